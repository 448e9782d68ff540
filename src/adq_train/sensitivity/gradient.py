"""Divergence to second order: gradients at the layers' outputs times what quantization changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import derived_seed
from adq_train.errors import UserError, first_line
from adq_train.nested import mapped
from adq_train.progress import Progress
from adq_train.quantization.base import check_choice
from adq_train.quantization.prepare import collect_inputs
from adq_train.quantization.watch import Call, intercepted
from adq_train.sensitivity.base import Conditions, Metric, plain_copy
from adq_train.sensitivity.forms import TENSORS, Forms, Key, quantized_forms, row
from adq_train.sensitivity.outputs import num_columns, rounding, summary

REMEDY = "take sensitivity=perturbation, which needs no gradients"

Gradients = list[tuple[str, list[Tensor]]]  # of each call of a layer, one for each vector


def fisher_vectors(logits: Tensor, draws: int, seed: int) -> Tensor:
    """Vectors v_1 … v_K of each image, with Σ_k v_k v_kᵀ the Fisher information F of its logits.

    F = diag(p) - p pᵀ = E_{y ~ p} [(e_y - p)(e_y - p)ᵀ] is the Hessian of the Kullback–Leibler
    divergence from softmax p. With A = diag(√p) - p √pᵀ it is A Aᵀ, so v_k = A s_k / √K with
    random signs s_k has F as its mean; that spreads far less than drawing y, as a confident
    network nearly always draws the same. The columns of A, a vector for each class, give F exactly.

    Args:
        logits: (N, C), or (N, C, …) for maps, whose places are independent of each other.
        draws: K; 0 takes the columns of A, for logits (N, C) alone.
        seed: Of the signs, which are drawn on the CPU.

    Returns:
        (K, N, C, …), or (C, N, C).
    """
    p = logits.double().softmax(1)
    if draws:
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(2, (draws, *logits.shape), generator=generator) - 1
        factors = signs.to(p) / draws**0.5
    else:
        factors = torch.eye(logits.shape[1]).to(p)[:, None]
    rooted = p.sqrt() * factors
    vectors: Tensor = rooted - p * rooted.sum(2, keepdim=True)
    return vectors.to(logits)


def output_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Any, vectors: Tensor
) -> Gradients:
    """∂ (v_k · logits) / ∂z at the output z of every call of some layers, for K vectors.

    Args:
        model: In evaluation mode, its parameters frozen.
        layers: By name.
        images: (N, C, H, W).
        vectors: (K, N, num_classes, …).

    Returns:
        The layers' names in the order of the calls, each with K gradients of z's shape.

    Raises:
        UserError: There is no gradient.
    """
    calls: list[tuple[str, Tensor]] = []

    def record(name: str, forward: Call, *inputs: Any, **named: Any) -> Tensor:
        z: Tensor = forward(*inputs, **named)
        calls.append((name, z if z.requires_grad else z.requires_grad_()))
        return z.clone()  # which the network may change in place

    try:
        with torch.enable_grad():
            with intercepted(layers, record):
                logits = model(images)
            outputs = [z for _, z in calls]
            each = [
                torch.autograd.grad(logits, outputs, v, retain_graph=True, allow_unused=True)
                for v in vectors
            ]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            "sensitivity: gradient cannot differentiate the network "
            f"({first_line(error)}); {REMEDY}"
        ) from error
    gradients = [(name, list(x)) for (name, _), *x in zip(calls, *each, strict=True)]
    for name, found in gradients:
        if any(x is None for x in found):
            raise UserError(
                f"sensitivity: gradient cannot differentiate the network (none reaches layer "
                f"{name} from its outputs); {REMEDY}"
            )
    return gradients


def require_images_apart(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Any, logits: Tensor
) -> None:
    """Refuses layers whose outputs' first axis does not tell the images apart.

    Of two equal images only the first is followed back; what arrives must lie in the first half.

    Args:
        model: In evaluation mode, its parameters frozen.
        layers: By name.
        images: (N, C, H, W), of which the first is used.
        logits: Theirs, (N, num_classes, …).

    Raises:
        UserError: Names the layer.
    """
    pair = mapped(lambda x: x[:1].repeat_interleave(2, 0), images)
    vector = torch.stack([torch.ones_like(logits[0]), torch.zeros_like(logits[0])])
    for name, (gradient,) in output_gradients(model, layers, pair, vector[None]):
        if len(gradient) % 2 or gradient.reshape(2, -1)[1].any():
            raise UserError(
                "sensitivity: gradient needs layers that work on each image apart, images first, "
                f"but the output {tuple(gradient.shape)} of layer {name} for 2 images is not so; "
                f"{REMEDY}"
            )


def slopes(
    model: nn.Module, forms: Mapping[str, Forms], images: Any, gradients: Gradients, count: int
) -> dict[str, dict[Key, Tensor]]:
    """How far each v_k · logits moves along the change Δz that each quantized form makes.

    Everything before a layer is float. A layer that is called more than once, and those that share
    its weight, are quantized in all their calls, so that their products ⟨g, Δz⟩ are summed.

    Args:
        model: In evaluation mode.
        forms: By layer.
        images: (N, C, H, W).
        gradients: Of all calls of the layers in ``forms``, as :func:`output_gradients` gives them.
        count: N, the number of images.

    Returns:
        Σ ⟨g_k, Δz⟩ by layer and form, (K, N).
    """
    found: dict[str, dict[Key, Tensor]] = {owner: {} for owner in forms}
    remaining = iter(gradients)

    def compare(name: str, forward: Call, *inputs: Any, **named: Any) -> Tensor:
        z: Tensor = forward(*inputs, **named)
        _, each = next(remaining)
        g = [x.reshape(count, -1).float() for x in each]
        for owner, key, form in of_layer[name]:
            change = (form(*inputs, **named) - z).reshape(count, -1).float()
            product = torch.stack([torch.linalg.vecdot(x, change) for x in g])
            found[owner][key] = found[owner].get(key, 0) + product
        return z

    of_layer = by_called_layer(forms)
    with intercepted({name: model.get_submodule(name) for name in of_layer}, compare):
        model(images)
    return found


def by_called_layer(forms: Mapping[str, Forms]) -> dict[str, list[tuple[str, Key, nn.Module]]]:
    """The forms that stand for each layer, with the layer for which they are measured."""
    found: dict[str, list[tuple[str, Key, nn.Module]]] = {}
    for owner, variants in forms.items():
        for key, layers in variants.items():
            for name, form in layers.items():
                found.setdefault(name, []).append((owner, key, form))
    return found


@dataclass(frozen=True)
class Gradient(Metric):
    """Ω[l, b] = ½ · mean over images of δᵀ F δ, the divergence of the outputs to second order.

    δ = J_l Δz_l is the change of the logits to first order, with Δz_l the change of the output of
    layer l at b bits and everything before it float, and F the Fisher information of the softmax
    (Martens 2020, arXiv 1412.1193). With F = E[v vᵀ], δᵀ F δ = E[⟨J_lᵀ v, Δz_l⟩²], and one
    backward pass gives J_lᵀ v for all layers. A batch takes two forward passes, ``draws`` backward
    passes, and one forward pass of each layer alone for every one of its forms, whatever the depth.

    It is :class:`~.perturbation.Perturbation` with ``kl`` where quantization changes little, in
    nats. Batch norm uses its fixed statistics, so a scale or an offset that training would take
    away counts. All layers are measured at once, so an interrupted measurement starts anew. In
    memory are the outputs of all layers for one batch, 2 + ``draws`` times.

    Attributes:
        tensors: What of the layer is quantized: ``weights``, ``activations`` (its input), ``both``
            at once, or ``separate``: each alone, for an allocator that chooses their bits apart.
        draws: Random vectors v for each image, at least 0; 0 takes one for each class, which is
            exact, for few classes.
    """

    tensors: str = "both"
    draws: int = 4

    def __post_init__(self) -> None:
        check_choice("tensors", self.tensors, TENSORS)
        if self.draws < 0:
            raise ValueError(f"draws must be at least 0, got {self.draws}")

    @property
    def name(self) -> str:
        """The metric's name in ``sensitivity.json``."""
        return f"gradient-{self.tensors}"

    @torch.no_grad()
    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures all layers at once; see :class:`~.base.SensitivityMetric`."""
        model = plain_copy(model).requires_grad_(False)
        batches = [images for images, _ in conditions.batches]
        inputs = collect_inputs(model, [x.name for x in layers], batches, conditions.seed)
        outputs = [model(x) for x in batches]
        self._check_outputs(outputs[0])
        forms = {
            x.name: quantized_forms(model, x.name, self.tensors, inputs, conditions) for x in layers
        }
        called = {name: model.get_submodule(name) for name in by_called_layer(forms)}
        each: dict[str, dict[Key, list[Tensor]]] = {
            name: {key: [] for key in variants} for name, variants in forms.items()
        }
        with Progress("gradients", total=len(batches)) as progress:
            for index, images in enumerate(batches):
                count = len(outputs[index])
                seed = derived_seed(conditions.seed, "gradient", index)
                vectors = fisher_vectors(outputs[index], self.draws, seed)
                if index == 0:
                    require_images_apart(model, called, images, outputs[0])
                gradients = output_gradients(model, called, images, vectors)
                for name, found in slopes(model, forms, images, gradients, count).items():
                    for key, slope in found.items():
                        each[name][key].append(slope.double().square().sum(0) / 2)
                progress.advance(f"{count} images")
        smallest = rounding(outputs) ** 2
        for info in layers:
            values = {k: summary(torch.cat(x), smallest) for k, x in each[info.name].items()}
            yield row(info, self.tensors, values)

    def _check_outputs(self, outputs: Tensor) -> None:
        """Refuses outputs that are no logits, or of which not every class can be taken."""
        if num_columns(outputs) == 1:
            raise UserError(
                "sensitivity: gradient needs two or more outputs for an image, but the model has "
                "one, and softmax over one class is always 1; set sensitivity=perturbation "
                "sensitivity.criterion=mse (squared distance of the outputs)"
            )
        if not self.draws and outputs.ndim > 2:
            raise UserError(
                f"sensitivity.draws: 0 needs outputs (N, classes), got {tuple(outputs.shape)}, "
                "a map of classes; set draws=1 or more"
            )
