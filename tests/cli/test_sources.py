"""Configurations of strangers below ``--config-dir``, and values as people type them."""

import pytest
import yaml
from helpers import problems_of

from adq_train.cli.overrides import trust_typed
from adq_train.cli.values import parse, quote, quoted

HYDRA = {
    "a launcher": "hydra:\n  launcher:\n    _target_: subprocess.Popen\n",
    "a sweeper": "hydra:\n  sweeper:\n    _target_: subprocess.Popen\n",
    "a callback": "hydra:\n  callbacks:\n    x: {_target_: subprocess.Popen}\n",
    "a log": "hydra:\n  job_logging:\n    handlers: {x: {(): subprocess.Popen}}\n",
    "the environment": "hydra:\n  job:\n    env_set: {PATH: /tmp/evil}\n",
    "a place to write": "hydra:\n  run:\n    dir: elsewhere\n  output_subdir: x\n",
    "another launcher": "defaults:\n  - override /hydra/launcher: slurm\n",
}
BAD = {
    "a syntax error": ("trainer: [1\n", "x.yaml, line "),
    "a tab": ("trainer:\n\tepochs: 1\n", "x.yaml, line 3, column 1: found character '\\t'"),
    "a key twice": ("seed: 1\nseed: 2\n", "x.yaml, line 3, column 1: found duplicate key seed"),
    "a tag": ("seed: !!python/object/apply:os.system [touch mark]\n", "x.yaml, line 2, column 7"),
    "a list": ("- 1\n", "x.yaml, line 1: holds no settings"),
    "a bomb": (
        "a0: &a0 [x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "x.yaml: its aliases (*name) make",
    ),
    "a bomb of interpolations": (
        "bits:\n  pinned:\n    a0: xx\n"
        + "".join(f"    a{i}: {f'${{bits.pinned.a{i - 1}}}' * 9}\n" for i in range(1, 12)),
        "its interpolations (${name}) expand to more than 10,000 values",
    ),
    "a bomb of relative interpolations": (
        "bits:\n  pinned:\n    a0: xx\n"
        + "".join(f"    a{i}: {f'${{.a{i - 1}}}' * 9}\n" for i in range(1, 12)),
        "its interpolations (${name}) expand to more than 10,000 values",
    ),
    "itself": ("defaults:\n  - x\n", "x.yaml"),
    "a choice that is not there": ("defaults:\n  - override /model: nothing\n", "model/nothing"),
    "a broken interpolation in a defaults list": ("defaults:\n  - /model: ${nowhere}\n", "x"),
}


@pytest.fixture
def problems(tmp_path):
    def of(text, *overrides, sweep=False):
        folder = tmp_path / "mine" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "x.yaml").write_bytes(b"# @package _global_\n" + content)
        return problems_of(["experiment=x", *overrides], str(tmp_path / "mine"), sweep)

    return of


def test_a_file_does_not_say_what_hydra_does(problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in HYDRA.items():
        (found,) = problems(text)
        assert found.startswith("hydra."), name
        assert "only the command line may say" in found
        assert "Popen" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    # Not the second choice of a sweep either, nor through a package header.
    (found,) = problems_of(["experiment=quickstart,x"], str(tmp_path / "mine"), True)
    assert found.startswith("hydra.")


def test_a_file_may_ask_for_a_sweep_and_the_command_line_for_little_more(problems):
    sweep = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2\n"
    assert problems(sweep, "trainer.epochs=1,2") == []
    assert problems("seed: 1\n", "hydra/launcher=slurm", "hydra.launcher.name=x") == []
    (found,) = problems("seed: 1\n", "+hydra.job.env_set.A=b")
    assert found.startswith("hydra.job.env_set.A: is not read; of Hydra there are hydra.mode, ")
    (found,) = problems("seed: 1\n", "seed=interval(0,1)", sweep=True)
    assert found == "seed=interval(0,1): a sweep is a list, a,b,c, or range(0,3)"
    assert "give the folder as --config-dir" in problems("seed: 1\n", "hydra.searchpath=[x]")[0]


def test_a_bad_file_is_told_in_one_line(problems, tmp_path):
    for name, (text, message) in BAD.items():
        found = problems(text)
        assert len(found) == 1, (name, found)
        assert message in found[0], name
        assert "\n" not in found[0]
    (found,) = problems("seed: 1 # é".encode("latin-1"))
    assert "x.yaml, line 2: a byte that is not UTF-8" in found


def test_a_file_does_not_trust_itself(cli, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("adq_train.run.pipeline.run", lambda cfg, *_: seen.append(cfg.copy()))
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    attack = {"trusted_packages": ["subprocess"], "data": {"_target_": "subprocess.Popen"}}
    (folder / "x.yaml").write_text("# @package _global_\n" + yaml.safe_dump(attack))
    more = ["--config-dir", "mine", "experiment=x"]
    outcome = cli(*more)
    assert outcome.code == 1
    assert "trusted_packages: ['subprocess'] comes from a file" in outcome.err
    assert not seen
    assert cli(*more, "trusted_packages=[subprocess]").code == 0
    assert len(seen) == 1


@pytest.mark.parametrize("value", ["'${x}'", "['${x}']", "a", "null", "[a.b-c]", "['']", "{a: b}"])
def test_trust_is_spelled_out(value):
    with pytest.raises(Exception, match="trusted_packages"):
        trust_typed([f"trusted_packages={value}"])
    assert trust_typed(["seed=1", "trusted_packages=[mine,my.own]"]) == ["mine", "my.own"]
    assert trust_typed(["seed=1"]) == []


@pytest.mark.parametrize(
    "value",
    [
        "outputs/quickstart/seed=1-abcd/allocation.json",
        "~/images", "a b=c", "a(1).pt", "a'b=", 'a"b=', "a\\=b\\", "é", "a;b", "a[1]", "a{1}", "#1",
        "007", "1_000", "1e3", "True",
    ],
)  # fmt: skip
def test_a_value_that_means_one_thing_needs_no_quotes(value):
    (text,) = quoted([f"data.root={value}"])
    override = parse(text)
    assert str(override.value()) == value
    assert not override.is_sweep_override()
    assert parse(f"a={quote(value)}").value() == value


@pytest.mark.parametrize(
    "text",
    [
        "seed=1,2", "bits.candidates=[2,3]", "seed=range(1,4)", "seed=1e3", "run_dir=null", "a",
        "run_dir=a,b", "run_dir='a,b'", "data.root=${x}", "seed=", "data.root=/a/b.c-d", "~a.b",
        "bits.candidates=[2,3", "pretrain.checkpoint=float.pt", "bits.pinned={fc: 4}",
    ],
)  # fmt: skip
def test_what_hydra_reads_rightly_stays(text):
    assert quoted([text]) == [text]


def test_a_comma_is_part_of_a_name_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = "seed=1,trainer.epochs=1-ab", "a=2"
    assert quoted([f"run_dir={one}"]) == [f"run_dir={one}"]
    (tmp_path / one).mkdir()
    (tmp_path / two).mkdir()
    assert parse(quoted([f"run_dir={one}"])[0]).value() == one
    (tmp_path / "a,b").mkdir()
    assert parse(quoted(["run_dir=a,b"])[0]).value() == "a,b"
    (tmp_path / "seed=1").mkdir()
    both = parse(quoted([f"data.root={two},seed=1"])[0])
    assert [x.text for x in both.sweep_iterator()] == ["a=2", "seed=1"]
    assert problems_of([both.input_line, "data=imagenet"], sweep=True) == []


def test_an_ambiguous_value_is_shown_as_it_is_written():
    (found,) = problems_of(["run_dir=a,b"])
    assert "which needs -m; a value with a comma is written 'run_dir=\"a,b\"'" in found
    (found,) = problems_of(["run_dir=a=1,b"])
    assert "one text is written 'run_dir=\"a=1,b\"'" in found
    assert problems_of(["run_dir=a,b"], sweep=True) == problems_of(['run_dir="a=1,b"']) == []
