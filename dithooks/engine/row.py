"""The rows of a batch: which request each belongs to, and at which of its steps it is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InvalidSetting, RunMismatch, WrongType
from ..validation import check_count, check_number, set_field, shown
from .requests import Request
from .sessions import Scope, Session, SessionEntry


@dataclass(frozen=True)
class Row:
    """One row of a batch, for :meth:`CacheHandle.rows`.

    Args:
        request: that it belongs to: what :meth:`CacheHandle.request` has returned, or any name or number of it.
        step: of the request's run, from 0 on.
        branch: which of the request's rows at this step it is, if their order does not tell: ``"uncond"``. Left out,
            the rows of a step are distinguished by their order, over all calls of the step.
        sigma: noise level of the step, if the request has not been given those of all steps.

    Raises:
        TypeError, ValueError: ``step`` is no such number, ``branch`` neither a number nor a name, or ``sigma`` no
            noise level.

    Example:
        >>> Row("cat", 3, branch="uncond")
        Row(request='cat', step=3, branch='uncond', sigma=None)
    """

    request: Hashable
    step: int
    branch: int | str | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        set_field(self, "step", check_count("step", self.step, 0))
        if self.branch is not None and not isinstance(self.branch, str):
            set_field(self, "branch", check_count("branch", self.branch, 0))
        if self.sigma is not None:
            set_field(self, "sigma", check_number("sigma", self.sigma, 0))
        try:
            hash(self.request)
        except TypeError:
            raise WrongType(
                f"request={shown(self.request)} cannot be looked up: give what cache.request() has returned, or the "
                "request's name or number"
            ) from None


class PlacedRow(NamedTuple):
    """A row of a batch that is under way.

    Args:
        plan: of its request; ``None``: what the cache was attached with.
        session: of its request.
        scope: the row's place in the request's run.
    """

    plan: Any
    session: Session
    scope: Scope


def row_of(entry: Any) -> Row:
    """Return what an entry of a batch stands for: a row, a request and a step, or an object that has both.

    Raises:
        WrongType: it is none of these.
        InvalidSetting: the step is no such number.

    Example:
        >>> row_of(("cat", 3))
        Row(request='cat', step=3, branch=None, sigma=None)
    """
    if isinstance(entry, Row):
        return entry
    if isinstance(entry, tuple) and len(entry) == 2:
        return Row(*entry)
    if hasattr(entry, "request_id") and hasattr(entry, "step_index"):
        return Row(entry.request_id, entry.step_index)
    raise WrongType(
        f"rows: {shown(entry)} is no row: give dithooks.Row(request, step), (request, step), or an object with "
        "request_id and step_index, for each row of the batch"
    )


class RowScope:
    """Makes the rows of the calls made within it belong to several requests; :meth:`CacheHandle.rows` returns it.

    Args:
        rows: in the order of the batch.
        requests: of each row.

    Raises:
        InvalidSetting: there are no rows, or a step is not one of its request's.
    """

    def __init__(self, rows: Sequence[Row], requests: Sequence[Request]) -> None:
        if not rows:
            raise InvalidSetting("rows: there are none: give one for each row of the batch")
        for row, request in zip(rows, requests, strict=True):
            if (steps := request.steps) is not None and row.step >= steps:
                raise InvalidSetting(
                    f"rows: step={row.step} is not one of the {steps} of its request {shown(row.request)}: it "
                    "counts from 0"
                )
        self._rows, self._requests = rows, requests
        self._taken: list[Request] = []
        self._entry: SessionEntry | None = None

    def __enter__(self) -> None:
        """Make the calls that follow belong to the rows' requests.

        Raises:
            RunMismatch: one of them is entered already, here or in another thread or task, or was closed; or this was
                entered before.
        """
        if self._entry is not None:
            raise RunMismatch("rows: these are entered already: write cache.rows(...) once more for each call")
        sessions: dict[int, Session] = {}
        try:
            for request in self._requests:
                if id(request) not in sessions:
                    sessions[id(request)] = request.take()
                    self._taken.append(request)
            placed = [
                _placed(row, request, sessions[id(request)])
                for row, request in zip(self._rows, self._requests, strict=True)
            ]
            self._entry = SessionEntry(Session(None, rows=placed))
        except BaseException:
            self._give_back(failed=False)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        entry, self._entry = self._entry, None
        try:
            if entry is not None:
                entry.leave(failed=kind is not None)
            for row, request in zip(self._rows, self._requests, strict=True) if kind is None else ():
                request.step = row.step
        finally:
            self._give_back(failed=kind is not None)

    def _give_back(self, failed: bool) -> None:
        while self._taken:
            self._taken.pop().give_back(failed)


def _placed(row: Row, request: Request, session: Session) -> PlacedRow:
    sigma = row.sigma
    if sigma is None and request.sigmas is not None:
        sigma = request.sigmas[row.step]
    epoch = getattr(session.scheduler, "timesteps", None)
    return PlacedRow(request.plan, session, Scope(row.step, row.branch, sigma, request.steps, session, epoch))
