"""README.md: short, its code runs as pasted, its commands are understood, and its figures are those of the tables."""

import json
import re
import subprocess
import sys

import pytest
from docs_pages import INERT, ROOT, blocks, check_command, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
CALLS = commands(README)


def test_it_is_short():
    assert len(README.encode()) <= 9000


@pytest.mark.slow
def test_the_code_runs_as_pasted(tmp_path):
    """In a file of its own, by a process of its own, and the cache does something."""
    (code,) = [block.body for block in blocks(README) if block.kind == "python"]
    (tmp_path / "first.py").write_text(code)
    done = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pizza.png").stat().st_size > 500
    calls = re.search(r"^(\d+) of 24 calls reused", done.stdout, re.M)
    assert int(calls[1]) >= 10, done.stdout


def test_every_block_says_what_it_is():
    assert {block.kind for block in blocks(README)} <= INERT | {"python"}


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_commands_are_understood(words):
    check_command(words)


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^()\s]+)\)", README)
    assert len(links) >= 20
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []


def test_the_times_under_the_animation_are_those_it_plays():
    times = json.loads((ROOT / "docs/race.json").read_text(encoding="utf-8"))
    plain, cached = (f"{times[kind][-1]:.1f} s" for kind in ("plain", "cached"))
    assert f"without a cache in {plain}, and with one in {cached}" in README
    assert f"in {cached} instead of {plain}" in README


def test_the_figures_are_those_of_the_table():
    """Of each row: the mean and its interval, those of the best other method, and the difference."""
    table = (ROOT / "bench/results/compare.md").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if line.startswith("|") and "**" in line]
    assert len(rows) == 9
    for row in rows:
        own, other, ahead = re.search(
            r"\*\*([\d.]+)\*\* (\(.*?\) \| [\d.]+ \(.*?\)) \| .*? \| (\+[\d.]+ \(.*?\))", row
        ).groups()
        mean, _, interval = ahead.partition(" ")
        assert any(f"{own} {other} |" in line and f"**{mean}** {interval}" in line for line in table.splitlines()), row
