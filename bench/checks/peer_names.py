"""The names of cache-dit that other packages import, against the list of docs/migration.md.

``python -m bench.checks.peer_names sglang-0.5.23-….whl vllm_omni-0.30.0-….whl`` reads the Python files of wheels, or of
folders, and says which names each of them uses that the page does not list, or that ``dithooks.compat.cache_dit``
neither has nor says what to take instead of. Exit codes: 0 there are none; 1 there are some.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dithooks.errors import NotProvided

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
PACKAGE, HERE = "cache_dit", "dithooks.compat.cache_dit"


def listed(page: str) -> dict[str, tuple[str, str]]:
    """The names of the page's list, each with who uses it, and what it is here."""
    part = page[page.index("### Its names") :].split("\n### ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]*) \| ([^|]+) \|$", part, re.M)
    return {name: (users, here) for names, users, here in rows for name in re.findall(r"`([^`]+)`", names)}


def used(source: str) -> set[str]:
    """The dotted names of cache-dit that a source imports, and what it reads from them, without the package's own.

    >>> sorted(used("import cache_dit as c; from cache_dit.caching import A; c.enable_cache(A.kind)"))
    ['caching.A', 'caching.A.kind', 'enable_cache']
    """
    tree, places, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.partition(".")[0] == PACKAGE:
                    places[each.asname or PACKAGE] = each.name if each.asname else PACKAGE
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == PACKAGE:
            for each in node.names:
                places[each.asname or each.name] = f"{node.module}.{each.name}"
                found.add(places[each.asname or each.name])
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in places:
            found.add(".".join([places[node.id], *parts]))
    return {name.partition(".")[2] for name in found}


def sources(path: Path) -> Iterator[str]:
    """The Python files of a wheel or folder that mention the package."""
    if path.is_dir():
        texts: Iterator[bytes] = (file.read_bytes() for file in sorted(path.rglob("*.py")))
    else:
        wheel = zipfile.ZipFile(path)
        texts = (wheel.read(name) for name in wheel.namelist() if name.endswith(".py"))
    for text in texts:
        if PACKAGE.encode() in text:
            yield text.decode("utf-8", "replace")


def found(name: str) -> Any:
    """What a dotted name leads to here: an attribute of the longest module that its beginning names.

    Raises:
        NotProvided: it leads into something that is not here, and that says what to take instead.
        AttributeError: it leads nowhere.
    """
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        try:
            value = importlib.import_module(".".join([HERE, *parts[:length]]))
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def unknown(name: str, known: dict[str, tuple[str, str]]) -> bool:
    """Whether a name is not listed, by its path or by that of an object that it is read from, or leads nowhere here."""
    ends = {each.rpartition(".")[2] for each in known}
    try:
        found(name)
    except NotProvided:
        pass
    except AttributeError:
        return True
    return not ends & {*name.split(".")} and not any(each.startswith(f"{name}.") for each in known)


def main() -> int:
    """Read what is named on the command line, and print what is missing."""
    known, missing = listed(PAGE.read_text(encoding="utf-8")), 0
    for argument in sys.argv[1:]:
        names = {name for text in sources(Path(argument)) for name in used(text)}
        absent = sorted(name for name in names if unknown(name, known))
        print(f"{Path(argument).name}: {len(names)} names, of which unknown: {', '.join(absent) or 'none'}")
        missing += len(absent)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
