"""The package's docstrings as the site shows them: Sphinx roles as links, examples as examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).parent
ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?\.?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package that is loaded."""

    def __init__(self) -> None:
        api = (HERE / "api.md").read_text(encoding="utf-8")
        paths = reversed(re.findall(r"^::: (\S+)", api, re.M))  # of several of one name, the first counts
        self.pages = {path.rpartition(".")[2]: path for path in paths}

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example: +(\S.*)", r"\1Example:\n\1    \2\n", obj.docstring.value, flags=re.M)
        text = re.sub(r"^( *)Example:", r"\1Examples:", text, flags=re.M)
        within = obj if obj.is_class else obj.parent
        obj.docstring.value = ROLE.sub(lambda role: self._linked(role.group(1), within), text)

    def _linked(self, name: str, within: griffe.Object | None) -> str:
        """The name as a link, if it is on the page of the API."""
        last = name.rpartition(".")[2]
        if within is not None and within.is_class and "." not in name and _shown(within, name):
            owner = self.pages.get(within.name)
            return f"`{name}`" if owner is None else f"[`{name}`][{owner}.{name}]"
        return f"[`{last}`][{self.pages[last]}]" if last in self.pages else f"`{last}`"


def _shown(within: griffe.Object, name: str) -> bool:
    """Whether a member has an entry of its own: what a dataclass's ``Args`` describe has none."""
    return name in within.members and within.members[name].docstring is not None
