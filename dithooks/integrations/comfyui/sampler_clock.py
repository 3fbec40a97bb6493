"""The step and branch of each call of a sampler's model, known by what ComfyUI hands along with the call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from math import isclose
from typing import Any

from torch import Tensor

from ...engine.requests import RequestSchedule
from ...engine.sessions import Session, SessionEntry, current_session
from ...engine.step_source import RunClock, RunTime, Tick

CLOSE = 1e-4  # relative: some samplers take σ through its logarithm and back
SOURCE = "ComfyUI"
CONDS = ("cond", "uncond")  # by ComfyUI's index; those of other guiders are numbered


@dataclass(frozen=True, eq=False)
class CallPlace:
    """A step source for one call of the model.

    Args:
        step: index of the sampler's step.
        steps: number of steps.
        branch: name of the call at its step.
        sigma: noise level of the call, which may lie between those of two steps.
        run: an object that stays the same while the sampler draws.
    """

    step: int
    steps: int
    branch: str
    sigma: float
    run: object

    def tick(self, clock: RunClock, scheduler: Any, arguments: Mapping[str, Any] | None, time: RunTime) -> Tick:
        """Return where in the sampler's run the call stands."""
        return Tick(self.step, SOURCE, self.branch, self.sigma, epoch=self.run, steps=self.steps)


@dataclass(frozen=True, eq=False)
class CallIdentity:
    """What a call has in common with that of the same branch at the step before.

    Args:
        conds: index and ``uuid`` of each conditioning of the batch.
        window: frames of a context window, or the window itself where it lists none; ``None`` without windows.
        shape: of the latents.
        patches: functions that ComfyUI's nodes have put into the model's blocks for this call.
        hooks: what changes weights for the call's conditionings alone, and how strongly just now.
    """

    conds: tuple[tuple[int, object], ...]
    window: object
    shape: tuple[int, ...]
    patches: tuple[object, ...]
    hooks: tuple[tuple[int, object], ...] = ()

    @classmethod
    def of(cls, latents: Any, options: Mapping[str, Any], hooks: Iterable[Any] = ()) -> CallIdentity:
        """Read it from a call's latents, its ``transformer_options``, and the hooks in force."""
        conds = tuple(zip(options.get("cond_or_uncond") or (), options.get("uuids") or (), strict=False))
        window = options.get("context_window")
        frames = getattr(window, "index_list", None)
        patches = (*_leaves(options.get("patches")), *_leaves(options.get("patches_replace")))
        strengths = tuple((id(hook), getattr(hook, "strength", None)) for hook in hooks)
        frames = window if frames is None else tuple(frames)
        return cls(conds, frames, tuple(getattr(latents, "shape", ())), patches, strengths)

    def is_that_of(self, other: CallIdentity) -> bool:
        """Return whether both are of one branch."""
        return (
            (self.conds, self.window, self.shape, self.hooks) == (other.conds, other.window, other.shape, other.hooks)
            and len(self.patches) == len(other.patches)
            and all(mine is theirs for mine, theirs in zip(self.patches, other.patches, strict=True))
        )

    def __str__(self) -> str:
        return "+".join(CONDS[index] if index < len(CONDS) else f"cond {index}" for index, _ in self.conds) or "call"


@dataclass
class BranchNames:
    """The names of a step's calls: that of the call before in its place, as long as each call before it fits, too.

    ComfyUI puts several conditionings into one call, or makes a call of each, as memory allows, and samplers and
    guidance may call with one of them again. So the order of calls distinguishes branches, and what the calls are given
    shows whether the order still holds. From the first call of a step that does not fit, all are new branches.

    Args:
        before: the calls of the step before, and their names.
        now: those of this step.
        has_parted: whether a call of this step did not fit.
        given: how many branches were given a name, by what they are called.
    """

    before: list[tuple[CallIdentity, str]] = field(default_factory=list)
    now: list[tuple[CallIdentity, str]] = field(default_factory=list)
    has_parted: bool = False
    given: dict[str, int] = field(default_factory=dict)

    def begin_step(self) -> None:
        """Let the calls that follow be those of another step."""
        self.before, self.now, self.has_parted = self.now, [], False

    def name(self, call: CallIdentity) -> str:
        """Return the name of a step's next call."""
        place = len(self.now)
        former = self.before[place] if place < len(self.before) and not self.has_parted else None
        if former is not None and call.is_that_of(former[0]):
            name = former[1]
        else:
            self.has_parted = True
            number = self.given[str(call)] = self.given.get(str(call), 0) + 1
            name = str(call) if number == 1 else f"{call} ({number})"
        self.now.append((call, name))
        return name


class SamplerSession(Session):
    """The cache of one run of one sampler, and where in it the sampler is.

    A call belongs to the step of its σ; between two steps, to the one before; never to one before the latest, as some
    samplers look ahead. The calls of a second-order sampler at one step are branches of it.

    Args:
        sigmas: the sampler's schedule: a level for each step, and the one that it ends at.

    Example: the second call of Heun's method is made at the σ of the next step.
        >>> session = SamplerSession([1.0, 0.5, 0.0])
        >>> for sigma in (1.0, 0.5, 0.5):
        ...     session.place_call(None, {"cond_or_uncond": [0], "uuids": ["a"]}, sigma)
        ...     print(session.step_source.step, session.step_source.branch)
        0 cond
        1 cond
        1 cond (2)
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.levels = [level for level, _ in groupby(sigmas[:-1])]  # twice the same level is one step
        super().__init__(None, RequestSchedule(self.levels))
        self._run, self._step, self._names = object(), 0, BranchNames()
        self._read: tuple[object, float] = (None, 0.0)

    def place_call(self, latents: Any, options: Mapping[str, Any], sigma: object, hooks: Iterable[Any] = ()) -> None:
        """Note where in the run the call stands that is about to be made.

        Args:
            latents: of the call.
            options: its ``transformer_options``.
            sigma: its noise level, a number or a tensor of one for each sample.
            hooks: that change weights for it.
        """
        if sigma is not self._read[0]:  # the calls of one evaluation share it, and reading it waits for the device
            self._read = sigma, _number(sigma)
        level = self._read[1]
        step = self._step_of(level)
        if step != self._step:
            self._step = step
            self._names.begin_step()
        name = self._names.name(CallIdentity.of(latents, options, hooks))
        self.step_source = CallPlace(step, len(self.levels), name, max(level, 0.0), self._run)

    def _step_of(self, sigma: float) -> int:
        step, levels = self._step, self.levels
        for number in range(step, len(levels)):
            if isclose(levels[number], sigma, rel_tol=CLOSE):
                return number
        while step + 1 < len(levels) and levels[step + 1] > sigma:
            step += 1
        return step


@contextmanager
def entered(session: SamplerSession) -> Iterator[None]:
    """Make the calls made within belong to a sampler's session."""
    entry = SessionEntry(session)
    failed = True
    try:
        yield
        failed = False
    finally:
        entry.leave(failed)


def sampler_session() -> SamplerSession | None:
    """Return the session of the sampler that is drawing here, if it is one whose model is cached."""
    session = current_session()
    return session if isinstance(session, SamplerSession) else None


def _number(sigma: Any) -> float:
    return float(sigma.flatten()[0]) if isinstance(sigma, Tensor) else float(sigma)


def _leaves(patches: Any) -> Iterator[object]:
    if isinstance(patches, Mapping):
        for each in patches.values():
            yield from _leaves(each)
    elif isinstance(patches, (list, tuple)):
        for each in patches:
            yield from _leaves(each)
    elif patches is not None:
        yield patches
