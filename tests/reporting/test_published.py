import pytest
from made_up import CONFIG, LSQ, make_run

from adq_train.reporting import published
from adq_train.reporting.gather import gather
from adq_train.reporting.groups import sections

KNOWN = published.load()
RESNET18 = {"_target_": "adq_train.models.TorchvisionModel", "name": "resnet18", "weights": None}
FOLDERS = {"_target_": "adq_train.data.image_folder.Folders", "root": "x"}
IMAGENET = {"model": RESNET18, "data": FOLDERS}


def part(name):
    return {"_target_": f"adq_train.quantization.{name}.Any"}


def figures(folder, num_test_images=10_000, **options):
    """The figures beside a run's row, and all those for its data set and model."""
    path = make_run(folder / "run", **options) / "result.json"
    path.write_text(path.read_text().replace("10000", str(num_test_images)))
    (section,) = sections(gather([folder]))
    known = published.for_section(section, KNOWN)
    return [x.top1_percent for x in published.for_row(section.rows[0], known)], known


def imagenet(folder, weights, activations, bits, num_test_images=50_000):
    changes = {
        **IMAGENET,
        "weight_quantizer": part(weights),
        "activation_quantizer": part(activations),
    }
    data = {"name": "image_folder", "fingerprint": "ab"}
    options = {"changes": changes, "bits": bits, "manifest": {"data": data}}
    return figures(folder, num_test_images, **options)


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        ("dorefa", "pact", [64.4, 68.1, 69.2]),
        ("dorefa", "dorefa", [64.7, 67.5, 68.1]),
        ("lsq", "lsq", [67.6, 70.2, 71.1]),
        ("n2uq", "n2uq", [69.4, 71.9, 72.9]),
    ],
)
def test_rivals_on_imagenet_by_their_bits(tmp_path, weights, activations, expected):
    found = [
        imagenet(tmp_path / str(bits), weights, activations, bits)[0] for bits in (2, 3, 4, 2.5)
    ]
    assert found == [[x] for x in expected] + [[]]


def test_adq_on_imagenet_at_its_average(tmp_path):
    found = [imagenet(tmp_path / str(b), "adq", "n2uq", b)[0] for b in (2.81, 2.8, 2.7, 3)]
    assert found == [[71.512], [71.512], [], []]


def test_another_image_folder_is_not_imagenet(tmp_path):
    assert imagenet(tmp_path, "lsq", "lsq", 2, num_test_images=1000) == ([], [])


def test_cifar10_has_its_own(tmp_path):
    beside, known = figures(tmp_path / "lsq", changes=LSQ, bits=2)
    assert beside == [90.2]
    assert {str(x) for x in known} >= {
        "90.2 % (LSQ at 2 bits)",
        "92.49 % (APoT at 3 bits)",
        "91.3 % (PACT at 4 bits)",
        "88.2 % (DoReFa-Net at 2 bits)",
        "90.6 % (SLB at 2 bits)",
    }
    assert figures(tmp_path / "adq", bits=3)[0] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**CONFIG["model"], "width": 8}},
        {"model": {**CONFIG["model"], "depth": 32}},
        {"data": {**CONFIG["data"], "train_images": 20000}},
        {"data": {**CONFIG["data"], "name": "cifar100"}},
    ],
)
def test_another_network_or_part_of_the_data_has_none(tmp_path, changes):
    assert figures(tmp_path, changes={**LSQ, **changes}, bits=2) == ([], [])


def test_every_figure_names_its_source():
    assert len(KNOWN) == 28
    assert all(figure.source and 50 < figure.top1_percent < 100 for figure in KNOWN)
    assert str(KNOWN[0]) == "64.4 % (PACT at 2 bits)"
