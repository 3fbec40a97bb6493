"""A command whose stdout or stderr is closed, or a pipe that nobody reads: it ends as ever, and without a traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES, REMARKS = b"figure 0\nfigure 1\nfigure 2\n", b"remark\nremark\nremark\n"
# A command that prints to both while it works, writes a file at last, and misses a target.
WORK = """
import sys
from dithooks.cli import env_command, main

def run(args):
    for number in range(3):
        print("figure", number, flush={flush})
        print("remark", file=sys.stderr)
    with open("written", "w") as file:
        file.write("all of it")
    return 3

env_command.run = run
sys.exit(main.main(["env"]))
"""


def run(folder, command, stdout=None, stderr=None):
    """Return the exit code of a command, and what comes to the streams that somebody reads.

    Args:
        folder: to run it in.
        command: the arguments of Python.
        stdout: ``"unread"``: a pipe whose reader has gone; ``"closed"``: before it starts; a path; else it is read.
        stderr: likewise.
    """
    ends, shell, files = [], [], {}
    for number, (name, kind) in enumerate({"stdout": stdout, "stderr": stderr}.items(), 1):
        if kind == "unread":
            read, write = os.pipe()
            os.close(read)
            ends.append(write)
        if kind == "closed":
            shell.append(f"{number}>&-")
        elif kind is not None and kind != "unread":
            shell.append(f"{number}>{kind}")
        files[name] = ends[-1] if kind == "unread" else subprocess.PIPE
    line = " ".join(["exec", *map(shlex.quote, [sys.executable, *command]), *shell])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], cwd=folder, env=environment, timeout=60, **files)
    for each in ends:
        os.close(each)
    return done.returncode, done.stdout or b"", done.stderr or b""


def work(folder, flush=True, **streams):
    done = run(folder, ["-c", WORK.format(flush=flush)], **streams)
    written = folder / "written"
    return (*done, written.read_text() if written.exists() else None)


def test_streams_that_are_read(tmp_path):
    assert work(tmp_path) == (3, FIGURES, REMARKS, "all of it")


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("kind", ["unread", "closed"])
@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_work_goes_on_where_nobody_reads_what_is_printed(tmp_path, which, kind, flush):
    """The exit code and the file are as ever; the other stream has what belongs there, and no more."""
    streams = dict.fromkeys(("stdout", "stderr") if which == "both" else (which,), kind)
    figures, remarks = b"" if "stdout" in streams else FIGURES, b"" if "stderr" in streams else REMARKS
    assert work(tmp_path, flush, **streams) == (3, figures, remarks, "all of it")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
class TestFullDisk:
    """Somebody may read it: what is printed may not be lost without a word."""

    def test_of_stdout(self, tmp_path):
        code, _, said, _ = work(tmp_path, stdout="/dev/full")
        assert (code, said) == (2, b"dithooks: error: stdout cannot be written: No space left on device\n")

    def test_of_stdout_found_at_the_end(self, tmp_path):
        code, _, said, written = work(tmp_path, flush=False, stdout="/dev/full")
        error = b"dithooks: error: stdout cannot be written: No space left on device\n"
        assert (code, said, written) == (2, REMARKS + error, "all of it")

    def test_of_stderr(self, tmp_path):
        assert work(tmp_path, stderr="/dev/full") == (3, FIGURES, b"", "all of it")


@pytest.mark.parametrize("kind", ["unread", "closed"])
@pytest.mark.parametrize("command", ["--help", "--version", "search --help"])
def test_help_that_nobody_reads(tmp_path, command, kind):
    assert run(tmp_path, ["-m", "dithooks.cli", *command.split()], stdout=kind) == (0, b"", b"")


@pytest.mark.parametrize("kind", ["unread", "closed"])
def test_an_error_that_nobody_reads_is_not_among_the_figures(tmp_path, kind):
    command = ["-m", "dithooks.cli", "search", "demo", "--json", "-", "--max-evals", "few"]
    assert run(tmp_path, command, stderr=kind) == (2, b"", b"")
    code, out, said = run(tmp_path, command, stdout=kind)
    assert (code, out) == (2, b"")
    assert said.startswith(b"dithooks: error: argument --max-evals: invalid int value: 'few'")


def test_streams_of_the_caller_are_as_they_were():
    code = "import sys; from dithooks.cli.main import main; made = sys.stdout, sys.stderr\n"
    code += "main(['search']); print((sys.stdout, sys.stderr) == made)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"
    assert done.stderr.startswith("dithooks: error: the following arguments are required: MODEL")
