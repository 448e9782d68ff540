"""The whole command on made-up folders: what it prints, and the three files that it writes."""

import base64
import csv
import hashlib
import html.parser
import json
import os
import re
import subprocess
import sys

import pytest
from made_up import LSQ, make_run, make_sweep

from adq_train.cli import report as command
from adq_train.reporting import figures, machine, tables

EVIL = "<script>alert('x')</script>|`*_[a](http://e.vil)$\\frac{&amp;"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two rows of three seeds, one failed, one unfinished and one damaged run, hostile names."""
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder, {"ablation=none": [90.0, 90.1, 90.3], "ablation=a": [91, 91.2, 91.3]})
    evil = {"overrides": ("experiment=x", f"trainer.name={EVIL}"), "changes": LSQ}
    make_run(folder / EVIL.replace("/", "∕"), 80, layers=("<b>$\\frac{", "$"), bits=2, **evil)
    make_run(folder / "bad", seed=1, state="failed", stage="qat", error=EVIL, **evil)
    make_run(folder / "slow", seed=2, state="running", stage="profile", **evil)
    (make_run(folder / "odd", seed=3, **evil) / "result.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def report(sweep):
    return command.build([sweep], None)


@pytest.fixture(scope="module")
def written(sweep, report):
    command.write(report, sweep / "report")
    return sweep / "report"


class Page(html.parser.HTMLParser):
    """Collects tags, links of any kind and the texts of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.cells, self.texts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.tags[-1:] == ["td"] and data.strip():
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "report.html").read_text())


def test_the_page_asks_for_nothing(written, page):
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    text = (written / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    named = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{named}'" in text
    assert page.tags.count("script") == 1
    (style,) = re.findall(r"<style>(.*?)</style>", (written / "report.html").read_text(), re.S)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_the_page_holds_every_cell_of_the_tables(report, page):
    (section,) = report.sections
    expected = [cell for row in tables.lead_table(section) for cell in row]
    expected += [cell for row in tables.cells(section, report.known) for cell in row]
    assert page.cells == expected
    assert any(EVIL in cell for cell in expected)


def test_the_page_begins_with_title_day_and_machine(tmp_path):
    facts = {"started": "2026-01-02T03:04:05+00:00", "processor": "2 × <b>", "hardware": "cpu AVX2"}
    make_run(tmp_path / "a", manifest=facts)
    make_run(tmp_path / "b", seed=1, manifest={**facts, "started": "2026-01-04T00:00:00+00:00"})
    made = command.build([tmp_path], None, "Ours & theirs")
    assert made.origin() == ["2026-01-02 to 2026-01-04", "2 × <b>", "cpu AVX2", "torch 2.6.0"]
    text = tables.markdown(made)
    assert text.startswith(
        "# Ours &amp; theirs\n\n2026-01-02 to 2026-01-04; 2 × &lt;b&gt;; cpu AVX2"
    )


def test_the_page_names_what_is_not_in_the_tables(report, page):
    assert {*report.problems()} <= {*page.texts}
    states = [run.state for run in report.runs if run.state != "done"]
    assert sorted(states) == ["damaged", "failed", "unfinished"]
    for name in ("bad", "slow", "odd"):
        assert any(f"/{name}: " in text for text in page.texts)


def test_a_picture_is_the_same_for_the_same_runs(report):
    rows = [row for row in report.sections[0].rows if row.runs]
    with figures.drawing():
        once, again = (figures.data_uri(figures.bars(rows, [])) for _ in range(2))
    assert once == again


def test_a_report_is_no_run(sweep, report, written):
    assert len(command.build([sweep], None).runs) == len(report.runs)


def test_markdown_holds_no_markup_of_others(written):
    text = (written / "report.md").read_text()
    assert "<" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for line in rows:
        assert len(re.findall(r"(?<!\\)\|", line)) == len(tables.HEADINGS) + 1
    assert r"\`\*\_\[a\]" in text
    assert "gain: paired t-test, n = 3, p = " in text


def test_csv_has_a_row_for_each_run_and_reads_back(sweep, report, written):
    with (written / "runs.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert set(rows) == {str(run.path) for run in report.runs}
    for run in report.runs:
        row = rows[str(run.path)]
        assert (row["state"], row["note"]) == (run.state, run.note)
        if run.result is None:
            assert row["qat_top1_percent"] == ""
            continue
        assert int(row["seed"]) == run.seed
        assert float(row["qat_top1_percent"]) == run.result.qat_top1_percent
        assert float(row["final_train_loss"]) == run.final_train_loss
        last = float(row["final_validation_top1_percent"])
        assert (
            last == run.final_validation_top1_percent == run.records[-1]["validation_top1_percent"]
        )
        assert float(row["average_weight_bits"]) == run.allocation.average_weight_bits
        assert float(row["seconds"]) == 10.5
    assert rows[str(sweep / "bad")]["row"] == f"trainer.name={EVIL}"
    assert rows[str(sweep / "bad")]["note"].startswith("in stage qat")
    first = rows[str(sweep / "ablation=a,seed=0")]
    assert (first["commit"], first["torch"], first["device"]) == ("0" * 40, "2.6.0", "cpu")
    assert first["command"] == "adq-train experiment=x ablation=a seed=0"


def test_the_table_says_what_the_seeds_support(report):
    (section,) = report.sections
    rows = {row[0]: row for row in tables.cells(section, report.known)}
    assert rows["ablation=none"][1:4] == ["3", "90.13 ± 0.15", "–"]
    assert (rows["ablation=none"][5], rows["ablation=none"][8]) == ("3.00 / 3.00", "0.5 ± 0")
    assert rows["ablation=none"][9] == "reference"
    assert rows["ablation=a"][3] == "+1.03"
    assert rows["ablation=a"][9].startswith("gain: paired t-test, n = 3, p = ")
    assert rows[f"trainer.name={EVIL}"][1] == "1"
    assert rows[f"trainer.name={EVIL}"][9] == (
        "too few seeds (n = 1); not at equal bits: -1.00 for weights, -1.00 for inputs"
    )


def test_a_loss_with_a_teacher_in_it_is_marked(tmp_path):
    for name, target in (("plain", "NoDistillation"), ("taught", "TrainedTeacher")):
        target = f"adq_train.training.distillation.{target}"
        changes = {"distillation": {"_target_": target}}
        make_run(tmp_path / name, changes=changes, overrides=(f"distillation={name}",))
    (section,) = command.build([tmp_path], None).sections
    losses = {row[0]: row[8] for row in tables.cells(section, [])}
    assert losses == {"distillation=plain": "0.5", "distillation=taught": "0.5, taught"}


def test_the_seeds_whose_loss_is_lower_are_counted(tmp_path):
    losses = {"none": (0.5, 0.6, 0.7), "a": (0.4, 0.6, 0.8), "b": (0.1, 0.1, 0.1)}
    teacher = {"_target_": "adq_train.training.distillation.TrainedTeacher"}
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            make_run(
                tmp_path / f"{name}{seed}",
                90 + seed * (name == "none"),
                seed=seed,
                losses=(1.0, loss),
                overrides=("experiment=x", f"ablation={name}"),
                changes={"distillation": teacher} if name == "b" else {"extra": {"name": name}},
            )
    (section,) = command.build([tmp_path], None).sections
    found = {
        row.name: difference
        for row, difference in zip(section.rows, section.differences, strict=True)
    }
    assert found["ablation=a"].lower_losses == (1, 3)
    assert found["ablation=b"].lower_losses is None
    words = {row[0]: row[9] for row in tables.cells(section, [])}
    assert words["ablation=a"].endswith("; training loss lower in 1 of 3 seeds")


def test_json_is_one_line_with_the_same_figures(sweep, written, monkeypatch, program):
    monkeypatch.setattr(command, "write", lambda *_: None)  # the page is drawn above
    (line,) = program("adq-report", sweep, "json=true", "reference=ablation=a").out.splitlines()
    found = json.loads(line)
    (section,) = found["sections"]
    rows = {row["name"]: row for row in section["rows"]}
    assert {row["reference"] for row in rows.values()} == {"ablation=a"}
    assert rows["ablation=none"]["seeds"] == [0, 1, 2]
    assert rows["ablation=none"]["qat_top1_percent"]["mean"] == pytest.approx(90.1 + 0.1 / 3)
    assert rows["ablation=none"]["difference"]["verdict"] == "loss"
    assert rows["ablation=a"]["difference"] is None
    assert len(found["problems"]) == len(command.build([sweep], None).problems())


def test_a_diverged_loss_is_shown_and_stays_json(tmp_path, monkeypatch, program):
    make_run(tmp_path / "run", losses=(float("nan"),))
    monkeypatch.setattr(command, "write", lambda *_: None)
    out = program("adq-report", tmp_path, "json=true").out
    (row,) = json.loads(out)["sections"][0]["rows"]
    assert row["final_train_loss"] == {"n": 1, "mean": None, "std": None}


def test_an_error_is_one_line(tmp_path, program):
    make_run(tmp_path / "x" / "a", state="failed", stage="qat", error="out of\nmemory")
    (tmp_path / "nothing").mkdir()
    make_run(tmp_path / "y" / "b")
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([tmp_path / "nothing"], "holds no run"),
        ([tmp_path / "x"], "none of the runs is finished (a: failed, in stage qat"),
        ([tmp_path / "y", "reference=z"], "reference: no row is called 'z'"),
        ([tmp_path / "y", f"output={tmp_path / 'file'}"], "output: cannot write to"),
    ):
        code, _, text = program("adq-report", *arguments)
        assert code == 1
        assert text.startswith("error: ")
        assert message in text
        assert len(text.splitlines()) == 1


def test_settings_have_no_dashes(tmp_path, program):
    code, _, text = program("adq-report", tmp_path, "--first-last", "4")
    assert code == 2
    assert text == "error: --first-last: a setting is written first_last=VALUE, without dashes\n"


def test_nothing_is_written_where_nothing_is_finished(tmp_path, program):
    make_run(tmp_path / "a", state="running", stage="qat")
    assert (
        "unfinished, stopped or still running in stage qat" in program("adq-report", tmp_path).err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_cell_that_a_spreadsheet_would_take_for_a_formula_is_quoted(tmp_path):
    formulas = ["=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(1)"]
    for seed, formula in enumerate(formulas):
        data = {"data": {"name": formula, "fingerprint": "ab" * 32}, "command": [formula]}
        make_run(tmp_path / formula, seed=seed, manifest=data)
    lines = list(csv.DictReader(machine.csv_text(command.build([tmp_path], None)).splitlines()))
    assert sorted(x["data"] for x in lines) == sorted(f"'{x}" for x in formulas)
    assert not [x for line in lines for x in line.values() if x and x[0] in "=+-@"]


def test_no_link_in_a_strangers_folder_is_written_through(tmp_path, program):
    make_run(tmp_path / "runs" / "a")
    target = tmp_path / "precious"
    target.mkdir()
    (tmp_path / "runs" / "report").symlink_to(target)
    told = program("adq-report", tmp_path / "runs").err
    assert "report is a link; say where to write with output=FOLDER" in told
    assert list(target.iterdir()) == []


def test_odd_names_are_shown_and_steer_no_terminal(tmp_path, monkeypatch, program):
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = {"data": {"name": "\x1b]0;mine\x07"}}
    make_run(tmp_path / "runs" / os.fsdecode(b"caf\xe9"), changes=changes)
    evil = "\x1b[2J"
    make_run(tmp_path / "runs" / evil, seed=1, changes=changes, state="failed", error=evil)
    captured = program("adq-report", "~/runs", "output=~/report")
    written = [tmp_path / "report" / x for x in ("report.md", "report.html", "runs.csv")]
    for text in (captured.out, captured.err, *(x.read_text(encoding="utf-8") for x in written)):
        assert not {"\x1b", "\x07"} & set(text)
    assert r"resnet20 on \x1b]0;mine\x07" in captured.out
    assert rf"{tmp_path}/runs/\x1b[2J: failed" in captured.err
    assert "caf\\udce9" in (tmp_path / "report" / "runs.csv").read_text(encoding="utf-8")


def test_a_report_needs_no_torch(tmp_path):
    make_run(tmp_path / "run")
    program = (
        "import sys\n"
        "from adq_train.cli.program import act\n"
        f"sys.argv = ['adq-report', {str(tmp_path)!r}]\n"
        "assert act('adq-report') == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resnet20 on cifar10" in done.stdout
    written = sorted((tmp_path / "report").iterdir())
    assert all(x.read_bytes()[:4] == b"\x89PNG" for x in written if x.suffix == ".png")
    assert [x.name for x in written] == [
        "cifar10-resnet20-accuracy.png",
        "cifar10-resnet20-bars.png",
        "cifar10-resnet20-bits.png",
        "cifar10-resnet20-curves.png",
        "report.html",
        "report.md",
        "runs.csv",
    ]


def test_a_real_sweep(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("adq_train.run.pipeline.report.write", lambda *_: None)  # a run's pictures
    short = ("pretrain.epochs=1", "trainer.epochs=1", "model.width=4", "data.train_images=500")
    outcome = cli("-m", "experiment=quickstart", *short, "ablation=none,uniform_bits")
    assert outcome.code == 0, outcome.err
    report = command.build([tmp_path / "outputs"], None)
    (section,) = report.sections
    assert section.problems == ()
    assert all(run.note == "" for run in report.runs)
    assert (section.data, section.model) == ("digits", "resnet8, width 4")
    assert [row.name for row in section.rows] == ["ablation=none", "ablation=uniform_bits"]
    assert section.common.split() == ["experiment=quickstart", *short]
    assert section.differences[1].verdict == "too few seeds"
    assert len(section.rows[0].runs[0].records[-1]["codebooks"]) == 6
