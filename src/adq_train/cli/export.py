"""Entry points of ``adq-export`` and ``adq-eval``; torch waits until the arguments are read."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass, field

from adq_train.cli.arguments import read
from adq_train.deploy.formats import FORMATS
from adq_train.errors import UserError
from adq_train.messages import configure_logging
from adq_train.printable import one_line, printable
from adq_train.settings.schema import setting
from adq_train.storage.files import typed_path


def _format_help() -> str:
    """Two lines for each format: its file and what it is for, and what it needs."""
    lines = []
    for x in FORMATS.values():
        needs = f"; needs pip install 'adq-train[{x.extra}]'" if x.extra else ""
        lines.append(f"    {x.name:<8}export/{x.file.removeprefix('export/')}{needs}")
        lines += textwrap.wrap(x.help, 80, initial_indent=" " * 12, subsequent_indent=" " * 12)
    return "\n".join(lines)


EXPORT_HELP = f"""adq-export: write the trained network of a finished run as one file.

Examples
  adq-export outputs/quickstart/default-5be24364
  adq-export run format=onnx
  adq-export run format=qdq output=model.onnx

Usage
  adq-export RUN_FOLDER [setting=value ...]

Settings, with their defaults
  format=packed             one of
{_format_help()}
  output=FILE               another place
  float_type=float32        packed: precision of norms, biases and layers that
                            are not quantized; or float16
  fold_batch_norm=false     packed: fold batch norms into convolutions; logits
                            then differ by rounding
  tolerance=0.001           largest share of the test images whose class may
                            differ in the other program (docs/export.md)
  data.KEY=VALUE            other settings of the run's data set:
                            data.root=/data/cifar10, data.download=true
  trusted_packages=[NAME]   packages of your own whose classes the run uses;
                            they will be imported
  json=false                the report as one line of JSON
  debug=false               show where an error comes from
"""
EVAL_HELP = """adq-eval: measure a run, or a file of adq-export, on its test images.

Examples
  adq-eval outputs/quickstart/default-5be24364
  adq-eval run/export/model.safetensors data.root=/data/cifar10
  adq-eval run/export/model.onnx predict=photo.jpg
  adq-eval run all_forms=true

Usage
  adq-eval PATH [setting=value ...]

Settings, with their defaults
  data=NAME data.KEY=VALUE  another data set, or other settings of it:
                            data.root=/data/imagenet, data.download=true
  predict=FILE_OR_FOLDER    classify images of your own instead
  all_forms=false           a run beside all files in its export/ folder: top-1,
                            images with another class than from the checkpoint,
                            bytes, milliseconds for an image
  batch_size=500            images of a batch
  trusted_packages=[NAME]   packages of your own whose classes it names; they
                            will be imported
  json=false                one line of JSON
  debug=false               show where an error comes from
"""


@dataclass(frozen=True)
class ExportSettings:
    """The command line of ``adq-export``."""

    path: str
    format: str = setting("packed", "The form of the file.", choices=tuple(FORMATS))
    output: str = ""
    float_type: str = setting(
        "float32", "Precision of what stays float.", choices=("float32", "float16")
    )
    fold_batch_norm: bool = False
    tolerance: float = setting(
        0.001, "Share of images that may get another class.", minimum=0, maximum=1
    )
    data_changes: dict[str, str] = field(default_factory=dict)
    trusted_packages: tuple[str, ...] = ()
    json: bool = False
    debug: bool = False


@dataclass(frozen=True)
class EvalSettings:
    """The command line of ``adq-eval``."""

    path: str
    data: str = ""
    data_changes: dict[str, str] = field(default_factory=dict)
    batch_size: int = setting(500, "Images of a batch.", minimum=1)
    predict: str = ""
    all_forms: bool = False
    trusted_packages: tuple[str, ...] = ()
    json: bool = False
    debug: bool = False


def export_main() -> None:
    """``adq-export``: a run's trained model as one small file."""
    settings = read(ExportSettings, EXPORT_HELP)
    configure_logging()
    from adq_train.deploy.write import export_run

    report = export_run(
        typed_path(settings.path),
        typed_path(settings.output) if settings.output else None,
        settings.data_changes,
        settings.trusted_packages,
        form=settings.format,
        float_type=settings.float_type,
        fold_batch_norm=settings.fold_batch_norm,
        tolerance=settings.tolerance,
    )
    print(json.dumps(report.to_dict()) if settings.json else printable(report.to_text()))


def eval_main() -> None:
    """``adq-eval``: the accuracy of a model in any of its forms."""
    settings = read(EvalSettings, EVAL_HELP)
    configure_logging()
    evaluate(settings)


def evaluate(settings: EvalSettings) -> None:
    """Prints accuracies, or the classes of some images.

    Raises:
        UserError: The model or its data set cannot be read.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from adq_train.deploy import evaluable as forms
    from adq_train.deploy.datasets import data_section
    from adq_train.training.evaluate import evaluate as measure

    if settings.all_forms:
        evaluate_all(settings)
        return
    opened = forms.open_path(typed_path(settings.path), settings.trusted_packages)
    if settings.predict:
        predictions = forms.predict(opened, typed_path(settings.predict))
        if settings.json:
            rows = [
                {"image": x.image, "classes": [list(c) for c in x.classes]} for x in predictions
            ]
            print(json.dumps({"form": opened.form, "predictions": rows}))
            return
        for x in predictions:
            found = "  ".join(f"{one_line(name)} {100 * p:.1f} %" for name, p in x.classes)
            print(f"{one_line(x.image)}  {found}")
        return
    section, download = data_section(
        opened.data, settings.data or None, settings.data_changes, opened.form != "run"
    )
    data = forms.open_data(opened, section, settings.batch_size, download)
    same_data = None if opened.fingerprint is None else opened.fingerprint == data.fingerprint
    figures = measure(opened.network, data.test)
    many = data.num_classes > 5  # of five, every image has its class among the best five
    if settings.json:
        row = {
            "form": opened.form,
            "top1_percent": figures.top1_percent,
            **({"top5_percent": figures.top5_percent} if many else {}),
            "num_images": figures.num_images,
        }
        print(json.dumps(row))
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("form", "data", "top-1", *(["top-5"] if many else []), "loss", "images"):
            table.add_column(name, justify="left" if name in ("form", "data") else "right")
        table.add_row(
            opened.form,
            escape(one_line(data.name)),
            f"{figures.top1_percent:.2f} %",
            *([f"{figures.top5_percent:.2f} %"] if many else []),
            f"{figures.loss:.4f}",
            f"{figures.num_images:,}",
        )
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    if same_data is False:
        name = one_line(data.name)
        print(f"note: {name} is not the data that the model was trained on", file=sys.stderr)


def evaluate_all(settings: EvalSettings) -> None:
    """Prints a run beside all of its exported files.

    Raises:
        UserError: The run or its data set cannot be read, or one of the files, but for one whose
            packages are not installed.
    """
    from adq_train.deploy.all_forms import evaluate_forms, text

    if settings.predict:
        raise UserError("all_forms: it evaluates on the test set; leave predict out")
    rows = evaluate_forms(
        typed_path(settings.path),
        settings.data or None,
        settings.data_changes,
        settings.batch_size,
        settings.trusted_packages,
    )
    for row in rows if settings.json else ():
        print(json.dumps(row.to_dict()))
    if not settings.json:
        print(printable(text(rows)))
    wrong = [row.form for row in rows if row.problem]
    if wrong:
        raise UserError(f"all_forms: could not evaluate {', '.join(wrong)}; see above")
