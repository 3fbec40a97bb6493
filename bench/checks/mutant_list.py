"""The mutants of :mod:`bench.checks.mutants`: edits of the engine that its tests have to notice."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dithooks import handle
from dithooks.engine import (
    active_calls,
    anchor,
    branches,
    change_metrics,
    clock,
    decider,
    noise_probe,
    range_cache,
    replay,
    residual,
    run,
    sessions,
    verification,
    weights_version,
)
from dithooks.engine.active_calls import ActiveCalls
from dithooks.engine.change_metrics import OutputChangeEstimate, RelativeChange
from dithooks.engine.clock import StepClock
from dithooks.engine.decider import CallDecider
from dithooks.engine.range_cache import RangeCache
from dithooks.engine.replay import Replay
from dithooks.engine.run import Branch, Run
from dithooks.engine.verification import Verification
from dithooks.handle import CacheHandle
from dithooks.policies import history, reason
from dithooks.stats import log
from dithooks.stats.log import DecisionLog

RUNS = "tests/engine/test_runs.py"
ENDS = "tests/engine/test_ends.py"
SAFETY = "tests/engine/test_safety.py"
CLOCK = "tests/engine/test_clock.py"
STEP_INDEX = "tests/compat/test_step_index.py"
SCHEDULERS = "tests/engine/test_schedulers.py"
HANDED_ON = "tests/engine/test_handed_on.py"
HALF = "tests/engine/test_half_attached.py"
ATTACH = "tests/engine/test_attach.py"
METRICS = "tests/engine/test_change_metrics.py"
PROBE = "tests/engine/test_noise_probe.py"
WEIGHTS = "tests/engine/test_weights_version.py"
POLICY_RUNS = "tests/policies/test_policy_runs.py"
STREAMS = "tests/blocks/test_streams.py"
DRIVEN = "tests/blocks/test_driven.py"
LOG = "tests/stats/test_log.py"
STATS = "tests/stats/test_stats.py"
GUARDS = "tests/engine/test_guards.py"

# Quick files that are tried for every mutant of a module, until one fails.
TESTS: dict[ModuleType, tuple[str, ...]] = {
    active_calls: (GUARDS, HALF),
    anchor: (GUARDS, ENDS, POLICY_RUNS),
    branches: (GUARDS, SAFETY, RUNS),
    change_metrics: (METRICS, GUARDS),
    clock: (CLOCK, STEP_INDEX, GUARDS, SCHEDULERS),
    decider: (GUARDS, ENDS, RUNS, SAFETY, POLICY_RUNS),
    handle: (GUARDS, ATTACH),
    history: (POLICY_RUNS,),
    log: (LOG, STATS),
    noise_probe: (PROBE, GUARDS),
    range_cache: (GUARDS, HANDED_ON, RUNS, SAFETY, HALF),
    reason: (GUARDS,),
    replay: (GUARDS, SAFETY),
    residual: (GUARDS, STREAMS),
    run: (ENDS, GUARDS),
    sessions: (GUARDS, RUNS, CLOCK),
    verification: (GUARDS, HANDED_ON, SAFETY, PROBE, HALF),
    weights_version: (WEIGHTS,),
}


@dataclass(frozen=True)
class Mutant:
    """One edit of one function.

    Example: ``Mutant("count no bytes", DecisionLog.hold, "max(self._peak, now_bytes)", "now_bytes")``.

    Args:
        name: what is wrong with it.
        where: the function, method, property or class; a module, where no function encloses the place.
        old: an expression or a statement that stands there once.
        new: what stands there instead.
        tests: files to try before those of the module.
    """

    name: str
    where: Any
    old: str
    new: str
    tests: tuple[str, ...] = ()


def _range_cache() -> list[Mutant]:
    return [
        Mutant(
            "hand on without looking at versions",
            RangeCache._leave_skipped,
            "_versions(results) != versions[: len(results)]",
            "False",
        ),
        Mutant(
            "accept writes into what the range was given",
            RangeCache._leave_skipped,
            "_versions(streams) != versions[len(results) :]",
            "False",
        ),
        Mutant(
            "hand on without a clone",
            RangeCache.pass_over,
            "value.clone() if isinstance(value, Tensor) else value",
            "value",
        ),
        Mutant(
            "ask inference tensors for versions",
            RangeCache._handed_on,
            "any(map(Tensor.is_inference, (*results, *call.streams)))",
            "False",
        ),
        Mutant("leave a skipped range open", RangeCache._leave_skipped, "call.stage = AFTER", "pass"),
        Mutant("go on skipping after the range", RangeCache._leave_skipped, "self.state.shortcut = ASK", "pass"),
        Mutant(
            "accept a range that was entered and not left",
            RangeCache.finish,
            "call.stage is INSIDE and call.mode is REUSE",
            "False",
            (STREAMS,),
        ),
        Mutant("leave a run in flight", RangeCache.finish, "call.run.in_flight = False", "pass"),
        Mutant(
            "decide calls while hooks go on",
            RangeCache._begin_call,
            "call = Call()",
            "call = decider.plain_call_with_gradients()",
        ),
        Mutant("cache with gradients", RangeCache._begin_call, "torch.is_grad_enabled()", "False"),
        Mutant("replay what the call wrote into", RangeCache._begin_call, "replay.keep()", "None"),
        Mutant(
            "reuse where the first block was left out",
            RangeCache.pass_over,
            "call.stage is BEFORE and not call.stale",
            "False",
        ),
        Mutant(
            "accept a step told after the decision",
            RangeCache._enter_range,
            "session.step_source is not call.step_source",
            "False",
            (STEP_INDEX,),
        ),
        Mutant("take a second pass for the first", RangeCache._enter_range, "call.stage is not BEFORE", "False"),
        Mutant("capture after the range's end", RangeCache.leave, "call.stage is not INSIDE", "False"),
        Mutant(
            "measure what the model may write into",
            RangeCache._enter_range,
            "clones(call.metric_inputs)",
            "call.metric_inputs",
        ),
        Mutant(
            "refuse the rest of a call that began before the hooks",
            RangeCache._restart,
            "not met_unknown_step and not self.decider.clock.knows(state.arguments)",
            "False",
        ),
        Mutant(
            "accept two passes in one call",
            RangeCache._restart,
            "self.unverified and state.transformer_was_called",
            "False",
        ),
        Mutant(
            "keep a residual that was refused",
            RangeCache._conclude,
            "branch.anchors, branch.history.refreshed = [], None",
            "pass",
        ),
    ]


def _branches() -> list[Mutant]:
    function = branches.choose_branch
    return [
        Mutant("choose by age, not by turn", function, "number == turn", "False"),
        Mutant("choose the latest of alike branches", function, "-number", "number"),
        Mutant("choose the branch with most that differs", function, "-len(differing)", "len(differing)"),
        Mutant("take any branch for fitting", function, "differing <= changing", "True"),
        Mutant("take what changed once for unstable", function, "len(steps) > 1", "len(steps) > 0"),
        Mutant("never take conditioning for unstable", function, "len(steps) > 1", "False"),
        Mutant("number a new branch as its turn", function, "turn not in run.branches", "True"),
        Mutant("take another picture for a branch", function, "return None", "continue"),
        Mutant("take views with other strides for one", branches._one, "a.stride() == b.stride()", "True"),
        Mutant("take tensors of other shapes for one", branches._one, "a.shape != b.shape", "False"),
        Mutant("compare known prompts by value", branches._differing, "name in known", "False"),
    ]


def _decider() -> list[Mutant]:
    return [
        Mutant(
            "evict the newest branch",
            CallDecider._enter_step,
            "min(run.branches, key=lambda number: run.branches[number].called)",
            "max(run.branches, key=lambda number: run.branches[number].called)",
        ),
        Mutant(
            "evict the lowest number",
            CallDecider._enter_step,
            "min(run.branches, key=lambda number: run.branches[number].called)",
            "min(run.branches)",
        ),
        Mutant("evict no branch", CallDecider._enter_step, "len(run.branches) > MAX_BRANCHES", "False"),
        Mutant("reuse after a call that was cut short", CallDecider.decide, "branch.clear()", "None"),
        Mutant(
            "go on with a run that an exception left",
            CallDecider.decide,
            "run.in_flight = seen",
            "run.in_flight = False",
        ),
        Mutant(
            "count branches by this step alone",
            CallDecider.decide,
            "max(run.before[0], calls)",
            "calls",
            (POLICY_RUNS,),
        ),
        Mutant(
            "decide branches apart that decide together",
            CallDecider._ask_policy,
            "not policy.separate_branches",
            "False",
        ),
        Mutant(
            "note a shared value once a branch",
            CallDecider._ask_policy,
            "run.shared._replace(value=None)",
            "run.shared",
        ),
        Mutant(
            "reuse with a scheduler that is shared",
            CallDecider._ask_policy,
            "run.scheduler_is_shared and not needs_consensus",
            "False",
        ),
        Mutant(
            "take changed weights for changed shapes", CallDecider._why_unusable, "former[0] != signature[0]", "False"
        ),
        Mutant("reuse whatever changed", CallDecider._why_unusable, "former == signature", "True"),
        Mutant(
            "take a changed shape for a switch",
            CallDecider._why_unusable,
            "_tensor_forms(former) == _tensor_forms(signature)",
            "True",
        ),
        Mutant("share one branch's own reason", CallDecider._record, "None if own else decision", "decision"),
        Mutant("forget that a computed call began", CallDecider._record, "branch.interrupted = True", "pass"),
        Mutant("keep anchors of another form", CallDecider._record, "anchor.signature == call.signature", "True"),
        Mutant(
            "keep one anchor too many", CallDecider._record, "fitting[: self._anchors - 1]", "fitting[: self._anchors]"
        ),
        Mutant("reuse in the form that is kept", CallDecider._predicted, "newest.is_as_taken", "True"),
        Mutant(
            "let the last branch decide for all",
            CallDecider._record,
            "not run.policy.separate_branches and run.shared is None",
            "not run.policy.separate_branches",
        ),
        Mutant("leave a finished call interrupted", CallDecider.commit, "branch.interrupted = False", "pass"),
        Mutant(
            "keep the residual of a non-finite change",
            CallDecider.commit,
            "decided.reason is not Reason.NON_FINITE",
            "True",
        ),
        Mutant("keep old residuals beside a lost one", CallDecider.commit, "branch.clear()", "None"),
        Mutant("finish a run at its first branch", CallDecider.commit, "len(run.used) >= max(run.before)", "True"),
        Mutant("finish a run again", CallDecider.commit, "not run.finished", "True"),
        Mutant("keep all at the end", CallDecider._finish, "self.config.free_at_end", "False"),
        Mutant(
            "free a run that has not been taken over", CallDecider.release, "run.step < ended.schedule.first", "True"
        ),
        Mutant(
            "go on after a scope left by an exception",
            CallDecider._locate,
            "run.session_epoch != session.epoch",
            "False",
        ),
        Mutant("go on where a call was cut short", CallDecider._locate, "run.in_flight", "False"),
        Mutant(
            "allow one call more at a step",
            CallDecider._locate,
            "len(run.used) >= MAX_BRANCHES",
            "len(run.used) > MAX_BRANCHES",
        ),
        Mutant("free branches that are called", CallDecider._enter_step, "idle > 1", "idle > 0"),
        Mutant(
            "remember calls of one step only",
            CallDecider._enter_step,
            "(len(run.used), run.before[0])",
            "(len(run.used), 0)",
        ),
        Mutant(
            "see the last step too late",
            CallDecider._enter_step,
            "step >= run.schedule.steps - 1",
            "step >= run.schedule.steps",
        ),
        Mutant(
            "share a decision with the next step",
            CallDecider._enter_step,
            "run.step, run.used, run.shared = (step, [], None)",
            "run.step, run.used = step, []",
        ),
        Mutant(
            "share a scheduler with a run that is over", CallDecider._shares_scheduler, "not other.finished", "True"
        ),
        Mutant("go on with another schedule", decider._breaks, "tick.epoch is not run.epoch", "False"),
        Mutant(
            "go on after a step left out",
            decider._breaks,
            "0 <= tick.step - run.step <= 1",
            "0 <= tick.step - run.step <= 2",
        ),
        Mutant(
            "go on after a step back",
            decider._breaks,
            "0 <= tick.step - run.step <= 1",
            "-1 <= tick.step - run.step <= 1",
        ),
        Mutant(
            "review runs with a shared scheduler",
            CallDecider._warn_of_missed_target,
            "run.scheduler_is_shared",
            "False",
        ),
    ]


def _run() -> list[Mutant]:
    return [
        Mutant(
            "leave a refresh where nothing is kept",
            Branch.clear,
            "self.history.refreshed, self.interrupted = (None, False)",
            "self.interrupted = False",
        ),
        Mutant("keep a metric's reference", Branch.free, "self.metric.clear()", "None", (ENDS, POLICY_RUNS)),
        Mutant(
            "keep what the last calls were given", Run.clear, "branch.latents, branch.conditioning = ({}, {})", "pass"
        ),
        Mutant("lose what runs of one step are told by", Run.clear, "self.schedule.steps != 1", "True"),
    ]


def _clock() -> list[Mutant]:
    return [
        Mutant("accept a sigma that repeats", StepClock.sigmas, "a > b", "a >= b"),
        Mutant(
            "accept sigmas of another schedule",
            StepClock.sigmas,
            "len(sigmas) not in (tick.steps, tick.steps + 1)",
            "False",
        ),
        Mutant("restart where the value stands", StepClock._ordinal, "moved * way < 0", "moved * way <= 0"),
        Mutant("never restart by timesteps", StepClock._ordinal, "moved * way < 0", "False"),
        Mutant("count calls for steps", StepClock._ordinal, "value != history[-1]", "True"),
        Mutant("forget which way timesteps go", StepClock._ordinal, "self._way = moved", "pass"),
        Mutant("keep the timesteps of the run before", StepClock._ordinal, "history.clear()", "None"),
        Mutant("ask the list in mid-run", StepClock.timed, "listed and not history", "listed"),
        Mutant("ask for the smallest timestep of a token", clock._timestep, "value.max().item()", "value.min().item()"),
        Mutant("begin at step 0 always", StepClock.scheduled, "getattr(scheduler, 'begin_index', None)", "None"),
        Mutant(
            "prefer a step source to a scope",
            StepClock.read,
            "scope is not None",
            "scope is not None and session.step_source is None",
        ),
    ]


def _replay() -> list[Mutant]:
    return [
        Mutant("tolerate one part in twenty", replay.tolerance, "1e-3", "5e-2"),
        Mutant("tolerate no rounding", replay.tolerance, "16 * coarsest", "0.0"),
        Mutant("tolerate anything of nothing", replay.difference, "float(distance > 0)", "0.0"),
        Mutant(
            "replay with the arguments themselves",
            Replay.keep,
            "self._args, self._kwargs = (_copied(self._args), _copied(self._kwargs))",
            "pass",
        ),
        Mutant("feed a cache in the arguments twice", Replay.__call__, "_copied(self._kwargs, True)", "self._kwargs"),
        Mutant(
            "let other caches take part in a replay", Replay.__call__, "replaying.set(True)", "replaying.set(False)"
        ),
        Mutant("replay with whatever dicts hold", replay._plain, "all(map(_plain, value.values()))", "True"),
    ]


def _residual() -> list[Mutant]:
    return [
        Mutant("add residuals of another dtype", residual._fits, "one.dtype == other.dtype", "True"),
        Mutant("add residuals of another shape", residual._fits, "one.shape == other.shape", "True"),
        Mutant(
            "take residuals in the place of a stream used twice",
            residual.take_residual,
            "wiring.plain or isinstance(bridge, (Concat, Unrelated))",
            "True",
        ),
        Mutant("take residuals of an output that was none", residual.take_residual, "value is not None", "False"),
        Mutant(
            "keep the last block's output itself",
            residual.capture_output,
            "value.clone() if isinstance(value, Tensor) else None",
            "value",
        ),
        Mutant("keep what is measured itself", residual._measured, "output.clone()", "output", (GUARDS,)),
    ]


def _verification() -> list[Mutant]:
    return [
        Mutant("accept any error", Verification.check_residual, "tolerance(output, cache.decider.config.dtype)", "inf"),
        Mutant("never go over to copies", Verification.check_residual, "cache.hands_on_results", "False"),
        Mutant(
            "test on an output that is not finite", Verification.check_residual, "not finite(output)", "False", (ENDS,)
        ),
        Mutant("believe a test of a range that was taken off", Verification._error, "trial.stale", "False", (GUARDS,)),
        Mutant("accept noise that arrives otherwise", Verification.check_residual, "alike < ALIKE", "False"),
        Mutant("probe small streams once", Verification.check_residual, "not few(noisy)", "True"),
        Mutant("replay arguments that remember", Verification.check_residual, "argument is not None", "False"),
        Mutant(
            "leave the replayed call in place",
            Verification.repeat,
            "each.state.call, each.state.shortcut = former, shortcut",
            "pass",
        ),
    ]


def _noise_probe() -> list[Mutant]:
    return [
        Mutant("accept any likeness", noise_probe, "0.6", "-1.0"),
        Mutant("let noise go astray", noise_probe._astray, "bool(silent.any())", "False"),
        Mutant(
            "let one stream's noise be lost",
            noise_probe.likeness,
            "min([cosine, *shares, 1 - _astray(arrived, whole) / min(noisy.sizes, default=1.0)])",
            "min([cosine, 1 - _astray(arrived, whole) / min(noisy.sizes, default=1.0)])",
        ),
    ]


def _change_metrics() -> list[Mutant]:
    return [
        Mutant("compare with the last call, not the last computed", RelativeChange.note, "output is not None", "True"),
        Mutant(
            "keep a reference that was to be forgotten",
            RelativeChange.clear,
            "self.reference = ()",
            "pass",
            (POLICY_RUNS,),
        ),
        Mutant(
            "compare with the last computed call, not the last", OutputChangeEstimate.note, "self.before = seen", "pass"
        ),
        Mutant("compare shapes that differ", change_metrics._alike, "a.shape == b.shape", "True", (POLICY_RUNS,)),
        Mutant(
            "take the mean for the most",
            change_metrics._reduced,
            "values.max() if reduce == 'max' else values.mean()",
            "values.mean()",
        ),
        Mutant(
            "divide nothing by nothing",
            OutputChangeEstimate.change,
            "torch.where((output == 0) & (given == 0), output, output / given)",
            "output / given",
        ),
    ]


def _anchor() -> list[Mutant]:
    return [
        Mutant(
            "interpolate weights that do not add up",
            anchor._sum,
            "abs(weight + others[0][1] - 1) < 1e-6",
            "True",
            ("tests/predictors",),
        ),
        Mutant("read anchors of weight 0", anchor.weighted_sum, "weight != 0", "True", ("tests/predictors",)),
        Mutant(
            "return what is kept in another form",
            anchor.Anchor.keep,
            "forms == tuple(((tensor.dtype, tensor.device) for tensor in kept))",
            "True",
        ),
    ]


def _active_calls() -> list[Mutant]:
    return [
        Mutant("follow calls while hooks go on", RangeCache._begin_call, "call.stale = True", "pass"),
        Mutant("follow calls that had begun", ActiveCalls.close, "self.expire()", "None"),
        Mutant("do not wait for other threads", ActiveCalls.close, "self._passing()", "False"),
        Mutant("wait for one's own call", ActiveCalls._passing, "thread.thread != threading.get_ident()", "True"),
        Mutant("expire the call that is to go on", ActiveCalls.expire, "call is not but", "True"),
    ]


def _handle() -> list[Mutant]:
    rollback = "for attached in former:\n    attached.detach()\n    attached.cache.forget()\n    attached.attach()"
    return [
        Mutant(
            "keep what was cached when an update fails",
            CacheHandle._change,
            rollback,
            "for attached in former:\n    attached.detach()\n    attached.attach()",
        ),
        Mutant("leave nothing attached when an update fails", CacheHandle._change, rollback, "pass"),
        Mutant("name the new caches when an update fails", CacheHandle._change, "self._attached = former", "pass"),
        Mutant("leave hooks where attaching fails", handle.dit_cache, "handle.remove()", "None"),
        Mutant(
            "take a plan for another model's", CacheHandle._change, "config.fingerprint not in (None, here)", "False"
        ),
        Mutant("keep counts when reset", CacheHandle.reset, "attached.log.clear()", "None"),
        Mutant("keep residuals when removed", CacheHandle.remove, "remarks += attached.cache.forget()", "pass"),
        Mutant("attach what never reuses", CacheHandle._change, "not own.when.never_reuses", "True"),
    ]


def _sessions() -> list[Mutant]:
    return [
        Mutant(
            "trust what was cached before an exception in a request",
            sessions.inside,
            "session.epoch += 1",
            "pass",
            (GUARDS, "tests/engine/test_handles.py"),
        ),
        Mutant(
            "trust what was cached before an exception in a scope",
            sessions.timestep_scope,
            "session.epoch += 1",
            "pass",
        ),
        Mutant("accept a step past the last", sessions.timestep_scope, "index >= total", "index > total"),
        Mutant("give a task its parent's session", sessions.Session.holds, "self.owner() is owner", "True"),
    ]


def _weights() -> list[Mutant]:
    return [
        Mutant(
            "take swapped contents for written ones",
            weights_version._differ,
            "now.versions[index] > former.versions[index]",
            "now.versions[index] != former.versions[index]",
        ),
        Mutant("see no writes", weights_version._differ, "now.versions[index] > former.versions[index]", "False"),
        Mutant(
            "take moved weights for others", weights_version._differ, "form == former.forms[index] is not None", "True"
        ),
        Mutant("see no other parameter", weights_version._differ, "form == former.forms[index] is not None", "False"),
    ]


def _reason() -> list[Mutant]:
    own = ("NO_ANCHOR", "UNMEASURED", "WEIGHTS", "SHAPE", "SWITCH", "NOT_REACHED")
    return [Mutant(f"share {each} among branches", reason, f"Reason.{each}", "Reason.ANOTHER_RANK") for each in own]


def _history() -> list[Mutant]:
    return [
        Mutant("count steps for calls", log.fold, "step == calls.step", "True"),
        Mutant(
            "measure a rate at the refresh itself",
            log.fold,
            "step > branch.refreshed",
            "step >= branch.refreshed",
        ),
        Mutant("note rates that are not finite", log.fold, "math.isfinite(value)", "True"),
        Mutant(
            "go on with the streak",
            log.fold,
            "branch.computed, branch.streak, branch.drift = (branch.computed + 1, 0, 0.0)",
            "branch.computed, branch.drift = (branch.computed + 1, 0.0)",
        ),
        Mutant(
            "go on with the drift",
            log.fold,
            "branch.computed, branch.streak, branch.drift = (branch.computed + 1, 0, 0.0)",
            "branch.computed, branch.streak = (branch.computed + 1, 0)",
        ),
    ]


def _log() -> list[Mutant]:
    counts = log._RunLog
    return [
        Mutant(
            "count the first call in the median",
            counts._speedups,
            "self.computed[1:] or self.computed",
            "self.computed",
        ),
        Mutant(
            "count the first range in the median", counts._speedups, "self.ranges[1:] or self.ranges", "self.ranges"
        ),
        Mutant(
            "count the first call in the sum",
            counts._speedups,
            "[*self.computed[1:], *self.reused]",
            "[*self.computed, *self.reused]",
        ),
        Mutant("correct the first call of its kind", DecisionLog.correct, "reversed(self._calls)", "self._calls"),
        Mutant("count what was corrected twice", DecisionLog.correct, "self._runs[run].counted = RunCounts()", "pass"),
        Mutant(
            "drop a run that is still sampling",
            DecisionLog.begin_run,
            "former.last <= self._recorded - len(self._calls)",
            "True",
        ),
        Mutant(
            "keep one call too few", DecisionLog.record, "len(self._calls) > MAX_CALLS", "len(self._calls) >= MAX_CALLS"
        ),
        Mutant(
            "drop the run that is the latest but one",
            DecisionLog._fold_oldest,
            "log.run < self._begun - MAX_RUNS",
            "log.run <= self._begun - MAX_RUNS",
        ),
        Mutant("forget the peak", DecisionLog.hold, "max(self._peak, now_bytes)", "now_bytes"),
    ]


MUTANTS = (
    *_reason(),
    *_log(),
    *_history(),
    *_active_calls(),
    *_handle(),
    *_residual(),
    *_replay(),
    *_branches(),
    *_decider(),
    *_clock(),
    *_run(),
    *_change_metrics(),
    *_anchor(),
    *_sessions(),
    *_verification(),
    *_noise_probe(),
    *_range_cache(),
    *_weights(),
)

# Survivors, and why no test can kill them.
EXPLAINED: dict[str, str] = {
    "choose the branch with most that differs": "branches that fit differ in the same names: one that a branch shares "
    "with the call is not taken for changing",
}
