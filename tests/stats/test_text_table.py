"""Tables as text: whole cells, in parts that fit the terminal."""

import pytest

from dithooks.stats.text_table import folded, output_width, text_table

ROWS = [
    ("", "seconds", "speed-up", "blocks run"),
    ("plain", "4.35", "1.00x", "672 of 672"),
    ("cached", "12.47", "1.76x", "336 of 672"),
]


def test_as_wide_as_it_is():
    assert text_table(ROWS, ruled=True).splitlines() == [
        "        seconds  speed-up  blocks run",
        "─" * 37,
        "plain      4.35     1.00x  672 of 672",
        "cached    12.47     1.76x  336 of 672",
    ]


@pytest.mark.parametrize("width", [37, 200])
def test_where_it_fits_it_is_one(width):
    assert text_table(ROWS, width) == text_table(ROWS)


def test_in_parts():
    assert text_table(ROWS, 36).splitlines() == [
        "        seconds  speed-up",
        "plain      4.35     1.00x",
        "cached    12.47     1.76x",
        "",
        "        blocks run",
        "plain   672 of 672",
        "cached  336 of 672",
    ]


def test_no_cell_is_cut_however_narrow_it_is():
    text = text_table(ROWS, 1)
    assert [part.count("\n") for part in text.split("\n\n")] == [2, 2, 2]
    assert all(cell in text for row in ROWS for cell in row)


def test_to_the_left():
    assert text_table([("a", "b"), ("long", "x")], left=2) == "a     b\nlong  x"


def test_long_lines_are_folded_below_their_beginning():
    assert folded("one two three\n  four five six", 10).splitlines() == [
        "one two",
        "  three",
        "  four",
        "    five",
        "    six",
    ]
    assert folded("one two three", None) == "one two three"


def test_a_pipe_has_no_width(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_width() is None
    monkeypatch.setenv("COLUMNS", "61")
    assert output_width() == 61
