"""What will run the network: float arithmetic, or integers of eight bits, in part or throughout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from adq_train.errors import UserError
from adq_train.quantization.base import ActivationQuantizer, Makers
from adq_train.quantization.edges import calibrate_edges, connect, edges
from adq_train.quantization.graph import Graph
from adq_train.quantization.int8_grid import int8_maker
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.products import connect_products, operand_names, require_attentions


class Target:
    """Float arithmetic: layers are quantized, what passes between them stays float.

    Attributes:
        name: How users call it.
        inputs: Makes the quantizers of layers' inputs where nothing else is asked for.
    """

    name: ClassVar[str] = "float"
    inputs: ClassVar[type[ActivationQuantizer]] = N2uqActivationQuantizer

    def makers(self, make: Makers) -> Makers:
        """The makers of quantizers of weights and of inputs, as this target wants them.

        Raises:
            ValueError: It cannot use them; says which it can.
        """
        return make

    def num_edges(self, network: nn.Module) -> int:
        """How many quantizers :meth:`connect` would add to a network.

        Args:
            network: Float or with quantized layers.

        Raises:
            UserError: It could not take the network; names the place in it.
        """
        return 0

    def connect(
        self,
        network: nn.Module,
        quantizers: Iterable[nn.Module] | None = None,
        layers: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """Adds to a network with quantized layers, in place, what else is quantized.

        Args:
            network: On any device.
            quantizers: As many as :meth:`num_edges`; None: new ones, not calibrated.
            layers: Classes that stand for quantized layers.

        Raises:
            UserError: As :meth:`num_edges`.
        """

    def calibrate(self, network: nn.Module, batches: Sequence[Tensor], seed: int) -> None:
        """Initialises what :meth:`connect` has added, from batches (N, …).

        Raises:
            UserError: A value is NaN or infinite, or none comes to a quantizer.
        """


class AttentionTarget(Target):
    """Float arithmetic, and eight bits for what attention multiplies.

    Queries, keys, attention weights and values have a quantizer of eight bits each, with a learned
    step for all heads.
    """

    name = "attention"

    def num_edges(self, network: nn.Module) -> int:
        """Four for each attention.

        Raises:
            UserError: There is none.
        """
        require_attentions(network)
        return len(operand_names(network))

    def connect(
        self,
        network: nn.Module,
        quantizers: Iterable[nn.Module] | None = None,
        layers: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """Puts the quantizers between the products.

        Raises:
            UserError: There is no attention.
        """
        connect_products(network, quantizers)

    def calibrate(self, network: nn.Module, batches: Sequence[Tensor], seed: int) -> None:
        """Initialises the steps.

        Raises:
            UserError: A value is NaN or infinite, or an attention multiplies in another way.
        """
        calibrate_edges(network, batches, seed, operand_names(network))


class Int8Target(Target):
    """The network that integer runtimes compute: what is trained is what they run.

    Weight levels lie on an int8 grid per layer (times a scale per channel where the method has
    one), inputs of layers have evenly spaced levels, and what else passes between layers has eight
    bits with learned steps.
    """

    name = "int8"
    inputs: ClassVar[type[ActivationQuantizer]] = LsqActivationQuantizer

    def makers(self, make: Makers) -> Makers:
        """Weights on int8 grids; inputs as they are, if their levels are evenly spaced.

        Raises:
            ValueError: They are not; names the quantizer and those that will do.
        """
        quantizer = make[1](8)
        if not quantizer.is_uniform:
            raise ValueError(
                "target=int8 needs evenly spaced levels and thresholds, and "
                f"{type(quantizer).__name__} has others; choose lsq, pact or dorefa, or "
                "target=float"
            )
        return int8_maker(make[0]), make[1]

    def num_edges(self, network: nn.Module) -> int:
        """How many values besides the inputs of layers are quantized.

        Raises:
            UserError: The graph cannot be followed; the place is named.
        """
        return len(list(edges(Graph(network))))

    def connect(
        self,
        network: nn.Module,
        quantizers: Iterable[nn.Module] | None = None,
        layers: tuple[type[nn.Module], ...] = (),
    ) -> None:
        """Puts quantizers of eight bits on the network's edges.

        Raises:
            UserError: The graph cannot be followed; the place is named.
        """
        connect(network, quantizers, layers)

    def calibrate(self, network: nn.Module, batches: Sequence[Tensor], seed: int) -> None:
        """Initialises the steps.

        Raises:
            UserError: A value is NaN or infinite.
        """
        calibrate_edges(network, batches, seed)


FLOAT = Target()
TARGETS = {kind.name: kind for kind in (Target, AttentionTarget, Int8Target)}


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        UserError: There is none.
    """
    if name not in TARGETS:
        raise UserError(f"target: must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]()
