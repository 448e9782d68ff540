from dataclasses import dataclass
from typing import Annotated

import pytest

from adq_train.storage.decoding import Within, decode, strict_json


@dataclass(frozen=True)
class Inner:
    name: str
    share: Annotated[float, Within(0, 1)] = 0.5


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Within(1)]
    flag: bool
    by_bits: dict[int, float]
    inner: tuple[Inner, ...]
    maybe: Annotated[int, Within(0)] | None = None


GOOD = {"count": 1, "flag": True, "by_bits": {"2": 1}, "inner": [{"name": "x"}], "more": "ignored"}


def test_a_value_of_its_types():
    assert decode(Outer, GOOD) == Outer(1, True, {2: 1.0}, (Inner("x"),))
    assert decode(Outer, {**GOOD, "maybe": None}).maybe is None
    assert type(decode(Outer, GOOD).by_bits[2]) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"count": True}, "count is True, not a whole number"),
        ({"count": 1.0}, r"count is 1\.0, not a whole number"),
        ({"count": None}, "count is None, not a whole number"),
        ({"flag": 1}, "flag is 1, not true or false"),
        ({"by_bits": []}, r"by_bits is \[\], not an object"),
        ({"by_bits": {"two": 1}}, "by_bits has the key 'two', not a whole number"),
        ({"by_bits": {"02": 1}}, "by_bits has the key '02'"),
        ({"by_bits": {"²": 1}}, "by_bits has the key"),
        ({"by_bits": {"2": True}}, r"by_bits\.2 is True, not a number"),
        ({"by_bits": {"2": 10**400}}, r"by_bits\.2 is too large a number"),
        ({"inner": {}}, r"inner is \{\}, not a list"),
        ({"inner": [{"name": "x"}, 3]}, r"inner\[1\] is 3, not an object"),
        ({"inner": [{}]}, r"inner\[0\]\.name is missing"),
        ({"inner": [{"name": "y", "share": 1.5}]}, r"inner\[0\] \(y\)\.share is 1\.5; .* 0 … 1"),
        ({"inner": [{"name": None}]}, r"inner\[0\]\.name is None, not a text"),
        ({"maybe": -1}, "maybe is -1; it must be at least 0"),
        ({"flag": "x" * 1000}, "flag is 'x{56}…, not true or false"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        decode(Outer, {**GOOD, **change})


@pytest.mark.parametrize("name", ["count", "flag", "by_bits", "inner"])
def test_what_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} is missing$"):
        decode(Outer, {key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        ('[{"x": {"y": 1, "y": 1}}]', "'y' is there twice"),
        ("[NaN]", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        ("[1", "Expecting"),
    ],
)
def test_what_strict_json_does_not_have(text, message):
    with pytest.raises(ValueError, match=message):
        strict_json(text)


def test_a_repeated_name_is_found_in_one_pass_over_many():
    # Searched for by counting each name, this would take hours.
    names = "".join(f'"{i}": 0, ' for i in range(500_000))
    with pytest.raises(ValueError, match="'499999' is there twice"):
        strict_json("{" + names + '"499999": 0}')
    assert strict_json(b'{"a": [1, 2.5, {"b": null}]}') == {"a": [1, 2.5, {"b": None}]}
