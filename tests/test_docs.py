"""What the pages say to type: every command line is one that the programs take."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import problems_of
from PIL import Image
from torch import nn
from torch.nn import functional

import adq_train
from adq_train.cli.arguments import parse
from adq_train.cli.clean import CleanSettings
from adq_train.cli.export import EvalSettings, ExportSettings
from adq_train.cli.pareto import ParetoSettings
from adq_train.cli.report import ReportSettings
from adq_train.cli.values import quoted

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```\w*\n(.*?)^\1```|^((?: {4}.*\n)+)", re.S | re.M)


def commands(page, program="adq-train"):
    """The lines of a page's code blocks that call a program; long ones may go on after a \\."""
    for _, fenced, indented in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in (fenced or indented).replace("\\\n", " ").splitlines():
            if f"{program} " not in line or "[" in line.split(f"{program} ")[0]:
                continue
            words = shlex.split(line, comments=True)
            if program in words[:3] and not any("…" in word for word in words):
                yield words[words.index(program) + 1 :]


def test_every_command_of_the_pages_is_taken():
    found = [(page.name, words) for page in PAGES for words in commands(page)]
    assert len(found) > 20
    for page, words in found:
        flags = [word for word in words if word.startswith("-")]
        overrides = [x.lstrip("+") for x in words if not x.startswith("-") and "=" in x]
        if any(flag.startswith("--") for flag in flags):  # --help, --settings …
            continue
        assert problems_of(quoted(overrides), sweep="-m" in flags) == [], (page, words)


OTHERS = {
    "adq-export": ExportSettings,
    "adq-eval": EvalSettings,
    "adq-pareto": ParetoSettings,
    "adq-report": ReportSettings,
    "adq-clean": CleanSettings,
}


@pytest.mark.parametrize("program", OTHERS)
def test_every_command_of_the_other_programs_is_taken(program):
    lines = [words for page in PAGES for words in commands(page, program)]
    assert lines
    for words in lines:
        if not {"...", "budgets", *("--help", "|")} & set(words):
            parse(OTHERS[program], [x for x in words if x != "to"])


@pytest.mark.parametrize("page", [x for x in PAGES[1:] if x.parent.name in ("docs", "results")])
def test_a_page_begins_with_what_one_can_do_after_it_and_has_an_example(page):
    title, _, first, *rest = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    if page.name != "api.md":
        assert first.startswith("After this page you ")
        assert any(x.startswith(("```", "    ")) for x in rest)


def complete_examples():
    """The blocks of each page that are marked as ``sh``: what a reader types from top to bottom."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for number, block in enumerate(
            re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        ):
            yield pytest.param(block, id=f"{page.stem}-{number}")


# The example as it stands, its own settings last, but for shorter training and a smaller profile.
BRIEF = """adq-train() {
    command adq-train pretrain.epochs=1 trainer.epochs=1 data.calibration_images=16 "$@"
}"""


@pytest.mark.parametrize("block", complete_examples())
def test_the_examples_of_the_pages_run(block, tmp_path):
    shutil.copytree(ROOT / "examples/own_model", tmp_path, dirs_exist_ok=True)
    for name in ("cat", "dog"):
        pets = tmp_path / "pets" / name
        pets.mkdir(parents=True)
        for number in range(20):
            noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(pets / f"{number}.png")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", f"{BRIEF}\n{block}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_has_an_example_that_runs():
    run = {param.id.rsplit("-", 1)[0] for param in complete_examples()}
    for page, test in (("python", "test_api.py"), ("tasks", "examples/test_tasks.py")):
        assert f"{page}.md" in (ROOT / "tests" / test).read_text(encoding="utf-8")
        run.add(page)
    lists = {"api", "performance"}  # of functions, and of measurements
    assert run | lists == {page.stem for page in (ROOT / "docs").glob("*.md")}


def test_the_five_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) == 5
    torch.manual_seed(0)
    images, labels = torch.rand(64, 8), torch.arange(64) % 4
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    before = model[2].weight.clone()

    def train(network, optimizer):
        codebook = network[2].weight_quantizer.codebook.clone()
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        assert not torch.equal(network[2].weight_quantizer.codebook, codebook)
        network.eval()

    names = {"adq_train": adq_train, "torch": torch, "model": model, "images": images}
    exec(code, {**names, "train": train})
    assert torch.equal(model[2].weight, before)
    packed = adq_train.load_packed("model.safetensors", network=model)
    assert packed(images).shape == (64, 4)


def test_the_readme_can_be_read_in_a_few_minutes():
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert all(len(x) <= 120 for x in lines)


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "training" / "index.html").exists()
