"""The solver's steps: what a scheduler is given and returns at each, and what it would return for another output."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RunMismatch

OUTPUT, SAMPLE = ("model_output",), ("sample", "latents", "x")  # what parameters of step() are called
STEP = "step"


class SolverCall:
    """One call of a scheduler's ``step``: the output of the model that it is given, and the sample.

    Args:
        step: the watched method.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        RunMismatch: its arguments are not an output and a sample of the same shape.
    """

    def __init__(self, step: WatchedStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step, self._args, self._kwargs = step, list(args), dict(kwargs)
        output, sample = self._given(step.output), self._given(step.sample)
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor) or output.shape != sample.shape:
            raise RunMismatch(
                f"{type(step.scheduler).__name__}.step is not given an output and a sample of one shape, but "
                f"{_form(output)} and {_form(sample)}"
            )
        self.output: Tensor = output
        self.sample: Tensor = sample

    def replace(self, output: Tensor) -> None:
        """Give the scheduler another output of the model."""
        self._args, self._kwargs = self._changed({self._step.output: output.to(self.output.dtype)})

    def dry(self, output: Tensor) -> Tensor:
        """Return what the scheduler would return, in float32: a copy of it is asked, with the noise that it would draw.

        Args:
            output: of the model.
        """
        twin, sample = copy.deepcopy(self._step.scheduler), self.sample
        own = {self._step.output: output, self._step.sample: sample}  # copied: a scheduler may write into them
        args, kwargs = self._changed({name: value.to(torch.float32, copy=True) for name, value in own.items()})
        devices = [] if sample.device.type in ("cpu", "meta") else [sample.device]
        kinds = {"device_type": sample.device.type} if devices else {}
        with torch.random.fork_rng(devices, **kinds):
            returned = getattr(twin, STEP)(
                *map(_with_own_noise, args), **{name: _with_own_noise(value) for name, value in kwargs.items()}
            )
        return next_sample(returned).float()

    def run(self) -> Any:
        """Make the call."""
        return self._step.plain(*self._args, **self._kwargs)

    def _given(self, name: str) -> Any:
        place = self._step.names.index(name)
        return self._args[place] if place < len(self._args) else self._kwargs.get(name)

    def _changed(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = list(self._args), dict(self._kwargs)
        for name, value in values.items():
            place = self._step.names.index(name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return args, kwargs


class SolverWatcher(Protocol):
    """An observer of the steps of a solver."""

    def before(self, call: SolverCall) -> None:
        """Look at a call that is about to be made; it may replace its output."""

    def after(self, call: SolverCall, following: Tensor) -> None:
        """Look at the sample that a call has returned."""

    def fails(self, error: Exception) -> None:
        """Note that a call cannot be looked at; it is made as it would be."""


class WatchedStep:
    """A scheduler's ``step`` that shows its calls to a watcher: an attribute of the instance, in front of the method.

    Copies of the scheduler, as some pipelines step them, have their own plain method.

    Args:
        scheduler: the scheduler.
        watcher: the observer of its steps.
    """

    def __init__(self, scheduler: Any, watcher: SolverWatcher) -> None:
        self.scheduler, self.watcher = scheduler, watcher
        self.former: tuple[Any, ...] = (vars(scheduler)[STEP],) if STEP in vars(scheduler) else ()
        parameters = inspect.signature(self.plain).parameters.values()
        self.names = tuple(
            each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        )
        self.output = next((name for name in OUTPUT if name in self.names), next(iter(self.names), ""))
        self.sample = next((name for name in SAMPLE if name in self.names), "")

    @property
    def plain(self) -> Any:
        """The method without a watcher."""
        return self.former[0] if self.former else _unwatched(self.scheduler)

    __wrapped__ = plain  # where its signature is read from: pipelines ask whether it takes a generator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            call = SolverCall(self, args, kwargs)
            self.watcher.before(call)
        except Exception as error:  # whatever a scheduler's copy may raise, the run goes on
            self.watcher.fails(error)
            return self.plain(*args, **kwargs)
        result = call.run()
        try:
            self.watcher.after(call, next_sample(result))
        except Exception as error:
            self.watcher.fails(error)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.former[0], memo) if self.former else _unwatched(copy.deepcopy(self.scheduler, memo))

    def __reduce__(self) -> Any:
        return (copy.copy, (self.former[0],)) if self.former else (_unwatched, (self.scheduler,))


def can_be_watched(scheduler: Any) -> bool:
    """Return whether a scheduler has a ``step`` that takes an output and a sample."""
    if not callable(getattr(type(scheduler), STEP, None)) or not hasattr(scheduler, "__dict__"):
        return False
    try:
        watched = WatchedStep(scheduler, _Nobody())
    except (TypeError, ValueError):  # no signature
        return False
    return bool(watched.output and watched.sample)


@contextmanager
def watched_solver(scheduler: Any, watcher: SolverWatcher) -> Iterator[None]:
    """Show a scheduler's steps to a watcher; when left, the scheduler is as it was."""
    step = WatchedStep(scheduler, watcher)
    vars(scheduler)[STEP] = step
    try:
        yield
    finally:
        if vars(scheduler).get(STEP) is step:
            if step.former:
                vars(scheduler)[STEP] = step.former[0]
            else:
                del vars(scheduler)[STEP]


def next_sample(result: Any) -> Tensor:
    """Return the sample in what a scheduler's ``step`` returns.

    Raises:
        RunMismatch: there is none.
    """
    found = getattr(result, "prev_sample", result[0] if isinstance(result, (tuple, list)) and result else result)
    if not isinstance(found, Tensor):
        raise RunMismatch(f"the scheduler's step returns no sample, but {type(result).__name__}")
    return found


class _Nobody:
    """A watcher that looks at nothing."""

    def before(self, call: SolverCall) -> None: ...

    def after(self, call: SolverCall, following: Tensor) -> None: ...

    def fails(self, error: Exception) -> None: ...


def _unwatched(scheduler: Any) -> Any:
    """Return what the class has, as an instance finds it: a method, or a function or an object that is not bound."""
    found = inspect.getattr_static(type(scheduler), STEP)
    bind = getattr(type(found), "__get__", None)
    return found if bind is None else bind(found, scheduler, type(scheduler))


def _with_own_noise(value: Any) -> Any:
    """Return a generator's copy, so that a dry call does not change what the scheduler draws; others unchanged."""
    if isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
        return twin
    return [_with_own_noise(each) for each in value] if isinstance(value, list) else value


def _form(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
