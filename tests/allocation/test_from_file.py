import json
from dataclasses import asdict
from pathlib import Path

import pytest

from adq_train.allocation.allocator import allocate
from adq_train.allocation.from_file import FileAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.errors import UserError

ROWS = [(9.0, 5.0, 0.0), (0.3, 0.2, 0.1)]


@pytest.fixture
def written(tmp_path):
    def write(**bits):
        """A file by hand, with nothing but the layers."""
        layers = [
            {"name": name, "weight_bits": pair[0], "activation_bits": pair[1]}
            for name, pair in bits.items()
        ]
        path = tmp_path / "allocation.json"
        path.write_text(json.dumps({"layers": layers}))
        return str(path)

    return write


def test_the_bits_of_another_run(make_problem, make_table, tmp_path):
    problem = make_problem(average_weight_bits=3)
    table = make_table(problem.mixed, ROWS)
    first = allocate(IlpAllocator(), problem, table)
    (tmp_path / "a.json").write_text(first.to_json())
    again = allocate(FileAllocator(str(tmp_path / "a.json")), problem, table)
    assert again.layers == first.layers
    assert again.objective == first.objective
    assert (again.allocator, again.optimal) == ("from_file", False)


def test_a_file_by_hand_with_any_bits(make_problem, make_table, written):
    problem = make_problem(average_weight_bits=8)
    path = written(head=(5, 2), body=(2, 8), stem=(8, 8))
    allocation = allocate(FileAllocator(path), problem, make_table(problem.mixed, ROWS))
    assert [(x.weight_bits, x.activation_bits) for x in allocation.layers] == [
        (8, 8), (2, 8), (5, 2)
    ]  # fmt: skip
    assert allocation.model_size_bytes == 27 + 25 + 32
    assert allocation.objective is None


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"body": (2, 2), "head": (2, 2)}, "is of another model: it lacks stem$"),
        (
            {"stem": (8, 8), "body": (2, 2), "tail": (2, 2)},
            "is of another model: it lacks head and has besides tail$",
        ),
        ({"stem": (4, 8), "body": (2, 2), "head": (2, 2)}, "gives stem 4 .* it is pinned to 8"),
        (
            {"stem": (8, 8), "body": (4, 2), "head": (2, 2)},
            r"exceed the budget \(budget\.average_weight_bits: 3\.32\d+ of 3\)",
        ),
    ],
)
def test_what_does_not_fit_shows_before_any_training(make_problem, written, bits, message):
    with pytest.raises(UserError, match=rf"(?s)allocator\.path: .*{message}"):
        FileAllocator(written(**bits)).check(make_problem(average_weight_bits=3))


@pytest.mark.parametrize(("pair", "what"), [((1, 2), "1 weight"), ((2, 9), "9 activation")])
def test_bits_out_of_range(written, pair, what):
    with pytest.raises(
        ValueError, match=rf"path: .*\(body\)\.{what[2:]}_bits is {what[0]}; it must be 2 … 8"
    ):
        FileAllocator(written(body=pair))


@pytest.mark.parametrize("bits", [2.5, "2", True, None])
def test_bits_that_are_no_whole_number(written, bits):
    with pytest.raises(
        ValueError, match=rf"not a bit allocation: .*\(body\)\.activation_bits is {bits!r}, not a"
    ):
        FileAllocator(written(body=(2, bits)))


def test_a_layer_twice(tmp_path):
    layer = {"name": "fc", "weight_bits": 2, "activation_bits": 2}
    (tmp_path / "a.json").write_text(json.dumps({"layers": [layer, layer]}))
    with pytest.raises(ValueError, match="more than one entry for fc"):
        FileAllocator(str(tmp_path / "a.json"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"path: .*cannot be read"):
        FileAllocator(str(tmp_path / "nowhere.json"))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"path: .*cannot be read"):
        FileAllocator(str(tmp_path / "b.json"))
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match=r"path: .*c\.json is not a bit allocation"):
        FileAllocator(str(tmp_path / "c.json"))


def test_stated_figures_that_the_bits_do_not_come_to_are_told(
    make_problem, make_table, written, caplog
):
    problem = make_problem(average_weight_bits=8)
    table = make_table(problem.mixed, ROWS)
    path = Path(written(head=(5, 2), body=(2, 8), stem=(8, 8)))
    true = asdict(allocate(FileAllocator(str(path)), problem, table))
    names = ("average_weight_bits", "average_activation_bits", "model_size_bytes", "bops")
    rounded = {name: round(true[name], 2) for name in names}
    content = json.loads(path.read_text())

    def told(**stated):
        caplog.clear()
        path.write_text(json.dumps({**content, **stated}))
        allocate(FileAllocator(str(path)), problem, table)
        return [x.getMessage() for x in caplog.records]

    assert told() == told(**rounded) == told(allocator="me", objective=0) == []
    (line,) = told(**rounded | {"model_size_bytes": 85, "average_weight_bits": None})
    assert "average_weight_bits None, but its bits come to 3.01" in line
    assert "model_size_bytes 85, but its bits come to 84" in line
    assert line.startswith(f"allocator.path: {path} states ")
