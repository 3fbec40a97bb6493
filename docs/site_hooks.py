"""What the site adds to the pages: results of benchmarks, notebooks, the command line's help, the version.

Pages link to files of the repository as they lie in it, so that they can be read there; here these links are turned
into those of the site, and of the repository's own pages if ``DITHOOKS_REPO_URL`` names it.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, NOTEBOOKS = ROOT / "bench" / "results", ROOT / "notebooks"
FOLDERS = {"results": "bench/results", "notebooks": "notebooks"}  # of the site, and where they lie in the repository
SHOWN = (".md", ".svg", ".png", ".txt", ".csv")  # of the results; JSON is for programs
WIDTH = "86"  # of the help, in characters
FENCED = re.compile(r"^(`{3,}).*?^\1\s*?$", re.M | re.S)
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^()\s]+)\)")
PAIR = re.compile(r"<tr><(t[dh])>(.*?)</\1><\1>(.*?)</\1></tr>", re.S)
IMAGE = re.compile(r'(?<=<img src=")(?![a-z]+:|/)[^"]+')  # in HTML, which mkdocs leaves as it is
TABLE, CELL = re.compile(r"<table>\s*<thead>.*?</table>", re.S), re.compile(r"<(t[hd])([^>]*)>(.*?)</\1>", re.S)
LONG = 45  # letters of a cell, from which on it is prose: such tables become cards on a phone
# How a notebook becomes a page of Markdown: as nbconvert has it, but for outputs, which are fenced blocks.
TEMPLATE = """{% extends "markdown/index.md.j2" %}
{% block stream %}
```output
{{ output.text | trim }}
```
{% endblock %}
{% block data_text %}
```output
{{ output.data["text/plain"] | trim }}
```
{% endblock %}"""


def on_config(config: Any) -> Any:
    """The version in the name of the site, at the top of every page."""
    from dithooks import __version__

    config.site_name = f"{config.site_name} {__version__}"
    return config


def on_files(files: Any, config: Any) -> Any:
    """The results, as pages and files below ``results/``, and the notebooks below ``notebooks/``."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.iterdir()):
        if path.suffix in SHOWN:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for name, content in notebooks():
        files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebooks() -> Iterator[tuple[str, str | bytes]]:
    """(name, content) of a page for each notebook, of the pictures on it, and of the notebook itself; none is run."""
    from jinja2 import DictLoader
    from nbconvert import MarkdownExporter

    exporter = MarkdownExporter(extra_loaders=[DictLoader({"page.md.j2": TEMPLATE})], template_file="page.md.j2")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        markdown, resources = exporter.from_filename(str(path), {"output_files_dir": path.stem})
        title, _, rest = markdown.lstrip().partition("\n")
        yield f"{path.stem}.md", f"{title}\n\n[The notebook]({path.name}) to download and run.\n{rest}"
        yield path.name, path.read_bytes()
        yield from resources["outputs"].items()


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

    def image(found: re.Match[str]) -> str:
        return posixpath.relpath(posixpath.join(posixpath.dirname(at), found.group()), page.url)

    def changed(text: str) -> str:
        return LINK.sub(lambda link: relinked(link, at, config.repo_url), IMAGE.sub(image, text))

    return outside_code(markdown, changed)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Tables of prose, so marked that a phone shows each row as a card."""
    return TABLE.sub(lambda found: carded(found.group()), html)


def carded(table: str) -> str:
    """A table with the head of its column beside each cell, if any cell is prose."""
    texts = [(tag, unescape(re.sub("<[^>]*>", "", content))) for tag, _, content in CELL.findall(table)]
    heads = [text for tag, text in texts if tag == "th"]
    if max(len(text) for _, text in texts) < LONG:
        return table
    numbers = iter(range(len(texts)))

    def labelled(cell: re.Match[str]) -> str:
        head = heads[next(numbers) % len(heads)]
        label = f' data-head="{escape(head)}"' if cell[1] == "td" and head and len(heads) > 2 else ""
        return f"<{cell[1]}{cell[2]}{label}>{cell[3]}</{cell[1]}>"

    return CELL.sub(labelled, table).replace("<table>", "<table data-cards>", 1)


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
    """Rows of two listings in an HTML table, as two columns of listings that Markdown renders.

    Each listing has the head of its column beside it, for screens where the columns are one below the other.
    """
    heads = ["", ""]

    def pair(row: re.Match[str]) -> str:
        cells = [cell.strip() for cell in row.group(2, 3)]
        kind = "pair heads" if row[1] == "th" else "pair"
        if row[1] == "th":
            heads[:] = cells
        columns = zip(heads, cells, strict=True)
        listings = "".join(f'<div markdown="1" data-head="{head}">\n{cell}\n</div>\n' for head, cell in columns)
        return f'<div class="{kind}" markdown="1">\n{listings}</div>\n'

    return re.sub(r"</?table>\n?", "", PAIR.sub(pair, markdown))


def outside_code(markdown: str, change: Any) -> str:
    """Apply ``change`` to all but fenced blocks."""
    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), columned(fence.group())]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def columned(fence: str) -> str:
    """A block of text, as output if it has columns, whose lines must not be broken."""
    return fence.replace("```text", "```output", 1) if re.search(r"\S {2,}\S", fence) else fence


def relinked(link: re.Match[str], page: str, repository: str | None = None) -> str:
    """A link to a file of the repository, as one to a page of the site; else to the repository, if that is known.

    The text alone is left where neither has the file.
    """
    to, _, anchor = link["to"].partition("#")
    if not to or ":" in to or to.startswith("/"):
        return link.group()
    folder = posixpath.dirname(page)
    there = posixpath.normpath(posixpath.join(FOLDERS.get(folder, posixpath.join("docs", folder)), to))
    if there == "README.md":
        target = "index.md"
    elif there.startswith("docs/"):
        target = there.removeprefix("docs/")
    elif there.startswith("bench/results/") and there.endswith(SHOWN):
        target = f"results/{posixpath.basename(there)}"
    elif there.startswith("notebooks/"):
        target = there if folder == "notebooks" else there.replace(".ipynb", ".md")
    elif repository:
        return f"[{link['text']}]({repository.rstrip('/')}/blob/HEAD/{there}{'#' + anchor if anchor else ''})"
    else:
        return link["text"]
    new = posixpath.relpath(target, folder or ".")
    return f"{link['mark']}[{link['text']}]({new}{'#' + anchor if anchor else ''})"
