"""The oracle: which calls of a loop could be reused, and whether those that were have their own branch's residual."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from .drawing import Loop
from .playing import Outcome, Played

# A warning that nothing is reused has to name one of these, unless only what the engine cannot know was in the way.
REMEDIES = ("timestep_scope", "dithooks.steps", "calls_per_step", "timestep=", "scheduler=", "request(")


@dataclass
class Verdict:
    """What the oracle makes of one loop.

    Args:
        loop: the loop.
        calls: number of calls that came to their end.
        reusable: numbers of the calls that could be reused.
        excused: of these, those that the engine may compute: it cannot know yet what changed.
        reused: numbers of the calls that were reused.
        wrong: what each reused call was given that was not its own, in words.
        silent: nothing was reused although something could be, and no warning names a remedy.
        error: of the library, that ended the loop.
    """

    loop: Loop
    calls: int
    reusable: set[int] = field(default_factory=set)
    excused: set[int] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    silent: bool = False
    error: str | None = None


def judge(outcome: Outcome) -> Verdict:
    """Hold a loop's calls against the truth."""
    loop, calls = outcome.loop, outcome.calls
    verdict = Verdict(loop, len(calls), error=outcome.error)
    verdict.reused = {number for number, call in calls.items() if call.source is not None}
    for run in sorted({call.run for call in calls.values()}):
        own = [call for call in calls.values() if call.run == run]
        reusable = reusable_calls(loop, own)
        verdict.reusable |= reusable
        verdict.excused |= reusable & unknowable_calls(loop, own)
    for number in sorted(verdict.reused):
        call = calls[number]
        fault = fault_of(loop, call, calls)
        if fault is not None:
            verdict.wrong.append(f"call {number}, {described(call)}: {fault}")
    due = verdict.reusable - verdict.excused
    if loop.clock == "untold":  # nothing tells the step, so that nothing has to be reused
        verdict.excused = set(verdict.reusable)
    wanted = REMEDIES if due else (*REMEDIES, "reused nothing")
    warned = any(remedy in text for text in outcome.warnings for remedy in wanted)
    verdict.silent = bool(verdict.reusable) and not verdict.reused and not warned and outcome.error is None
    return verdict


def reusable_calls(loop: Loop, calls: list[Played]) -> set[int]:
    """Return the calls of one run that the policy reuses, and that have a residual of their branch to reuse.

    A residual serves until the policy's next refresh, also where the branch was not called then.
    """
    reusable, computed_at = set(), dict[object, int]()
    for call in calls:
        at = computed_at.get(call.branch)
        if at is not None and not any(map(loop.computes, range(at + 1, call.step + 1))):
            reusable.add(call.number)
        else:
            computed_at[call.branch] = call.step
    return reusable


def unknowable_calls(loop: Loop, calls: list[Played]) -> set[int]:
    """Return the calls at the second step, if an argument has changed, and those of a step that has other calls."""
    by_step: dict[int, set[object]] = {}
    for call in calls:
        by_step.setdefault(call.step, set()).add(call.branch)
    changing = bool(loop.drifting) or any(how in ("new", "each") for _, how in loop.extras)
    changing |= loop.clock == "outer"  # the inner transformer's prompts have the time added to them
    steps = list(by_step)
    unknowable = {step for former, step in pairwise(steps) if by_step[former] != by_step[step]}
    if changing:
        unknowable |= set(steps[1:2])
    return {call.number for call in calls if call.step in unknowable}


def fault_of(loop: Loop, call: Played, calls: dict[int, Played]) -> str | None:
    """Return what is wrong with the residual of a reused call; ``None`` if it is its own branch's.

    Of several evaluations at one step, branches are told apart by order: by that of the step's evaluations, or of the
    calls of one kind. There are two allowances. At the second step, the first where two evaluations may show, the
    evaluation just before this one serves as well. And of calls that are equal in all that they are given, one serves
    as well as the other of the same step, also if one was in a run that was broken off there: it is the same residual.
    Where such a run is followed by one on the very same latents, and the loop tells nothing of that, nobody can see
    which calls of that step began the second one: then evaluations of it serve for each other until the next refresh.
    """
    source = calls.get(call.source or 0)
    if source is None:
        return f"a residual of call {call.source}, which did not come to its end"
    if source.source is not None:
        return f"a residual of call {source.number}, which computed none"
    if source.run != call.run:
        twins = (each for each in calls.values() if each.run == call.run and each.step == source.step)
        source = next((each for each in twins if each.given == source.given and each.spec == source.spec), source)
    if source.run != call.run:
        return f"a residual of another run: {described(source)}"
    steps = sorted({each.step for each in calls.values() if each.run == call.run})
    alike = source.spec == call.spec or loop.kind == "equal prompts"
    given = [(each.run, each.step, each.given) for each in calls.values() if each.spec == source.spec]
    is_repeated = any(run != call.run and (step, what) == (source.step, source.given) for run, step, what in given)
    if alike and is_repeated and source.step == steps[0] and loop.ends_at_once:
        return None
    if alike and (source.order == call.order or source.turn == call.turn):
        return None
    if alike and source.evaluation == call.evaluation - 1 and call.step in steps[1:2]:
        return None
    return f"a residual of another branch: {described(source)}"


def described(call: Played) -> str:
    """Return where in its loop a call is."""
    spec = call.spec
    parts = [f"run {call.run[1]}", f"step {call.step}", f"guidance {spec.guidance}"]
    parts += [f"window {spec.window}"] * (spec.window > 0) + [f"half {spec.half}"] * (spec.half > 0)
    parts += ["layers skipped"] * spec.flag + [f"evaluation {call.order} of its step"] * (call.order > 0)
    return ", ".join([*parts, f"thread {call.run[0]}"] if call.run[0] else parts)
