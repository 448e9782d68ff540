"""Image folders: a folder for each class, below ``train/`` and ``val/`` or by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adq_train.data.image_files import ImageFiles, Listed
from adq_train.data.listing import list_images
from adq_train.data.pictures import shown
from adq_train.errors import UserError

TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Folders(ImageFiles):
    """ImageNet or any other image folder.

    Attributes:
        root: Folder with ``train/`` and ``val/``, which is the test part. With ``test_images`` it
            may also be called ``valid``, ``validation`` or ``test``, or there is ``train/`` alone
            or the classes themselves, of which so many are set aside.
    """

    root: str

    def listed(self) -> Listed:
        """Lists the folders.

        Raises:
            UserError: A folder is missing, or the two parts have different classes.
        """
        root, strict = Path(self.root), self.test_images is None
        inside = next((root / name for name in TRAIN if strict or (root / name).is_dir()), None)
        other = next((root / name for name in TEST if strict or (root / name).is_dir()), None)
        if inside is None and other is not None:
            raise UserError(f"data.root: {shown(root)} has {other.name}/ and no train/ beside it")
        train = list_images(inside or root)
        if inside is None and len(train.classes) < 2:
            raise UserError(
                f"data.root: {shown(root)} has no train/ and one folder, "
                f"{shown(train.classes[0])}; give the folder that holds train/ and val/, or the "
                "folders of the classes"
            )
        if inside is None or other is None:
            return Listed(root, train.classes, train.samples)
        test = list_images(other)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise UserError(
                f"data.root: {inside.name}/ and {other.name}/ have different classes (say, "
                f"{shown(odd[0])})"
            )
        return Listed(root, train.classes, train.samples, test=test.samples)
