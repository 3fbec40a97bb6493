"""The site: it builds without a warning, its code runs, what it quotes is there, and nothing public is missing."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from docs_pages import (
    BUILDERS,
    FENCE,
    INERT,
    ROOT,
    blocks,
    check_command,
    commands,
    inputs,
    make_pipeline,
    run_page,
    stand_ins,
)

import dithooks
from dithooks import DitHooksWarning
from dithooks.cli.main import build_parser
from dithooks.handle import CacheHandle
from dithooks.stats import warnings as wording

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
# Pages whose code is run by tests of their own, which read them.
ELSEWHERE = {
    **{"migration.md": "compat/test_migration.py", "npu.md": "environment/test_env.py", "using.md": "test_using.py"},
}
RUN = [name for name, text in PAGES.items() if name not in ELSEWHERE and any(b.kind == "python" for b in blocks(text))]
SLOW = {name for name in RUN if name.startswith("howto/")} | {"index.md"}
SAID = {"troubleshooting.md": "residual_diff_threshold is 1e-09"}  # what a page is meant to be told
OF_OTHERS = {"howto/opensora.md", "howto/diffsynth.md", "howto/mindie_sd.md"}  # whose pipelines are not diffusers' own
SERVED = {"howto/sglang.md", "howto/vllm_omni.md"}  # where a server attaches the cache
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
RESULT = re.compile(r"bench/results/([\w.]+\.md)")
PHONE = 390  # pixels across
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def loaded(name):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site_hooks():
    return loaded("site_hooks")


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *``` *$", "", text, flags=re.M | re.S)


# -- the code of the pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in RUN])
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    """As it stands, with gradients left to the page, without a word of complaint, and the cache does something."""
    monkeypatch.chdir(tmp_path)
    loaded = []
    with stand_ins(loaded), torch.enable_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        names = run_page(PAGES[name], {"inputs": inputs, "make_pipeline": make_pipeline})
    complaints = [str(each.message) for each in said if each.category in (UserWarning, DitHooksWarning)]
    assert [each for each in complaints if SAID.get(name, "nothing") not in each] == []
    assert bool(complaints) == (name in SAID)
    kept = [value for value in names.values() if isinstance(value, CacheHandle)]
    assert kept or not name.startswith(("howto/", "own_sampler")) or name in SERVED
    assert all(handle.stats.reused_calls > 0 for handle in kept)
    if name.startswith("howto/") and name not in OF_OTHERS | SERVED:
        assert len(loaded) == 1


def test_every_stand_in_is_used():
    assert {name for name in BUILDERS if any(f"{name}.from_pretrained(" in text for text in PAGES.values())} == {
        *BUILDERS
    }


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_pages_are_run_by_others(name):
    assert f'"{name}"' in (ROOT / "tests" / ELSEWHERE[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_what_it_is(name):
    assert {block.kind for block in blocks(PAGES[name])} <= INERT | {"python"}
    assert len(re.findall(r"^ *```", PAGES[name], re.M)) == 2 * len(blocks(PAGES[name]))


CALLS = [(name, words) for name, text in PAGES.items() for words in commands(text)]


@pytest.mark.parametrize(("name", "words"), CALLS, ids=[f"{name}: {' '.join(words)}" for name, words in CALLS])
def test_commands_are_understood(name, words):
    check_command(words)


def test_there_are_commands():
    assert len(CALLS) >= 8


# -- what the pages say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    """As the pages lie in the repository; anchors, and links as the site has them, are the build's."""
    for link in LINK.findall(prose(PAGES[name])):
        if ":" not in link and not link.startswith("#"):
            assert (DOCS / name).parent.joinpath(link.partition("#")[0]).exists(), link


def texts_in(tree):
    """All texts within a syntax tree, with a NUL for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def sentences():
    """All texts of the source."""
    for path in sorted((ROOT / "dithooks").rglob("*.py")):
        yield from texts_in(ast.parse(path.read_text(encoding="utf-8")))


def quoted(text):
    """Messages that a page quotes, one a line: text blocks that are no output."""
    found, python = [], False
    for block in blocks(text):
        if block.kind == "text" and not (block.follows and python):
            found += filter(None, block.body.splitlines())
        python = block.kind == "python"
    return found


SOURCE = list(sentences())
MESSAGES = quoted(PAGES["troubleshooting.md"])


def pattern_of(message):
    """What a quoted message looks like in the source."""
    parts = [part for part in message.split("…") if part.strip()]
    assert max(map(len, parts)) >= 12, "too little is quoted to be looked for"
    return re.compile(".*".join(map(re.escape, parts)), re.S)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_the_librarys(message):
    wanted = pattern_of(message)
    assert any(wanted.search(sentence) for sentence in SOURCE)


WARNINGS = {
    node.name: list(texts_in(node))
    for node in ast.parse(inspect.getsource(wording)).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
}


@pytest.mark.parametrize("name", WARNINGS)
def test_every_warning_of_an_attached_cache_is_explained(name):
    own = WARNINGS[name][1:]  # without the docstring
    assert any(pattern_of(message).search(text) for message in MESSAGES for text in own)


def test_there_are_messages():
    assert len(MESSAGES) >= 35
    assert not any(re.search("the picture is wrong", sentence) for sentence in SOURCE)  # not everything is found


def cited(text):
    """(result pages, numbers) of each row and paragraph that links to results."""
    for part in re.split(r"\n\n|\n(?=\|)", prose(text)):
        pages = RESULT.findall(part)
        if pages:
            yield sorted(set(pages)), re.findall(r"(?<![\w.])-?\d+\.\d+", re.sub(r"`[^`]*`", "", LINK.sub("", part)))


CITED = [each for name in [*RUN, "choose.md"] for each in cited(PAGES[name]) if each[1]]


@pytest.mark.parametrize(("pages", "numbers"), CITED, ids=[f"{', '.join(p)}: {' '.join(n)}" for p, n in CITED])
def test_numbers_are_of_the_tables_they_name(pages, numbers):
    tables = " ".join((ROOT / "bench" / "results" / page).read_text(encoding="utf-8") for page in pages)
    known = set(re.findall(r"-?\d+\.\d+", tables))
    assert [number for number in numbers if not {number, f"-{number}"} & known] == []


def test_there_are_numbers():
    assert sum(len(numbers) for _, numbers in CITED) >= 40


@pytest.mark.parametrize("name", ["design.md", "contributing.md"])
def test_files_that_are_named_are_there(name):
    code = [
        path for span in re.findall(r"`([^`\n]+)`", prose(PAGES[name])) for path in re.findall(r"[\w/]+\.py\b", span)
    ]
    assert len(code) >= 8
    there = {
        path.relative_to(ROOT).as_posix()
        for room in ("dithooks", "tests", "bench", "docs")
        for path in (ROOT / room).rglob("*.py")
    }
    there.add("path/to/file.py")  # a user's own
    assert [path for path in code if not any(f"/{each}".endswith(f"/{path}") for each in there)] == []


# -- the source, as pages link to it -------------------------------------------------------------------------------

REFRESH = "run: python docs/line_links.py"
LINE_LINKS = [
    (name, *link)
    for name, text in PAGES.items()
    for link in re.findall(r"\[`([^`]*)`\]\(([^()\s]+)#L(\d+)\)", prose(text))
]


def test_links_to_lines_lead_to_what_they_name():
    for page, text, path, number in LINE_LINKS:
        lines = (DOCS / page).parent.joinpath(path).read_text(encoding="utf-8").splitlines()
        *owner, name = text.split(".")
        assert re.match(rf" *(def|class) {name}\b", lines[int(number) - 1]), f"{page}: {text}: {REFRESH}"
        if owner:  # the class around it is the last that began before
            around = [line for line in lines[: int(number)] if re.match(r"class \w", line)][-1]
            assert re.match(rf"class {owner[0]}\b", around), f"{page}: {text}: {REFRESH}"


def test_there_are_links_to_lines():
    assert len(LINE_LINKS) >= 40
    assert len({text for _, text, _, _ in LINE_LINKS}) >= 30


def test_every_file_of_the_package_is_named():
    files = {path.relative_to(ROOT / "dithooks").as_posix() for path in (ROOT / "dithooks").rglob("*.py")}
    named = re.findall(r"^\| `([\w/]+\.py)` \| \S", PAGES["design.md"].partition("## Every file")[2], re.M)
    assert sorted(named) == sorted(name for name in files if not Path(name).name.startswith("__")), REFRESH


def test_every_room_is_named():
    floors = PAGES["design.md"].partition("## The rooms")[2].partition("## ")[0]
    named = [room for cell in re.findall(r"^\|([^|]*)\|", floors, re.M) for room in re.findall(r"`(\w+)/`", cell)]
    assert sorted(named) == sorted(path.parent.name for path in (ROOT / "dithooks").glob("*/__init__.py"))


@pytest.mark.parametrize("room", ["blocks", "engine"])
def test_a_reading_order_names_every_file(room):
    order = re.findall(r"``(\w+)``", importlib.import_module(f"dithooks.{room}").__doc__)
    files = {path.stem for path in (ROOT / "dithooks" / room).glob("*.py")} - {"__init__"}
    assert sorted(order) == sorted(files)  # each once


def test_lines_and_files_can_be_refreshed():
    refreshed = loaded("line_links").refreshed
    assert refreshed(link := f"[`DitCacheConfig.when`](../dithooks/config/cache_config.py#L{1})") != link
    assert all(refreshed(PAGES[name]) == PAGES[name] for name in ("design.md", "contributing.md")), REFRESH
    head, room = "<!-- files of predictors -->\n\n| | |\n|---|---|\n", ROOT / "dithooks" / "predictors"
    *others, last = sorted(path.name for path in room.glob("*.py") if not path.name.startswith("__"))
    table = refreshed(f"{head}| `predictors/{last}` | old |\n| `gone.py` | old |\n\nafter")
    assert table.startswith(head)
    assert re.findall(r"^\| `predictors/(.*?)`", table, re.M) == [last, *others]  # where it was, and new ones after it
    assert "old" not in table
    assert table.endswith(" |\n\nafter")


# -- the reference -------------------------------------------------------------------------------------------------


def documented(under):
    """Names on the page of the API below a module, and the rest of their paths."""
    return re.findall(rf"^::: {re.escape(under)}\.(\S+)$", PAGES["api.md"], re.M)


def test_every_public_name_is_in_the_reference():
    own = [
        path.rpartition(".")[2]
        for path in documented("dithooks")
        if not path.startswith(("compat", "demo", "integrations", "plot", "ray"))
    ]
    assert sorted(own) == sorted(set(dithooks.__all__) - {"__version__"})


@pytest.mark.parametrize("module", ["cache_dit", "mindie_sd", "msmodelslim"])
def test_so_are_the_names_of_other_libraries(module):
    package = importlib.import_module(f"dithooks.compat.{module}")
    other_names = {"BlockAdapterRegister", "get_adapter", "load_options", "supported_pipelines"}
    public = set(package.__all__) - other_names  # of what is there
    assert set(documented(f"dithooks.compat.{module}")) == public


def test_so_are_those_of_many_machines():
    assert sorted(documented("dithooks.ray")) == sorted(importlib.import_module("dithooks.ray").__all__)


# -- the site ------------------------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The text of a page."""

    def __init__(self):
        super().__init__()
        self.parts = []

    def handle_data(self, data):
        self.parts.append(data)


def text_of(path):
    parser = Text()
    parser.feed(path.read_text(encoding="utf-8"))
    return " ".join("".join(parser.parts).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as anyone would; a warning is an error."""
    pytest.importorskip("nbconvert", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    given = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site):
    for name in PAGES:
        at = name.removesuffix(".md")
        assert (site / ("index.html" if at == "index" else f"{at}/index.html")).is_file(), name
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_the_command_line_is_on_its_page(site):
    page = text_of(site / "cli" / "index.html")
    helps = site_hooks().commands()
    assert " ".join(re.sub(r"^(## `(.*)`|```.*)$", r"\2", helps, flags=re.M).split()[-40:]) in page
    for name in next(each for each in build_parser()._actions if each.dest == "command").choices:
        assert f"usage: dithooks {name}" in page


@pytest.mark.slow
def test_results_and_docstrings_are_there(site):
    assert "What a cache keeps" in text_of(site / "results" / "memory" / "index.html")
    assert (site / "results" / "compare_emoji.svg").is_file()
    api = text_of(site / "api" / "index.html")
    assert "attach it with dit_cache(pipe, result.plan)" in api
    assert ":class:" not in api
    assert ":func:" not in api
    assert ":meth:" not in api
    assert "``" not in api


def section(target):
    """The text below the heading that a link from the first page leads to, or the whole page."""
    name, _, anchor = target.partition("#")
    if not anchor:
        return PAGES[name]
    text = PAGES[name or "index.md"]
    code = [range(*fence.span()) for fence in FENCE.finditer(text)]
    found = [each for each in re.finditer(r"^#+ (.*)", text, re.M) if not any(each.start() in part for part in code)]
    for heading, following in zip(found, [*found[1:], None], strict=True):
        if re.sub(r"[^\w-]", "", heading[1].lower().replace(" ", "-")) == anchor:
            return text[heading.end() : following and following.start()]
    raise AssertionError(f"no heading of {target}")


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("With Wan 2.2", ["from diffusers import WanPipeline"]),
        ("In my own sampler?", ["for t in dithooks.steps(timesteps):"]),
        ("Which policy?", ["| `Budget(2.0)` |", "`Linear()`, unless memory is short"]),
        (
            "Why is nothing reused?",
            ["a run of … steps reused nothing", "A warm-up as long as the run"],
        ),
        ("On eight GPUs?", ["--num_processes 8", "process_group="]),
        ("With LoRA, quantisation", [r"\| LoRA.*\| \[yes\]", r"\| Quantised.*\| \[yes\]", r"compile`.*\| \[yes\]"]),
    ],
)
def test_the_first_page_leads_to_the_answer(question, answers):
    """By one click: what is below the headings that it links to says it."""
    (row,) = [line for line in PAGES["index.md"].splitlines() if line.startswith(f"| {question}")]
    there = "\n".join(map(section, LINK.findall(row)))
    assert [each for each in answers if not (each in there or re.search(each, there))] == []


@pytest.mark.slow
def test_notebooks_are_pages_of_their_own(site):
    """All five, as they are committed: with the outputs that are in them, and the notebook itself."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, cells = site / "notebooks" / path.stem, json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
        shown = text_of(page / "index.html")
        for output in outputs:
            said = output.get("text", output.get("data", {}).get("text/plain") if "data" in output else [])
            if "image/png" not in output.get("data", {}):
                assert " ".join("".join(said).split()) in shown
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        assert (page / "index.html").read_text(encoding="utf-8").count("<img alt=") == len(pictures)
        assert (site / "notebooks" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_version_is_on_every_page(site):
    pages = list(site.rglob("index.html"))
    assert len(pages) > 60
    assert all(f"dithooks {dithooks.__version__}" in text_of(path) for path in pages)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, *given):
        pass


def widths(folder, pages, by_script=()):
    """How wide the content of each page is in a window as wide as a phone's, by one browser with a frame for each.

    Scripts run on the pages ``by_script`` alone, as they take most of the time.
    """
    kinds = {page: "" if page in by_script else ' sandbox="allow-same-origin"' for page in pages}
    frames = "".join(f'<iframe src="{page}" width="{PHONE}"{kind}></iframe>' for page, kind in kinds.items())
    script = "[...document.querySelectorAll('iframe')].map(each => each.contentDocument.documentElement.scrollWidth)"
    html = f"<!doctype html><title></title>{frames}<script>onload = () => {{ document.title = {script} }}</script>"
    (folder / "all_pages.html").write_text(html, encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/all_pages.html"
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--hide-scrollbars"]
            command = [BROWSER, *options, "--dump-dom", url]
            dom = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
        finally:
            server.shutdown()
            (folder / "all_pages.html").unlink()
    return dict(zip(pages, map(int, re.search(r"<title>([\d,]+)</title>", dom)[1].split(",")), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_no_page_scrolls_sideways_on_a_phone(site):
    """Tables and listings scroll within their own boxes."""
    pages = sorted(f"{path.parent.relative_to(site).as_posix()}/" for path in site.rglob("index.html"))
    found = widths(site, pages, ["./", "choose/", "migration/", "models/", "notebooks/03_search/"])
    assert {page: wide for page, wide in found.items() if wide > PHONE} == {}
    assert len(found) > 60
    assert min(found.values()) == PHONE  # they were laid out


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_page_that_is_too_wide_would_be_found(tmp_path):
    (tmp_path / "wide.html").write_text(f'<div style="width: {PHONE + 60}px; margin: 0">x</div>')
    (tmp_path / "box.html").write_text(f'<div style="overflow: auto"><p style="width: {PHONE + 60}px">x</p></div>')
    found = widths(tmp_path, ["wide.html", "box.html"])
    assert found["wide.html"] > PHONE
    assert found["box.html"] == PHONE


def test_tables_of_prose_become_cards_and_those_of_numbers_do_not():
    row = "<tr><th>a &amp; b</th><th>c</th><th>d</th></tr>"
    table = f"<table><thead>{row}</thead><tbody><tr><td>1</td><td>2</td><td>{{}}</td></tr></tbody></table>"
    assert site_hooks().carded(table.format("3")) == table.format("3")
    prose = "<code>long</code> " * 12
    carded = site_hooks().carded(table.format(prose))
    assert carded.startswith("<table data-cards><thead>")
    assert re.findall(r"<td([^>]*)>", carded) == [' data-head="a &amp; b"', ' data-head="c"', ' data-head="d"']
    assert f">{prose}</td>" in carded


@pytest.mark.slow
def test_every_picture_is_there(site):
    """Also those in HTML, whose addresses are as in the repository."""
    found = set()
    for path in site.rglob("*.html"):
        for picture in re.findall(r'<img [^>]*?src="([^":]+)"', path.read_text(encoding="utf-8")):
            assert (path.parent / picture).is_file(), f"{path.relative_to(site)}: {picture}"
            found.add(Path(picture).name)
    assert {"race.png", "step.svg", "frontier.svg", "steps_threshold.svg", "compare_emoji.svg"} <= found


@pytest.mark.slow
def test_no_list_or_table_is_left_as_text(site):
    """Of the pages in docs/: Markdown that is not recognised stays as it is written."""
    for name in PAGES:
        page = (site / name.removesuffix(".md").removesuffix("index") / "index.html").read_text(encoding="utf-8")
        plain = re.sub(r"<(pre|script|style)\b.*?</\1>", "", page, flags=re.S)
        assert re.findall(r"\n *(?:- |\d+\. |\|)[^\n]{,40}", plain) == [], name


def test_lists_are_lists():
    """Markdown as the site reads it begins a list after an empty line only, and nests by four spaces."""
    for name, text in PAGES.items():
        plain = prose(text)
        assert re.findall(r"^(?!\s*(?:[-*|<]|\d+\.)|\s)[^\n]+\n(?:- |\d+\. )[^\n]*", plain, re.M) == [], name
        assert re.findall(r"^ {1,3}(?:\||- |\d+\. )[^\n]*", plain, re.M) == [], name


def test_links_out_of_the_docs_are_turned():
    hooks = site_hooks()

    def turned(text, page, repository=None):
        link = lambda found: hooks.relinked(found, page, repository)  # noqa: E731
        return hooks.outside_code(text, lambda part: hooks.LINK.sub(link, part))

    assert turned("[a](../README.md) ![b](../bench/results/x.svg)", "npu.md") == "[a](index.md) ![b](results/x.svg)"
    assert turned("[a](../../bench/results/m.md#t)", "howto/wan.md") == "[a](../results/m.md#t)"
    assert turned("[`f`](../dithooks/a.py), [b](choose.md), [c](https://d.e)", "x.md") == (
        "`f`, [b](choose.md), [c](https://d.e)"
    )
    assert turned("```text\n[a](../README.md)\n```\n", "npu.md") == "```text\n[a](../README.md)\n```\n"
    assert turned("[a](../notebooks/x.ipynb)", "npu.md") == "[a](notebooks/x.md)"
    assert turned("[a](x.ipynb), [b](../docs/npu.md#m)", "notebooks/x.md") == "[a](x.ipynb), [b](../npu.md#m)"
    assert turned("[a](../../docs/npu.md), [b](y.md)", "results/x.md") == "[a](../npu.md), [b](y.md)"
    assert turned("[a](../setup.cfg#L3)", "npu.md", "https://d.e/f/") == "[a](https://d.e/f/blob/HEAD/setup.cfg#L3)"


def test_lines_of_messages_break_and_those_of_columns_do_not():
    blocks = "```text\na message, of words\n```\n\n```text\nname   value\na         1\n```\n"
    assert site_hooks().outside_code(blocks, str) == blocks.replace("text\nname", "output\nname")


def test_tables_of_listings_become_columns():
    listing = "```python\nx\n```"
    rows = f"<tr><th>a</th><th>b</th></tr>\n<tr><td>\n\n{listing}\n\n</td><td>\n\ny\n\n</td></tr>\n"
    rows = f"<table>\n{rows}</table>\n"
    columns = site_hooks().side_by_side(rows)
    assert re.findall(r'<div class="(.*?)" markdown="1">', columns) == ["pair heads", "pair"]
    assert re.findall(r'data-head="(.*?)">\n(\S+)', columns) == [("a", "a"), ("b", "b"), ("a", "```python"), ("b", "y")]
    assert "<t" not in site_hooks().side_by_side(rows)
    assert "```python\nx\n```\n</div>" in site_hooks().side_by_side(rows)


def test_help_is_as_wide_everywhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    narrow = site_hooks().commands()
    assert os.environ["COLUMNS"] == "60"
    monkeypatch.delenv("COLUMNS")
    assert site_hooks().commands() == narrow
    assert "COLUMNS" not in os.environ


def test_the_drawing_is_legible_on_any_ground():
    """It brings a ground of its own, and every text on it is dark."""
    drawing = Path(DOCS / "step.svg").read_text(encoding="utf-8")
    assert '<rect width="940" height="560" rx="8" fill="#ffffff"/>' in drawing
    assert set(re.findall(r"<text[^>]* fill=\"(#\w+)\"", drawing)) <= {"#1f2933", "#52606d"}
