import numpy as np
import pytest
import torch

from adq_train.data.arrays import Arrays, images_of
from adq_train.data.base import Loading
from adq_train.errors import UserError

RANDOM = np.random.default_rng(0)


def pictures(count, *shape, dtype=np.uint8):
    return RANDOM.integers(0, 256, (count, *(shape or (6, 5)))).astype(dtype)


def load(folder, changes=None, **arrays):
    np.savez_compressed(folder / "data.npz", **arrays)
    held_out = {"validation_images": "0.1x", "calibration_images": 2}
    settings = {**held_out, "root": str(folder / "data.npz"), **(changes or {})}
    return Arrays(**settings).load(Loading(8, 8, 0, torch.device("cpu")))


def pixels(data, part):
    """The pixels of a part as they were, (N, C, H, W), and targets."""
    images, targets = zip(*getattr(data, part).epoch(0), strict=True)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (data.pixels.mean, data.pixels.std))
    return (torch.cat(images) * std + mean).round().to(torch.uint8), torch.cat(targets)


def test_parts_of_their_own_are_taken_as_they_are(tmp_path):
    sizes = {"train": 20, "val": 4, "test": 5}
    given = {part: pictures(size, 6, 5, 3) for part, size in sizes.items()}
    labels = {part: RANDOM.integers(3, 6, (len(x), 1)) for part, x in given.items()}
    labels["train"][:3, 0] = 3, 4, 5
    data = load(
        tmp_path,
        **{f"{part}_images": x for part, x in given.items()},
        **{f"{part}_labels": x for part, x in labels.items()},
        about=np.zeros(3),
    )
    for part, name in (("val", "validation"), ("test", "test")):
        images, targets = pixels(data, name)
        assert torch.equal(images, torch.from_numpy(given[part]).permute(0, 3, 1, 2))
        assert targets.tolist() == (labels[part][:, 0] - 3).tolist()
    assert len(pixels(data, "train")[0]) == 18
    assert data.class_names == ("3", "4", "5")
    assert sum(data.class_counts) == 18


def test_one_part_is_divided_by_shares(tmp_path):
    names = np.array(["cat", "dog", "eel"])[np.arange(50) % 3]
    floats = pictures(50) / 255
    data = load(tmp_path, {"test_images": "0.2x", "calibration_images": "0.2x"}, x=floats, y=names)
    sizes = [len(pixels(data, x)[0]) for x in ("test", "validation", "calibration", "train")]
    assert sizes == [10, 4, 8, 28]
    assert data.class_names == ("cat", "dog", "eel")
    every = torch.cat([pixels(data, x)[0] for x in ("test", "validation", "calibration", "train")])
    expected = torch.from_numpy(np.rint(floats * 255).astype(np.uint8))
    assert sorted(every.flatten(1).sum(1).tolist()) == sorted(expected.flatten(1).sum(1).tolist())


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (1, 6, 5), (6, 5, 3), (3, 6, 5)])
def test_channels_lie_where_they_lie(shape):
    array = pictures(4, *shape)
    channels = 3 if 3 in shape else 1
    last = array if shape[-1] in (1, 3) else array.reshape(4, channels, 6, 5).transpose(0, 2, 3, 1)
    expected = torch.from_numpy(np.ascontiguousarray(last)).permute(0, 3, 1, 2)
    assert torch.equal(images_of(array), expected.reshape(4, channels, 6, 5))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pictures(9)}, "holds nothing; expected images and labels"),
        ({"images": pictures(9)}, "has one of images and labels"),
        ({"images": pictures(9), "labels": np.zeros(8, int)}, "do not belong together"),
        ({"images": pictures(9, 6, 5, 7), "labels": np.zeros(9, int)}, r"shape \(9, 6, 5, 7\)"),
        ({"images": pictures(9) / 128.0, "labels": np.zeros(9, int)}, "from 0|floats in 0"),
        ({"images": np.full((9, 4, 4), np.nan), "labels": np.zeros(9, int)}, "from nan to nan"),
        ({"images": pictures(9), "labels": np.zeros(9)}, "labels of float64"),
        ({"images": pictures(9, dtype=int) - 1, "labels": np.zeros(9, int)}, "from -1|0 … 255"),
        (
            {"x_train": pictures(9), "y_train": np.arange(9), "x_test": pictures(1),
             "y_test": np.array([9])},
            "no training image has the label 9",
        ),
        ({"images": np.array([{}] * 9), "labels": np.zeros(9, int)}, "allow_pickle"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_set_of_images_is_told(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **arrays)


def test_what_is_no_file_of_arrays_is_told(tmp_path, monkeypatch):
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("text.npz", "missing.npz"):
        settings = {"root": str(tmp_path / name), "validation_images": 1, "calibration_images": 1}
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            Arrays(**settings).load(Loading(8, 8, 0, torch.device("cpu")))
    monkeypatch.setattr("adq_train.data.arrays.MAX_BYTES", 100)
    with pytest.raises(UserError, match="unpacks to"):
        load(tmp_path, images=pictures(9), labels=np.zeros(9, int))
