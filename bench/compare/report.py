"""Tables and plots of what was measured: ``python -m bench.compare.report --out bench/results``.

Of each ``compare_NAME.json``: ``compare_NAME.md`` and ``.csv``, and ``compare_NAME.svg`` with quality over compute.
``compare.md`` has the plans of all models against the best of the others, ``schedules.svg`` shows these plans, and
``search_cost.svg`` what finding them took.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.compare.curves import Axis, Duel, cost, duels, kendall, libraries, lpips_of, measured, psnr_of, useful
from bench.compare.quality import interval
from bench.compare.sweep import Row
from bench.peers.own import CONTROL, LIBRARY, SEARCH
from dithooks.storage.replacement import replacing, write_text

Compared = tuple[dict[str, Any], list[Row]]  # about, and rows


def load(path: Path) -> Compared:
    """What a sweep has written."""
    given = json.loads(path.read_text())
    return given["about"], [Row.from_dict(each) for each in given["rows"]]


def page(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """Markdown: the plans against the best of the others, then every setting."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# {about['subject']}: quality for as much compute",
        "",
        f"{len(about['cases'])} test cases, {about['steps']} steps, in batches of {about['group']}; PSNR in dB to the "
        f"uncached run, {about['equal']:g} where equal.",
        f"{machines(about, rows)}; {versions}.",
        "",
        f"## The plans of `{SEARCH}` against the best of every other library",
        "",
        "For as many block executions. A method is given its best setting that takes no more, chosen on the test "
        "cases, or the line between two neighbouring settings where that is higher. Means with 95 % bootstrap "
        "intervals; the difference is by case. LPIPS is a learned distance, 0 for equal pictures.",
        "",
    ]
    lines += [*table(duels(rows, LIBRARY, SEARCH), "fraction"), "", agreement(rows)]
    lines += ["", "For as much time of one thread:", "", *table(duels(rows, LIBRARY, SEARCH, "time"), "time"), ""]
    lines += control(rows)
    lines += ["", "## What finding it took", "", *spent(rows)]
    lines += ["", "## Every setting", "", *settings(rows)]
    failed = [row for row in rows if row.failed]
    if failed:
        lines += ["", "## What did not run", "", *failures(failed)]
    return "\n".join(lines) + "\n"


def machines(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What the times were taken on; where it was several, which rows on which."""
    taken: dict[str, list[str]] = {}
    for row in rows:
        titles = taken.setdefault(row.machine or about["machine"], [])
        if row.title not in titles:
            titles.append(row.title)
    (most, _), *others = sorted(taken.items(), key=lambda item: -len(item[1]))
    return "; ".join([most, *(f"on {machine}: {', '.join(titles)}" for machine, titles in others)])


def summary(found: Mapping[str, Compared]) -> str:
    """Markdown: all models' plans against the best of the others, for as many block executions and for as much time."""
    lines = [
        f"# The plans of `{SEARCH}` against the best of every other library",
        "",
        "PSNR in dB to the uncached run, mean with a 95 % bootstrap interval; the difference is by case. A method is "
        "given its best setting that takes no more, chosen on the test cases, or the line between two neighbouring "
        "ones where that is higher. "
        "LPIPS is a learned distance, 0 for equal pictures.",
    ]
    axes: tuple[tuple[Axis, str], ...] = (
        ("fraction", "as many block executions"),
        ("time", "as much time of one thread"),
    )
    for axis, what in axes:
        lines += ["", f"For {what}:", ""]
        for number, (name, (_, rows)) in enumerate(found.items()):
            head, rule, *body = table(duels(rows, LIBRARY, SEARCH, axis), axis)
            lines += [] if number else [f"| model {head}", f"|---{rule}"]
            lines += [f"| {name} {line}" for line in body]
    told = {name: text for name, (_, rows) in found.items() if (text := agreement(rows))}
    lines += [line for name, text in told.items() for line in ("", f"{name}: {text}")]
    return "\n".join(lines) + "\n"


def table(found: Sequence[Duel], axis: Axis) -> list[str]:
    """Of one axis."""
    head = ["target", "fewer blocks" if axis == "fraction" else "faster", "`search`", "best other", "which", "ahead"]
    head += ["intervals apart", f"LPIPS: `{SEARCH}`, best other"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for duel in found:
        assert duel.own.quality is not None
        cells = [
            f"{duel.target:g}×",
            f"{1 / cost(duel.own, axis):.2f}×",
            shown(duel.own.quality.psnr),
            shown(duel.best.psnr.tolist()),
            f"{duel.best.title}, {duel.best.how}",
            shown_difference(*duel.ahead),
            "yes" if duel.apart else "no",
            "–" if duel.lpips is None else "{:.4f}, {:.4f}".format(*duel.lpips),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def agreement(rows: Sequence[Row]) -> str:
    """Whether LPIPS has the order that PSNR has: of each plan and the best other, and of all settings."""
    found = [duel for duel in duels(rows, LIBRARY, SEARCH) if duel.lpips is not None]
    if not found:
        return ""
    same = sum((duel.ahead[0] > 0) == (duel.lpips[0] < duel.lpips[1]) for duel in found if duel.lpips is not None)
    looks = [(psnr_of(row).mean(), -each.mean()) for row in useful(rows) if (each := lpips_of(row)) is not None]
    return (
        f"The order of methods by LPIPS agrees with that by PSNR in {same} of {len(found)} rows (Kendall τ "
        f"{kendall(*zip(*looks, strict=True)):.2f} over {len(looks)} settings)."
    )


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Mean and interval."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def shown_difference(mean: float, low: float, high: float) -> str:
    return f"**{mean:+.1f}** ({low:+.1f} … {high:+.1f})"


def control(rows: Sequence[Row]) -> list[str]:
    """The row that has to be exact."""
    found = [row for row in measured(rows) if row.method == CONTROL and row.quality is not None]
    return [
        f"The control, attached with every step computed: relative L1 of the latents {max(row.quality.latent_l1):g} "
        f"at most, {'exactly equal' if max(row.quality.latent_l1) == 0 else 'NOT equal'}."
        for row in found
        if row.quality is not None
    ]


def spent(rows: Sequence[Row]) -> list[str]:
    """What searches and calibrations took: block executions over those of one uncached run of the same cases."""
    lines = ["| method | knob | runs | run equivalents | seconds |", "|---" * 5 + "|"]
    for row in rows:
        if row.spent is not None:
            cells = [str(row.spent.runs), f"{row.spent.run_equivalents:.2f}", f"{row.spent.seconds:.0f}"]
            lines.append(f"| {' | '.join([row.title, f'{row.knob} {row.value}', *cells])} |")
    return lines


def settings(rows: Sequence[Row]) -> list[str]:
    """Every row that has figures."""
    lines = ["| method | knob | fewer blocks | faster | PSNR | worst | SSIM | latent L1 | LPIPS |"]
    video = any(row.quality is not None and row.quality.motion_psnr for row in rows)
    lines[0] += " worst frame | motion PSNR |" if video else ""
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for methods in libraries(measured(rows)).values():
        for each in methods.values():
            for row in each:
                quality = row.quality
                assert quality is not None
                times = [f"{1 / cost(row, axis):.2f}×" for axis in ("fraction", "time")]
                cells = [row.title, f"{row.knob} {row.value}", *times]
                cells += [shown(quality.psnr), f"{min(quality.psnr):.1f}", f"{fmean(quality.ssim):.4f}"]
                cells += [f"{fmean(quality.latent_l1):.4f}"]
                cells += ["–" if quality.lpips is None else f"{fmean(quality.lpips):.4f}"]
                if quality.motion_psnr:
                    cells += [f"{fmean(quality.worst_frame):.1f}", f"{fmean(quality.motion_psnr):.1f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def failures(rows: Sequence[Row]) -> list[str]:
    """By method and reason, with the values of the knob that failed so."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        found.setdefault((row.title, row.knob, row.failed), []).append(str(row.value))
    lines = ["| method | knob | how it fails |", "|---" * 3 + "|"]
    for (title, knob, why), values in found.items():
        why = why.replace("|", "\\|")
        lines.append(f"| {title} | {knob} {', '.join(values)} | {why} |")
    return lines


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Means and intervals of every row: what the plots are made of."""
    head = ["library", "method", "knob", "value", "block_fraction", "time_fraction", "psnr", "psnr_low", "psnr_high"]
    head += ["psnr_min", "ssim", "latent_l1", "lpips", "motion_psnr", "worst_frame", "run_equivalents"]
    head += ["shown", "failed"]
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, head, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells: dict[str, Any] = {name: getattr(row, name) for name in ("library", "method", "knob", "value")}
            cells |= {"shown": row.shown, "failed": row.failed}
            if row.quality is not None:
                quality = row.quality
                mean, low, high = interval(quality.psnr)
                figures = {"block_fraction": row.fraction, "time_fraction": row.time, "psnr": mean}
                figures |= {"psnr_low": low, "psnr_high": high, "psnr_min": min(quality.psnr)}
                figures |= {"ssim": fmean(quality.ssim), "latent_l1": fmean(quality.latent_l1)}
                if quality.lpips is not None:
                    figures["lpips"] = fmean(quality.lpips)
                if quality.motion_psnr:
                    figures |= {"motion_psnr": fmean(quality.motion_psnr), "worst_frame": fmean(quality.worst_frame)}
                if row.spent is not None:
                    figures["run_equivalents"] = row.spent.run_equivalents
                cells |= {name: f"{value:.6g}" for name, value in figures.items() if value is not None}
            writer.writerow(cells)


def main(arguments: list[str] | None = None) -> None:
    """Read what sweeps have written, and write tables and plots next to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    found: dict[str, Compared] = {}
    for path in sorted(options.out.glob("compare_*.json")):
        about, rows = found[path.stem.removeprefix("compare_")] = load(path)
        write_text(path.with_suffix(".md"), page(about, rows))
        write_csv(path.with_suffix(".csv"), rows)
    if not found:
        raise SystemExit(f"{options.out} holds no compare_*.json: run python -m bench.compare.sweep first")
    write_text(options.out / "compare.md", summary(found))
    from bench.compare import plots

    plots.draw(found, options.out)
    print(f"written to {options.out}: {', '.join(found)}")


if __name__ == "__main__":
    main()
