"""Progress on a terminal, in a log, and on a stderr that is no more."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise

import pytest
from toys import Net, Pipe, latents

from dithooks.progress_bars import ProgressReport, progress
from dithooks.recording.record import record

BEST = "best so far 45.2 dB at 2.01× [of 5]"
END = b"<the end>"
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Stream(io.StringIO):
    def __init__(self, terminal=False):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def fileno(self):
        raise io.UnsupportedOperation


class Broken(Stream):
    """A terminal that has hung up, after so many writes."""

    def __init__(self, writes=0):
        super().__init__(terminal=True)
        self.writes = writes

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(5, "Input/output error")
        return super().write(text)


def search(report):
    report("record", 0, 28)
    report("record", 28, 28)
    report("plan", 0, None)
    for done in range(5):
        report("run plans", done, 5, BEST if done else "")


@pytest.fixture
def stderr(monkeypatch):
    """Puts a stream in place of stderr, on a terminal of some width."""

    def put(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return put


@pytest.fixture(params=["rich", "tqdm", "neither"])
def installed(request, monkeypatch):
    """What is installed: the best of it is taken."""
    missing = {"rich": [], "tqdm": ["rich"], "neither": ["rich", "tqdm"]}[request.param]
    if request.param != "neither":
        pytest.importorskip(request.param)
    for name in [module for each in missing for module in (each, f"{each}.console", f"{each}.progress")]:
        monkeypatch.setitem(sys.modules, name, None)
    return request.param


@pytest.mark.parametrize("terminal", [False, True])
def test_silence(stderr, capfd, terminal):
    stream = stderr(Stream(terminal))
    with progress(verbose=False) as report:
        search(report)
    assert stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_a_log_has_a_line_for_each_stage(stderr, installed, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI has it, for the sake of colours
    stream = stderr(Stream())
    with progress() as report:
        search(report)
    *lines, last = stream.getvalue().splitlines()
    assert lines == ["record: 0 of 28", "plan", "run plans: 0 of 5"]
    assert last == f"run plans: 4 of 5, {BEST}"
    assert capsys.readouterr().out == ""


def test_a_log_has_a_line_every_ten_seconds_then_every_tenth_of_the_time(stderr, monkeypatch):
    """One step takes 4 s: lines after 12, 24, … s; after 300 s, a line has to be 30 s after the one before."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = stderr(Stream())
    with progress() as report:
        for step in range(101):
            report("record", step, 200)
            now[0] += 4.0
    lines = stream.getvalue().splitlines()
    steps = [int(re.search(r"(\d+) of 200", line)[1]) for line in lines]
    assert steps[:4] == [0, 3, 6, 9]
    assert 13 < len(lines) < 25
    assert lines[1] == "record: 3 of 200, about 13 min left"  # 197 steps of 4 s
    late = [after - before for before, after in pairwise(steps) if before * 4 > 300]
    assert all(8 <= gap <= 11 for gap in late[:-1])  # steps of 4 s, in 30 to 40 s


@pytest.mark.parametrize("stage", ["record", "run plans", "Gram matrices"])
def test_a_bar_is_whole_at_60_columns(stderr, monkeypatch, stage):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "60")
    stream = stderr(Stream(terminal=True))
    with progress() as report:
        report(stage, 13, 14, "best 54.5 dB, 1.76×", seconds_left=59 * 60)
        report._display._bars.refresh()
    (first, *_) = [
        line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", stream.getvalue())) if line
    ]
    assert len(first) <= 60
    assert first.startswith(f"{stage} ━")
    assert "13 of 14 59 min left best 5" in first
    if stage != "Gram matrices":
        assert first.rstrip().endswith("best 54.5 dB, 1.76×")


def test_the_time_left_is_that_of_all_runs(stderr, monkeypatch):
    """Runs of two kinds, of one count: 3 of 6 took 30 s, so that 30 s are left, whatever the kind is called."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = stderr(Stream())
    with progress() as report:
        for done, name in enumerate(["uncached", "plan a", "plan b", "uncached"]):
            report(name, done, 6)
            now[0] += 10.0
    assert stream.getvalue().splitlines() == [
        "uncached: 0 of 6",
        "plan a: 1 of 6, about 50 s left",
        "plan b: 2 of 6, about 40 s left",
        "uncached: 3 of 6, about 30 s left",
    ]


def test_a_terminal_that_can_nothing_has_lines(stderr, installed, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = stderr(Stream(terminal=True))
    with progress() as report:
        report("verify", 1, 5, BEST)
    assert stream.getvalue() == f"verify: 1 of 5, {BEST}\n"


def test_a_terminal(stderr, installed, capsys):
    stream = stderr(Stream(terminal=True))
    with progress() as report:
        search(report)
    text = stream.getvalue()
    assert sys.stderr is stream
    assert capsys.readouterr().out == ""
    for stage in ("record", "plan", "run plans"):
        assert stage in text
    if installed == "neither":
        assert text.splitlines()[:3] == ["record: 0 of 28", "plan", "run plans: 0 of 5"]
        return
    assert re.search(r"4 of 5|4/5", text)
    assert BEST in text  # brackets and all
    assert text.count(HIDDEN) == text.count(SHOWN)
    assert text.rindex("run plans") > text.rindex("record")


def test_a_new_stage_takes_the_place_of_the_former(stderr):
    pytest.importorskip("rich")
    stream = stderr(Stream(terminal=True))
    with progress() as report:
        report("record", 28, 28)
        report("run plans", 1, 5)
        before = len(stream.getvalue())
        report("run plans", 2, 5)
        report("run plans", 3, None)  # is no reason to forget the total
        report._display._bars.refresh()
        after = stream.getvalue()[before:]
    assert "run plans" in after
    assert "record" not in after


def test_what_is_printed_meanwhile(stderr, monkeypatch):
    """stdout goes where it goes: into a pipe, past the bar; on the same terminal, above it."""
    pytest.importorskip("rich")
    stream, out = stderr(Stream(terminal=True)), Stream()
    monkeypatch.setattr(sys, "stdout", out)
    with progress() as report:
        report("verify", 1, 5)
        print("result")
        print("remark", file=sys.stderr)
    assert out.getvalue() == "result\n"
    assert "remark" in stream.getvalue()
    assert "result" not in stream.getvalue()
    assert (sys.stdout, sys.stderr) == (out, stream)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_remark_is_a_line_that_stays(stderr, installed, capsys, terminal):
    """After the lines of what was done so far, or above the bar of what follows."""
    stream = stderr(Stream(terminal))
    with progress() as report:
        report("record", 0, 28)
        report("record", 28, 28)
        report.remark("no weights")
        report("verify", 1, 5)
    plain = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", stream.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    assert lines.count("no weights") == 1
    before, after = lines[: lines.index("no weights")], lines[lines.index("no weights") :]
    assert any("record" in line for line in before)
    assert any("verify" in line for line in after)
    assert not any("verify" in line for line in before)
    assert capsys.readouterr().out == ""
    if not terminal:
        assert lines[:4] == ["record: 0 of 28", "record: 28 of 28", "no weights", "verify: 1 of 5"]


@pytest.mark.parametrize("make", [lambda: None, Broken])
def test_a_remark_where_nothing_can_be_written(stderr, capfd, make):
    stderr(make())
    with progress() as report:
        report.remark("no weights")
    with progress(verbose=False) as report:
        report.remark("no weights")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_terminal_is_as_it_was_after_an_error(stderr, installed, error):
    stream, out = stderr(Stream(terminal=True)), sys.stdout

    def fail():
        with progress() as report:
            report("verify", 1, 5)
            raise error

    with pytest.raises(error):
        fail()
    assert (sys.stdout, sys.stderr) == (out, stream)
    text = stream.getvalue()
    assert text.count(HIDDEN) == text.count(SHOWN)
    assert text.rfind(SHOWN) >= text.rfind(HIDDEN)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("make", [lambda: None, *(lambda n=n: Broken(n) for n in (0, 1, 3, 8))])
def test_a_display_that_fails_is_given_up(stderr, installed, make):
    stream, out = stderr(make()), sys.stdout
    with progress() as report:
        for _ in range(3):
            search(report)
    assert (sys.stdout, sys.stderr) == (out, stream)


def test_a_closed_stderr(stderr, installed):
    stream = stderr(Stream(terminal=True))
    with progress() as report:
        report("record", 0, 28)
        stream.close()
        search(report)
    assert sys.stderr is stream


def test_nothing_is_shown_afterwards(stderr, installed):
    stream = stderr(Stream(terminal=True))
    with progress() as report:
        report("record", 0, 28)
    before = stream.getvalue()
    report("record", 1, 28)
    assert stream.getvalue() == before


def test_what_recording_tells(stderr):
    stream = stderr(Stream())
    report: ProgressReport
    with progress() as report:
        record(Pipe(Net()), lambda pipe: pipe(latents(), steps=4), report=report)
    assert stream.getvalue().splitlines()[0] == "record: 1 of 4"


INTERRUPTED = """
import sys, time
from dithooks.progress_bars import progress
with progress() as report:
    for done in range(1000):
        report("verify", done, 1000, "best so far")
        print("ready", flush=True)
        time.sleep(0.05)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.timeout(120)
def test_ctrl_c_on_a_real_terminal():
    pytest.importorskip("rich")
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    code = [sys.executable, "-c", INTERRUPTED]
    read: list[bytes] = []

    def drain():  # meanwhile: a terminal that no one reads is full soon
        with suppress(OSError):  # what Linux says at the end
            while chunk := os.read(master, 65536):
                read.append(chunk)

    def heed():  # where these tests run in the background, an interrupt is ignored, and would be by the child
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    given = {"stdout": subprocess.PIPE, "stderr": slave, "env": environment, "text": True, "preexec_fn": heed}
    with subprocess.Popen(code, **given) as process:
        reader = threading.Thread(target=drain)
        reader.start()
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.7)  # of which the display makes use
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            os.write(slave, END)  # held open till here: what is written last may be lost with the last to close
            while not b"".join(read).endswith(END):
                time.sleep(0.01)
        finally:
            process.kill()
            os.close(slave)
            reader.join()
            os.close(master)
    text = b"".join(read)
    bar, _, rest = text.decode(errors="replace").rpartition(SHOWN)
    assert "of 1000" in bar
    assert "KeyboardInterrupt" in rest  # below, with the cursor back
    assert HIDDEN not in rest
