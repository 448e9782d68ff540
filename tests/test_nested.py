"""Tensors in nested containers: found and changed, and the containers stay what they were."""

from collections import namedtuple

import torch

from adq_train.nested import entries, few, mapped

Pair = namedtuple("Pair", "first second")


def test_containers_keep_their_kind():
    x = torch.arange(3.0)
    value = {"a": [x, 5], "b": (x, "text"), "c": Pair(x, {"d": None})}
    found = mapped(lambda tensor: tensor + 1, value)
    assert (type(found["a"]), type(found["b"]), type(found["c"])) == (list, tuple, Pair)
    for changed in (found["a"][0], found["b"][0], found["c"].first):
        assert torch.equal(changed, x + 1)
    assert (found["a"][1], found["b"][1], found["c"].second) == (5, "text", {"d": None})
    assert torch.equal(x, torch.arange(3.0))


def test_entries_are_those_of_each_tensor():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(entries(Pair(x, [x]), 1).second[0], x[1])
    assert torch.equal(entries((x,), slice(1, 3))[0], x[1:])


def test_few_are_the_first_of_a_tensor_and_all_of_another_value():
    x = torch.arange(6)
    assert torch.equal(few(x, 2), x[:2])
    assert few([x], 2)[0] is x
