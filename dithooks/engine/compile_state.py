"""What is to be known of a call where its code may be compiled, traced or exported."""

from __future__ import annotations

import torch

from ..stats.timing import mark
from .call import Call


def mark_compiled(call: Call) -> None:
    """Note that what is taken of a call comes out of compiled code. Each function that takes some may be compiled,
    or not, by itself.
    """
    if torch.compiler.is_dynamo_compiling():
        call.traced = True


def mark_time(call: Call) -> None:
    """Note the time, at either end of a computed range; compiled code has none."""
    if not torch.compiler.is_dynamo_compiling() and call.marks:
        call.marks.append(mark(call.device))


def is_tracing_or_exporting() -> bool:
    """Whether a call is traced or exported: what comes of it is a copy of the model, and copies are not cached."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return bool(getattr(torch.compiler, "is_exporting", bool)())  # which came with 2.7
