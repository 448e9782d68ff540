import pytest

from adq_train.allocation.patterns import by_layer, listed, match, pinned_bits
from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError

LAYERS = tuple(LayerInfo(name, 10, 10, 10) for name in ("stem", "a.conv1", "a.conv2", "head"))


def test_the_ends_are_pinned_unless_told_otherwise():
    assert pinned_bits(LAYERS, 8, {}) == {"stem": 8, "head": 8}
    assert pinned_bits(LAYERS, None, {}) == {}


def test_layers_are_pinned_by_name_and_pattern_over_the_ends():
    assert pinned_bits(LAYERS, 8, {"a.*": 2, "head": 4}) == {
        "stem": 8, "a.conv1": 2, "a.conv2": 2, "head": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a.conv3": 2}, r"no layer is called 'a.conv3' \(did you mean 'a.conv2' or 'a.conv1'\?\)"),
        ({"zzz*": 2}, r"no layer is called 'zzz\*'; the layers are stem, a.conv1, a.conv2, head"),
        ({"a.*": 2, "*.conv1": 3}, r"'a.\*' and '\*.conv1' both match a.conv1; keep one"),
    ],
)
def test_a_pin_that_matches_nothing_or_twice_is_an_error(given, message):
    with pytest.raises(UserError, match=message):
        pinned_bits(LAYERS, 8, given)


def test_a_layer_without_a_pattern_is_left_out():
    assert match("bits", ["a.*"], ["stem", "a.conv1"]) == {"a.conv1": "a.*"}
    assert by_layer("bits", {"a.*": (2, 3)}, LAYERS) == {"a.conv1": (2, 3), "a.conv2": (2, 3)}


def test_a_long_list_is_cut():
    assert listed("abc") == "a, b, c"
    assert listed([str(n) for n in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
