"""The wording of the warnings that an attached cache gives. All are ``UserWarning``; most are given once per range.

======================================  ===================================================  ======================
worded by                               when                                                 emitted by
======================================  ===================================================  ======================
:func:`range_left_late`                 a call was still in the range when it was detached   the attachment
:func:`stand_in_is_wrapped`             detaching found something put around a stand-in      the attachment
:func:`refreshes_every_step`            the settings leave nothing to attach                 the handle
:func:`ranks_decide_alone`              ranks share a model, but not their decisions         the handle, the engine
:func:`nothing_will_be_reused`          a run begins whose steps will all be computed        the engine
:func:`scheduler_is_shared`             a run begins on a scheduler that another one uses    the engine
:func:`step_stands_still`               one step has more calls than any guidance makes      the engine
:func:`scheduler_stands_still`          the scheduler stands still while timesteps move      the engine
:func:`gradients_are_enabled`           a call has gradients enabled                         the engine
:func:`ranks_have_diverged`             the ranks of a process group did different things    the engine
:func:`coefficients_are_missing`        a predictor was not fitted for the computed steps    the engine
:func:`output_is_not_corrected`         an output's correction was fitted to other steps     the engine
:func:`output_is_not_seen`              an output is to be corrected, and only blocks run    the engine
:func:`argument_may_be_written`         a first residual cannot be tested                    the engine
:func:`model_is_not_finite`             computed calls give NaN, at more than one step       the engine
:func:`another_cache_is_at_work`        another library's cache was enabled since attaching  the engine
:func:`residual_is_not_finite`          a residual holds NaN or infinity, so none is reused  the engine
:func:`additions_are_stale`             additions between blocks are not this step's         the engine
:func:`nothing_was_reused`              a run has ended, and nothing was reused              the handle, the engine
:func:`nothing_was_ever_reused`         the cache is removed, and nothing was ever reused    the handle
:func:`output_cannot_be_made`           an output is of a kind that no other can be made of  the engine
:func:`arguments_are_written`           a call left out would not write into its arguments   the engine
:func:`no_call_was_seen`                the cache is removed, and nothing was called         the handle
:func:`no_call_was_left_to`             the same, where whole transformers are left out      the handle
:func:`nothing_is_attached`             there is no cache to take off                        the handle
:func:`trunk_is_another`                the first calls show that another stack denoises     the handle
:func:`trunk_does_not_fit`              so they do, but the settings do not fit that stack   the handle
======================================  ===================================================  ======================

What depends on one class's settings is worded by that class, and emitted by the engine or the handle:
``Policy.warning_at_start`` and ``Predictor.warning_at_start`` when a run begins, ``Policy.why_nothing_reused`` (within
:func:`nothing_was_reused`) and ``Policy.warning_at_end`` when it ends, ``CachePlan.mismatch_warnings`` when a plan is
attached, and ``BlockIO.remark`` when the streams of a block have been followed. Warnings of a search, of cache-dit's
interface and of a batch job's folder are worded where they are emitted: in ``dithooks.tuning``, ``dithooks.compat`` and
``dithooks.ray``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ..policies.history import BranchHistory, RunHistory, Schedule
from ..policies.policy import Policy
from ..policies.reason import Reason
from .log import RunCounts
from .types import CallRecord


def range_left_late(name: str, first: str, last: str, seconds: float) -> str:
    """Word that a call was between the range's first and last block for longer than detaching waits."""
    return (
        f"{name}: a call had not come from {first} to {last} within {seconds:g} s of the cache being taken off. If an "
        "exception has ended it there, all is well; else its output lacks the range's effect"
    )


def stand_in_is_wrapped(paths: Sequence[str]) -> str:
    """Word that something else was put around stand-ins, or in their place, after the cache was attached."""
    return (
        f"{', '.join(paths)}: wrapped by something else, or replaced, since the cache was attached; a stand-in that is "
        "wrapped stays where it is, inert. Attach the cache last and remove it first"
    )


def refreshes_every_step() -> str:
    """Word that a configuration recomputes the range at every step of every transformer."""
    return "every call is computed (cache_step_interval=1, or policy=Uncached()): nothing is attached"


def ranks_decide_alone(name: str, sharing: str, policy: Policy) -> str:
    """Word that ranks run one model together, but each by its own decisions; ``sharing`` says how they share it."""
    return (
        f"{name}: {sharing}, and {type(policy).__name__} decides on each rank by what that sees: ranks that decide "
        "differently wait for each other for ever, or go on with each other's wrong weights or tokens. Let them decide "
        "as one: dit_cache(..., process_group=...), of all ranks that share the model; or take a policy that does not "
        "look"
    )


def nothing_will_be_reused(name: str, policy: Policy, schedule: Schedule, configured: Policy) -> str | None:
    """Word that all steps of a run will be computed, whatever is measured in them; ``None`` if one may be reused.

    Args:
        name: of the transformer.
        policy: the policy as made out for the run.
        schedule: of the run; its number of steps is known.
        configured: the policy as the user configured it.
    """
    assert schedule.steps is not None
    reasons: Counter[str] = Counter()
    for step in range(schedule.first, schedule.steps):
        run = RunHistory(step - schedule.first)
        branches = [BranchHistory(number, step - 1, run=run) for number in range(policy.distinct)]
        decisions = [policy.before(step, branch, schedule) for branch in branches]
        may_reuse = any(each is None or each.reuse or each.reason is Reason.CONDITIONAL for each in decisions)
        if step > schedule.first and may_reuse:
            return None
        first = decisions[0]
        reasons[Reason.NO_ANCHOR if first is None or first.reuse else first.reason] += 1
    why = _listed(reasons)
    warmup = getattr(policy, "max_warmup_steps", None) if Reason.WARM_UP in reasons else None
    if warmup is not None:
        why += f", max_warmup_steps is {warmup}"
    steps = schedule.steps - schedule.first
    return f"{name}: nothing will be reused in a run of {steps} steps: {why} ({configured})"


def scheduler_is_shared(name: str) -> str:
    """Word that one scheduler gives the steps of runs in several threads or tasks."""
    return (
        f"{name} is called in several threads or tasks at once, and one scheduler gives the steps of all: that is "
        "right for one of them at most, so all but the first are computed. Give each its own, by `with "
        "handle.request(scheduler=...):`, or tell the steps, by `with timestep_scope(step):`; if it is one run that "
        "goes from thread to thread, put `with handle.request():` around it"
    )


def step_stands_still(name: str, calls: int, step: int, source: str) -> str:
    """Word that a step has had more calls than any guidance makes; ``source`` is where the step was read from."""
    return (
        f"{name} was called {calls} times at step {step} (by the {source}), so nothing could be reused: if these "
        "were different steps, say so with `with timestep_scope(step): ...`"
    )


def scheduler_stands_still(name: str, stood_at: int | None, argument: str | None, before: float, now: float) -> str:
    """Word that a scheduler stood still while the timestep moved, which gives the steps instead."""
    return (
        f"{name}: the scheduler's step_index stayed at {stood_at} while {argument} went from {before:g} to {now:g}, so "
        "another scheduler makes the steps. They follow that argument; how many there will be is not known. Give "
        "the one that steps: dit_cache(..., scheduler=...), or `with handle.request(scheduler=...):` around the run; "
        "or attach to the transformer instead of the pipeline"
    )


def gradients_are_enabled(name: str) -> str:
    """Word that a call with gradients is neither cached nor reused."""
    return (
        f"{name} is called with gradients enabled, so nothing is cached or reused: sample under torch.no_grad() or "
        "torch.inference_mode()"
    )


def ranks_have_diverged(name: str, step: int) -> str:
    """Word that the ranks of a process group computed or reused different calls before this step."""
    return (
        f"{name}, step {step}: the ranks of the process group have come here by other ways than each other (one has "
        "computed what others reused, or takes this call for another branch than they do), so none of them reuses "
        "anything more in this run"
    )


def coefficients_are_missing(name: str, step: int, computed: Sequence[int], predictor: object, anchors: int) -> str:
    """Word that a predictor has no coefficients for a step that follows these computed steps."""
    instead = "the last residual is taken as it is" if anchors == 1 else "the line through the last two is taken"
    return (
        f"{name}: step {step} follows computed steps {list(computed)}, for which {type(predictor).__name__} has no "
        f"coefficients: {instead}"
    )


def output_is_not_corrected(name: str, step: int, computed: Sequence[int]) -> str:
    """Word that a predictor corrects the output of a step, but not as it was made, or not by the outputs at hand."""
    at_hand = f"those of steps {list(computed)}" if computed else "none"
    return (
        f"{name}: the output of step {step} is used as it is: its correction was found for other noise levels, or for "
        f"other outputs than are at hand ({at_hand})"
    )


def output_is_not_seen(name: str) -> str:
    """Word that blocks run without their transformer's call, so that its output cannot be corrected."""
    return (
        f"{name}: its output is not corrected as planned, as the blocks run without a call of the model. Call the "
        "model itself, or name the method that is called in its place: dit_cache(..., method=...)"
    )


def argument_may_be_written(name: str, argument: str) -> str:
    """Word that the call has an argument that blocks may write into, so that the residual was not tested."""
    return (
        f"{name} is given {argument}: if blocks write into it (keys and values, say), those of the range do not on "
        "reused steps; nor was the residual tested on its own call, which would have to be made again"
    )


def model_is_not_finite(name: str, what: str, step: int) -> str:
    """Word that the model, computed as without a cache, gives NaN or infinity at one step after another."""
    return (
        f"{name} itself gives NaN or infinity: {what} at step {step}, and not there alone, with all blocks computed. "
        "Nothing is reused of such calls: see that the model's weights, dtype and inputs are right without a cache"
    )


def another_cache_is_at_work(name: str, what: str) -> str:
    """Word that another library's cache was enabled on the model after this one was attached."""
    return (
        f"{name} has another cache at work ({what}), enabled since this one was attached: it would stand still where "
        "blocks are passed over, so nothing is reused while it is there. Use one of the two"
    )


def residual_is_not_finite(name: str, step: int) -> str:
    """Word that a residual holds NaN or infinity, or may, and that the step is computed instead."""
    return (
        f"{name}: a residual is not finite (step {step}): what the range adds is NaN, infinite or beyond what its "
        "dtype holds. It is never reused, the step is computed instead. Where only float16 is too narrow, run the "
        "model in bfloat16"
    )


def additions_are_stale(name: str, before: str, after: str) -> str:
    """Word that what the model does to the streams between two blocks changes, and a reused step repeats the former."""
    return (
        f"{name}: what the model does between {before} and {after} changes from step to step, and cannot be separated "
        "from what the blocks do: reused steps repeat that of the last computed step. Choose blocks on one side of it"
    )


def nothing_was_reused(name: str, steps: int, counts: RunCounts, policy: Policy) -> str | None:
    """Word why a run that went to its end reused nothing; ``None`` if it did, or has a single step.

    Example:
        >>> from dithooks import Interval
        >>> counts = RunCounts(calls=3, reasons=Counter({"warm-up": 2, "end": 1}))
        >>> nothing_was_reused("net", 3, counts, Interval(2, 4))
        'net: a run of 3 steps reused nothing (calls computed for warm-up: 2, end: 1): Interval(start=2, interval=4)'
    """
    halves = counts.reasons[Reason.CONDITIONAL]
    if steps < 2 or counts.reused or halves or not counts.calls:  # without calls: the log no longer has them
        return None
    message = f"{name}: a run of {steps} steps reused nothing (calls computed for {_listed(counts.reasons)})"
    finite = [value for value in counts.values if math.isfinite(value)]
    why = policy.why_nothing_reused(finite, counts.reasons) if finite else str(policy)
    message = f"{message}: {why}" if why else message
    if counts.reasons[Reason.NO_ANCHOR] > 1:  # calls of a step that were not known again at the next
        message += ". If its calls are given other prompts at every step, name them: timestep_scope(step, branch=...)"
    return message


def nothing_was_ever_reused(name: str, source: str, records: Sequence[CallRecord]) -> str:
    """Word why nothing was reused as long as a cache was attached, by what gave the steps and what it showed.

    Args:
        name: of the transformer.
        source: of the latest run's steps, in a word.
        records: of all calls, none of which was reused.
    """
    steps, runs = sorted({record.step for record in records}), {record.run for record in records}
    if len(steps) == 1:
        seen = f"step {steps[0]} at every call"
    elif len(runs) > 1 and len(records) < 4 * len(runs):
        seen = f"the first steps of {len(runs)} runs, each of which ended before anything could be reused"
    else:
        shown = ", ".join(map(str, steps[:8])) + (", …" if len(steps) > 8 else "")
        seen = f"steps {shown}, computed for {_listed(Counter(record.reason for record in records))}"
    return (
        f"{name}: {len(records)} calls reused nothing. The {_SOURCES[source][0]} showed {seen}. {_SOURCES[source][1]}"
    )


def no_call_was_seen(ranges: Sequence[str]) -> str:
    """Word that nothing was called between attaching a cache and removing it."""
    return (
        f"no call of {', '.join(ranges)} was seen while the cache was attached: is another model called, or a copy? "
        "Attach to the one that is called, or name its blocks: dit_cache(..., blocks='path.to.its.blocks')"
    )


def output_cannot_be_made(name: str, kind: str) -> str:
    """Word that a transformer returns what no other of its kind can be made of, so that no call is left out."""
    return (
        f"{name} returns {kind}, and no other can be made of tensors (tuples, lists, dicts and dataclasses can): every "
        "call is computed. Cache the residual of its blocks, DitCacheConfig(payload='residual')"
    )


def arguments_are_written(name: str, paths: Sequence[str]) -> str:
    """Word that a transformer puts something into its arguments at many steps, which a call left out would not."""
    return (
        f"{name} writes into what it is given ({', '.join(paths):.80}), which a call that is left out would not: such "
        "calls are computed. Cache the residual of its blocks, DitCacheConfig(payload='residual')"
    )


def no_call_was_left_to(ranges: Sequence[str]) -> str:
    """Word that nothing called a transformer's stand-in between attaching a cache and removing it."""
    return (
        f"no call of {', '.join(ranges)} was seen while the cache was attached: payload='output' sees calls of what "
        "the pipeline holds, not those of a copy, of forward() or of a reference from before. Let the loop call what "
        "it holds, or cache the residual"
    )


def nothing_is_attached(kind: str) -> str:
    """Word that there is no cache where one was to be taken off."""
    return f"nothing is cached in this {kind}, so there was nothing to detach"


_LOOP = "write `for t in dithooks.steps(timesteps):` around its calls"
_SOURCES = {  # what gave the steps, and what to do if it was wrong
    "scope": ("timestep_scope", f"Give each step its own number, or {_LOOP}"),
    "scheduler": (
        "scheduler's step_index",
        f"Give the scheduler that makes the steps, dit_cache(..., scheduler=...); or {_LOOP}",
    ),
    "timestep": ("timestep argument", f"If the loop goes on, {_LOOP}; or name it: dit_cache(..., timestep='its name')"),
    "count": ("count of calls", "Let calls_per_step and steps be those of the loop"),
    "loop": ("step index that was set", "Set it before each step, from 0 on"),
    "": ("timestep", f"To tell the steps, {_LOOP}"),
}


def trunk_is_another(now: str, before: str, inputs: int, lists: Sequence[str]) -> str:
    """Word that another stack is cached from now on; ``inputs`` is how many the one before was given."""
    given = f"was given {inputs} different one(s)" if inputs else "was not called"
    return (
        f"{now} is cached from now on, not {before}: its input is another one at every step, while {before} {given}. "
        f"To choose for yourself, give {_as_blocks(lists)}"
    )


def trunk_does_not_fit(now: str, before: str, error: str, lists: Sequence[str]) -> str:
    """Word that another stack would have to be cached, but cannot be with these settings."""
    return (
        f"{before} is cached, but {now} denoises, by its calls: its input is another one at every step. It cannot be "
        f"cached so: {error}. Change the settings, and give {_as_blocks(lists)}"
    )


def _as_blocks(lists: Sequence[str]) -> str:
    return f"blocks={lists[0]!r}" if len(lists) == 1 else f"blocks={list(lists)}"


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
