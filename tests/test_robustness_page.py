"""docs/robustness.md: written by the tests that it tells of, and by all of them."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent / "robustness"
PAGE = (TESTS.parent.parent / "docs" / "robustness.md").read_text(encoding="utf-8")


def there_are():
    found = set()
    for path in TESTS.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = (ast.get_docstring(node) or "").split("\n\n")[0]
                found.add((f"{path.name}::{node.name}", " ".join(text.split())))
    return found


def test_every_test_is_told_of_as_it_is():
    told = {(where, text) for text, where in re.findall(r"^- (.*) \(`(\S+)`\) \*\*", PAGE, re.M)}
    assert told == there_are(), "pytest tests/robustness --table docs/robustness.md"


def test_all_was_tried_and_nothing_failed():
    rows = re.findall(r"^\| \[([^|]+)\]\(#([^|]+)\) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.M)
    assert len(rows) == 10
    for line, _, in_short, result in rows:
        assert in_short.strip(), line
        assert re.search(r"\d+ passed", result), line
        assert "failed" not in result, line


def test_the_table_fits_one_screen_and_leads_to_the_details():
    """At 100 letters a line, a row of the table takes two lines at most."""
    rows = re.findall(r"^\| \[([^|]+)\]\(#([^|]+)\) \| ([^|]+) \|", PAGE, re.M)
    assert all(len(in_short) <= 110 for *_, in_short in rows)
    for line, anchor, _ in rows:
        assert f"\n## {line}\n" in PAGE
        assert anchor == re.sub(r"[^\w-]", "", line.lower().replace(" ", "-"))
    assert PAGE.count('<details markdown="1">') == PAGE.count("</details>") == len(rows)
