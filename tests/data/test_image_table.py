from pathlib import Path

import pytest
import torch
from PIL import Image

from adq_train.data.base import Loading
from adq_train.data.image_table import ImageTable, read_table
from adq_train.errors import UserError

SIZES = {"image_size": 16, "resize": 18, "num_workers": 0}


@pytest.fixture
def folder(tmp_path):
    """Grey pictures of odd sizes, as dark as their number."""
    for i in range(20):
        Image.new("L", (17 + 5 * i, 40 - i), 10 * i).save(tmp_path / f"{i}.png")
    return tmp_path


def written(folder, *lines):
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def load(path, **changes):
    held_out = {"validation_images": "0.2x", "calibration_images": "0.1x", "test_images": "0.25x"}
    table = ImageTable(root=str(path), **{**SIZES, **held_out, **changes})
    return table.load(Loading(4, 4, 0, torch.device("cpu")))


def numbers(batches):
    """Which pictures there are, by their darkness, with their targets."""
    found = {}
    for images, targets in batches.epoch(0):
        values = ((images[:, 0, 0, 0] * 0.229 + 0.485) * 255 / 10).round().int().tolist()
        found |= dict(zip(values, targets.tolist(), strict=True))
    return found


def test_lines_are_images_and_shares_are_held_out(folder):
    lines = [f"{i}.png,{'odd' if i % 2 else 'even'}" for i in range(20)]
    data = load(written(folder, "path,label", *lines))
    parts = {x: numbers(getattr(data, x)) for x in ("test", "validation", "calibration", "train")}
    assert [len(x) for x in parts.values()] == [5, 3, 2, 10]  # of 20; then of 15
    every = {number: target for x in parts.values() for number, target in x.items()}
    assert every == {i: i % 2 for i in range(20)}
    assert data.class_names == ("even", "odd")
    counts = torch.tensor(list(parts["train"].values())).bincount()
    assert data.class_counts == tuple(counts.tolist())


def test_a_column_says_which_part_a_line_is_of(folder):
    parts = ["val"] * 4 + ["test"] * 6 + ["train"] * 5 + [""] * 5
    lines = [f"c{i % 3},{part},{folder / f'{i}.png'}" for i, part in enumerate(parts)]
    data = load(written(folder, "\ufeffLabel, Split ,path", *lines), calibration_images=2)
    assert set(numbers(data.validation)) == set(range(4))
    assert numbers(data.test) == {i: i % 3 for i in range(4, 10)}
    assert len(numbers(data.train)) == 8


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0.png,a", "1.png,b"], "begins with '0.png,a'; its first line must name the columns"),
        (["path,label"], "lists no images"),
        (["path,label", "0.png"], "line 2 of .* is not a path, a label"),
        (["path,label", "0.png,a,train"], "line 2 of .* is not a path, a label"),
        (["path,label,split", "0.png,a,train", "1.png,b,tset"], "line 3 of .* one of train, val"),
        (["path,label", "0.png,a", "1.png,a"], "has 1 classes"),
        (["path,label,split", "0.png,a,", "1.png,b,", "2.png,c,test"], "has the label 'c'"),
        (["path,label", *(f"{i}.png,{i % 2}" for i in range(19, 21))], "leave none of"),
        (["path,label", *(f"{i}.png,{i % 2}" for i in range(25))], "cannot read the image .*20"),
    ],
    ids=lambda x: str(x)[-20:],
)  # fmt: skip
def test_what_is_no_table_of_images_is_told(folder, lines, message):
    with pytest.raises(UserError, match=message):
        load(written(folder, *lines))


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"nowhere\.csv cannot be read .*No such file"):
        read_table(Path("nowhere.csv"))
