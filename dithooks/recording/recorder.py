"""The recorder of one transformer: hooks that keep token samples of its streams, and time its blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks.block_io import bind, parameter_names
from ..blocks.block_lists import Chain
from ..blocks.data_flow import DataFlow
from ..blocks.observation import Observation, observed_blocks
from ..blocks.stream_matching import block_io_of
from ..blocks.tap import tap
from ..blocks.trunk import Trunk, find_trunk, followable_ranges
from ..blocks.wiring import gap
from ..config.cache_config import DitCacheConfig
from ..engine.arguments import CallArguments
from ..engine.call import Call
from ..engine.clock import StepClock
from ..engine.decider import CallDecider
from ..engine.output_comparison import tensors_in
from ..engine.replay import Replay, replaying
from ..engine.stand_in import stand_in
from ..errors import InvalidSetting, WiringError
from ..integrations.dispatch import BlockIntegrations
from ..policies.history import BranchHistory, Decision, Schedule
from ..policies.policy import Policy
from ..progress_bars import ProgressCallback
from ..stats.log import DecisionLog
from .gram_totals import GramTotals
from .input_check import InputSamples
from .loop_passes import LoopPasses
from .recording import Trace
from .sensitivity import CallPosition
from .stopwatch import OTHER, SAMPLING, Stopwatch
from .token_samples import Sampled
from .token_selection import SamplePoint, points_of

BRANCHES, STEPS = 2, 50  # assumed of a run while they are unknown


@dataclass(frozen=True)
class Computed(Policy):
    """The policy of a recorded run: every call is computed."""

    needs_sigmas: ClassVar[bool] = True

    def before(self, step: int, track: BranchHistory, schedule: Schedule) -> Decision:
        return Decision(False, "record")

    def keeps(self, step: int, anchors: int) -> bool:
        return False


class Recorder:
    """Records one transformer.

    Args:
        chain: the transformer's blocks.
        scheduler: returns the pipeline's current scheduler, or ``None``.
        expected: number of steps of a run; ``None``: unknown.
        memory: largest size of one run's samples in bytes.
        share: largest share of the tokens to keep.
    """

    def __init__(
        self, chain: Chain, scheduler: Callable[[], Any], expected: int | None, memory: int, share: float
    ) -> None:
        self.chain, self.expected, self.memory, self.share = chain, expected, memory, share
        self.stopwatch, self.tally = Stopwatch(chain.owner), GramTotals(chain.name)
        self.schedule, self.size, self.rows, self.calls = Schedule(), tuple[int, ...](), 0, 0
        self.sequence: list[CallPosition] = []  # of all calls
        self.on_call: Callable[[int, int], None] = lambda run, step: None  # called with each call of the model
        self._watched = InputSamples(chain.owner)
        self._observed, self._names = observed_blocks(chain), parameter_names(chain.owner)
        log = DecisionLog(chain.name, len(self._observed), len(self._observed))
        config = DitCacheConfig(policy=Computed())
        clock = StepClock(scheduler, chain.name)
        self._decider = CallDecider(chain, config, clock, log, BlockIntegrations())
        self._decider.on_anchor = lambda call, deltas: None  # to record is all that is wanted: nothing to warn of
        self._report: ProgressCallback = lambda stage, done, total: None
        self._observation: Observation | None = None
        self._flow: DataFlow | None = None  # of the call that is observed
        self._refused_ranges: set[tuple[int, int]] = set()  # ranges that can be followed, but not cached
        self._altered: set[int] = set()  # blocks whose outputs the model writes into, and, while it is looked at,
        self._returned: list[tuple[int, Tensor, Tensor]] = []  # what one has returned, and that by value
        self._trunk: Trunk | None = None
        self._refused = ""  # why a range cannot be followed
        self._points: dict[Any, list[SamplePoint]] = {}  # by the signature of a call
        self._branches: dict[int, tuple[Any, Sampled]] = {}  # of the run under way, by number
        self._run = -1
        self._first_step: int | None = None  # of all
        self._call: Call | None = None
        # Where a loop calls the blocks without the transformer: their passes, and the first and last block of a call
        self._passes = LoopPasses(self._observed, len(chain.block_lists) == 1)
        self._ends: tuple[int, int] | None = None
        self._here: dict[tuple[int, str], list[int]] = {}  # points of the call under way, by block and side
        self._sampled = Sampled(())
        self._taken: list[list[Tensor]] = []
        self._extra_ms = 0.0

    @contextmanager
    def hooked(self, report: ProgressCallback | None) -> Iterator[None]:
        """With the hooks on; taken off again, whatever happens."""
        self._report = report or self._report
        refs = [(ref, ref.block) for ref in self.chain.block_refs]
        lists, behind = [block_list.blocks for block_list in self.chain.block_lists], dict[int, nn.Module]()
        blocks = [block for _, block in refs]
        with tap(blocks, self._enter, self._leave, self._begin, self._finish, model=self.chain.owner):
            try:
                for index, (ref, block) in enumerate(refs):
                    skip = stand_in(block, index, is_end=True)  # whose forward(), called by itself, calls hooks, too
                    behind[id(skip)] = block
                    ref.put(skip)
                yield
            finally:
                for parent in [*lists, *self.chain.owner.modules()]:  # a run may have rebuilt its lists
                    for name, child in list(parent._modules.items()):
                        if id(child) in behind:
                            parent._modules[name] = behind[id(child)]

    def driven(self) -> bool:
        """Whether a loop called the blocks without the transformer; the next run then records the blocks' calls."""
        seen = self._passes.cut()
        if seen is None or self.calls:
            return False
        order, held = self._learn((), seen), self._passes.most_held
        if held is not None:  # a pass cannot be made once more, to follow its data
            self._refused_ranges |= {
                (first, last) for first, last in self.tally.ranges if held.inside(order[first : last + 1]) is not None
            }
        assert self._trunk is not None
        self._ends = self._trunk.order[0], self._trunk.order[-1]
        return True

    @property
    def last(self) -> nn.Module:
        """The last block that a call runs."""
        assert self._trunk is not None
        return self.chain.block_refs[self._trunk.order[-1]].block

    @property
    def spent_ms(self) -> float:
        """Milliseconds that recording has added to the run."""
        return self._extra_ms + self.stopwatch.spent(SAMPLING)

    def trace(self) -> Trace:
        """Return what was recorded, once the run is over."""
        self._fold()
        if self._trunk is None or not self.tally.runs:
            raise InvalidSetting(f"{self.chain.name}: no call ran all the blocks that its first one did")
        tally, order = self.tally, self._trunk.order
        ranges = [number for number, pair in enumerate(tally.ranges) if pair not in self._refused_ranges]
        moments = [tally.moments[step] for step in tally.steps]
        block_ms = np.array([self.stopwatch.spent(index) for index in order]) / self.calls
        points = next(iter(self._points.values()))
        kept, whole = sum(len(point.ids) for point in points), sum(point.tokens for point in points)
        if not whole:
            raise InvalidSetting(f"{self.chain.name}: no range of its blocks can be followed: {self._refused}")
        return Trace(
            path=self.chain.path,
            blocks=tuple(self._observed[index].path for index in order),
            ranges=np.array(tally.ranges, dtype=np.int64).reshape(-1, 2)[ranges],
            grams=tally.grams[ranges],
            norms=np.sqrt(tally.squares),
            steps=np.array(tally.steps, dtype=np.int64),
            times=np.array([moment.time for moment in moments]),
            axis=moments[0].axis,
            branches=self.calls / (len(moments) * tally.runs),
            block_ms=block_ms,
            call_ms=float(block_ms.sum()) + self.stopwatch.spent(OTHER) / self.calls,
            share=kept / whole,
            inputs=self._watched.inputs,
            second=self._watched.second,
            calls=self._watched.calls,
        )

    # -- hooks --------------------------------------------------------------------------------------------------

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if replaying.get():
            return
        if torch.is_grad_enabled():
            raise InvalidSetting(f"{self.chain.name} is called with gradients enabled: call run under torch.no_grad()")
        begun = time.perf_counter()
        arguments = bind(self._names, args, kwargs)
        call = self._decider.decide(arguments, seen=True, capture=False)
        assert call.run is not None
        assert call.branch is not None
        if call.run.number != self._run:
            self._fold()
            self._run = call.run.number
            self._count(arguments)
        self.schedule = call.run.schedule
        key, number = CallArguments(arguments, frozenset()).form, call.branch.history.number
        self._first_step = call.moment.step if self._first_step is None else self._first_step
        second = not self._watched.second and call.moment.step != self._first_step
        self._watched.note(arguments, second)
        self.sequence.append(CallPosition(call.run.number, call.moment.step, number))
        self.on_call(call.run.number, call.moment.step)
        if key not in self._points:
            self._observe(key, args, kwargs)
        former = self._branches.setdefault(number, (key, Sampled(self._points[key])))
        if former[0] != key:
            raise InvalidSetting(
                f"{self.chain.name}: at step {call.moment.step}, call {number} of a step is given tensors of other "
                "shapes than at the step before: a range's effects at the two cannot be compared"
            )
        self._call, self._sampled, self.calls = call, former[1], self.calls + 1
        self._taken = [[] for _ in self._sampled.points]
        self._here = {}
        for place, point in enumerate(self._sampled.points):
            self._here.setdefault((point.block, point.side), []).append(place)
        self._extra_ms += (time.perf_counter() - begun) * 1e3
        self.stopwatch.mark(OTHER)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ends is not None and index == self._ends[0] and not replaying.get():
            if self._call is not None:  # a block that was called by itself
                self.calls, self._watched.calls = self.calls - 1, self._watched.calls - 1
            self._begin((), {})
        observation = self._watching(index)
        if observation is not None:
            self._altered |= {block for block, now, then in self._returned if not torch.equal(now, then)}
            self._returned = []  # first: it holds an output, for which others are looked at
            if self._flow is not None:
                arguments = self._observed[index].reader.arguments(args, kwargs)
                self._flow.enter(index, tensors_in((args, kwargs)).values(), arguments)
            elif self._passes.held is not None:
                self._passes.held.enter(index, args, kwargs)
            observation.enter(index, args, kwargs)
        elif self._call is not None:
            self.stopwatch.mark(SAMPLING)
            reader = self._observed[index].reader
            self._take(index, "in", lambda name: reader.read(str(name), args, kwargs))
            self.stopwatch.mark(index)

    def _leave(self, index: int, output: Any) -> None:
        if (observation := self._watching(None)) is not None:
            observation.leave(index, output)
            if self._flow is not None:
                self._flow.leave(index, tensors_in(output).values())
            elif self._passes.held is not None:
                self._passes.held.leave(index, output)
            values = self._observed[index].reader.take(output)[1]
            self._returned = [(index, value, value.clone()) for value in values if isinstance(value, Tensor)]
        elif self._call is not None:
            self.stopwatch.mark(SAMPLING)
            values = self._observed[index].reader.take(output)[1]
            self._take(index, "out", lambda position: values[int(position)] if int(position) < len(values) else None)
            self.stopwatch.mark(OTHER)
            if self._ends is not None and index == self._ends[1]:
                self._finish(output)

    def _finish(self, _: Any) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        self.stopwatch.mark(SAMPLING)
        self._decider.commit(call)
        assert call.run is not None
        call.run.in_flight = False
        if all(self._taken):
            self._sampled.moments.append(call.moment)
            self._sampled.calls.append([[_to_host(each) for each in taken] for taken in self._taken])
        self._report("record", call.moment.step + 1, call.run.schedule.steps or self.expected)
        self.stopwatch.mark(None)

    # -- inside -------------------------------------------------------------------------------------------------

    def _take(self, index: int, side: str, read: Callable[[str | int], Any]) -> None:
        for place in self._here.get((index, side), ()):
            taken = self._sampled.points[place].take(read)
            if taken is None:
                raise InvalidSetting(
                    f"{self._observed[index].path} is given or returns tensors of other shapes than on the first call "
                    "with such arguments: what it does cannot be recorded"
                )
            self._taken[place] = taken

    def _watching(self, entered: int | None) -> Observation | None:
        """Return the observation of the blocks: before a call is recorded, or while only blocks were called."""
        if self._observation is not None or self._call is not None or self.calls or self._ends or replaying.get():
            return self._observation
        return self._passes.now if entered is None else self._passes.entered(entered)

    def _observe(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a call once more, beforehand, to observe its wiring, and choose the tokens to keep of it."""
        replay = Replay(self.chain.owner, args, kwargs)
        if replay.unsafe_argument:
            raise InvalidSetting(
                f"{self.chain.name} is given {replay.unsafe_argument}, which may remember a call: its first call "
                "cannot be made twice, which recording has to do, to see how the streams run"
            )
        self._observation, self._altered = Observation(self._observed), set()
        observation, self._flow = self._observation, (flow := DataFlow())
        try:
            outcome = replay(eager=False)
            flow.end(tensors_in(outcome.output).values())
        finally:
            self._observation, self._flow, self._returned = None, None, []
            observation.close()
            flow.close()
        order = self._learn(key, observation)
        uses, parted = flow.last_uses(order), [*map(partial(_is_parted, flow, observation), order, order[1:])]
        self._refused_ranges |= {
            (first, last)
            for first, last in self.tally.ranges
            if any(use > last for use in uses[first:last]) or any(parted[first:last])
        }

    def _learn(self, key: Any, observation: Observation) -> tuple[int, ...]:
        """Find the wiring of an observed call, and choose the tokens to keep of such calls; return its order."""
        trunk = find_trunk(observation, self.chain.weights() if self.chain.found else None)
        if trunk is None:
            raise InvalidSetting(f"{self.chain.name} called none of its blocks: name those it calls with blocks=...")
        allowed, refused = followable_ranges(observation, trunk)
        self._refused = next(iter(refused.values()), "")
        if self._trunk is None:
            self._trunk, self.tally.order, self.tally.ranges = trunk, trunk.order, sorted(allowed)
        elif trunk.order != self._trunk.order or not set(self.tally.ranges) <= allowed:
            raise InvalidSetting(
                f"{self.chain.name}: calls with other shapes run other blocks: record them one at a time"
            )
        steps = self.schedule.steps or self.expected or STEPS
        self._points[key] = points_of(
            observation, trunk.order, self._altered, self.share, self.memory / (steps * BRANCHES)
        )
        return trunk.order

    def _fold(self) -> None:
        """Add the current run's samples to the Gram matrices, and drop them."""
        branches: list[tuple[Any, Sampled]] = []
        for key, sampled in self._branches.values():
            alike = [former for other, former in branches if other == key and not former.shares(sampled)]
            if alike:  # one branch after all, which was not recognised at some step
                alike[0].extend(sampled)
            elif sampled.calls:
                branches.append((key, sampled))
        self._branches = {}
        if branches:
            self.stopwatch.wait()  # samples may still be in transfer to the host
            self.tally.add(
                [sampled for _, sampled in branches], lambda done, total: self._report("Gram matrices", done, total)
            )

    def _count(self, arguments: Mapping[str, Any]) -> None:
        """Count the rows of a run's latents, and note their size."""
        latents = arguments.get(self._decider.latents_name or "")
        if isinstance(latents, Tensor) and latents.dim() > 1:
            self.rows, self.size = self.rows + len(latents), tuple(latents.shape[1:])


def _is_parted(flow: DataFlow, observation: Observation, former: int, latter: int) -> bool:
    """Return whether a stream that goes from one block to another by its name or form is another one by its data."""
    calls = {call.index: call for call in reversed(observation.calls)}
    if former not in calls or latter not in calls:
        return False
    try:
        sender, taker = (block_io_of(observation, calls[index]) for index in (former, latter))
    except WiringError:
        return False  # no range that could be followed goes across
    guessed = gap(observation, calls[former], sender, calls[latter], taker).how
    return not all(flow.carries(former, latter, name) for name in guessed)


def _to_host(tensor: Tensor) -> Tensor:
    """Copy to the host without waiting: the copy is read when the run is over."""
    if tensor.device.type in ("cpu", "meta"):
        return tensor
    return tensor.to("cpu", non_blocking=True)
