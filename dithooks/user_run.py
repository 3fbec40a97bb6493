"""The user's function that makes a run: given the target, if it takes an argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import WrongType
from .validation import shown


@dataclass(frozen=True)
class WithoutTarget:
    """A function of no arguments as one that is given the target; it can be pickled where the function can.

    Args:
        run: the function.
    """

    run: Callable[[], Any]

    def __call__(self, target: object) -> Any:
        return self.run()


def check_run(run: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function of the target that makes the user's run.

    Args:
        run: ``lambda pipe: pipe("a forest")``, or, if it can be called without arguments, ``lambda: pipe("a forest")``.

    Raises:
        TypeError: it is no function, or takes more than the target.

    Example:
        >>> check_run(lambda pipe: pipe + 1)(1), check_run(lambda: 3)(1)
        (2, 3)
    """
    if not callable(run):
        raise WrongType(f"run must be a function that makes the run, such as lambda pipe: pipe(...), not {shown(run)}")
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError):  # a callable without a signature
        return run
    if not any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values()) and _binds(signature):
        return WithoutTarget(run)  # also where arguments have defaults: they may stand for anything
    if not _binds(signature, None):
        raise WrongType(
            f"run takes {signature}: it is called as run(pipe), so give the rest beforehand, as in "
            "lambda pipe: run(pipe, ...)"
        )
    return run


def _binds(signature: inspect.Signature, *given: object) -> bool:
    """Return whether a function can be called with these arguments."""
    try:
        signature.bind(*given)
    except TypeError:
        return False
    return True
