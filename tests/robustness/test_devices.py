"""Everything on a device called npu (PyTorch's private-use backend, renamed, and simulated in the host's memory): what
is decided, where residuals lie, what waits for the device, and in which precision.

The simulation (``devices_fake.py``) writes down every operation that makes the host wait, and the line that asked for
it. The checks run in one process of their own (``devices_checks.py``); each test here reads what came out of one of
them.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dithooks.blocks import observation
from dithooks.engine import clock, decider, finite_check, output_comparison, timestep_argument
from dithooks.engine.timestep_argument import is_same

pytestmark = [pytest.mark.line("Devices, Ascend NPU"), pytest.mark.on("a transformer of five blocks"), pytest.mark.slow]

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "dithooks"
SOURCES = sorted(PACKAGE.rglob("*.py"))
JUDGE, SIGMAS = decider.__file__, clock.__file__
FINITE = finite_check.__file__  # once for each residual, when it is first reused
TIMESTEP = timestep_argument.__file__  # once, where guidance's two calls have a timestep each: is it the same?
STATIC = ("interval", "range, weights given", "by step", "on the host", "bfloat16", "line", "preset", "magnitudes")
LOOKING = ("threshold", "by the first block", "largest sample", "one for both", "easycache", "budget")
CHECKS = ("counting", "mixing", "kept", "clocks", "profiled", "searched", "timed", "mismatched", "refused", "precision")
ALL = [*(f"static: {n}" for n in STATIC), *(f"looking: {n}" for n in LOOKING), *CHECKS, "tiny_flux", "questions"]


@pytest.fixture(scope="module")
def found():
    """What came out of all checks."""
    done = subprocess.run([sys.executable, HERE / "devices_checks.py"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def lines(waits):
    """The files that asked, and how often."""
    return {str(PACKAGE.parent / line.split(":")[0]): number for line, number in waits.items()}


@pytest.mark.parametrize("name", ALL)
def test_it_runs_and_makes_nothing_in_double_precision(found, name):
    """Each of these checks runs to its end, and never makes a tensor in float64 on the device, which NPUs lack."""
    assert "traceback" not in found[name], found[name]["traceback"]
    assert found[name]["doubles"] == {}


def test_every_check_is_read(found):
    """No check of the program goes without a test here."""
    assert set(found) == set(ALL)


def test_the_simulation_counts(found):
    """Reading a number, comparing, copying to the host wait once each; arithmetic and queued copies do not."""
    waits = found["counting"]["waits"]
    free = {"copied into pinned, not blocking", "from pinned, not blocking", "arithmetic"}
    assert waits == {name: int(name not in free) for name in waits}
    assert len(waits) == 14
    assert found["counting"]["device"] == "npu:0"
    assert found["counting"]["pinned"]


def test_devices_cannot_be_mixed(found):
    """A tensor of the host's with one of the device's is an error, as on any accelerator."""
    raised = found["mixing"]["raised"]
    assert len(raised) == 2
    assert all("same device" in error and "npu:0" in error for error in raised)


@pytest.mark.parametrize("name", [f"static: {n}" for n in STATIC] + [f"looking: {n}" for n in LOOKING])
def test_the_same_as_on_the_host(found, name):
    """Decisions and outputs on the device are those on the host, residuals are reused, and all memory comes back."""
    each = found[name]
    assert each["device"] == "npu:0"
    assert each["same decisions"]
    assert each["reused"] >= 8
    assert each["moved"] > 1e-3  # the cache changes the output, or this would show nothing
    assert max(each["off"], each["again off"]) < 1e-6
    assert each["held after removal"] == 0


@pytest.mark.parametrize("name", STATIC)
def test_a_static_plan_waits_for_its_residuals(found, name):
    """Once tested, a static plan waits for each residual and the first timestep; for noise levels if it needs them."""
    each = found[f"static: {name}"]
    by_sigma = name in ("range, weights given", "by step", "line", "preset")
    waits = lines(each["ours, second run"])
    read = each["computed"] // 2 if name == "magnitudes" else each["read"]  # it decides after they are read
    assert waits == {FINITE: read, TIMESTEP: 1} | ({SIGMAS: 1} if by_sigma else {})
    assert each["waits, second run"] == each["plain waits"] + sum(waits.values())


@pytest.mark.parametrize("name", LOOKING)
def test_a_policy_that_looks_waits_once_for_each_decision(found, name):
    """Threshold and its kin make one host sync more for each decision by a value, and no other."""
    each = found[f"looking: {name}"]
    assert each["looked"] >= 6
    waits = lines(each["ours, second run"])
    # A residual is read when it might be reused, which the policy has yet to decide.
    assert each["read"] <= waits[FINITE] <= each["computed"] // 2
    assert waits == {JUDGE: each["looked"], FINITE: waits[FINITE], TIMESTEP: 1}
    assert each["waits, second run"] == each["plain waits"] + sum(waits.values())


@pytest.mark.parametrize("name", STATIC)
def test_the_first_run_learns_and_tests_once(found, name):
    """The first run of a cache waits a few times more: to see the wiring, and to test the first residual by replays."""
    waits = lines(found[f"static: {name}"]["ours, first run"])
    assert set(waits) <= {observation.__file__, output_comparison.__file__, SIGMAS, TIMESTEP, FINITE}
    assert waits[output_comparison.__file__] <= 3  # is it finite, how far off, of what size
    assert waits[observation.__file__] == 10  # five blocks, two streams each


@pytest.mark.parametrize("name", ["device", "host", "host, not pinned", "bfloat16", "host, bfloat16"])
def test_where_residuals_are_kept(found, name):
    """They lie where cache_device says, in cache_dtype; bytes_held counts them; copies are queued, if memory pins."""
    each = found["kept"][name]
    host = name.startswith("host")
    assert each["devices"] == (["cpu"] if host else ["npu:0"])
    assert each["dtypes"] == ["torch.bfloat16" if "bfloat16" in name else "torch.float32"]
    assert each["pinned"] == [host and "not" not in name] * 4
    assert each["bytes_held"] == each["bytes"] > 0
    # The only other memory is the last latents, by which the next call is recognised.
    norms = each["device bytes"] - each["latents"] - (0 if host else each["bytes"])
    assert norms in range(4 * 4 + 1)  # but for a number of each of the four residuals, until it is read
    assert each["reused"] == 12
    assert each["again off"] == 0
    # Twelve residuals a run are made from memory that waits; each that is new is read, and so is the first timestep.
    assert each["waits"] == (12 if "not pinned" in name else 0) + each["read"] + 1
    # Of two runs: two streams of twelve residuals, and the norm of each; two to test the first.
    queued = {"down": 24 + 12, "up": 26} if host else {"down": 12}
    assert each["queued"] == ({} if "not pinned" in name else queued)


def test_what_tells_the_step(found):
    """A timestep_scope costs no wait; a timestep that lies on the device one a call, and one where a run begins."""
    scope, timestep = found["clocks"]["scope"], found["clocks"]["timestep"]
    assert lines(scope["waits"]) == {FINITE: scope["read"]}
    assert lines(timestep["waits"]) == {TIMESTEP: 9, FINITE: timestep["read"]}  # eight calls
    assert scope["reused"] == 6
    assert found["clocks"]["timestep"]["reused"] == 6


def test_profile_is_the_same(found):
    """dithooks.profile measures on the device what it does on the host."""
    assert found["profiled"]["same"], found["profiled"]["text"]
    assert "reused at threshold" in found["profiled"]["text"]


def test_search_where_events_cannot_be_timed(found):
    """record, plan and search work on a device whose events tell no time, and wait for it instead to read the clock."""
    each = found["searched"]
    assert each["grams off"] < 1e-5
    assert each["block_ms"] > 0
    assert each["synchronized"] > 100
    assert each["plan reused"] > 0
    assert each["plan off"] == 0
    assert lines(each["plan waits"]) == {SIGMAS: 1, TIMESTEP: 1, FINITE: each["plan read"]}
    assert each["search reached"]


def test_search_where_events_can_be_timed(found):
    """Where events tell the time, a recorded run puts them into the stream, and hardly ever waits for the device."""
    each = found["timed"]
    assert len(each["block_ms"]) == 5
    assert min(each["block_ms"]) > 0
    assert sum(each["block_ms"]) < each["call_ms"] < each["run_ms"]
    assert each["synchronized"] < 10


def test_a_model_that_moves_is_computed(found):
    """A residual of another device is not used: the call is computed, and the next may reuse again."""
    assert found["mismatched"]["reasons"] == ["refresh", "reuse", "shape", "reuse", "shape"]


def test_an_unsound_range_is_refused(found):
    """The first residual is tested by a replay on the device, and a range that loses something is refused."""
    assert found["refused"]["error"].startswith("WiringError: ")
    assert "off (relative L2)" in found["refused"]["error"]


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_decisions_are_made_in_float32(found, dtype):
    """Changes of half-precision activations are those worked out in float64, also where a sum in half overflows."""
    each = found["precision"][dtype]
    assert each["dtype"] == each["rate dtype"] == "torch.float32"
    assert each["change"] == pytest.approx(each["change, float64"], rel=1e-5)
    assert each["rate"] == pytest.approx(each["rate, float64"], rel=1e-5)
    assert len(each["values"]) == 3
    assert each["values"] == pytest.approx(each["values, float64"], rel=1e-5)
    assert each["sum in half precision"] == (
        float("inf") if dtype == "torch.float16" else pytest.approx(12e6, rel=0.01)
    )


@pytest.mark.on("tiny FLUX in the pipeline that ships")
@pytest.mark.parametrize(("name", "extra"), [("static", 0), ("threshold", 8), ("line on the host", 1)])
def test_flux_in_a_pipeline(found, name, extra):
    """diffusers' FLUX, with its own branches for npu, decides as on the host and waits no more than is stated above."""
    each = found["tiny_flux"][name]
    assert found["tiny_flux"]["device"] == "npu:0"
    assert each["same decisions"]
    assert each["reused"] >= 8
    assert each["moved"] > 1e-3
    assert each["off"] < 1e-4  # on an npu, diffusers makes its rotary tables in float32
    assert each["looked"] == (extra if name == "threshold" else 0)
    waits = extra + each["read"] + 1  # the residuals, and the first timestep
    assert each["waits"] == found["tiny_flux"]["plain waits"] + waits
    assert sum(each["ours"].values()) == waits


def test_what_the_accelerator_is_asked(found):
    """Waiting, memory and name come from torch.accelerator, or from the device's own module where that lacks them."""
    each = found["questions"]
    assert each["synchronized"] == 2
    assert each["name"] == "simulated NPU"
    assert each["machine"].startswith("simulated NPU, ")
    assert each["memory"]


class Wrapped(torch.Tensor):
    """A tensor subclass without storage of its own, as quantised and sharded tensors are."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.mark.on("tensors")
def test_tensors_without_storage_are_not_taken_for_one():
    """Two tensors whose address is 0, as a subclass shows it, are not taken for the same conditioning."""
    one, other = Wrapped(torch.ones(2)), Wrapped(torch.zeros(2))
    assert one.data_ptr() == other.data_ptr() == 0
    assert is_same(one, one)
    assert not is_same(one, other)


@pytest.mark.on("the package's source")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_device_is_named(path):
    """No torch.cuda, torch.npu and the like, no .cuda(), and no such device as a string, but in texts for the user."""
    kinds = {"cuda", "npu", "xpu", "mps", "hpu", "musa", "mlu"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in kinds:
            assert ast.unparse(node) in ("torch.version.cuda",), f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value.partition(":")[0] not in kinds, f"line {node.lineno}: {node.value!r}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[:2] in (["torch", kind] for kind in kinds) for name in names), names
            assert not any(name.partition(".")[0] == "torch_npu" for name in names), names


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator: run bench.checks by hand")
@pytest.mark.on("a machine without an accelerator")
def test_the_checks_for_accelerators_say_that_there_is_none():
    """The script that checks real accelerators ends at once, and in peace, where there is none."""
    command = [sys.executable, "-m", "bench.checks"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no accelerator here")
    assert done.stderr == ""
