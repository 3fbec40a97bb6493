"""The mutants of :mod:`bench.checks.mutants`: edits of the engine that its tests have to notice."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dithooks import handle
from dithooks.engine import (
    active_calls,
    anchor,
    argument_copies,
    arguments,
    branches,
    change_metrics,
    clock,
    decider,
    noise_probe,
    output_comparison,
    range_cache,
    replay,
    residual,
    run,
    sessions,
    steps_loop,
    timestep_argument,
    verification,
    weights_version,
)
from dithooks.engine.active_calls import ActiveCalls
from dithooks.engine.branches import Likeness
from dithooks.engine.change_metrics import OutputChangeEstimate, RelativeChange
from dithooks.engine.clock import CountedCalls, SchedulerIndex, StepClock, TimestepArgument
from dithooks.engine.decider import CallDecider
from dithooks.engine.range_cache import RangeCache
from dithooks.engine.replay import Replay
from dithooks.engine.run import Branch, Run
from dithooks.engine.timestep_argument import Noted
from dithooks.engine.verification import Verification
from dithooks.handle import CacheHandle
from dithooks.policies import history, reason
from dithooks.stats import log
from dithooks.stats.log import DecisionLog

RUNS = "tests/engine/test_runs.py"
ENDS = "tests/engine/test_ends.py"
SAFETY = "tests/engine/test_safety.py"
CLOCK = "tests/engine/test_clock.py"
BRANCHES = "tests/engine/test_branches.py"
SOURCES = "tests/engine/test_step_sources.py"
COPIES = "tests/engine/test_argument_copies.py"
COMPARISON = "tests/engine/test_output_comparison.py"
FINITE = "tests/engine/test_not_finite.py"
RESIDUALS = "tests/engine/test_finite_residuals.py"
STEPS = "tests/loops/test_steps.py"
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
    argument_copies: (COPIES, GUARDS),
    arguments: (BRANCHES, RUNS),
    branches: (BRANCHES, GUARDS, SAFETY, RUNS),
    change_metrics: (METRICS, GUARDS),
    clock: (SOURCES, CLOCK, STEP_INDEX, GUARDS, SCHEDULERS),
    decider: (BRANCHES, GUARDS, ENDS, RUNS, SAFETY, POLICY_RUNS),
    handle: (GUARDS, ATTACH),
    history: (POLICY_RUNS,),
    log: (LOG, STATS),
    noise_probe: (PROBE, GUARDS),
    output_comparison: (GUARDS, COMPARISON),
    range_cache: (GUARDS, HANDED_ON, RUNS, SAFETY, HALF),
    reason: (GUARDS,),
    replay: (GUARDS, SAFETY),
    residual: (GUARDS, STREAMS),
    run: (ENDS, GUARDS),
    sessions: (SOURCES, GUARDS, RUNS, CLOCK),
    steps_loop: (SOURCES, STEPS),
    timestep_argument: (SOURCES, GUARDS, CLOCK),
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
            "Call() if active.is_closed else decider.plain_call_with_gradients()",
            "decider.plain_call_with_gradients()",
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
    function, compare, believable = branches.choose_branch, branches._compare, branches._believable
    is_next = "any(_is_next(run.branches[number], given) for number in run.used if number in run.branches)"
    forms = "branch.changes.get(f'{name} as form') == 0"
    nearness = "rival.changes[name] <= like.changes.get(name, -inf)"
    return [
        Mutant("call near whatever changes", branches, "0.03", "0.5"),
        Mutant("let drift go ten times as fast", branches, "3.0", "10.0"),
        Mutant("take half of another prompt for another", branches, "0.8", "0.4"),
        Mutant("take any change for that of another prompt", Likeness.far, "self.changes[name] >= APART", "True"),
        Mutant("prefer what changed as much as another prompt", Likeness.rank, "-self.far", "self.far"),
        Mutant(
            "choose the branch with most that differs",
            Likeness.rank,
            "-len(self.doubts) - len(self.misfits)",
            "len(self.doubts) + len(self.misfits)",
        ),
        Mutant("see no form that differs", Likeness.rank, "-len(self.doubts) - len(self.misfits)", "-len(self.doubts)"),
        Mutant("choose the branch with least in common", Likeness.rank, "self.alike", "-self.alike"),
        Mutant("compare what is known to be latents", compare, "name in given.latents", "False"),
        Mutant("compare known prompts by value", compare, "name in known", "False"),
        Mutant("doubt a strength that fades", compare, "now.numel() <= few", "False"),
        Mutant("let prompts change that repeated", compare, "last == 0", "False"),
        Mutant("take what was seen once for what repeats", compare, "last == 0", "not last"),
        Mutant("doubt small changes after smaller ones", believable, "max(NEAR, grown)", "grown"),
        Mutant("doubt what drifts as before", believable, "max(NEAR, grown)", "NEAR"),
        Mutant("doubt nothing that was seen once", believable, "return NEAR", "return inf"),
        Mutant("take another prompt for a drift that grew", believable, "min(grown, APART)", "grown"),
        Mutant("see no rival of one call", function, "any(_is_as_near(other, like) for other in rivals)", "False"),
        Mutant("see rivals that were idle", function, "run.branches[key].called == run.last_step", "True"),
        Mutant("take who is farther for a rival", branches._is_as_near, nearness, nearness.replace("<", ">")),
        Mutant("doubt what is known to jump", believable, "last < APART", "True"),
        Mutant("let forms change that repeated", compare, forms, "False"),
        Mutant("refuse a form that was seen once", compare, "like.misfits.add(name)", "like.conflicts.add(name)"),
        Mutant(
            "forget which forms repeat",
            compare,
            "like.changes[f'{name} as form'] = float(was != is_now)",
            "pass",
        ),
        Mutant("take another picture for a branch", function, "return None", "pass"),
        Mutant(
            "end a run that is through whatever is called",
            function,
            f"run.finished and {is_next}",
            "run.finished",
        ),
        Mutant(
            "take a second evaluation for another picture",
            function,
            f"run.finished and {is_next}",
            is_next,
        ),
        Mutant("call a branch twice at a step", function, "number not in run.used", "True"),
        Mutant("take a branch that conflicts", function, "not like.conflicts", "True"),
        Mutant("number a new branch as its turn", function, "turn not in run.branches", "True"),
        Mutant("take the newest number once more", function, "max(run.branches) + 1", "max(run.branches)"),
        Mutant(
            "choose the branch least alike",
            function,
            "max((like.rank for like in fitting.values()))",
            "min((like.rank for like in fitting.values()))",
        ),
        Mutant(
            "take the first of branches that are alike",
            function,
            "len(tied) > 1 or (may_be_left_over and len(run.branches) > 1)",
            "run.epoch is None and run.branches[number].steps == 1",
        ),
        Mutant(
            "trust the only branch that fits",
            function,
            "len(tied) > 1 or (may_be_left_over and len(run.branches) > 1)",
            "len(tied) > 1",
        ),
        Mutant(
            "doubt the only branch though a scheduler tells runs",
            function,
            "len(tied) > 1 or (may_be_left_over and len(run.branches) > 1)",
            "len(tied) > 1 or run.branches[number].steps == 1",
        ),
        Mutant(
            "take another picture's latents for the same",
            branches._is_next,
            "not _are_alike(branch.given.latents, given.latents)",
            "True",
        ),
        Mutant(
            "take calls with fewer arguments for alike",
            branches._are_alike,
            "before.keys() == now.keys()",
            "before.keys() >= now.keys()",
        ),
        Mutant("ask for the very same tensors", branches._are_alike, "distance(before[name], now[name]) == 0", "False"),
    ]


def _claims() -> list[Mutant]:
    function, settle = branches.choose_branch, branches.settle_claims
    lost = "number in run.used or far > best[number] or number not in run.branches"
    return [
        Mutant("claim what another call has a claim to", function, "claimed.get(number, inf) <= like.far", "False"),
        Mutant(
            "give a draw to the later claim",
            function,
            "claimed.get(number, inf) <= like.far",
            "claimed.get(number, inf) < like.far",
        ),
        Mutant(
            "look at the worst claim",
            function,
            "sorted(filter(None, claims), reverse=True)",
            "sorted(filter(None, claims))",
        ),
        Mutant("claim a branch that is idle", function, "run.branches[number].called != run.last_step", "False"),
        Mutant(
            "go on with a branch that is in doubt",
            function,
            "return Match(new, Claim(number, like.far), like.changes)",
            "return Match(number, None, like.changes)",
        ),
        Mutant(
            "forget how much a claimed prompt changed",
            function,
            "return Match(new, Claim(number, like.far), like.changes)",
            "return Match(new, Claim(number, like.far))",
        ),
        Mutant(
            "lose what a call is not sure of",
            function,
            "is_doubtful or any(_is_as_near(other, like) for other in rivals)",
            "any(_is_as_near(other, like) for other in rivals)",
        ),
        Mutant(
            "forget what changed",
            function,
            "Match(number, None, like.changes, is_doubtful or any(_is_as_near(other, like) for other in rivals))",
            "Match(number, None, {}, is_doubtful or any(_is_as_near(other, like) for other in rivals))",
        ),
        Mutant(
            "let the worst claim hold", settle, "min(far, best.get(number, far))", "max(far, best.get(number, far))"
        ),
        Mutant("let every claim hold", settle, lost, "number in run.used or number not in run.branches"),
        Mutant("let a claim on a called branch hold", settle, lost, "far > best[number] or number not in run.branches"),
        Mutant("settle claims on a dropped branch", settle, lost, "number in run.used or far > best[number]"),
        Mutant("believe the changes of a lost claim", settle, "branch.changes, branch.jumps = {}, set()", "pass"),
        Mutant("keep a claim that is settled", settle, "branch.claim = None", "pass"),
        Mutant(
            "believe another prompt at once",
            settle,
            "{name for name, change in branch.changes.items() if change >= APART}",
            "set()",
        ),
        Mutant("never believe another prompt", settle, "branch.jumps - before", "branch.jumps"),
    ]


def _nearest() -> list[Mutant]:
    function, given = branches._nearest, branches._distance
    far = "not near and seen_once and kind == 'latents' and (run.epoch is None)"
    return [
        Mutant("go on from a branch that is idle", function, "called or branches", "branches"),
        Mutant("look at latents only", function, "('conditioning', 'latents')", "('latents',)"),
        Mutant("look at conditioning only", function, "('conditioning', 'latents')", "('conditioning',)"),
        Mutant("take evaluations of one step for windows", function, "farthest >= APART", "True"),
        Mutant("doubt what has no like form", function, "min(distances.values()) < inf", "True"),
        Mutant(
            "call near what is nearer at all",
            function,
            "distances[number] < farthest / 2",
            "distances[number] < farthest",
        ),
        Mutant("find none where none is near", function, "near or branches", "near"),
        Mutant("trust a branch of one call that is far", function, far, "False"),
        Mutant(
            "doubt a far branch of many calls", function, far, "not near and kind == 'latents' and run.epoch is None"
        ),
        Mutant(
            "doubt a branch beside a near one", function, far, "seen_once and kind == 'latents' and run.epoch is None"
        ),
        Mutant("doubt far conditioning", function, far, "not near and seen_once and run.epoch is None"),
        Mutant("doubt far latents of a scheduled run", function, far, "not near and seen_once and kind == 'latents'"),
        Mutant("trust whichever rival", function, "len(set(rivals)) > 1", "False"),
        Mutant("doubt rivals that are alike", function, "len(set(rivals)) > 1", "len(rivals) > 1"),
        Mutant("take later calls for rivals", function, "branch.is_first and branch.steps == 1", "branch.steps == 1"),
        Mutant(
            "take branches of many calls for rivals",
            function,
            "branch.is_first and branch.steps == 1",
            "branch.is_first",
        ),
        Mutant("see rivals where a scope tells steps", function, "run.source == 'timestep'", "True"),
        Mutant("choose by age, not by position", function, "(branches[each].position, each)", "each"),
        Mutant(
            "choose the latest of alike branches",
            function,
            "(branches[each].position, each)",
            "(-branches[each].position, each)",
        ),
        Mutant("take one sample for each call", branches._samples, "len(latents)", "1"),
        Mutant("compare strengths for distances", given, "value.numel() > few", "True"),
        Mutant("leave out latents of few numbers", given, "0 if kind == 'latents' else _samples(now)", "_samples(now)"),
        Mutant(
            "take the nearest argument for the distance",
            given,
            "max([0.0 if is_same(*pair) else distance(*pair) for pair in pairs], default=0.0)",
            "min([0.0 if is_same(*pair) else distance(*pair) for pair in pairs], default=0.0)",
        ),
        Mutant(
            "measure distances by the former's size",
            branches.distance,
            "max(float(x.norm()), float(y.norm()))",
            "float(x.norm())",
        ),
        Mutant("measure distances by no size", branches.distance, "apart / size", "apart"),
        Mutant("take what is not a number for near", branches.distance, "0.0 if apart == 0 else inf", "0.0"),
        Mutant("measure real parts", branches.distance, "a.is_complex()", "False"),
        Mutant("measure between dtypes", branches.distance, "a.dtype != b.dtype", "False"),
        Mutant("measure between shapes", branches.distance, "a.shape != b.shape", "False"),
    ]


def _decider() -> list[Mutant]:
    return [
        Mutant(
            "add what is not finite",
            CallDecider._why_unusable,
            "branch.unread and not self._is_finite(run, branch)",
            "False",
            (RESIDUALS,),
        ),
        Mutant("keep what is not finite", CallDecider._is_finite, "isfinite(each.check.peak)", "True", (RESIDUALS,)),
        Mutant(
            "add more than half precision holds",
            CallDecider._is_beyond,
            "any(check.is_out_of_reach for check in checks) or not is_beyond(checks, weights)",
            "True",
            (RESIDUALS,),
        ),
        Mutant(
            "say nothing of it before ranks agree",
            CallDecider._agreed,
            "not self._predicted(call, branch)",
            "False",
            (RESIDUALS,),
        ),
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
        Mutant(
            "evict no branch",
            CallDecider._enter_step,
            "len(run.branches) > max(MAX_CAPTURED, 2 * run.before[0])",
            "False",
        ),
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
            "take changed weights for changed shapes", decider.what_has_changed, "former[0] != signature[0]", "False"
        ),
        Mutant("reuse whatever changed", CallDecider._why_unusable, "former == signature", "True"),
        Mutant(
            "take a changed shape for a switch",
            decider.what_has_changed,
            "_tensor_forms(former) == _tensor_forms(signature)",
            "True",
        ),
        Mutant("share one branch's own reason", CallDecider._record, "None if own else decision", "decision"),
        Mutant("forget that a computed call began", CallDecider._make_room, "branch.interrupted = True", "pass"),
        Mutant("keep anchors of another form", CallDecider._make_room, "anchor.signature == call.signature", "True"),
        Mutant(
            "keep one anchor too many",
            CallDecider._make_room,
            "fitting[: self._anchors - 1]",
            "fitting[: self._anchors]",
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
            "len(run.used) >= max(MAX_CALLS, 2 * run.before[0])",
            "len(run.used) > max(MAX_CALLS, 2 * run.before[0])",
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
            "run.last_step, run.step, run.used, run.shared = run.step, step, [], None",
            "run.last_step, run.step, run.used = run.step, step, []",
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
        Mutant("free no cancelled requests", CallDecider._free_abandoned, "run.clear()", "None"),
        Mutant(
            "free no requests whose scheduler goes on with others",
            CallDecider._free_abandoned,
            "is_over or run.session_epoch != session.epoch",
            "run.session_epoch != session.epoch",
        ),
        Mutant(
            "free no requests that an exception left",
            CallDecider._free_abandoned,
            "is_over or run.session_epoch != session.epoch",
            "is_over",
        ),
        Mutant(
            "free requests of other schedulers",
            CallDecider._free_abandoned,
            "scheduler is not None and getattr(scheduler, 'timesteps', None) is not run.epoch",
            "scheduler is not None and run.epoch is not begun.epoch",
        ),
        Mutant(
            "keep all that a first step makes",
            CallDecider._ask_policy,
            "run.steps == 1 and len(run.used) > MAX_CAPTURED and (self.on_anchor is None)",
            "False",
        ),
        Mutant(
            "keep few calls of any step",
            CallDecider._ask_policy,
            "run.steps == 1 and len(run.used) > MAX_CAPTURED and (self.on_anchor is None)",
            "len(run.used) > MAX_CAPTURED and self.on_anchor is None",
        ),
        Mutant(
            "evict branches that a step calls",
            CallDecider._enter_step,
            "len(run.branches) > max(MAX_CAPTURED, 2 * run.before[0])",
            "len(run.branches) > MAX_CAPTURED",
        ),
        Mutant(
            "end a run at a step of many calls",
            CallDecider._locate,
            "len(run.used) >= max(MAX_CALLS, 2 * run.before[0])",
            "len(run.used) >= MAX_CALLS",
        ),
        Mutant(
            "leave latents among the conditioning",
            CallDecider.learn_latents,
            "branch.given.sort(self._latents)",
            "None",
        ),
        Mutant("retire no branch", CallDecider._enter_step, "branch.called != run.step", "False"),
        Mutant("retire branches that were called", CallDecider._enter_step, "branch.called != run.step", "True"),
        Mutant("leave claims unsettled", CallDecider._enter_step, "settle_claims(run)", "None"),
        Mutant(
            "reuse what may be another run's",
            CallDecider.decide,
            "branch.interrupted or match.is_doubtful",
            "branch.interrupted",
        ),
        Mutant(
            "forget that the only prompt repeats",
            CallDecider._match,
            "first.changes.update(dict.fromkeys(now, 0.0))",
            "None",
        ),
        Mutant("take the only branch in any form", CallDecider._match, "first.given.form == given.form", "True"),
        Mutant(
            "reuse at a step what was kept at it",
            CallDecider._why_unusable,
            "branch.anchors[0].moment.step < step",
            "True",
        ),
        Mutant(
            "ask why nothing was reused though it was",
            CallDecider.why_silent,
            "any((each.reuse or each.reason == Reason.CONDITIONAL for each in records))",
            "False",
        ),
        Mutant("ask why one call reused nothing", CallDecider.why_silent, "len(records) < LEAST_CALLS", "False"),
        Mutant(
            "explain twice why nothing was reused",
            CallDecider.why_silent,
            "not self._could_reuse or self._is_explained or self.on_anchor is not None",
            "not self._could_reuse or self.on_anchor is not None",
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
        Mutant("keep what the last calls were given", Run.clear, "branch.given = _nothing()", "pass"),
        Mutant("lose what runs of one step are told by", Run.clear, "self.schedule.steps == 1", "False"),
    ]


def _clock() -> list[Mutant]:
    standing = "self._standing is Standing.KNOWN or not time.first or time.index in (None, tick.step)"
    never = "self._standing = Standing.NEVER"
    index, argument, back = SchedulerIndex, TimestepArgument, clock.goes_back
    return [
        Mutant("go on where another pipeline began", index._moves_alone, "self._moved(asked)", "True"),
        Mutant("take timesteps that always stand for another run", index._moves_alone, standing, "False"),
        Mutant("forget that the other pipeline made the steps", index._trusts, never, "None"),
        Mutant("accept a sigma that repeats", StepClock.sigmas, "a > b", "a >= b"),
        Mutant(
            "accept sigmas of another schedule",
            StepClock.sigmas,
            "len(sigmas) not in (tick.steps, tick.steps + 1)",
            "False",
        ),
        Mutant("restart where the value stands", argument._goes_back, "moved * way < 0", "moved * way <= 0"),
        Mutant("never restart by timesteps", argument._goes_back, "moved * way < 0", "False"),
        Mutant("forget which way timesteps go", argument._goes_back, "self._way = moved", "pass"),
        Mutant(
            "go by the way of the run before",
            argument._goes_back,
            "last.highest - first.highest if len(time.readings) > 1 else self._way",
            "self._way",
        ),
        Mutant(
            "keep the way of runs of one timestep",
            argument._goes_back,
            "self._way = way if len(time.readings) > 1 else 0.0",
            "self._way = way",
        ),
        Mutant("count calls for steps", argument.tick, "reading.values != time.readings[-1].values", "True"),
        Mutant(
            "tell timesteps by their highest alone",
            argument.tick,
            "reading.values != time.readings[-1].values",
            "reading.highest != time.readings[-1].highest",
        ),
        Mutant(
            "keep the timesteps of the run before",
            argument.tick,
            "time.readings, time.moves, time.offset = [reading], 0, 0",
            "pass",
        ),
        Mutant("forget the latest timestep", argument.tick, "time.readings[1:] = [reading]", "pass"),
        Mutant("begin beside the list always", argument.tick, "reading.highest in listed", "False"),
        Mutant(
            "count listed timesteps as often as they are",
            argument.tick,
            "list(dict.fromkeys(epoch.cpu().tolist()))",
            "epoch.cpu().tolist()",
        ),
        Mutant(
            "take the list of a scheduler that stands still",
            argument.tick,
            "time.trusts_scheduler is None",
            "True",
        ),
        Mutant(
            "go by the first timestep though it stands",
            argument._reading,
            "moved or time.moves or (not time.others)",
            "True",
        ),
        Mutant(
            "go by another timestep in mid-run", argument._reading, "moved or time.moves or (not time.others)", "moved"
        ),
        Mutant(
            "compare one timestep with another",
            argument._reading,
            "time.path, time.readings = path, [first]",
            "time.path = path",
        ),
        Mutant("begin at step 0 always", clock.scheduled, "getattr(scheduler, 'begin_index', None)", "None"),
        Mutant("trust a scheduler that is through", index.tick, "tick.step >= tick.steps", "tick.step > tick.steps"),
        Mutant(
            "forget that a scheduler is through",
            index.tick,
            "time.trusts_scheduler, time.index = False, tick.step",
            "pass",
        ),
        Mutant("never trust a scheduler again", index.tick, "tick.step != time.index", "False"),
        Mutant(
            "go on with a scheduler that moves after all",
            index.tick,
            "tick._replace(restart=True) if tick.step != time.index else None",
            "tick if tick.step != time.index else None",
        ),
        Mutant("see no move of a scheduler", index.tick, "time.index = tick.step", "pass"),
        Mutant(
            "trust a scheduler no more for moving",
            index._trusts,
            "time.trusts_scheduler, time.first = True, []",
            "pass",
        ),
        Mutant(
            "trust a scheduler that stands still",
            index._trusts,
            "time.trusts_scheduler is None and not is_proven and self._moved(asked)",
            "False",
        ),
        Mutant(
            "trust it at the call that shows it", index._trusts, "return time.trusts_scheduler is None", "return True"
        ),
        Mutant(
            "count from 0 where a scheduler stood",
            index._trusts,
            "time.trusts_scheduler, time.stood_at, time.offset = False, tick.step, tick.step",
            "time.trusts_scheduler, time.stood_at = False, tick.step",
        ),
        Mutant(
            "lose the timestep of the first call",
            index._trusts,
            "time.path, time.readings = found.path, [reading]",
            "pass",
        ),
        Mutant("go back at the first move", back, "moved * way < 0", "moved * way <= 0"),
        Mutant("never go back", back, "moved * way < 0", "False"),
        Mutant("go back part of the way within a step", back, "(value - time.start) * time.way <= 0", "True"),
        Mutant(
            "never go back within a step",
            back,
            "moved * time.way < 0 and (value - time.start) * time.way <= 0",
            "False",
        ),
        Mutant("compare timesteps with the first one", back, "time.shown = value", "pass"),
        Mutant("forget the way where a timestep stands", back, "if not moved:\n    return False", "pass"),
        Mutant(
            "count each call of a step as one", CountedCalls.tick, "time.calls // self.calls_per_step", "time.calls"
        ),
        Mutant("count no calls", CountedCalls.tick, "time.calls += 1", "pass"),
        Mutant("count one step too many", CountedCalls.tick, "step >= self.steps", "step > self.steps"),
        Mutant("count on where timesteps go back", CountedCalls.tick, "seen is not None and seen.restart", "False"),
        Mutant("prefer a scheduler to a named timestep", StepClock.__init__, "self.sources.reverse()", "None"),
        Mutant(
            "go on by a scheduler where timesteps go back",
            StepClock.read,
            "goes_back(arguments, run_time, is_new_step)",
            "False",
        ),
        Mutant("take calls of one step for steps", StepClock.read, "run_time.index = tick.step", "pass"),
        Mutant(
            "go on with a scheduler that is through",
            StepClock.read,
            "tick is not None and tick.step < tick.steps",
            "tick is not None",
        ),
        Mutant(
            "prefer a step source to a scope",
            StepClock.read,
            "scope is not None",
            "scope is not None and session.step_source is None",
        ),
    ]


def _timestep_argument() -> list[Mutant]:
    read, same = timestep_argument.read, timestep_argument.is_same
    return [
        Mutant("take views with other strides for one", same, "a.stride() == b.stride()", "True"),
        Mutant("take tensors of other shapes for one", same, "a.shape != b.shape", "False"),
        Mutant("take tensors of other dtypes for one", same, "a.dtype != b.dtype", "False"),
        Mutant(
            "take tensors without memory for one",
            same,
            "0 != a.data_ptr() == b.data_ptr()",
            "a.data_ptr() == b.data_ptr()",
        ),
        Mutant("read flags as timesteps", read, "not isinstance(given, bool)", "True"),
        Mutant("ask for the smallest timestep of a token", read, "float(different[-1])", "float(different[0])"),
        Mutant(
            "count clean frames",
            read,
            "tuple((value for value in different.tolist() if value)) or (0.0,)",
            "tuple(different.tolist())",
        ),
        Mutant(
            "read an embedding of timesteps", read, "len(different) > _MANY and 2 * len(different) > len(flat)", "False"
        ),
        Mutant(
            "take many tokens' timesteps for an embedding",
            read,
            "len(different) > _MANY and 2 * len(different) > len(flat)",
            "len(different) > _MANY",
        ),
        Mutant(
            "take any timestep inside for the likeliest",
            timestep_argument.timesteps_in,
            "sorted(deeper, key=lambda found: names.index(_name(found.path, names)))",
            "deeper",
        ),
        Mutant(
            "take names that end alike for one",
            timestep_argument._is_called,
            "path.endswith(f'.{name}')",
            "path.endswith(name)",
        ),
        Mutant("look one container deep", timestep_argument._inside, "depth > 1", "False"),
        Mutant("look into containers without end", timestep_argument._inside, "depth > 1", "True"),
        Mutant("take what was written into for still", Noted.is_still, "now._version == self.version", "True"),
        Mutant("note a timestep that is written into", timestep_argument.note, "value.detach().clone()", "value"),
    ]


def _steps() -> list[Mutant]:
    function = steps_loop._iterate
    made = "Scope(index, None, sigma, total, session, loop, outer)"
    return [
        Mutant("leave the step before open", function, "if scope is not None:\n    scope.is_closed = True", "pass"),
        Mutant("end the step of another loop", function, "open_scope() is scope", "True"),
        Mutant("take each loop for broken off", function, "is_over = True", "pass"),
        Mutant("trust what a loop broken off has cached", function, "session.epoch += 1", "pass"),
        Mutant(
            "make each step a loop of its own",
            function,
            made,
            "Scope(index, None, sigma, total, session, object(), outer)",
        ),
        Mutant("forget the scope around a loop", function, made, "Scope(index, None, sigma, total, session, loop)"),
        Mutant(
            "count on in a step that is over", sessions.open_scope, "scope is not None and scope.is_closed", "False"
        ),
        Mutant(
            "forget the scope around a step that is over", sessions.open_scope, "scope = scope.outer", "scope = None"
        ),
        Mutant(
            "take a step that is over for the open one",
            sessions.current_context,
            "scope is not None and scope.is_closed",
            "False",
        ),
        Mutant(
            "lose a request's scope",
            sessions.SessionEntry.__init__,
            "scope and replace(scope, session=session)",
            "None",
        ),
    ]


def _arguments() -> list[Mutant]:
    function = arguments.latents_among
    return [
        Mutant("take a prompt of the latents' form for latents", function, "shapes = shapes[len(chosen):]", "pass"),
        Mutant("take all of one form for latents", function, "shapes.remove(tensor.shape)", "None"),
        Mutant("take timesteps for latents", function, "path.rpartition('.')[2] not in TIME", "True"),
        Mutant(
            "know no latents without an output like them", function, "chosen or [path for path, _ in own[:1]]", "chosen"
        ),
        Mutant(
            "take the first list alone for latents",
            function,
            "isinstance(given, (Tensor, list, tuple))",
            "isinstance(given, Tensor)",
        ),
    ]


def _replay() -> list[Mutant]:
    return [
        Mutant("tolerate one part in twenty", output_comparison.tolerance, "1e-3", "5e-2"),
        Mutant("tolerate no rounding", output_comparison.tolerance, "16 * coarsest", "0.0"),
        Mutant("tolerate anything of nothing", output_comparison.difference, "float(distance > 0)", "0.0"),
        Mutant(
            "replay with the arguments themselves",
            Replay.keep,
            "self._args, self._kwargs = _copied(self._args, self._kwargs)",
            "pass",
        ),
        Mutant(
            "feed a cache in the arguments twice",
            Replay.__call__,
            "_copied(self._args, self._kwargs)",
            "(self._args, self._kwargs)",
        ),
        Mutant(
            "let other caches take part in a replay", Replay.__call__, "replaying.set(True)", "replaying.set(False)"
        ),
        Mutant("use up an iterator", argument_copies._Writer.persistent_id, "isinstance(value, Iterator)", "False"),
        Mutant(
            "share what a tuple holds",
            argument_copies._is_unwritable,
            "not hasattr(value, '__dict__') and all(map(_is_unwritable, value))",
            "True",
        ),
    ]


def _residual() -> list[Mutant]:
    return [
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
            "value.clone()",
            "value",
        ),
        Mutant("keep what is measured itself", residual.measured_outputs, "output.clone()", "output", (GUARDS,)),
    ]


def _verification() -> list[Mutant]:
    allowed = "tolerance((output, deltas), cache.decider.config.dtype, *autocast_of(tensors_in(output).values()))"
    return [
        Mutant("accept any error", Verification.check_residual, allowed, "inf"),
        Mutant("take zeros for a proof", Verification.check_residual, "is_zero(output)", "False"),
        Mutant(
            "refuse a model for what float16 cannot hold",
            Verification.check_residual,
            "first_not_finite(deltas) is not None",
            "False",
            (RESIDUALS,),
        ),
        Mutant("never go over to copies", Verification.check_residual, "cache.hands_on_results", "False"),
        Mutant(
            "test on an output that is not finite",
            Verification.check_residual,
            "(path := first_not_finite(output)) is not None",
            "False",
            (FINITE,),
        ),
        Mutant(
            "believe a test of a range that was taken off",
            Verification._trial,
            "if trial.stale:\n    return None",
            "pass",
        ),
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
            "min([cosine, *shares, 1 - _astray(arrived, whole) / size])",
            "min([cosine, 1 - _astray(arrived, whole) / size])",
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
    rollback = "for attached in former:\n    attached.detach()\n    attached.cache.drop()\n    attached.attach()"
    return [
        Mutant(
            "keep what was cached when an update fails",
            CacheHandle._change,
            rollback,
            "for attached in former:\n    attached.detach()\n    attached.attach()",
        ),
        Mutant("leave nothing attached when an update fails", CacheHandle._change, rollback, "pass"),
        Mutant(
            "name the new caches when an update fails",
            CacheHandle._change,
            "self._attached, self._watches, (self._given, self._config) = (former, former_watches, before)",
            "self._watches, (self._given, self._config) = (former_watches, before)",
        ),
        Mutant("leave hooks where attaching fails", handle.dit_cache, "handle.__exit__(*sys.exc_info())", "None"),
        Mutant(
            "take a plan for another model's", CacheHandle._change, "config.fingerprint not in (None, here)", "False"
        ),
        Mutant("keep counts when reset", CacheHandle.reset, "attached.log.clear()", "None"),
        Mutant("keep residuals when removed", CacheHandle._take_off, "remarks += _forgotten(attached)", "pass"),
        Mutant("attach what never reuses", CacheHandle._change, "not own.when.never_reuses", "True"),
    ]


def _sessions() -> list[Mutant]:
    return [
        Mutant(
            "trust what was cached before an exception in a request",
            sessions.SessionEntry.leave,
            "self._session.epoch += failed",
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
    *_claims(),
    *_nearest(),
    *_decider(),
    *_clock(),
    *_timestep_argument(),
    *_steps(),
    *_arguments(),
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
    "doubt the only branch though a scheduler tells runs": "where a scheduler tells runs, nothing comes of distances "
    "to the only branch: they are measured for nothing, which takes time",
}
