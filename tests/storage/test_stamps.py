import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.storage.stamps import content_problem, digest, origin_problem, stamped

CONTENT = {"a": 1, "b": [0.1, {"c": None}], "d": "é"}


def test_a_stamp_fits_what_it_was_made_for():
    content = json.loads(stamped(json.dumps(CONTENT), "ab"))
    assert {k: v for k, v in content.items() if k != "stamp"} == CONTENT
    assert content_problem(content) is None
    assert origin_problem(content, "ab") is None
    assert "another run" in origin_problem(content, "cd")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"a": 2}, "a"),
        ({"a": 1.0}, "a"),
        ({"b": [0.1, {"c": 0}], "d": "e"}, "b, d"),
        ({"e": 1}, "e"),
    ],
)
def test_what_was_changed_is_named(change, fields):
    content = {**json.loads(stamped(json.dumps(CONTENT), "ab")), **change}
    assert content_problem(content) == f"{fields} changed after it was written"


def test_a_field_that_is_gone_is_named():
    content = json.loads(stamped(json.dumps(CONTENT), "ab"))
    del content["d"]
    assert content_problem(content) == "d changed after it was written"


@pytest.mark.parametrize("stamp", [None, 1, "ab", [], {}, {"content": None}, {"content": "ab"}])
def test_a_stamp_that_is_none(stamp):
    assert content_problem({**CONTENT, "stamp": stamp}) == "stamp is not one"
    assert origin_problem({**CONTENT, "stamp": stamp}, "ab")


def test_without_a_stamp_only_the_content_passes():
    assert content_problem(CONTENT) is None
    assert origin_problem(CONTENT, "ab") == "it has no stamp, so it was not made by this run"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text().filter(lambda x: x != "stamp"), json_values))
def test_every_content_fits_its_own_stamp(content):
    assert content_problem(json.loads(stamped(json.dumps(content), "ab"))) is None


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    # printf '{"a": 1}' | sha256sum
    assert digest({"a": 1}) == "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"
