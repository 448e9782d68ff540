"""One run as a whole: what it leaves, what it shares, what it refuses."""

import json
import re

import pytest
import torch
import yaml
from helpers import QUICK
from safetensors.torch import load_file, save_file

from adq_train.deploy.trained import open_run, trained_network
from adq_train.errors import UserError
from adq_train.quantization import kernels
from adq_train.run import manifest
from adq_train.storage.files import sha256
from adq_train.storage.stamps import stamped
from adq_train.training.evaluate import evaluate

CONTRACT = {
    "config.yaml",
    "levels.json",
    "manifest.json",
    "status.json",
    "train.log",
    ".lock",
    "metrics.jsonl",
    "tensorboard",
    "plots",
    "checkpoints",
    "sensitivity.json",
    "allocation.json",
    "allocation.txt",
    "result.json",
}


def read(path):
    return json.loads(path.read_text())


def test_a_run_leaves_what_the_contract_says(finished, tmp_path):
    _, run = finished
    assert {path.name for path in run.iterdir()} == CONTRACT
    assert {path.name for path in tmp_path.iterdir()} == {"run", "outputs"}

    manifest = read(run / "manifest.json")
    assert {"command", "git", "versions", "device", "seed", "data", "kernels"} <= set(manifest)
    assert re.fullmatch("[0-9a-f]{64}", manifest["float_models"]["pretrain"]["sha256"])
    assert manifest["kernels"] == kernels.in_use()
    assert re.fullmatch("[0-9a-f]{64}", manifest["data"]["fingerprint"])
    status = read(run / "status.json")
    assert (status["state"], status["stage"], status["error"]) == ("done", None, None)

    table = read(run / "sensitivity.json")
    assert {"metric", "bit_widths", "layers", "stamp"} <= set(table)
    assert table["bit_widths"] == [2, 3, 4]
    assert {"name", "num_weights", "macs", "sensitivity"} <= set(table["layers"][0])
    assert set(table["layers"][0]["sensitivity"]) == {"2", "3", "4"}

    allocation = read(run / "allocation.json")
    assert set(allocation) - {"caveat"} == {
        "allocator", "budget", "layers", "average_weight_bits", "average_weight_bits_all_layers",
        "average_activation_bits", "model_size_bytes", "bops", "objective", "optimal",
        "stamp",
    }  # fmt: skip
    assert set(allocation["layers"][0]) == {"name", "weight_bits", "activation_bits"}
    assert allocation["layers"][0]["weight_bits"] == allocation["layers"][-1]["weight_bits"] == 8

    result = read(run / "result.json")
    assert set(result) == {
        "fp_top1_percent", "ptq_top1_percent", "qat_top1_percent", "qat_top5_percent",
        "num_test_images", "seconds", "stamp",
    }  # fmt: skip
    assert result["num_test_images"] == 64
    assert set(result["seconds"]) == {
        "pretrain", "profile", "allocate", "prepare", "qat", "evaluate"
    }  # fmt: skip
    assert {"last.pt", "best.pt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert (run / "plots" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["width"] == 4


def test_the_summary_tells_what_a_person_wants_to_know(finished):
    outcome, run = finished
    result, allocation = read(run / "result.json"), read(run / "allocation.json")
    for layer in allocation["layers"]:
        bits = f"{layer['weight_bits']}/{layer['activation_bits']}"
        assert re.search(rf"{re.escape(layer['name'])}\s.*\s{bits}\s", outcome.out)
    for name in ("fp", "ptq", "qat"):
        assert f"{result[f'{name}_top1_percent']:.2f} %" in outcome.out
    assert f"{allocation['average_weight_bits']:.2f} weights" in outcome.out
    assert "times smaller" in outcome.out
    assert "tensorboard --logdir run" in outcome.out


def test_the_model_has_the_bits_that_the_allocation_promises(finished):
    """Counted from the checkpoint itself: distinct levels of each layer's quantized weights."""
    _, run = finished
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]
    for layer in read(run / "allocation.json")["layers"]:
        codebook = state[f"{layer['name']}.weight_quantizer.codebook"]
        assert len(codebook) == 2 ** layer["weight_bits"]
        thresholds = state[f"{layer['name']}.input_quantizer.log_widths"]
        assert len(thresholds) == 2 ** layer["activation_bits"] - 1


def test_the_same_command_again_says_that_all_is_done(job, finished):
    first, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = job(*QUICK, "run_dir=run")
    assert again.code == 0
    assert "all stages of run are done" in again.err
    assert again.out == first.out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_settings_do_not_touch_a_run(job, finished):
    _, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    outcome = job(*QUICK, "run_dir=run", "trainer.epochs=2", "seed=5")
    assert outcome.code == 1
    assert "run holds a run with other settings (seed: 0 → 5; trainer.epochs: 1 → 2)" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.usefixtures("no_pictures")
def test_ablations_share_the_float_model_and_change_the_result(job, tmp_path):
    toggles = ("init_random", "no_adaptation", "uniform_bits", "activation_lsq")
    weights, floats = {}, []
    for ablation in ("none", *toggles):
        outcome = job(*QUICK, "pretrain.epochs=2", f"ablation={ablation}", f"run_dir={ablation}")
        assert outcome.code == 0, outcome.err
        state = torch.load(tmp_path / ablation / "checkpoints" / "last.pt", weights_only=True)
        weights[ablation] = state["model"]["layer1.0.conv1.weight"]
        floats.append(read(tmp_path / ablation / "result.json")["fp_top1_percent"])
        trained = "pretrain: 2 epochs" in outcome.err
        assert trained == (ablation == "none")
    assert len(set(floats)) == 1
    assert len(list((tmp_path / "outputs" / "shared").iterdir())) == 1
    for toggle in toggles:
        assert not torch.equal(weights["none"], weights[toggle]), toggle


EVERYTHING = (
    "trainer.precision=bf16",
    "trainer.accumulate_batches=2",
    "trainer.mixup_alpha=0.2",
    "trainer.cutmix_alpha=1",
    "trainer.weight_average_decay=0.9",
    "trainer.oscillation_damping=0.01",
    "trainer.batch_norm_reestimation=64",
    "trainer.skip_nonfinite_steps=1",
    "trainer.channels_last=true",
    "distillation=logits",
    "distillation.weight=0.5",
)


@pytest.mark.usefixtures("no_pictures")
def test_every_option_of_training_at_once(job, tmp_path):
    outcome = job(*QUICK, "trainer.epochs=2", *EVERYTHING, "run_dir=run")
    assert outcome.code == 0, outcome.err
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [x["stage"] for x in records] == ["pretrain", "qat", "qat"]
    assert records[-1]["step"] == 2 * 2  # 256 images in batches of 2 x 64
    assert all(x["images_per_second"] > 0 for x in records)
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert state["step"]["trained"].keys() == state["model"].keys()


@pytest.mark.usefixtures("no_pictures")
def test_a_teacher_is_trained_once_and_may_be_another_run_s_float_model(job, tmp_path):
    shared = tmp_path / "outputs" / "shared"
    taught = (*QUICK, "distillation=teacher", "distillation.model.width=2")
    outcome = job(*taught, "run_dir=taught")
    assert outcome.code == 0, outcome.err
    assert "teacher: 1 epochs" in outcome.err
    assert len(list(shared.iterdir())) == 2
    assert read(tmp_path / "taught/result.json")["seconds"]["teacher"] > 0
    stages = [json.loads(x)["stage"] for x in (tmp_path / "taught/metrics.jsonl").open()]
    assert stages == ["pretrain", "qat"]

    teacher = job(*QUICK, "model=resnet20", "model.width=2", "run_dir=teacher")
    assert teacher.code == 0, teacher.err
    assert "pretrain: float model from" in teacher.err
    metrics = [json.loads(x) for x in (tmp_path / "teacher/metrics.jsonl").open()]
    assert [x["stage"] for x in metrics] == ["pretrain", "qat"]

    other = job(*taught, "distillation.weight=0.5", "run_dir=other")
    assert other.code == 0, other.err
    assert "teacher: float model from" in other.err
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["model"]
        for name in ("taught", "other")
    ]
    assert not torch.equal(*(x["layer1.0.conv1.weight"] for x in weights))


@pytest.mark.usefixtures("no_pictures")
def test_float_training_does_not_depend_on_the_rate_of_qat(job, tmp_path):
    for run, rate in (("first", 0.1), ("second", 0.01)):
        outcome = job(*QUICK, f"optimizer.lr={rate}", f"run_dir={run}")
        assert outcome.code == 0, outcome.err
    assert "pretrain: float model from" in outcome.err
    assert len(list((tmp_path / "outputs" / "shared").iterdir())) == 1


@pytest.mark.usefixtures("no_pictures")
def test_another_seed_trains_another_float_model(job, tmp_path):
    for seed in (0, 1):
        assert job(*QUICK, f"seed={seed}").code == 0
    assert len(list((tmp_path / "outputs" / "shared").iterdir())) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_deleted_allocation_is_made_anew_and_trained(job, finished):
    _, run = finished
    before = (run / "allocation.json").read_text()
    for name in ("allocation.json", "status.json"):
        (run / name).unlink()
    outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert (run / "allocation.json").read_text() == before
    assert "profile:" not in outcome.err


def edit(path, change):
    """Changes a JSON file as a person would."""
    content = read(path)
    change(content)
    path.write_text(json.dumps(content))


def edit_and_stamp(path, change):
    """Changes a JSON file so that its stamp fits again."""
    content = read(path)
    stamp = content.pop("stamp")
    change(content)
    path.write_text(stamped(json.dumps(content), stamp["depends_on"]))


def four_bits(content):
    for layer in content["layers"][1:-1]:
        layer.update(weight_bits=4, activation_bits=4)


def set_in_layer(index, **values):
    return lambda content: content["layers"][index].update(values)


BAD = {
    "sensitivity.json": {
        "layers changed after": set_in_layer(1, sensitivity={"2": 0.0, "3": 0.0, "4": 0.0}),
        "metric changed after": lambda x: x.update(metric="mine"),
        "num_weights is -3": set_in_layer(1, num_weights=-3),
        "macs is missing": lambda x: x["layers"][2].pop("macs"),
        r"sensitivity\.2 is 'much'": set_in_layer(0, sensitivity={"2": "much"}),
        "more than one entry for conv1": lambda x: x["layers"].append(x["layers"][0]),
    },
    "allocation.json": {
        "layers changed after": four_bits,
        "average_weight_bits changed after": lambda x: x.update(average_weight_bits=7.5),
        "weight_bits is 1; it must be 2 … 8": set_in_layer(2, weight_bits=1),
        "activation_bits is 99; it must be 2 … 8": set_in_layer(2, activation_bits=99),
        "more than one entry for fc": lambda x: x["layers"].append(x["layers"][-1]),
        "model_size_bytes is -1": lambda x: x.update(model_size_bytes=-1),
        "optimal is 1, not true or false": lambda x: x.update(optimal=1),
        "bops is missing": lambda x: x.pop("bops"),
    },
    "levels.json": {"layers changed after": set_in_layer(1, weight_levels_used=3)},
    "result.json": {
        "qat_top1_percent changed after": lambda x: x.update(qat_top1_percent=99.5),
        "qat_top1_percent is 101; it must be 0 … 100": lambda x: x.update(qat_top1_percent=101),
        r"seconds\.qat is 'long'": lambda x: x["seconds"].update(qat="long"),
    },
}


def test_edited_artifacts_of_a_run_that_is_done_or_not(job, finished):
    _, run = finished
    for name, changes in BAD.items():
        whole = (run / name).read_text()
        for message, change in changes.items():
            edit(run / name, change)
            told = [job(*QUICK, "run_dir=run").err]
            if name in ("sensitivity.json", "allocation.json"):  # what adq-export reads
                with pytest.raises(UserError) as refused:
                    open_run(run)
                told.append(str(refused.value))
            for text in told:
                assert re.search(rf"run/{name} is .*{message}.*; delete it to make it anew", text)
                assert len(text.strip().splitlines()) == 1
            (run / name).write_text(whole)


def test_artifacts_without_a_stamp_or_of_another_origin(job, finished):
    """Also where the stamp was made to fit the content."""
    _, run = finished
    (run / "status.json").unlink()
    for name, section in (("sensitivity.json", "sensitivity"), ("allocation.json", "allocator")):
        whole = (run / name).read_text()
        for change, message in (
            (lambda x: x.pop("stamp"), "it has no stamp"),
            (lambda x: x["stamp"].update(depends_on="ab"), "it was made by another run"),
            (lambda x: x.update(stamp="mine"), "stamp is not one"),
        ):
            edit(run / name, change)
            outcome = job(*QUICK, "run_dir=run")
            assert outcome.code == 1
            assert re.search(
                rf"run/{name} .*{message}.*delete it .*{section}=from_file", outcome.err
            )
            (run / name).write_text(whole)

    whole = (run / "allocation.json").read_text()
    for change, message in (
        (four_bits, r"its bits exceed budget\.average_weight_bits: 4 of"),
        (lambda x: x.update(bops=5), r"bops is 5, but its bits come to \d+"),
        (set_in_layer(0, weight_bits=4), "conv1 has 4/8 bits, but is pinned to 8"),
    ):
        edit_and_stamp(run / "allocation.json", change)
        outcome = job(*QUICK, "run_dir=run")
        assert outcome.code == 1
        assert re.search(rf"run/allocation\.json: .*{message}", outcome.err)
        (run / "allocation.json").write_text(whole)


@pytest.mark.usefixtures("no_pictures")
def test_what_is_missing_of_a_run_that_is_done_is_made_anew(job, finished):
    _, run = finished
    names = ("sensitivity.json", "levels.json", "result.json")
    before = {name: read(run / name) for name in names}
    (run / "sensitivity.json").write_text('{"metric": NaN}')
    outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 1
    assert "run/sensitivity.json is not a sensitivity table" in outcome.err
    assert "delete it to make it anew" in outcome.err
    for name in names:
        (run / name).unlink()
    outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert "was done, but sensitivity.json, levels.json, result.json is missing" in outcome.err
    for name in names:
        after = read(run / name)
        if name == "result.json":
            del after["seconds"], before[name]["seconds"], after["stamp"], before[name]["stamp"]
        assert after == before[name], name


def test_a_shared_float_model_is_verified(job, finished, tmp_path):
    _, run = finished
    (shared,) = (tmp_path / "outputs" / "shared").iterdir()
    weights, depends_on = shared / "model.safetensors", shared / "depends_on.json"
    whole, noted = weights.read_bytes(), depends_on.read_text()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    other = {**json.loads(noted), "seed": 5}
    (run / "status.json").unlink()
    for name in ("run", "second"):
        for content, inputs, message in (
            (flipped, noted, "its SHA-256 is not the one in depends_on.json"),
            (whole, json.dumps(other), "depends_on.json beside it is of another folder"),
            (whole, "[]", "depends_on.json beside it cannot be read"),
        ):
            weights.write_bytes(content)
            depends_on.write_text(inputs)
            outcome = job(*QUICK, f"run_dir={name}")
            assert outcome.code == 1
            assert f"{weights.relative_to(tmp_path)} is damaged or another run's" in outcome.err
            assert message in outcome.err
    # One that fits the folder, but is not what the run began with.
    state = load_file(weights)
    state["fc.bias"][0] += 1
    save_file(state, weights)
    content = json.loads(noted)
    content["stamp"]["model.safetensors"] = sha256(weights)
    depends_on.write_text(json.dumps(content))
    outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 1
    assert "pretrain: the float model is not the one that the run in run began with" in outcome.err
    # The remedy: from its last checkpoint the same model is there at once.
    weights.unlink()
    outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert weights.read_bytes() == whole


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_with_its_float_model_under_other_conditions(job, finished, monkeypatch):
    """And a new one under these trains its own, so that no order of runs changes a result."""
    _, run = finished
    (run / "status.json").unlink()
    here = manifest.environment()
    other = {**here, "cpu_threads": 7}
    for module in ("shared_model", "manifest"):
        monkeypatch.setattr(f"adq_train.run.{module}.environment", lambda _: other)
    outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert f"cpu_threads: {here['cpu_threads']} → 7" in outcome.err
    assert "pretrain: float model from" in outcome.err
    outcome = job(*QUICK, "run_dir=new")
    assert outcome.code == 0, outcome.err
    assert "pretrain: 1 epochs" in outcome.err


@pytest.mark.usefixtures("no_pictures")
def test_a_float_checkpoint_replaces_float_training(job, finished, tmp_path):
    (shared,) = (tmp_path / "outputs" / "shared").iterdir()
    outcome = job(*QUICK, f"pretrain.checkpoint={shared / 'model.safetensors'}", "run_dir=second")
    assert outcome.code == 0, outcome.err
    assert "pretrain: float weights as given" in outcome.err
    first, second = read(tmp_path / "run/result.json"), read(tmp_path / "second/result.json")
    assert second["fp_top1_percent"] == first["fp_top1_percent"]
    assert load_file(shared / "model.safetensors")["conv1.weight"].shape == (4, 1, 3, 3)


@pytest.mark.usefixtures("no_pictures")
def test_no_qat_leaves_the_calibrated_model(job, tmp_path):
    outcome = job(*QUICK, "trainer.epochs=0", "run_dir=run")
    assert outcome.code == 0, outcome.err
    result = read(tmp_path / "run" / "result.json")
    assert result["qat_top1_percent"] == result["ptq_top1_percent"]
    kept = open_run(tmp_path / "run")
    accuracy = evaluate(trained_network(kept), kept.load_data().test).top1_percent
    assert accuracy == result["ptq_top1_percent"]


@pytest.mark.usefixtures("no_pictures")
def test_the_best_epoch_can_be_selected(job, tmp_path):
    outcome = job(*QUICK, "trainer.epochs=3", "trainer.select=best", "run_dir=run")
    assert outcome.code == 0, outcome.err
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = max(x["validation_top1_percent"] for x in records if x["stage"] == "qat")
    assert f"qat: validation top-1 {best:.2f} %" in outcome.err


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_stage_is_noted_and_continued(job, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("adq_train.run.stages.allocate.allocate", full)
        outcome = job(*QUICK, "run_dir=run")
    assert outcome.code == 1
    assert "No space left on device" in outcome.err
    status = read(tmp_path / "run" / "status.json")
    assert (status["state"], status["stage"]) == ("failed", "allocate")
    assert "No space left" in status["error"]

    again = job(*QUICK, "run_dir=run")
    assert again.code == 0, again.err
    assert "profile:" not in again.err
    assert read(tmp_path / "run" / "status.json")["state"] == "done"


ONE_LAYER = """{"layers": [{"name": "conv1", "sensitivity": {"2": 1, "3": 1, "4": 1},
    "weight_bits": 8, "activation_bits": 8}]}"""


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("{", ["sensitivity=from_file", "sensitivity.path=f"], "sensitivity.path: f is not"),
        (ONE_LAYER, ["sensitivity=from_file", "sensitivity.path=f"], "it has no layer layer1"),
        ("{", ["allocator=from_file", "allocator.path=f"], "allocator.path: f is not"),
        (ONE_LAYER, ["allocator=from_file", "allocator.path=f"], "it lacks layer1"),
        ("{", ["pretrain.checkpoint=f"], "pretrain.checkpoint: f"),
        ("{", ["distillation=logits", "distillation.checkpoint=f"], "distillation.checkpoint: f"),
        ("", ["bits.pinned={layer9: 4}"], "bits.pinned: no layer is called 'layer9'"),
        ("", ["allocator=fixed", "allocator.bits={nowhere: 4}"], "allocator.bits: no layer"),
        ("", ["bits.tied=false"], "bits.tied: false needs the effects"),
        ("", ["bits.tied=false", "sensitivity=fisher"], "and fisher does not tell them apart"),
    ],
    ids=range(10),
)
def test_what_a_run_will_need_is_checked_before_anything_is_trained(
    job, tmp_path, content, overrides, message
):
    (tmp_path / "f").write_text(content)
    outcome = job(*QUICK, *overrides, "run_dir=run")
    assert outcome.code == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_files_written_by_hand_need_names_and_values_alone(job, tmp_path):
    """Names alone are known to a person: no counts of weights, no multiply-accumulates."""
    names = ["conv1", *(f"layer{i}.0.conv{k}" for i in (1, 2, 3) for k in (1, 2)), "fc"]
    rows = [{"name": x, "sensitivity": {"2": 1.0, "3": 0.5, "4": 0.25}} for x in names]
    (tmp_path / "omega.json").write_text(json.dumps({"layers": rows}))
    table = ["sensitivity=from_file", "sensitivity.path=omega.json", "trainer.epochs=0"]
    outcome = job(*QUICK, *table, "run_dir=first")
    assert outcome.code == 0, outcome.err
    first = read(tmp_path / "first" / "sensitivity.json")
    assert first["metric"] == "from_file"
    assert first["layers"][0]["num_weights"] == 36
    bits = read(tmp_path / "first" / "allocation.json")["layers"]
    (tmp_path / "bits.json").write_text(json.dumps({"layers": bits}))
    outcome = job(*QUICK, *table, "allocator=from_file", "allocator.path=bits.json", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "run" / "allocation.json")["layers"] == bits


def test_a_dry_run_does_not_ask_whether_two_steps_converge(job):
    outcome = job(*QUICK, "dry_run=true", "optimizer.lr=1e30", "pretrain.lr=20")
    assert outcome.code == 0, outcome.err
    assert "dry run passed" in outcome.out
