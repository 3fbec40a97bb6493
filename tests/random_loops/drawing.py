"""Random sampling loops, by number: what the loop calls at each step, what tells its time, and how its runs end.

A loop is drawn so that whoever sees all of its calls can tell their branches apart: calls change their order, or drop
out in front, only where a name, prompt or flag shows which is which.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "timesteps_B_T")
IN_ARGUMENT = (*ARGUMENTS, "dataclass", "dict", "outer", "tau")  # the time is in an argument, whatever else there is
BY_VALUE = (*IN_ARGUMENT, "still scheduler", "copied scheduler", "scheduler without index", "two pipelines")
SCHEDULED = ("scheduler", "still scheduler", "copied scheduler", "scheduler without index", "two pipelines", "untold")
SCOPED = ("scope", "scope with number", "scope with name", "steps")
COUNTED = "calls_per_step"


class Spec(NamedTuple):
    """One of the calls that an evaluation of the model is made of.

    Args:
        guidance: which prompt it is given; 0 is the conditional one.
        window: which part of the tokens.
        half: which sample of the batch.
        flag: whether layers are to be skipped.
    """

    guidance: int = 0
    window: int = 0
    half: int = 0
    flag: bool = False


@dataclass(frozen=True)
class RunPlan:
    """One run of a loop.

    Args:
        groups: the time values of each sampling step's evaluations.
        prompts: ``"first"``, the tensors of the first run; ``"equal"``, others of the same values; ``"other"``.
        latents: ``"new"``, ``"equal"`` to the first run's, or the ``"same"`` tensor.
        stop: ``None``, or how, in which sampling step and before which of its calls the run is ended.
    """

    groups: tuple[tuple[float, ...], ...]
    prompts: str = "first"
    latents: str = "new"
    stop: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class Loop:
    """A sampling loop: all that :func:`playing.play` needs."""

    number: int
    clock: str
    kind: str
    specs: tuple[Spec, ...]
    runs: tuple[RunPlan, ...]
    computed: tuple[str, tuple[int, ...]]  # ("interval", (start, every)) or ("mask", bits)
    solver: str = "euler"
    pattern: str = "constant"  # or guidance "late", "early", "middle", or "first missing"
    active: tuple[float, float] = (0.0, 1.0)  # from which share of the steps on there is guidance, and to which
    missing: frozenset[int] = frozenset()  # sampling steps without the first branch
    shuffled: bool = False
    prompts: str = "object"  # the same "object" at each step, or "equal" values in another
    drifting: frozenset[int] = frozenset()  # guidance whose prompt is another at each step
    equal_prompts: bool = False
    own_prompts: bool = True  # each half of the batch has its own
    scope_per: str = "step"  # or "evaluation", or "call"
    tells_steps: bool = False
    has_time: bool = True  # the model is given a timestep, whatever tells the time
    time_form: str = "scalar"
    extras: tuple[tuple[str, str], ...] = ()  # other arguments: their name, and how they change
    pipeline: bool = True  # the cache is attached to a pipeline, not to the model and scheduler
    threads: int = 1
    lockstep: bool = False
    begin: int = 0  # step that each run begins with, as in image-to-image
    noisy: bool = False
    positional: bool = False

    @property
    def named(self) -> bool:
        """Whether a scope names the branch."""
        return self.clock in ("scope with number", "scope with name")

    @property
    def times(self) -> str:
        """Return where the step of a call comes from: ``"value"``, ``"evaluation"`` or ``"group"``."""
        if self.clock in BY_VALUE:
            return "value"
        return "evaluation" if self.clock == "scheduler" or self.scope_per == "evaluation" else "group"

    @property
    def ends_at_once(self) -> bool:
        """Whether a run ends at its first step and another one follows."""
        made = [len(run.groups) if run.stop is None else run.stop[1] + (run.stop[2] > 0) for run in self.runs]
        return min(made[:-1], default=2) < 2

    def present(self, spec: Spec, step: int, steps: int) -> bool:
        """Return whether a call is made at a sampling step."""
        if step in self.missing and spec.guidance == 0 and not spec.flag:
            return False
        if self.pattern in ("late", "early", "middle") and (spec.guidance > 0 or spec.flag):
            low, high = self.active
            return low * steps <= step < high * steps
        return True

    def computes(self, step: int) -> bool:
        """Return whether the policy computes a step."""
        kind, values = self.computed
        if kind == "mask":
            return step >= len(values) or bool(values[step])
        start, every = values
        return step < start or (step - start) % every == 0

    def features(self) -> dict[str, str]:
        """Return what kind of loop this is, by dimension."""
        drift = f"{len(self.drifting)} drifting" if self.drifting else self.prompts
        changing = sorted(f"{name} {how}" for name, how in self.extras if how in ("new", "each"))
        return {
            "clock": self.clock,
            "branches": self.kind,
            "clock x branches": f"{self.clock} x {self.kind}",
            "solver": self.solver,
            "pattern": self.pattern,
            "order": "shuffled" if self.shuffled else "fixed",
            "prompts": drift,
            "changing": ", ".join(changing) or "none",
            "runs": str(len(self.runs)),
            "ended": ", ".join(sorted({run.stop[0] for run in self.runs if run.stop})) or "never early",
            "shortest run": "one step, then another run" if self.ends_at_once else "longer",
            "threads": "1" if self.threads == 1 else "2 in lockstep" if self.lockstep else "2",
            "policy": self.computed[0],
        }


def time_values(r: Random, steps: int) -> tuple[list[float], float]:
    """Return the time of each step, and that of the end."""
    start, end = r.choice([(1000.0, 0.0), (1.0, 0.0), (14.5, 0.03), (0.0, 1.0)])
    bend = r.choice([1.0, 1.0, 2.0])
    values = [start + (end - start) * (k / steps) ** bend for k in range(steps + 1)]
    return values[:-1], values[-1]


def grouped(solver: str, values: list[float], end: float) -> tuple[tuple[float, ...], ...]:
    """Return the time values of each sampling step's evaluations."""
    following = [*values[1:], end]
    if solver in ("heun", "heun to the end"):
        pairs = [(a, b) for a, b in zip(values, following, strict=True)]
        return tuple(pairs if solver == "heun to the end" else [*pairs[:-1], pairs[-1][:1]])
    if solver == "dpm2":
        return tuple((a, (a + b) / 2) for a, b in zip(values, following, strict=True))
    if solver == "plms":  # the second timestep is evaluated twice
        return tuple((a,) for a in [*values[:2], *values[1:]])
    if solver == "pairs":
        return tuple((a, a) for a in values)
    return tuple((a,) for a in values)


KINDS = {
    "single": (Spec(),),
    "guidance": (Spec(0), Spec(1)),
    "guidance, negative first": (Spec(1), Spec(0)),
    "three prompts": (Spec(0), Spec(1), Spec(2)),
    "skip-layer": (Spec(0), Spec(0, flag=True)),
    "guidance and skip-layer": (Spec(0), Spec(1), Spec(0, flag=True)),
    "halves": (Spec(half=0), Spec(half=1)),
    "halves and guidance": (Spec(0, half=0), Spec(0, half=1), Spec(1, half=0), Spec(1, half=1)),
    "equal prompts": (Spec(0), Spec(1)),
}


def specs_of(r: Random, kind: str) -> tuple[Spec, ...]:
    """Return the calls of an evaluation."""
    if kind == "windows":
        return tuple(Spec(window=w) for w in range(r.randint(2, 6)))
    if kind == "windows and guidance":
        windows = r.randint(2, 3)
        if r.random() < 0.5:
            return tuple(Spec(g, w) for g in range(2) for w in range(windows))
        return tuple(Spec(g, w) for w in range(windows) for g in range(2))
    return KINDS[kind]


def pattern_of(r: Random, specs: tuple[Spec, ...], steps: int) -> tuple[str, tuple[float, float], frozenset[int]]:
    """Return at which steps some of the calls are left out."""
    guided = any(spec.guidance or spec.flag for spec in specs)
    pattern = r.choice(["constant", "constant", "late", "early", "middle", "first missing"]) if guided else "constant"
    if pattern == "first missing" and not any(spec.guidance for spec in specs):
        pattern = "late"
    shares = {"late": (r.choice([0.2, 0.4, 0.6]), 1.0), "early": (0.0, r.choice([0.3, 0.6, 0.8])), "middle": (0.3, 0.7)}
    few = frozenset(r.sample(range(steps), r.randint(1, max(1, steps // 2)))) if pattern == "first missing" else ()
    return pattern, shares.get(pattern, (0.0, 1.0)), frozenset(few)


def draw_clock(r: Random) -> str:
    """Return what tells the time."""
    kinds = [*SCOPED, COUNTED, "scheduler", "scheduler", "tau", "dataclass", "dict", "outer"]
    others = ["argument"] * 4 + ["still scheduler", "copied scheduler", "scheduler without index", "two pipelines"]
    clock = r.choice([*kinds, *others] * 3 + ["untold"])
    return r.choice(ARGUMENTS) if clock == "argument" else clock


def draw_solver(r: Random, clock: str) -> str:
    """Return how often an Euler-like, or other, loop evaluates the model at each step."""
    solver = r.choice(["euler"] * 6 + ["heun", "heun to the end", "dpm2", "plms", "pairs"])
    if clock == COUNTED and solver in ("heun", "plms"):
        return "euler"  # a step of theirs has other calls than the next
    if clock == "two pipelines" and solver != "dpm2":
        return "euler"  # elsewhere the index of one scheduler is another step than the other's timestep
    return "euler" if clock == "untold" else solver


def draw_extras(r: Random) -> tuple[tuple[str, str], ...]:
    """Return other arguments, and how each changes."""
    kinds = {
        "control": ["constant", "equal", "new", "each"],
        "ids": ["constant", "equal"],
        "scale": ["constant", "new"],
        "guidance": ["constant", "equal", "each"],
        "options": ["constant", "equal"],
    }
    return tuple((name, r.choice(hows)) for name, hows in kinds.items() if r.random() < 0.25)


def draw(number: int) -> Loop:
    """Return the loop of a number."""
    r = Random(number)
    clock = draw_clock(r)
    named = clock in ("scope with number", "scope with name")
    solver = draw_solver(r, clock)
    kind = r.choice([*KINDS, "guidance", "guidance", "windows", "windows", "windows and guidance"])
    specs = specs_of(r, kind)
    steps = r.choice([1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 10, 12])
    pattern, active, missing = pattern_of(r, specs, steps)
    shuffled = r.random() < 0.25
    guidances = sorted({spec.guidance for spec in specs})
    drifting = frozenset(g for g in guidances if r.random() < 0.5) if r.random() < 0.25 else frozenset()
    equal_prompts = kind == "equal prompts"
    own_prompts = kind.startswith("halves") and r.random() < 0.6
    if clock == COUNTED:
        pattern, active, missing = "constant", (0.0, 1.0), frozenset()
    if not named:
        if equal_prompts:
            pattern, missing, shuffled = "constant", frozenset(), False
        if drifting and pattern != "constant":
            always = tuple(spec for spec in specs if not spec.guidance and not spec.flag)
            if pattern == "first missing" or specs[: len(always)] != always:
                pattern, missing = "constant", frozenset()
            shuffled = False
        if len(drifting) > 1 or solver != "euler":
            shuffled = False
    mask = r.random() < 0.4
    vary = not mask and r.random() < 0.3
    scope_per = "step"
    if clock in SCOPED[:3]:
        scope_per = r.choice(["step", "call", "evaluation"])
        if named and solver not in ("euler", "plms"):
            scope_per = "evaluation"
    threads = 2 if clock not in SCHEDULED and r.random() < 0.08 else 1
    runs = draw_runs(r, clock, solver, steps, vary, len(specs), threads)
    plan = Loop(
        number=number,
        clock=clock,
        kind=kind,
        specs=specs,
        runs=runs,
        computed=("interval", (r.randint(0, 3), r.choice([2, 2, 3, 4, 100]))),
        solver=solver,
        pattern=pattern,
        active=active,
        missing=missing if len(specs) > 1 else frozenset(),
        shuffled=shuffled,
        prompts=r.choice(["object", "object", "equal"]),
        drifting=drifting,
        equal_prompts=equal_prompts,
        own_prompts=own_prompts,
        scope_per=scope_per,
        tells_steps=clock in SCOPED[:3] and r.random() < 0.5,
        has_time=clock not in (COUNTED, "untold") and (clock not in (*SCOPED, "scheduler") or r.random() < 0.7),
        time_form=r.choice(["scalar", "one", "batch", "float"]),
        extras=draw_extras(r),
        pipeline=r.random() < 0.5,
        threads=threads,
        lockstep=r.random() < 0.5,
        begin=r.choice([0, 0, 0, 2]) if clock in ("scope", "scope with number", "scope with name", "scheduler") else 0,
        noisy=r.random() < 0.2,
        positional=r.random() < 0.3,
    )
    return with_mask(r, plan) if mask else plan


def draw_runs(
    r: Random, clock: str, solver: str, steps: int, vary: bool, calls: int, threads: int
) -> tuple[RunPlan, ...]:
    """Return the runs of a loop; the last one is complete."""
    values, end = time_values(r, steps)
    count = r.choice([1, 1, 1, 2, 2, 3])
    plans = []
    for number in range(count):
        here, (times, last) = steps, (values, end)
        if vary and number and clock != COUNTED:
            here = r.randint(1, 8)
            share = [start + (end - start) * k / here for start in values[:1] for k in range(here)]
            times, last = share, end
        stop = None
        if number < count - 1 and r.random() < 0.4:
            hows = ["fails", "fails", "raises", "breaks"]
            # Nothing but the handle's reset tells a loop that is counted that it has begun again.
            how = "fails" if clock == COUNTED and threads > 1 else r.choice(hows)
            stop = (how, r.randrange(here), r.randrange(calls + 1))
        prompts = "first" if number == 0 else r.choice(["first", "first", "equal", "other"])
        latents = "new" if number == 0 else r.choice(["new", "new", "equal", "same"])
        plans.append(RunPlan(grouped(solver, times, last), prompts, latents, stop))
    return tuple(plans)


def with_mask(r: Random, loop: Loop) -> Loop:
    """Return the loop with a mask in place of the interval, where its number of steps is as the engine has it."""
    counts = {len(set(steps_of(loop, run))) for run in loop.runs}
    if len(counts) > 1 or (loop.times == "value" and loop.clock in SCHEDULED and loop.solver != "euler"):
        return loop
    bits = (1, *(r.choice([0, 0, 1]) for _ in range(counts.pop() + loop.begin - 1)))
    return Loop(**{**vars(loop), "computed": ("mask", bits)})


def steps_of(loop: Loop, run: RunPlan) -> list[int]:
    """Return the true step of each evaluation of a run, in the sense of what tells the time."""
    flat = [(number, value) for number, group in enumerate(run.groups) for value in group]
    if loop.times == "group":
        return [loop.begin + number for number, _ in flat]
    if loop.times == "evaluation":
        return [loop.begin + number for number in range(len(flat))]
    steps: list[int] = []
    for place, (_, value) in enumerate(flat):
        former = flat[place - 1][1] if place else None
        steps.append(0 if place == 0 else steps[-1] + (value != former))
    return steps
