"""What has to be known before rows of several requests can be treated apart in one call, and how it is found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import combinations
from typing import Any, Protocol

from torch import Tensor

from ..environment.torch_api import OutOfMemoryError
from ..errors import InvalidSetting, WiringError
from .additions import AdditionSum
from .batch_dimensions import BatchDimensions, BatchSurvey, RowSelection, by_layout, held_rows, taken, without_rows
from .block_range import BlockRange
from .call import ROWS, Call
from .decider import CallDecider
from .output_comparison import difference, tolerance
from .output_correction import floating_in
from .replay import Callee, Replay
from .row import PlacedRow
from .sample_decider import is_by_sample
from .verification import Verification

Given = tuple[tuple[Any, ...], dict[str, Any]]
FEW = 2  # rows of a trial, or one of a batch of two
MOST_AMBIGUOUS = 2  # arguments that hold no rows, though the batch has their size by chance, that are found at once


class RowUse(Enum):
    """What rows are treated apart for, in the words of messages: the method or setting, and what to do instead."""

    REQUESTS = "cache.rows", "call it once for each request"
    SAMPLES = "reduce='each'", "give reduce='mean' or 'max'"

    def __init__(self, by: str, remedy: str) -> None:
        self.by, self.remedy = by, remedy


class RowArguments:
    """Which arguments of a transformer hold the rows of its batch, in their first dimension.

    One of that size may hold none: positions of as many tokens, say. So the call is tried with a few rows, and has to
    give the same for these; what had another size once holds none for sure.

    Args:
        name: of the transformer, for messages.
        latents_name: returns the name of the argument that holds rows for sure.
        use: for what rows are treated apart, for messages.
    """

    def __init__(self, name: str, latents_name: Callable[[], str | None], use: RowUse = RowUse.REQUESTS) -> None:
        self._name, self._latents_name, self._use = name, latents_name, use
        self._shared: set[str] = set()  # what holds no rows
        self._tried: set[str] = set()  # what does, as a call with a few of them has shown

    def note(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Note the sizes of a call's arguments; return the names of those that hold rows, or may."""
        found = held_rows((args, kwargs), by_layout((args, kwargs), batch, frozenset()))
        if batch > 1:
            self._shared |= set(without_rows((args, kwargs), batch))
        return [name for name in found if name not in self._shared]

    def is_known(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether it is known of each argument of a call whether it holds rows."""
        return set(self.note(batch, args, kwargs)) <= self._tried

    def taken(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: RowSelection) -> Given:
        """Return the arguments of a call with some of the rows."""
        place = by_layout((args, kwargs), rows.batch, frozenset(self._shared))
        some_args, some_kwargs = taken((args, kwargs), place, rows)
        return some_args, some_kwargs

    def learn(
        self,
        call: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        is_compared: bool = True,
    ) -> None:
        """Try a call with a few rows, until it gives the same for these as the whole batch did.

        Args:
            call: calls the transformer, with some arguments.
            args: of the whole batch, positional ones.
            kwargs: of the whole batch, by name.
            output: for the whole batch.
            is_compared: whether the values are compared, and not the shapes alone.

        Raises:
            WiringError: it never does.
        """
        batch = _batch_of(args, kwargs, self._latents_name())
        rows = RowSelection([batch - 1, 0] if batch > FEW else [batch - 1], batch)
        reference, worst = _rows_of(output, rows), ""
        if reference is None:
            raise WiringError(
                f"{self._name}: {self._use.by}: what it returns does not hold {batch} rows, each tensor in its first "
                f"dimension: whose output is whose is unknown: {self._use.remedy}"
            )
        latents = "[0][0]" if args else f"[1][{self._latents_name()!r}]"
        held = self.note(batch, args, kwargs)
        for shared in _subsets([name for name in held if name != latents and name not in self._tried]):
            former, self._shared = self._shared, self._shared | shared
            try:
                answer = call(*self.taken(args, kwargs, rows))
            except (WiringError, OutOfMemoryError):
                raise
            except Exception as error:  # of arguments that do not fit each other
                self._shared, worst = former, worst or f"{type(error).__name__}: {error}"
                continue
            off = _distance(answer, reference, is_compared)
            if off <= tolerance(output):
                self._tried |= set(held) - shared
                return
            self._shared, worst = former, worst or f"the output comes out {off:.2g} off (relative L2)"
        raise WiringError(
            f"{self._name}: {self._use.by} called it with rows {rows.rows} of {batch} alone, and {worst:.100}: its "
            f"rows are not independent, or which arguments hold them is unknown: {self._use.remedy}"
        )


class _Holder(Protocol):
    rows: Any


class SurveyedCache(Protocol):
    """A range cache whose calls are surveyed."""

    decider: CallDecider
    block_range: BlockRange
    verification: Verification

    @property
    def state(self) -> _Holder: ...
    @property
    def is_compiled(self) -> bool: ...
    def learn_in_extra_calls(self, replay: Replay) -> bool:
        """Learn the wiring, and test a residual."""


class RowSurvey:
    """The survey of one range: its wiring, and where the rows are in what its blocks are given.

    It is taken in extra calls, before the first batch of several rows, and again where a later one has arguments of
    another kind: the call is made once with all rows, and once with a few of them, and has to give the same for these.

    Args:
        cache: of the range.
        is_compared: whether the outputs of the two calls are compared; those of a model that is not deterministic
            cannot be.
    """

    def __init__(self, cache: SurveyedCache, is_compared: bool) -> None:
        self._cache, self._is_compared = cache, is_compared
        self._dimensions: dict[frozenset[str], BatchDimensions] = {}  # by the arguments that hold rows
        self._use = RowUse.SAMPLES if is_by_sample(cache.decider.policy) else RowUse.REQUESTS
        self.arguments = RowArguments(cache.decider.name, lambda: cache.decider.latents_name, self._use)

    def check(
        self,
        rows: Sequence[PlacedRow],
        arguments: Mapping[str, Any],
        given: tuple[Callee, tuple[Any, ...], dict[str, Any]] | None,
    ) -> None:
        """Raise where rows cannot be treated apart, before anything is computed.

        Raises:
            InvalidSetting: the model is compiled, its blocks are called without it, or the batch has another size.
        """
        by, remedy = self._use.value
        name, latents = self._cache.decider.name, arguments.get(self._cache.decider.latents_name or "")
        if given is None:
            raise InvalidSetting(
                f"{name}: {by} has to see the transformer's call, and its blocks run without one: call the "
                f"transformer, or {remedy}"
            )
        if self._cache.is_compiled:
            raise InvalidSetting(
                f"{name}: {by} does not work with compiled code, whose graphs are of one batch size: leave "
                f"torch.compile out, or {remedy}"
            )
        if not isinstance(latents, Tensor) or not latents.dim() or latents.shape[0] != len(rows):
            what = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise InvalidSetting(
                f"{name}: cache.rows names {len(rows)} row{'s' * (len(rows) != 1)}, and the latents are {what}: give "
                "one for each row of the batch, which is the latents' first dimension"
            )

    def learn(self, replay: Replay) -> bool:
        """Learn the wiring of the range, if it is not known; return whether residuals can be kept.

        Raises:
            InvalidSetting: the call cannot be repeated.
            WiringError: the streams cannot be followed.
        """
        unverified = getattr(self._cache, "unverified", False)
        if self._cache.block_range.wiring is not None and not unverified:
            return True
        self._refuse_unsafe(replay)
        return self._cache.learn_in_extra_calls(replay)

    def look(self, batch: int, module: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchDimensions:
        """Return where the rows are in what the blocks are given; find out first, if that is not known.

        Raises:
            InvalidSetting: the call cannot be repeated.
            WiringError: rows are not independent of each other, or it is unknown which part belongs to which row.
        """
        if batch < 2:
            return BatchDimensions()
        dimensions = self._of(batch, args, kwargs)
        if not dimensions.is_needed:
            return dimensions
        replay = Replay(module, args, kwargs)
        self._refuse_unsafe(replay)
        full, few = BatchSurvey(batch), BatchSurvey(0)
        output = self._repeated(replay, full)
        if not full.forms:
            return dimensions

        def call(some_args: tuple[Any, ...], some_kwargs: dict[str, Any]) -> Any:
            nonlocal few
            few = BatchSurvey(min(batch - 1, FEW))
            return self._repeated(Replay(module, some_args, some_kwargs), few)

        self.arguments.learn(call, args, kwargs, output, self._is_compared)
        blocks, dimensions = self._cache.block_range, self._of(batch, args, kwargs)
        dimensions.learn(full, few, [blocks.observed[index] for index in blocks.blocks])
        return dimensions

    def _of(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchDimensions:
        """Return the findings for calls in which these arguments hold rows: a time may be one for all."""
        form = frozenset(self.arguments.note(batch, args, kwargs))
        return self._dimensions.setdefault(form, BatchDimensions())

    def _repeated(self, replay: Replay, survey: BatchSurvey) -> Any:
        """Repeat a call in which every block's arguments are noted; return its output."""
        state = self._cache.state
        former, state.rows = state.rows, survey
        try:
            wiring = self._cache.block_range.wiring
            assert wiring is not None
            call = Call(mode=ROWS, sums=AdditionSum(wiring, True))  # so that its blocks ask
            return self._cache.verification.repeat(replay, call).output
        finally:
            state.rows = former

    def _refuse_unsafe(self, replay: Replay) -> None:
        if (argument := replay.unsafe_argument) is not None:
            raise InvalidSetting(
                f"{self._cache.decider.name}: {self._use.by} first calls the transformer a few times more, to see "
                f"which part of its arguments is whose row, and {argument:.80} cannot be copied for that: "
                f"{self._use.remedy}"
            )


def _rows_of(output: Any, rows: RowSelection) -> list[Tensor] | None:
    """Return some rows of an output's tensors; ``None`` if they do not hold one for each row."""
    tensors = floating_in(output)
    if not tensors or any(tensor.dim() == 0 or tensor.shape[0] != rows.batch for tensor in tensors):
        return None
    return [rows.of(tensor, 0) for tensor in tensors]


def _distance(output: Any, reference: list[Tensor], is_compared: bool) -> float:
    tensors = floating_in(output)
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in reference]:
        return float("inf")
    return difference(tensors, reference) if is_compared else 0.0


def _subsets(names: Sequence[str]) -> list[frozenset[str]]:
    """Return what may hold no rows though it is of their number: nothing, then one argument, then two."""
    counts = range(MOST_AMBIGUOUS + 1)
    return [frozenset(chosen) for count in counts for chosen in combinations(names, count)]


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any], latents_name: str | None) -> int:
    latents = args[0] if args else kwargs[latents_name or ""]
    return len(latents)
