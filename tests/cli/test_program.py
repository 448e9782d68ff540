"""How programs begin and end: processes of their own, for exit codes and streams are theirs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adq_train import __version__

PROGRAMS = {
    "train": "adq-train",
    "report": "adq-report",
    "pareto": "adq-pareto",
    "export": "adq-export",
    "evaluate": "adq-eval",
    "clean": "adq-clean",
}


# A program whose body is a module of the test's own.
ACTING = "from adq_train.cli import program; program.PROGRAMS['adq-x'] = 'acting:main'; "


def start(code, *, cwd, function="run('adq-x')", arguments=(), **more):
    """Runs a program whose body is ``code``, in a module of its own."""
    (cwd / "acting.py").write_text(code)
    program = f"import sys; sys.argv[0] = 'x'; {ACTING}program.{function}"
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    environment = {**os.environ, "PYTHONPATH": str(cwd), **more.pop("env", {})}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **more)


def finish(*arguments, **more):
    process = start(*arguments, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_every_program_tells_its_version_without_torch(tmp_path):
    code = (
        "import sys\nfrom adq_train.cli import program\n"
        "for function, name in " + repr(list(PROGRAMS.items())) + ":\n"
        "    sys.argv = [name, '--version']\n"
        "    try: getattr(program, function)()\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'hydra'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} {__version__}" for name in PROGRAMS.values()]
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_an_encoding_lacks_are_replaced(tmp_path):
    body = "import sys\ndef main():\n    print('Ω ■ ± ä \\udcff'); print('→', file=sys.stderr)\n"
    for encoding, out in (("ascii", "Omega # +/- ? ?\n"), ("latin-1", "Omega # ± ä ?\n")):
        done = start(body, cwd=tmp_path, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
        assert done.communicate() == (out, "->\n")
        assert done.returncode == 0
    done = start(body, cwd=tmp_path, env={"PYTHONIOENCODING": "utf-8"}, encoding="utf-8")
    assert done.communicate() == ("Ω ■ ± ä ?\n", "→\n")


@pytest.mark.parametrize(("needed", "code"), [("True", 141), ("False", 0)])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, needed, code):
    body = (
        "import sys, time\nfrom pathlib import Path\ndef main():\n    time.sleep(0.3)\n"
        "    for i in range(20000): print('a line'); print('a line', file=sys.stderr)\n"
        "    Path('end').touch()\n"
    )
    reader, writer = os.pipe()
    function = f"run('adq-x', needs_output={needed})"
    process = start(body, cwd=tmp_path, function=function, stdout=writer, stderr=writer)
    os.close(reader)
    os.close(writer)
    assert process.wait(60) == code
    assert (tmp_path / "end").exists()


def test_output_that_cannot_be_written_is_an_error(tmp_path):
    with Path("/dev/full").open("w") as full:
        code, _, err = finish("def main():\n    print('x')\n", cwd=tmp_path, stdout=full)
    assert (code, err) == (1, "error: cannot write the output (No space left on device)\n")


def test_closed_streams_are_nobody_s_file(tmp_path):
    body = (
        "import sys\nfrom adq_train.progress import Progress\ndef main():\n"
        "    with open('own', 'w') as file, Progress('qat', 1) as steps:\n"
        "        steps.advance('x')\n"
        "        print('to stdout'); print('to stderr', file=sys.stderr)\n"
        "        assert file.fileno() > 2\n"
    )
    (tmp_path / "acting.py").write_text(body)
    program = f"{ACTING}program.run('adq-x')"
    shell = f'{sys.executable} -c "{program}" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run(shell, shell=True, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "own").read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["import", "main"])
def test_a_signal_ends_a_program_without_a_traceback(tmp_path, number, where):
    wait = "from pathlib import Path\nPath('ready').touch()\nimport time\ntime.sleep(60)\n"
    indented = "".join(f"    {line}\n" for line in wait.splitlines())
    body = wait if where == "import" else f"def main():\n{indented}"
    process = start(body, cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", f"\nstopped by {number.name}\n")
    assert process.returncode == 128 + number


def test_nohup_stays_nohup(tmp_path):
    body = "import os, signal\ndef main():\n    os.kill(os.getpid(), signal.SIGHUP)\n"
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    (tmp_path / "acting.py").write_text(body)
    program = f"{ignore}{ACTING}program.run('adq-x')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_an_error_is_one_line_and_debug_shows_where(tmp_path):
    body = "def main():\n    raise ValueError('no\\nluck')\n"
    line = "error: ValueError: no luck (adq-x --debug … shows where)\n"
    utf8 = {"PYTHONIOENCODING": "utf-8"}
    assert finish(body, cwd=tmp_path, env=utf8) == (1, "", line)
    code, _, err = finish(body, cwd=tmp_path, env=utf8, arguments=["--debug"])
    assert code == 1
    assert "Traceback" in err


def test_the_command_line_alone_prints_help(cli, tmp_path):
    for arguments in ([], ["-m"]):
        outcome = cli(*arguments)
        assert outcome.code == 2
        assert "adq-train [group=choice ...]" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_hydra_s_own_words_go_through_the_program(cli, tmp_path):
    for flag, value in (("--experimental-rerun", "x"), ("-cp", "."), ("-cn", "x")):
        outcome = cli(flag, value, "seed=1")
        assert outcome.code == 2
        assert outcome.err.startswith("error: --")
    outcome = cli("--cfg", "job", "--config-dir", "nowhere", "seed=1")
    assert "--config-dir: there is no folder nowhere" in outcome.err


def test_a_stopped_run_says_so(tmp_path):
    from adq_train.interrupts import Interrupted
    from adq_train.run.folder import RunFolder
    from adq_train.settings.schema import Config

    run = RunFolder(tmp_path / "run", Config.of({}))
    with pytest.raises(Interrupted), run as folder, folder.stage("qat"):
        raise Interrupted(signal.SIGTERM)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["stage"]) == ("stopped", "qat")
    assert status["error"] == "stopped by SIGTERM"


@pytest.mark.parametrize("name", [x for x in PROGRAMS.values() if x != "adq-train"])
def test_help_has_the_same_form_everywhere_and_begins_with_examples(name, program):
    code, out, err = program(name, "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    headings = [x.split(",")[0] for x in lines]
    places = [headings.index(x) for x in ("Examples", "Usage", "Settings")]
    assert places == sorted(places)
    assert places[0] == 2
    assert lines[0].startswith(f"{name}: ")
    assert lines[3].startswith(f"  {name} ")
    assert max(map(len, lines)) <= 80
