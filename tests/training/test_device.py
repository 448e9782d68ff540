"""What a process chooses before it computes, and that it is this process's device that is used."""

from unittest import mock

import pytest
import torch

from adq_train.training.device import use
from adq_train.training.health import PendingFlags
from adq_train.training.trainer import seed_generators


@pytest.fixture(autouse=True)
def as_before():
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [x.allow_tf32 for x in flags]
    yield
    use(torch.device("cpu"))
    for x, value in zip(flags, before, strict=True):
        x.allow_tf32 = value


def test_float32_is_not_rounded_to_tf32_unless_asked_for():
    for precision, rounded in (("float32", False), ("tf32", True), ("bf16", False)):
        use(torch.device("cpu"), precision=precision)
        assert torch.backends.cudnn.allow_tf32 is rounded
        assert torch.backends.cuda.matmul.allow_tf32 is rounded


def test_deterministic_algorithms_are_chosen_and_left(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for chosen in (True, False):
        use(torch.device("cpu"), deterministic=chosen)
        assert torch.are_deterministic_algorithms_enabled() is chosen
        assert torch.backends.cudnn.deterministic is chosen


def test_the_device_of_a_run_becomes_the_current_one():
    with mock.patch.object(torch.cuda, "set_device") as chosen:
        for name in ("cuda:1", "cuda", "cpu"):
            use(torch.device(name))
    assert chosen.call_args_list == [mock.call(torch.device("cuda:1"))]


def test_seeds_and_events_go_to_the_device_that_computes():
    device = torch.device("cuda", 1)
    with (
        mock.patch.object(torch.cuda, "device") as entered,
        mock.patch.object(torch.cuda, "manual_seed") as seeded,
        mock.patch.object(torch.cuda, "current_stream") as stream,
    ):
        seed_generators(3, device)
        entered.assert_called_once_with(device)
        seeded.assert_called_once_with(3)
        finite = mock.Mock(is_cuda=True, device=device)
        flags = PendingFlags(2)
        flags.add(0, finite, torch.zeros(1), torch.zeros(1))
        stream.assert_called_once_with(device)
        assert flags.waiting[0].arrived is stream.return_value.record_event.return_value
