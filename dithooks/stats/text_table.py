"""Tables as text: as wide as they are, or in several parts where they are wider than the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

GAP = 2  # spaces between columns


def text_table(rows: Sequence[Sequence[str]], width: int | None = None, left: int = 1, ruled: bool = False) -> str:
    """Return rows as a table; one that is wider than ``width`` is cut into parts, each with the first column.

    Args:
        rows: of texts, the heads first.
        width: of the terminal; ``None``: as wide as it is.
        left: columns from the left that are aligned to the left, the others are to the right.
        ruled: draw a line below the heads.

    Example:
        >>> print(text_table([("", "seconds", "PSNR"), ("plain", "4.35", ""), ("cached", "2.47", "63.7 dB")], width=20))
                seconds
        plain      4.35
        cached     2.47
        <BLANKLINE>
                   PSNR
        plain
        cached  63.7 dB
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts: list[list[int]] = []
    for column in range(1, len(widths)):
        taken = widths[0] + sum(GAP + widths[each] for each in parts[-1]) if parts else 0
        if not parts or (width is not None and taken + GAP + widths[column] > width):
            parts.append([])
        parts[-1].append(column)
    texts = []
    for part in parts or [[]]:
        lines = []
        for row in rows:
            cells = [_aligned(row[each], widths[each], each < left) for each in (0, *part)]
            lines.append((" " * GAP).join(cells).rstrip())
        if ruled:
            lines.insert(1, "─" * (widths[0] + sum(GAP + widths[each] for each in part)))
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def folded(text: str, width: int | None) -> str:
    """Return a text whose longer lines are broken; what goes on is indented by two more spaces.

    Example:
        >>> print(folded("  two words and more", 12))
          two words
            and more
    """
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + GAP)
        whole = width is None or len(line) <= width
        lines += [line] if whole else textwrap.wrap(line, width or 0, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def output_width() -> int | None:
    """Return the columns of stdout: of its terminal, or as COLUMNS says; ``None``: a file or pipe has none."""
    is_known = bool(os.environ.get("COLUMNS")) or (sys.stdout is not None and sys.stdout.isatty())
    return shutil.get_terminal_size().columns if is_known else None


def _aligned(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
