"""bench/accelerator.py, at a size that runs anywhere: what it counts, what it works out, and how it ends."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bench.accelerator import main
from bench.large import NAMES, eager
from bench.large.deadline import Deadline, OutOfTime
from bench.large.geometry import FLUX, TINY_FLUX, TINY_WAN, WAN_LARGE, WAN_SMALL
from bench.large.limits import limits
from bench.large.methods import CACHE_DIT, FIRST_BLOCK, MAGNITUDE, OURS, TAYLOR, Method, Setting, Unavailable
from bench.large.models import build, fill
from bench.large.parts import PARTS, measure_all
from bench.large.report import FAILED, MEASURED, NOT_REACHED, Report, new_row
from bench.large.session import Session
from bench.large.watching import block_times, blocks_of, counting
from dithooks.environment import machine

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
STATIC, _, DYNAMIC = OURS
STEPS = 6


@pytest.fixture(scope="module")
def flux():
    return build(TINY_FLUX, CPU)


@pytest.fixture(scope="module")
def wan():
    return build(TINY_WAN, CPU)


def ran_with(method, made, geometry):
    """What a second run draws, and which blocks run in it."""
    pipe, run = made
    with method.attach(Setting(pipe, STEPS)):
        run(STEPS, 3)  # broken off: nothing of it may be left in the next
        with counting(pipe.transformer, geometry) as ran:
            drawn = run(STEPS)
    return drawn, ran


@pytest.mark.parametrize(
    "method",
    [DYNAMIC, pytest.param(CACHE_DIT, id="cache-dit"), FIRST_BLOCK, MAGNITUDE, TAYLOR],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_same_blocks_at_the_same_steps(name, method, request):
    """All libraries leave out what ours does, and what they draw then is the same; afterwards nothing of it is left."""
    pytest.importorskip(method.needs)
    made, geometry = request.getfixturevalue(name), TINY_FLUX if name == "flux" else TINY_WAN
    pipe, run = made
    plain, order = run(STEPS), list(pipe.transformer._modules)
    drawn, ran = ran_with(STATIC, made, geometry)
    theirs, there = ran_with(method, made, geometry)
    every, first = list(range(geometry.blocks)), [0]
    expected = [every if step % 2 == 0 else first for step in range(STEPS) for _ in range(geometry.calls)]
    assert ran.calls == expected
    assert ran.picture(geometry.calls) == "●○●○●○"
    if method in (MAGNITUDE, TAYLOR):
        assert there.calls == [call if call == every else [] for call in expected]
        assert not torch.equal(theirs, plain)
    else:
        assert there.calls == expected
        torch.testing.assert_close(theirs, drawn, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(drawn, plain, rtol=1e-3)
    assert torch.equal(run(STEPS), plain)
    assert list(pipe.transformer._modules) == order


def test_limits_by_hand():
    """Of two blocks of four half the executions are left out, which is 12 of 40 ms, in a run of 50."""
    found = limits([4, 4, 4, 4], [4, 4, 2, 2], [1.0, 3.0, 2.0, 4.0], 0.050, 1.25)
    assert found["limit"] == pytest.approx(16 / 12)
    assert found["limit_by_time"] == pytest.approx(40 / 28)
    assert found["limit_with_rest"] == pytest.approx(50 / 38)
    assert found["ratio_to_limit"] == pytest.approx(1.25 * 12 / 16)
    assert found["ratio_to_limit_by_time"] == pytest.approx(1.25 * 28 / 40)
    assert found["ratio_to_limit_with_rest"] == pytest.approx(1.25 * 38 / 50)


def test_sizes_by_hand():
    """Tokens, and the work of one call, against sums that were done apart."""
    assert (FLUX.tokens, WAN_SMALL.tokens, WAN_LARGE.tokens) == (4096, 32760, 7800)
    assert (FLUX.blocks, WAN_SMALL.blocks, WAN_LARGE.blocks) == (57, 30, 40)
    width, tokens = 3072, 4608
    assert FLUX.flops == pytest.approx(57 * (24 * width**2 * tokens + 4 * tokens**2 * width))
    linear = 2 * 32760 * (6 * 1536**2 + 2 * 1536 * 8960) + 2 * 512 * 2 * 1536**2
    attention = 4 * 32760**2 * 1536 + 4 * 32760 * 512 * 1536
    assert WAN_SMALL.flops == pytest.approx(30 * (linear + attention))


@pytest.mark.parametrize("geometry", [FLUX, WAN_SMALL, WAN_LARGE], ids=lambda each: each.name)
def test_what_a_geometry_says_fits_the_model(geometry):
    """Blocks and layers are where they are looked for, in the sizes of those models."""
    import diffusers

    from bench.large.models import CLASSES

    with torch.device("meta"):
        model = getattr(diffusers, CLASSES[geometry.kind])(**geometry.config)
    assert len(blocks_of(model)) == geometry.blocks
    assert all(hasattr(block, geometry.attends) for block in blocks_of(model))
    size = {"flux": 11.9e9, "wan_1.3b": 1.42e9, "wan_14b": 14.29e9}[geometry.name]
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(size, rel=0.005)


def test_weights_are_all_drawn(wan):
    """No gate at zero, norms at one, the rotary tables as the class makes them, float32 where diffusers keeps it."""
    from dataclasses import replace

    from diffusers import WanTransformer3DModel

    model, usual = wan[0].transformer, WanTransformer3DModel(**TINY_WAN.config)
    assert torch.equal(model.rope.freqs_cos, usual.rope.freqs_cos)
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in usual.named_buffers()}
    assert bool((model.blocks[1].norm2.weight == 1).all())
    assert all(each.count_nonzero() > 0.9 * each.numel() for each in model.parameters())
    half = build(replace(TINY_WAN, dtype=torch.bfloat16), CPU)[0].transformer
    whole = {name for name, each in half.named_parameters() if each.dtype == torch.float32}
    assert "blocks.0.scale_shift_table" in whole
    assert "condition_embedder.time_embedder.linear_1.weight" in whole
    assert "blocks.0.attn1.to_q.weight" not in whole


def test_fill_keeps_the_size():
    """Of a linear layer's input, of an embedding's patches, and of a table of one row."""
    drawn = torch.Generator().manual_seed(0)
    for shape, fan_in in (((400, 100), 100), ((200, 4, 1, 5, 5), 100), ((1, 6, 400), 400)):
        assert float(fill(torch.empty(shape), "weight", drawn).std()) == pytest.approx(fan_in**-0.5, rel=0.1)


def test_block_times(flux):
    """Every block has a time, and so has the rest; together they are no more than the run."""
    pipe, run = flux
    begun = time.perf_counter()
    times = block_times(pipe.transformer, lambda: run(STEPS))
    taken = 1e3 * (time.perf_counter() - begun)
    assert len(times.block_ms) == TINY_FLUX.blocks
    assert min(times.block_ms) > 0
    assert 0 < STEPS * (sum(times.block_ms) + times.other_ms) < taken


def stubborn(deadline, end):
    """Work that goes on whatever error it meets."""
    with deadline.kept():
        while time.monotonic() < end:
            with suppress(Exception):
                time.sleep(0.01)


def test_a_deadline_breaks_off():
    """What takes too long ends with it, even where every Exception is caught; a timer of others goes on."""
    before = signal.getsignal(signal.SIGALRM)
    others = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        begun = time.monotonic()
        with pytest.raises(OutOfTime):
            stubborn(Deadline(0.05), begun + 20)
        assert time.monotonic() - begun < 10
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) is before
        with pytest.raises(OutOfTime):
            stubborn(Deadline(-1), begun + 20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)


def session(folder, seconds=60.0):
    return Session(CPU, Deadline(seconds), Report(folder, CPU, "tiny", seconds / 60), "eager", 1)


def test_nothing_fits(tmp_path):
    """With no time at all, every row of every part is in the file, and says that it was not reached, and why."""
    here = session(tmp_path, 2.0)
    measure_all(here)
    found = json.loads((tmp_path / "accelerator_cpu_tiny.json").read_text())
    assert tuple(found["parts"]) == NAMES == tuple(part.name for part in PARTS)
    for part in PARTS:
        rows = found["parts"][part.name]["rows"]
        assert [row["name"] for row in rows] == ["plain", *(each.name for each in part.methods)]
        assert all(row["status"] == NOT_REACHED and "were left in all" in row["why"] for row in rows)
    assert "not reached" in (tmp_path / "accelerator_cpu_tiny.md").read_text()


def test_a_row_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    """An error in one method, and one that is missing, are written down; the rows before and behind are measured."""

    def breaks(setting):
        raise RuntimeError("CUDA out of memory\nand a page of details")

    def misses(setting):
        raise Unavailable("there is none here")

    methods = (STATIC, Method("broken", "x", "y", breaks), Method("missing", "x", "y", misses), DYNAMIC)
    absent = Method("absent", "x", "y", breaks, needs="no_such_package")
    here = session(tmp_path)
    rows = [new_row(each, "", "") for each in ("plain", "static", "broken", "missing", "dynamic", "absent")]
    part = here.report.part("flux", "", rows)
    eager.measure(here, TINY_FLUX, (*methods, absent), part, here.deadline)
    found = {row["name"]: row for row in rows}
    assert [found[name]["status"] for name in ("plain", "static", "dynamic")] == [MEASURED] * 3
    assert (found["broken"]["status"], found["broken"]["why"]) == (FAILED, "RuntimeError: CUDA out of memory")
    assert (found["missing"]["status"], found["missing"]["why"]) == (NOT_REACHED, "there is none here")
    assert found["absent"]["why"] == "no_such_package is not installed"
    row = found["static"]
    assert row["blocks_run"] == 8 + 4 * 8 - 4 * 4  # the first block eight times, the other four half as often
    assert row["limit"] == pytest.approx(40 / 24)
    assert row["speedup"] == pytest.approx(found["plain"]["all_seconds"][0] / row["seconds"])
    # Once a run, at the scheduler's first step: has the timestep moved, too?
    assert (found["plain"]["host_reads"], row["host_reads"]) == (0, 1)
    assert found["dynamic"]["host_reads"] == 4 + 1
    assert (row["finite"], row["sane"]) == (True, True)
    assert row["bytes_held"] > 0


def test_parts_of_earlier_runs_stay(tmp_path):
    """A file of the same machine and versions keeps what is not measured now; another one is not mixed in."""
    first = Report(tmp_path, CPU, "tiny", 1.0)
    first.part("flux", "then", [new_row("plain", "", "")])
    first.write(1.0)
    second = Report(tmp_path, CPU, "tiny", 1.0)
    second.part("wan", "now", [new_row("plain", "", "")])
    second.write(1.0)
    path = tmp_path / "accelerator_cpu_tiny.json"
    found = json.loads(path.read_text())
    assert set(found["parts"]) == {"flux", "wan"}
    path.write_text(json.dumps({**found, "device_name": "another"}))
    assert Report(tmp_path, CPU, "tiny", 1.0).before == {}
    path.write_text("{")
    assert Report(tmp_path, CPU, "tiny", 1.0).before == {}


def test_run_as_a_file(tmp_path):
    """From another folder, where only the script itself can tell where the packages of the checkout are."""
    script = ROOT / "bench" / "accelerator.py"
    command = [sys.executable, script, "--device", "cpu", "--size", "tiny", "--minutes", "3", "--rounds", "1"]
    command += ["--only", "flux", "--out", tmp_path / "new"]
    bare = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "new" / "accelerator_cpu_tiny.json").read_text())
    assert (found["schema"], found["kind"], found["size"]) == (1, "accelerator", "tiny")
    assert {"torch", "diffusers"} <= set(found["versions"])
    plain, *rows = found["parts"]["flux"]["rows"]
    assert plain["status"] == MEASURED
    assert [row["name"] for row in rows][:3] == ["static", "planned", "dynamic"]
    needed = {"seconds", "speedup", "limit", "limit_by_time", "limit_with_rest", "ratio_to_limit", "host_reads"}
    needed |= {"ratio_to_limit_by_time", "ratio_to_limit_with_rest", "blocks_run", "relative_error", "finite", "runs"}
    for row in rows:
        assert row["status"] in (MEASURED, NOT_REACHED)
        assert row["status"] == MEASURED or row["why"]
        assert row["status"] != MEASURED or needed <= set(row)
    assert "## flux" in done.stdout
    assert found["parts"]["flux"]["facts"]["recorded_run_seconds"] > 0


def test_without_an_accelerator(monkeypatch, capsys):
    """It says so, and ends in peace; asked wrongly, it says that."""
    monkeypatch.setattr(machine, "accelerator", lambda: None)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("There is no accelerator here")
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", "--minutes", "0"])
    assert "must be above 0" in capsys.readouterr().err


def test_memory_of_a_device_that_is_not_this_builds_accelerator(monkeypatch):
    """A CUDA build that is asked for the CPU raises ValueError; there is nothing to tell then."""

    def refuse(device):
        raise ValueError(f"{device} doesn't match the current accelerator cuda.")

    monkeypatch.setattr(torch.accelerator, "memory_allocated", refuse)
    assert machine.memory_allocated(torch.device("cpu")) is None
