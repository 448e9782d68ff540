"""Several processes that train one model; a single process is the case in which nothing happens.

The gradients of each step are averaged by one explicit all-reduce, not by DistributedDataParallel:
its buckets change after the first step, and with them the order of summation, so that a resumed
run would not repeat an uninterrupted one. Here every step is summed in the same order, whatever
the accumulation or the compiler did before it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from adq_train.errors import UserError

T = TypeVar("T")

# A process may wait this long for another one, which may wait for a float model that is being
# trained by another run.
PATIENCE = timedelta(hours=24)
CPU = torch.device("cpu")


class RankLostError(UserError):
    """Another process of the run has stopped, and has said why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; without arguments, the only one.

    Every method that exchanges something must be called by all processes in the same order.

    Attributes:
        rank: From 0; rank 0 alone writes and speaks.
        world_size: Number of processes.
        local_rank: From 0 on each machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def has_own_gpu(self) -> bool:
        """Whether there is a GPU for every process of this machine, up to this one."""
        return self.local_rank < torch.cuda.device_count()

    @property
    def own(self) -> slice:
        """Which items of a sequence are this process's: every ``world_size``-th."""
        return slice(self.rank, None, self.world_size)

    def broadcast(self, make: Callable[[], T]) -> T:
        """What ``make()`` gives in rank 0, everywhere; tensors (on the CPU) and plain types.

        The processes have started one another and trust each other, so that values may be pickled.
        """
        if self.world_size == 1:
            return make()
        values: list[Any] = [make() if self.is_main else None]
        with _together():
            distributed.broadcast_object_list(values, 0, device=CPU)
        value: T = values[0]
        return value

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, by rank; tensors (on the CPU) and plain types."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with _together():
                distributed.all_gather_object(values, value)
        return values

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.world_size == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        with _together():
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return [int(x) for x in values]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world_size == 1:
            return values
        total = values.clone()
        with _together():
            distributed.all_reduce(total)
        return total

    @torch.no_grad()
    def all_reduce_mean(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Replaces each tensor by its weighted mean over all processes, in one exchange.

        The result has the same bits everywhere.

        Args:
            tensors: On one device; of the same shapes everywhere. Changed in place.
            weight: Of this process, at least 0; its values do not count with 0.
        """
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([*(x.flatten() for x in tensors), tensors[0].new_ones(1)])
        # An infinite value of a process without images would turn into NaN.
        flat = flat * weight if weight else torch.zeros_like(flat)
        with _together():
            distributed.all_reduce(flat)
        flat /= flat[-1].clone()
        parts = torch.split(flat[:-1], [x.numel() for x in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    @torch.no_grad()
    def broadcast_model(self, model: nn.Module) -> None:
        """Gives a model rank 0's parameters and buffers."""
        if self.world_size == 1:
            return
        for tensor in model.state_dict().values():
            value = tensor.contiguous()
            with _together():
                distributed.broadcast(value, 0)
            tensor.copy_(value)

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Lets one process of each machine go first, for what is downloaded once."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def barrier(self) -> None:
        """Waits for all processes."""
        self.all_reduce_max(0)


ALONE = Ranks()


def from_environment() -> Ranks:
    """The ranks as torchrun tells them; a process that it did not start is alone."""
    return Ranks(*(int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0),
    )))  # fmt: skip


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the other processes that torchrun has started, for the time of a with block.

    Raises:
        UserError: They cannot be reached.
    """
    ranks = from_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run cannot reach one another: {error}") from error
    try:
        yield ranks
    except BaseException:
        raise  # the others may be lost: to say goodbye to them would wait for them
    else:
        distributed.destroy_process_group()


def is_first_to_report() -> bool:
    """Whether no other process has reported an error yet; for one message instead of many."""
    if not distributed.is_initialized():
        return from_environment().is_main
    try:
        # Kept by torchrun itself, so that it can be asked when processes are gone.
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add("adq_train/errors", 1) == 1)
    except RuntimeError:
        return True


def launch_prefix(ranks: Ranks) -> list[str]:
    """How a command of this run begins: by itself, or under torchrun."""
    if ranks.world_size == 1:
        return ["adq-train"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    machines = ranks.world_size // here
    several = [f"--nnodes={machines}", "…"] if machines > 1 else []
    return ["torchrun", *several, f"--nproc-per-node={here}", "-m", "adq_train"]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around an exchange: what fails there is the loss of another process."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"another process of this run has stopped ({error})") from error
