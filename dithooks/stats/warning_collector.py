"""A context in which this package's warnings are collected, for programs that print them in a place of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DitHooksWarning

PACKAGE = Path(__file__).parent.parent


@contextmanager
def collect_warnings(messages: list[str]) -> Iterator[None]:
    """Append each warning of this package to ``messages``, once, instead of showing it; others' are shown as usual."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            seen = list(caught)
            for warning in seen:
                if is_own(warning) and (text := " ".join(str(warning.message).split())) not in messages:
                    messages.append(text)
    for warning in seen:
        if not is_own(warning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def is_own(warning: warnings.WarningMessage) -> bool:
    """Return whether a warning is this package's, which may point at the user's line."""
    if issubclass(warning.category, DitHooksWarning):
        return True
    return issubclass(warning.category, UserWarning) and Path(warning.filename).is_relative_to(PACKAGE)
