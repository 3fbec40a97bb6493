"""What is known of a call where its code may be compiled, traced or exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .call import Call

_COMPILED_CALL = attrgetter("_compiled_call_impl")


def mark_compiled(call: Call) -> None:
    """Note that what is taken of a call comes out of compiled code; functions may be compiled each by itself."""
    if torch.compiler.is_dynamo_compiling():
        call.compiled = True


def mark_time(call: Call, mark: Callable[[], Any]) -> None:
    """Note the time, at either end of a computed range; compiled code has none."""
    if not torch.compiler.is_dynamo_compiling() and call.marks:
        call.marks.append(mark())


def any_compiled(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of some modules was compiled in place."""
    return any(map(_COMPILED_CALL, modules))


def is_tracing_or_exporting() -> bool:
    """Return whether a call is traced or exported: a copy of the model comes of it, and copies are not cached."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return bool(getattr(torch.compiler, "is_exporting", bool)())  # which came with 2.7
