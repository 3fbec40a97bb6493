"""What was tried to make the library hold up, as a table: ``pytest tests/robustness --table docs/robustness.md``.

A module's mark ``line`` names the row, the first paragraph of its docstring says what was tried, its mark ``on`` on
what, and the docstrings of its tests are the details.
"""

from __future__ import annotations

import datetime
import inspect
import shutil
from collections import Counter
from pathlib import Path

from dithooks.environment.machine import machine, versions

LINES = {  # in one sentence each
    "torch.compile": "Whole or by blocks: as in eager code, two graphs, a break only for policies that look.",
    "Offload": "Weights moved by accelerate, diffusers' groups or a cast: there when needed, not fetched when skipped.",
    "LoRA": "Adapters switched, fused, swapped at any time: no residual outlives the weights it was taken with.",
    "Quantised": "torchao, tensor subclasses, layers without a weight: residuals have the dtype of activations.",
    "Save and copy": "Saved, moved, copied, pickled, exported while attached: as without a cache.",
    "Sharded": "FSDP2, tensor and context parallel, two processes: drawn as by the whole model, ranks decide alike.",
    "Concurrency": "Threads, asyncio, requests by turns: bit for bit what each run gives alone.",
    "Training": "Gradients are those of the plain model; nothing is cached, and one warning says so.",
    "Fault campaign": "Exceptions, Ctrl-C, lack of memory, damaged files: the next run is as a fresh one.",
    "Devices, Ascend NPU": "A simulated device: the same decisions as on the host, and every wait for it counted.",
}
OUTCOMES = ("failed", "passed", "skipped", "xfailed")


def first(docstring: str | None) -> str:
    """The first paragraph, in one line."""
    return " ".join((inspect.cleandoc(docstring or "").split("\n\n") or [""])[0].split())


def pytest_addoption(parser):
    parser.addoption("--table", type=Path, metavar="FILE", help="write what was tried, and how it went, to a file")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        lines = [mark.args[0] for mark in item.iter_markers("line")]
        assert lines, f"{item.nodeid}: which line of the table is it? pytestmark = pytest.mark.line(...)"
        assert lines[0] in LINES, f"{item.nodeid}: {lines[0]!r} is no line of {[*LINES]}"
        assert first(item.function.__doc__), f"{item.nodeid}: its docstring says what is tried"
        on = [each for mark in reversed(list(item.iter_markers("on"))) for each in mark.args]
        item.user_properties += [
            ("line", lines[0]),
            ("tried", first(item.module.__doc__)),
            ("on", on),
            ("where", (item.path.name, item.location[1], item.originalname)),
            ("what", first(item.function.__doc__)),
        ]


class Table:
    """Collects the reports; where there are workers, in the process that has them."""

    def __init__(self, path: Path) -> None:
        self.path, self.reports = path, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.reports.append((dict(report.user_properties), outcome(report), report.duration, reason(report)))

    def pytest_sessionfinish(self, session):
        self.path.write_text(page(self.reports), encoding="utf-8")


def pytest_configure(config):
    path = config.getoption("--table", None)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(path))


def outcome(report) -> str:
    return "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome


def reason(report) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail
    return report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""


def page(reports) -> str:
    """The whole page, in Markdown."""
    day = datetime.date.today().isoformat()
    packages = versions("diffusers", "accelerate", "peft", "torchao")
    named = ", ".join(f"{name} {version}" for name, version in packages.items())
    compiler = "with" if shutil.which("g++") else "without"
    rows, details = [], []
    for line, in_short in LINES.items():
        own = sorted((each for each in reports if each[0].get("line") == line), key=lambda each: each[0]["where"])
        tried = list(dict.fromkeys(props["tried"] for props, *_ in own))
        on = list(dict.fromkeys(each for props, how, *_ in own if how == "passed" for each in props["on"]))
        places = sorted({tuple(props["where"]) for props, *_ in own})
        rows.append(f"| [{line}](#{anchor(line)}) | {in_short} | {counted(own) or 'not tried'} |")
        details += ["", f"## {line}", "", *(f"{each}\n" for each in tried), f"Tried on: {'; '.join(on)}.", ""]
        details += ['<details markdown="1">', f"<summary>{len(places)} tests, each with its result</summary>", ""]
        for where in places:
            these = [each for each in own if tuple(each[0]["where"]) == where]
            whys = "; ".join(dict.fromkeys(why for *_, why in these if why))
            result = counted(these) + (f": {whys}" if whys else "")
            details.append(f"- {these[0][0]['what']} (`{where[0]}::{where[2]}`) **{result}**")
        details += ["", "</details>"]
    return "\n".join(
        [
            "# What it holds up to",
            "",
            "Ways in which a cache of blocks can crash, hang or silently do nothing, each tried with small models.",
            "This page is written by the tests themselves: `pytest tests/robustness --table docs/robustness.md`.",
            "",
            "| | in short | result |",
            "|---|---|---|",
            *rows,
            "",
            f"On {machine()}, {compiler} a C++ compiler; {named}; {day}.",
            *details,
            "",
        ]
    )


def anchor(heading: str) -> str:
    """The anchor of a heading, here and on the site."""
    return "".join(each for each in heading.lower().replace(" ", "-") if each.isalnum() or each == "-")


def counted(reports) -> str:
    counts = Counter(each[1] for each in reports)
    return ", ".join(f"{counts[each]} {each}" for each in OUTCOMES if counts[each])
