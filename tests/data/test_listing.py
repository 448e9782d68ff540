import os

import pytest
from torchvision.datasets import ImageFolder

from adq_train.data.listing import images_below, list_images
from adq_train.errors import UserError


@pytest.fixture
def root(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "b/deep/er/1.tiff", "b/a.webp", "a/1.bmp", "a/B.ppm"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "train"


def test_classes_and_images_come_in_the_order_of_torchvision(root):
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root.parent / "elsewhere").mkdir()
    (root.parent / "elsewhere" / "0.png").touch()
    expected, found = ImageFolder(str(root), allow_empty=True), list_images(root)
    assert list(found.classes) == expected.classes == ["a", "b", "linked"]
    assert list(found.samples) == expected.samples


def test_what_is_hidden_or_no_image_is_left_out_and_said_in_one_line(root, caplog):
    before = list_images(root)
    assert not caplog.text
    for name in (".DS_Store", ".ipynb_checkpoints/1.png", "__MACOSX/a/1.png", "b/._2.png"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).touch()
    (root / "b" / ".cache").mkdir()
    (root / "b" / ".cache" / "1.png").touch()
    (root / "b" / "Thumbs.db").touch()
    (root / "stray.png").touch()
    assert list_images(root) == before
    hidden, others = caplog.text.splitlines()
    assert "left out 5 entries that are hidden" in hidden
    assert f"{root}/.DS_Store, " in hidden
    assert "left out 2 entries that are not images of a class" in others
    assert f"{root}/b/Thumbs.db, {root}/stray.png" in others
    assert images_below(root / "b") == [path for path, target in before.samples if target]


def test_links_in_a_circle_are_left_out(root, caplog):
    before = list_images(root)
    (root / "b" / "deep" / "up").symlink_to(root / "b")
    (root / "a" / "all").symlink_to(root)
    (root / "a" / "parent").symlink_to("/")
    assert list_images(root) == before
    assert "left out 3 entries that are links to a folder around them" in caplog.text


def test_names_beyond_utf_8_and_links_that_lead_nowhere_are_listed(root):
    odd, dead = os.fsdecode(b"caf\xe9.png"), root / "a" / "dead.png"
    (root / "a" / odd).touch()
    dead.symlink_to("/nowhere.png")
    names = [path for path, _ in list_images(root).samples]
    assert f"{root}/a/{odd}" in names
    assert str(dead) in names


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"folder {root}/b/deep cannot be read .Permission denied"):
        list_images(root)


def test_a_class_of_hidden_files_alone_has_no_image(root):
    (root / "c").mkdir()
    (root / "c" / ".1.png").touch()
    with pytest.raises(UserError, match=f"{root} is not a folder of classes.*class c has no image"):
        list_images(root)
