from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adq_train.data.base import BatchPlan
from adq_train.deploy.all_forms import UNSEEN, FormRow, classes_of, milliseconds, text
from adq_train.deploy.formats import FORMATS
from adq_train.errors import UserError


class Answers(nn.Module):
    """Gives an image, which is its class, another one where it is told to."""

    def __init__(self, wrong=(), fails=False, seconds=None):
        super().__init__()
        self.wrong, self.fails = wrong, fails
        if seconds is not None:
            self.seconds = seconds
        self.threads = []

    def forward(self, images):
        self.threads.append(torch.get_num_threads())
        if self.fails:
            raise UserError("it broke")
        classes = [(x + (x in self.wrong)) % 10 for x in images.int().tolist()]
        return torch.eye(10)[classes]


def data(classes):
    batches = torch.tensor(classes).float().split(3)
    epoch = [(x, x.long()) for x in batches]
    return SimpleNamespace(test=SimpleNamespace(epoch=lambda _: iter(epoch)))


def test_all_networks_see_all_images():
    networks = {"run": Answers(), "a": Answers({2, 5}), "b": Answers(fails=True)}
    found, problems = classes_of(networks, data([0, 1, 2, 3, 4, 5, 6]))
    assert found["targets"].tolist() == found["run"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found["a"].tolist() == [0, 1, 3, 3, 4, 6, 6]
    assert "b" not in found
    assert problems == {"b": "it broke"}


def test_a_slow_form_looks_at_some_images_of_each_batch():
    networks = {"run": Answers(), "slow": Answers({2})}
    found, _ = classes_of(networks, data([0, 1, 2, 3, 4, 5, 6]), {"slow": 2})
    assert found["slow"].tolist() == [0, UNSEEN, 3, 3, UNSEEN, 5, 6]
    rows = [
        FormRow("run", "r", 50.0, 0, 7, None, 1.5),
        FormRow("slow", "s", 50.0, 1, 5, 10, 1.5),
    ]
    assert "1 of 5" in text(rows)
    assert text(rows).splitlines()[-1].startswith("7 test images")


@pytest.mark.parametrize(("total", "k"), [(1, 1), (1000, 1), (1001, 2), (10_000, 10)])
def test_how_many_images_a_slow_runtime_verifies(total, k):
    test = BatchPlan(total, 500)
    assert FORMATS["qonnx"].every(test) == k
    assert FORMATS["qdq"].every(test) == 1


def test_a_run_that_fails_is_an_error():
    with pytest.raises(UserError, match="it broke"):
        classes_of({"run": Answers(fails=True), "a": Answers()}, data([1]))


def test_one_thread_and_the_time_that_a_process_tells(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        own, apart = Answers(), Answers(seconds=0.25)
        times = milliseconds({"own": own, "apart": apart}, torch.zeros(1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert times["apart"] == 250
    assert 0 < times["own"] < 250
    assert set(own.threads) == {1}
    # A slow one leaves after ten seconds, by what it tells.
    assert (len(own.threads), len(apart.threads)) == (31, 31)
    slow = Answers(seconds=4.0)
    milliseconds({"own": own, "slow": slow}, torch.zeros(1))
    assert len(slow.threads) == 1 + 3


def test_the_table_of_what_was_not_evaluated():
    rows = [
        FormRow("run", "r", 50.0, 0, 1_000, None, 1.5),
        FormRow("onnx", "r/x.onnx", 49.9, 3, 1_000, 12_345, 0.25),
        FormRow("qonnx", "r/x.qonnx.onnx", bytes=9, missing="pip install it"),
    ]
    lines = text(rows).splitlines()
    assert lines[2].split() == ["onnx", "49.90", "%", "3", "12,345", "0.25"]
    assert lines[4] == "qonnx: pip install it"
    assert lines[5].startswith("1,000 test images")
    assert rows[2].to_dict() == {
        "form": "qonnx",
        "path": "r/x.qonnx.onnx",
        "bytes": 9,
        "missing": "pip install it",
    }
