import json
import logging

import pytest

from adq_train.artifacts import LayerSensitivity
from adq_train.sensitivity.partial import PartialTable

ROWS = (
    LayerSensitivity("a", 10, 100, {2: 1 / 3, 4: -1e-9}),
    LayerSensitivity("b", 20, 200, {2: 0.5, 4: 0.25}, {2: 0.1, 4: 0.0}),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sensitivity.partial.json"


def test_rows_come_back_as_they_were(path):
    table = PartialTable(path, "key", "m", (2, 4))
    assert table.table.layers == ()
    assert not path.exists()
    for count, row in enumerate(ROWS, 1):
        table.append(row)
        again = PartialTable(path, "key", "m", (2, 4)).table
        assert again == table.table
        assert again.layers == ROWS[:count]
    assert [x.name for x in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", '{"key": "key", "layers": [{"na', "[]", "\udcff"])
def test_a_damaged_file_is_told_and_not_used(path, text, caplog):
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert PartialTable(path, "key", "m", (2, 4)).table.layers == ()
    assert "cannot be read" in caplog.text


def test_edited_rows_are_told_and_not_used(path, caplog):
    PartialTable(path, "key", "m", (2, 4)).append(ROWS[1])
    path.write_text(path.read_text().replace("0.25", "0.75"))
    assert PartialTable(path, "key", "m", (2, 4)).table.layers == ()
    assert "layers changed after it was written" in caplog.text


def test_rows_of_another_model_are_told_and_not_used(path, caplog):
    PartialTable(path, "key", "m", (2, 4)).append(ROWS[0])
    with caplog.at_level(logging.WARNING, logger="adq_train"):
        other = PartialTable(path, "another", "m", (2, 4))
    assert other.table.layers == ()
    assert "belongs to another model" in caplog.text
    other.append(ROWS[1])
    assert json.loads(path.read_text())["stamp"]["depends_on"] == "another"
    assert PartialTable(path, "another", "m", (2, 4)).table.layers == ROWS[1:]
