"""Refresh what docs/*.md know of the source: the line of each link to a definition, and the tables of files.

Run ``python docs/line_links.py`` after moving code; tests/test_docs.py fails where a page is out of date.
"""

import ast
import re
import sys
from pathlib import Path

DOCS, PACKAGE = Path(__file__).parent, Path(__file__).parent.parent / "dithooks"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)")  # [`Class.method`](../dithooks/room/file.py#L12)
TABLE = re.compile(r"(?<=<!-- files of )(\S+)( -->\n\n\|.*\|\n\|.*\|\n)((?:\|.*\|\n)*)")


def line_of(name: str, file: Path) -> int:
    """Return the line of the ``def`` or ``class`` of a dotted name in a file."""
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        node = found[0] if found else sys.exit(f"{name} is not in {file}: link to what does the same now")
    return int(node.lineno)  # type: ignore[attr-defined]


def rows(table: re.Match[str]) -> str:
    """Return a table of the files of a room, by the first lines of their docstrings; files not yet listed come last."""
    files = PACKAGE.glob("*.py") if table[1] == "." else (PACKAGE / table[1]).rglob("*.py")
    names = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(files) if not file.name.startswith("__")}
    listed = [name for name in re.findall(r"^\| `([^`]+)`", table[3], re.M) if name in names]
    text = {name: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for name, file in names.items()}
    lines = [f"| `{n}` | {(text[n] or '').split(chr(10))[0]} |\n" for n in dict.fromkeys([*listed, *names])]
    return "".join([table[1], table[2], *lines]).replace("``", "`")


def refreshed(page: str) -> str:
    """Return a page with the lines and files of the source as it is now."""
    return TABLE.sub(rows, LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], DOCS / m[2])})", page))


for path in DOCS.glob("*.md") if __name__ == "__main__" else ():
    path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")
