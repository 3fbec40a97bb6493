"""The releases of other packages that this one was measured with: the page ``docs/versions.md`` says how.

Python's standard library only, as ``dithooks env`` reads it where PyTorch cannot be imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Release = tuple[int, int]

# All of them, from the first to the last; no other is refused, but a warning names it.
MEASURED: dict[str, tuple[Release, ...]] = {
    "python": ((3, 11),),
    "torch": (*((2, minor) for minor in range(1, 11)), (2, 13), (2, 15)),
    "diffusers": ((0, 38), (0, 42)),
}
# Of PyTorch: from where on compiled code can have a cache, and is refused before.
COMPILED_BLOCKS: Release = (2, 6)  # the blocks compiled one by one
COMPILED_MODELS: Release = (2, 8)  # the whole model
FULL_GRAPH: Release = (2, 10)  # with fullgraph=True
# From here on diffusers runs code that it finds in a model's folder only where trust_remote_code=True asks for it.
ASKS_FOR_TRUST: Release = (0, 38)


def release_of(version: str | None) -> Release | None:
    """The two numbers at the beginning of a version; None if there are none.

    Example:
        >>> release_of("2.13.0+cpu")
        (2, 13)
    """
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(match[1]), int(match[2])) if match else None


def unmeasured(installed: dict[str, str | None]) -> Iterator[str]:
    """The packages whose releases were not measured, in words: each with its version, and what was measured instead.

    Example:
        >>> list(unmeasured({"torch": "2.12.1", "diffusers": "0.37.0"}))
        ['torch 2.12.1 was not measured itself with dithooks, 2.10 and 2.13 were', \
'diffusers 0.37.0 was not measured with dithooks, 0.38 to 0.42 was']
    """
    for name, releases in MEASURED.items():
        version = installed.get(name)
        release = release_of(version)
        if release is None or release in releases:
            continue
        if releases[0] < release < releases[-1]:
            below, above = max(each for each in releases if each < release), min(e for e in releases if e > release)
            around = " and ".join(".".join(map(str, each)) for each in (below, above))
            yield f"{name} {version} was not measured itself with dithooks, {around} were"
        else:
            yield f"{name} {version} was not measured with dithooks, {text_of(releases[0], releases[-1])} was"


def compiled_by(release: Release) -> str:
    """What a release of PyTorch compiles with a cache, in words.

    Example:
        >>> compiled_by((2, 7))
        'with a cache: blocks one by one; models as a whole from 2.8 on'
    """
    blocks, models, graph = (".".join(map(str, each)) for each in (COMPILED_BLOCKS, COMPILED_MODELS, FULL_GRAPH))
    if release < COMPILED_BLOCKS:
        return f"with a cache: nothing; blocks one by one from {blocks} on, models as a whole from {models} on"
    if release < COMPILED_MODELS:
        return f"with a cache: blocks one by one; models as a whole from {models} on"
    if release < FULL_GRAPH:
        return f"with a cache: blocks and models, with breaks between graphs; fullgraph from {graph} on"
    return "with a cache: blocks and models, fullgraph too"


def text_of(first: Release, last: Release) -> str:
    """A range of releases in words.

    Example:
        >>> text_of((2, 1), (2, 15))
        '2.1 to 2.15'
    """
    low, high = (f"{major}.{minor}" for major, minor in (first, last))
    return low if low == high else f"{low} to {high}"
