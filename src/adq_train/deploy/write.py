"""``adq-export``: from a run's folder to one file, checked against the trained network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adq_train.deploy.fold import fold_batch_norms
from adq_train.deploy.formats import FORMATS, Source
from adq_train.deploy.packed import Sizes, tables_in_order
from adq_train.deploy.trained import open_run, table_model, trained_network
from adq_train.deploy.verify import Agreement, words, write_checked
from adq_train.errors import UserError
from adq_train.reporting.summary import FLOAT_BYTES, kilobytes
from adq_train.storage.files import written_whole

# What a packed file is read back on; the test set may be far away when a run is exported.
RANDOM_IMAGES = 8


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        format: Its name in :data:`~adq_train.deploy.formats.FORMATS`.
        file_bytes: Its size.
        promised_bytes: The weights that allocation.json promises, plus tables and float values.
        float32_bytes: The same network in float32.
        folded: Number of batch norms that were folded.
        agreement: Packed: with the trained network, on random images; otherwise with the network
            that its format is compared with, on the test set.
        sizes: The parts of a packed file.
        remarks: What a user is to know about the file, a line each.
    """

    path: str
    format: str
    file_bytes: int
    promised_bytes: int
    float32_bytes: int
    folded: int
    agreement: Agreement
    sizes: Sizes | None = None
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "compression": self.float32_bytes / self.file_bytes}

    def to_text(self) -> str:
        """For a terminal."""
        lines = [f"written   {self.path}"]
        parts = ""
        if self.sizes:
            rest = self.file_bytes - self.sizes.codes - self.sizes.tables - self.sizes.floats
            parts = (
                f": weights {self.sizes.codes:,}, tables {self.sizes.tables:,}, "
                f"float values {self.sizes.floats:,}, header and index {rest:,}"
            )
        lines += [
            f"size      {self.file_bytes:,} bytes{parts}",
            f"float32   {kilobytes(self.float32_bytes)}, "
            f"{self.float32_bytes / self.file_bytes:.1f} times as large",
        ]
        found, apart = self.agreement, f"{self.agreement.largest_difference:.3g}"
        kind = FORMATS[self.format]
        if not kind.exact:
            lines.append(
                f"verified  in {kind.runtime} on {found.num_images:,} test images: {words(found)}; "
                f"largest difference of two logits {apart}"
            )
        elif found.largest_difference == 0:
            lines.append(
                f"verified  read back: on {found.num_images} random images the logits are the "
                "trained network's, bit for bit"
            )
        else:
            lines.append(
                f"verified  read back: on {found.num_images} random images logits are up to "
                f"{apart} from the trained network's, {found.different} top-1 classes differ"
            )
        if found.moved is not None:
            lines.append(
                f"trained   on {found.moved:,} of these images the integer network gives another "
                "top-1 than the network that was trained"
            )
        if self.folded:
            lines.append(f"folded    {self.folded} batch norms")
        lines += [f"note      {remark}" for remark in self.remarks]
        return "\n".join(lines)


def export_run(
    folder: Path,
    output: Path | None = None,
    data_changes: Mapping[str, str] | None = None,
    trusted_packages: Sequence[str] = (),
    *,
    form: str = "packed",
    float_type: str = "float32",
    fold_batch_norm: bool = False,
    tolerance: float = 0.001,
) -> ExportReport:
    """Exports the trained network of a finished run.

    Args:
        folder: The run's folder.
        output: The file to write, which takes its name once it is verified; None: in ``export/``
            of the folder.
        data_changes: Settings of the run's data set to change, by name, in YAML.
        trusted_packages: Whose classes the run may name, besides the built-in ones.
        form: A name in :data:`~adq_train.deploy.formats.FORMATS`.
        float_type: ``float32`` or ``float16``, of what stays float.
        fold_batch_norm: Whether to fold batch norms into convolutions.
        tolerance: Share of the test images on which a runtime may give another top-1 class.

    Raises:
        UserError: The run cannot be exported, or the file does not do what the network does; no
            file is left then.
    """
    kind = FORMATS[form]
    if float_type == "float16" and not kind.float16:
        raise UserError(f"float_type: format={kind.name} keeps its float values in float32")
    kind.writer()  # a missing package shows before any work
    run = open_run(folder, trusted_packages)
    if output is None:
        output = inside(folder, kind.file)
    network = trained_network(run)
    model = table_model(run, network)
    num_weights = sum(x.weight.codes.numel() for x in model.layers.values())
    float32 = FLOAT_BYTES * (num_weights + _count(model.floats.values()))
    dtype = torch.float16 if float_type == "float16" else torch.float32
    drawn = torch.Generator().manual_seed(0)
    example = torch.randn(RANDOM_IMAGES, *run.input_format().image_shape, generator=drawn)
    if kind.exact:
        batches: Iterable[Tensor] = [example]
    else:
        test = run.load_data(data_changes).test
        some = slice(None, None, kind.every(test))
        batches = (images for images, _ in test.epoch(0, images=some))
    source = Source(network, model, example, dtype, run.trusted)
    if fold_batch_norm:
        model = fold_batch_norms(model, source.architecture)
        source = replace(source, tables=model)
    with made(output.parent), written_whole(output) as temporary:
        written, agreement = write_checked(temporary, kind, source, batches, tolerance)
    tables = _count(t for x in model.layers.values() for t in tables_in_order(x))
    tables += len(model.edges)  # a step each
    floats = dtype.itemsize * _count(model.floats.values())
    return ExportReport(
        path=str(output),
        format=form,
        file_bytes=output.stat().st_size,
        promised_bytes=run.allocation.model_size_bytes + FLOAT_BYTES * tables + floats,
        float32_bytes=float32,
        folded=len(model.folded),
        agreement=agreement,
        sizes=written.sizes,
        remarks=written.remarks,
    )


def inside(folder: Path, name: str) -> Path:
    """A file within a folder that may come from anybody.

    Raises:
        UserError: A link in the folder leads out of it.
    """
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"output: {path.parent} leads out of {folder}, to {path.parent.resolve()}; give "
            "output=FILE to write there"
        )
    return path


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder; where the block fails, what was made is taken away again.

    Raises:
        UserError: It cannot be made.
    """
    new = [x for x in (folder, *folder.parents) if not x.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot make {folder} ({error.strerror})") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
