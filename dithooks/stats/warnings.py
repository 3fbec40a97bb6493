"""Warnings of this package, collected rather than shown."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


@contextmanager
def heard(remarks: list[str]) -> Iterator[None]:
    """Keep what the library has to say, once each, instead of showing it; what others warn of is shown as ever."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            seen = list(caught)
            for each in seen:
                ours = issubclass(each.category, UserWarning) and Path(each.filename).is_relative_to(PACKAGE)
                if ours and (text := " ".join(str(each.message).split())) not in remarks:
                    remarks.append(text)
    for each in seen:
        if not Path(each.filename).is_relative_to(PACKAGE):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
