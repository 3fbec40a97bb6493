"""What the site adds to the pages: results from the benchmarks' folder, the command line's help, links out of docs/.

Pages link to files of the repository as they lie in it, so that they can be read there; here these links are turned
into those of the site.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SHOWN = (".md", ".svg", ".png", ".txt", ".csv")  # of the results; JSON is for programs
WIDTH = "86"  # of the help, in characters
FENCED = re.compile(r"^(`{3,}).*?^\1\s*?$", re.M | re.S)
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^()\s]+)\)")
PAIR = re.compile(r"<tr><(t[dh])>(.*?)</\1><\1>(.*?)</\1></tr>", re.S)


def on_files(files: Any, config: Any) -> Any:
    """The results, as pages and files below ``results/``."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.iterdir()):
        if path.suffix in SHOWN:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page as the site shows it."""
    at = page.file.src_uri
    if at == "cli.md":
        markdown = markdown.replace("<!-- commands -->", commands())
    if at == "benchmarks.md":
        markdown = markdown.replace("<!-- results -->", results())
    if at == "models.md" or at.startswith("results/"):  # wide tables: in the place of the table of contents, too
        page.meta["hide"] = ["toc"]
    if "<table>" in markdown:
        markdown = side_by_side(markdown)
    return outside_code(markdown, lambda text: LINK.sub(lambda link: relinked(link, at), text))


def commands() -> str:
    """The help of every command, from the parser itself."""
    from dithooks.cli.main import build_parser

    former = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ |= {"COLUMNS": WIDTH, "NO_COLOR": "1"}
    try:
        parser = build_parser()
        (group,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        helps = {"dithooks": parser, **{f"dithooks {name}": each for name, each in group.choices.items()}}
        return "\n\n".join(
            f"## `{name}`\n\n```output\n{each.format_help().rstrip()}\n```" for name, each in helps.items()
        )
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def results() -> str:
    """A list of all pages of results, by their titles."""
    titles = {path: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in RESULTS.glob("*.md")}
    return "\n".join(f"- [{titles[path]}](../bench/results/{path.name})" for path in sorted(titles))


def side_by_side(markdown: str) -> str:
    """Rows of two listings in an HTML table, as two columns of listings that Markdown renders."""
    pairs = PAIR.sub(
        lambda row: (
            '<div class="pair" markdown="1">\n'
            + "".join(f'<div markdown="1">\n{cell.strip()}\n</div>\n' for cell in row.group(2, 3))
            + "</div>\n"
        ),
        markdown,
    )
    return re.sub(r"</?table>\n?", "", pairs)


def outside_code(markdown: str, change: Any) -> str:
    """Apply ``change`` to all but fenced blocks."""
    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def relinked(link: re.Match[str], page: str) -> str:
    """A link to a file of the repository, as one to a page of the site; the text alone, if the site has none."""
    to, _, anchor = link["to"].partition("#")
    if not to or ":" in to or to.startswith("/"):
        return link.group()
    there = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), to))
    if there.startswith("docs/"):
        return link.group()
    if there == "README.md":
        target = "index.md"
    elif there.startswith("bench/results/") and there.endswith(SHOWN):
        target = f"results/{posixpath.basename(there)}"
    else:
        return link["text"]
    new = posixpath.relpath(target, posixpath.dirname(page) or ".")
    return f"{link['mark']}[{link['text']}]({new}{'#' + anchor if anchor else ''})"
