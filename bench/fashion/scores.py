"""Whether the clothes are as good with a cache as without: ``python -m bench.fashion.scores --help``.

Each row draws the same 5,000 labels and seeds, 500 of each class, and scores them with the small classifier
(``metrics.py``): Fréchet distance of its features to the 10,000 test pictures, Inception score of its classes, and the
share that it takes for the class that was asked for. It is not Inception, so only rows of one table compare. The first
row has real pictures, 5,000 that the classifier was not trained on: nothing drawn can be expected to do better. Methods
draw in batches of 250; what looks at what it draws decides for such a batch. Blocks are counted as ``bench.compare``
does; what a method has to find out beforehand it does on the subject's calibration cases, which is not in its time.

Rows are kept in ``fashion_scores.json``, which is written after each, with a table in ``fashion_scores.md``; those in
it are not drawn again, unless with ``--fresh``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compare.subject import Case, Subject, counting
from bench.peers.peer import Knob, Method
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

from .classifier import SEEN, Classifier, load_classifier, look, part
from .data import NAMES, Split, load_fashion
from .metrics import Moments, Scores, scores_of, to_bytes

SEED = 1_000_000  # of the first picture; the next has the next. Far from those that searches and comparisons draw
SAMPLES, BATCH = 5_000, 250
TIMES = (3.0, 2.0)  # fewer steps, or blocks; the hardest first
REAL, PLAIN = "real pictures", "uncached"
Draw = Callable[[Sequence[int], Sequence[int]], Tensor]  # labels, seeds → pictures (n, 1, 28, 28) in 0…1


@dataclass(frozen=True)
class Row:
    """One way to draw, and its scores.

    Args:
        title: of the method.
        value: of its knob.
        shown: what that came to.
        fraction: of the uncached block executions, that were done.
        seconds: of processor time, in drawing.
        scores: of what was drawn.
    """

    title: str
    value: Knob | None
    shown: str
    fraction: float | None
    seconds: float | None
    scores: Scores
    machine: str = ""  # that drew it

    @property
    def key(self) -> tuple[str, Knob | None]:
        return self.title, self.value

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Row:
        return cls(**given | {"scores": Scores(**given["scores"])})


def cases(samples: int) -> tuple[list[int], list[int]]:
    """Labels, of each class as many, and seeds: the same for whoever draws."""
    return [number % len(NAMES) for number in range(samples)], [SEED + number for number in range(samples)]


@dataclass(frozen=True)
class Judge:
    """The classifier, and the features that are to be met."""

    classifier: Classifier
    real: Moments
    samples: int = SAMPLES
    batch: int = BATCH

    @classmethod
    def of(cls, classifier: Classifier, test: Split, samples: int = SAMPLES, batch: int = BATCH) -> Judge:
        """One that compares with these real pictures."""
        return cls(classifier, Moments.of(look(classifier, test.pictures)[0]), samples, batch)

    def score(self, draw: Draw) -> Scores:
        """Draw, and score what was drawn."""
        labels, seeds = cases(self.samples)
        spans = [slice(at, at + self.batch) for at in range(0, self.samples, self.batch)]
        pictures = torch.cat([to_bytes(draw(labels[span], seeds[span])) for span in spans])
        return scores_of(pictures, torch.tensor(labels), self.classifier, self.real)

    def score_real(self, split: Split) -> Scores:
        """Of real pictures, as many as are drawn, or as there are, of each class as many."""
        each = min(self.samples // len(NAMES), int(split.labels.bincount(minlength=len(NAMES)).min()))
        chosen = torch.cat([(split.labels == label).nonzero().flatten()[:each] for label in range(len(NAMES))])
        return scores_of(split.pictures[chosen], split.labels[chosen], self.classifier, self.real)


class Table:
    """The rows there are, drawn with one subject and kept in a file."""

    def __init__(self, subject: Subject, judge: Judge, path: Path, *, fresh: bool = False) -> None:
        self.subject, self.judge, self.path = subject, judge, path
        self.original = subject.pipe.transformer
        self.about = {
            "subject": subject.name,
            "steps": subject.steps,
            "samples": judge.samples,
            "batch": judge.batch,
            "first seed": SEED,
            "machine": machine(),
            "versions": versions("dithooks", "diffusers", "cache-dit", "msmodelslim"),
        }
        self.rows: list[Row] = []
        with suppress(FileNotFoundError):
            if not fresh:
                kept = json.loads(path.read_text())
                for name in ("subject", "steps", "samples", "batch", "first seed"):
                    if kept["about"][name] != self.about[name]:
                        raise SystemExit(f"{path} has other {name}: --fresh draws all again, --out writes elsewhere")
                self.rows = [Row.from_dict(each) for each in kept["rows"]]

    def has(self, title: str, value: Knob | None) -> bool:
        return (title, value) in {row.key for row in self.rows}

    def add(self, row: Row) -> None:
        """Keep a row, in both files."""
        self.rows.append(row)
        content = {"about": self.about, "rows": [asdict(each) for each in self.rows]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(content, indent=2) + "\n")
        write_text(self.path.with_suffix(".md"), markdown(self.rows, self.about))
        print(line(row), flush=True)

    def real(self, split: Split) -> None:
        """The row of real pictures."""
        if not self.has(REAL, None):
            self.add(Row(REAL, None, "", None, None, self.judge.score_real(split), machine()))

    def plain(self) -> None:
        """The row without a method."""
        if not self.has(PLAIN, None):
            self.add(Row(PLAIN, None, f"{self.subject.steps} steps", 1.0, *self._drawn(self.subject.steps), machine()))

    def method(self, method: Method, value: Knob) -> None:
        """The row of a method, which is given a transformer that no other has touched."""
        if self.has(method.title, value):
            return
        labels, seeds = (each[: self.judge.batch] for each in cases(self.judge.samples))
        with counting(self.original) as whole:
            self._pictures(labels[:1], seeds[:1], self.subject.steps)
        self.subject.pipe.transformer = copy.deepcopy(self.original)
        try:
            with method.attach(self.subject, value) as attached, counting(self.subject.pipe.transformer) as work:
                seconds, scores = self._drawn(attached.steps or self.subject.steps)
        finally:
            self.subject.pipe.transformer = self.original
        fraction = work.executions(whole) / len(whole.done) / self.judge.samples
        self.add(Row(method.title, value, attached.shown, fraction, seconds, scores, machine()))

    def _drawn(self, steps: int) -> tuple[float, Scores]:
        begun = time.process_time()
        scores = self.judge.score(lambda labels, seeds: self._pictures(labels, seeds, steps))
        return round(time.process_time() - begun, 1), scores

    def _pictures(self, labels: Sequence[int], seeds: Sequence[int], steps: int) -> Tensor:
        batch = [Case(label, seed) for label, seed in zip(labels, seeds, strict=True)]
        return self.subject.pictures(self.subject.draw(batch, steps))


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table, and what it was taken on."""
    named = dict.fromkeys(row.machine or about["machine"] for row in rows)
    marks = {name: chr(ord("A") + number) for number, name in enumerate(named)}
    versions = [f"{name} {number}" for name, number in about["versions"].items()]
    lines = [
        f"# Scores of {about['samples']:,} pictures a row: Fashion-MNIST, {about['steps']} steps",
        "",
        "In the eyes of a small classifier, not of Inception; Fréchet distance to the 10,000 test pictures.",
        f"Batches of {about['batch']}. {'; '.join(versions)}. A time only compares with one on the same machine"
        + (
            f": {'; '.join(f'{mark} is {name}' for name, mark in marks.items())}."
            if len(marks) > 1
            else f": {', '.join(marks)}."
        ),
        "",
        "| | | times fewer blocks | processor time | Fréchet distance | Inception score | class as asked |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda each: (each.title not in (REAL, PLAIN), each.title)):
        fewer = "" if row.fraction is None else f"{1 / row.fraction:.2f}x"
        where = f", {marks[row.machine or about['machine']]}" if len(marks) > 1 else ""
        seconds = "" if row.seconds is None else f"{row.seconds:.0f} s{where}"
        told = f"{row.scores.frechet:.3f} | {row.scores.inception:.3f} | {row.scores.asked:.2%}"
        lines.append(f"| {row.title} | {row.shown} | {fewer} | {seconds} | {told} |")
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """A row in short."""
    fewer = "" if row.fraction is None else f"{1 / row.fraction:.2f}x fewer blocks, {row.seconds:.0f} s, "
    told = f"Fréchet {row.scores.frechet:.3f}, Inception {row.scores.inception:.3f}, as asked {row.scores.asked:.2%}"
    return f"{row.title} {row.value or ''} | {fewer}{told} | {row.shown[:60]}"


def wanted(asked: Sequence[str], quick: bool) -> Iterator[tuple[Method, Knob]]:
    """Fewer steps and this library's searched plans; and those that are asked for as ``PART OF A TITLE=VALUE``."""
    from bench.compare.sweep import all_methods
    from bench.peers import fewer_steps, own

    usual = [*fewer_steps.methods(), *(each for each in own.methods() if each.name == own.SEARCH)]
    yield from ((method, times) for times in (TIMES[:1] if quick else TIMES) for method in usual)
    for each in asked:
        name, equals, value = each.rpartition("=")
        found = [method for method in all_methods([name]) if isinstance(method, Method)]
        if not equals or len(found) != 1:
            titles = [method.title for method in found or all_methods() if isinstance(method, Method)]
            raise SystemExit(f"--also {each!r} is {len(found)} methods: give VALUE and a part of one of {titles}")
        yield found[0], knob(value)


def knob(text: str) -> Knob:
    """A number, where it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Draw and score row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the four idx files (default: where Debian puts them)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--also", action="append", default=[], metavar="PART=VALUE", help="a method and its knob's value"
    )
    parser.add_argument("--quick", action="store_true", help="100 pictures a row, in batches of 50, and fewer rows")
    parser.add_argument("--fresh", action="store_true", help="draw again what is there")
    options = parser.parse_args(arguments)
    from bench.compare.fashion import Fashion

    torch.set_num_threads(1)
    size = (100, 50) if options.quick else (SAMPLES, BATCH)
    judge = Judge.of(load_classifier(), load_fashion("test", options.data), *size)
    train = load_fashion("train", options.data)
    path = options.out / ("fashion_scores_quick.json" if options.quick else "fashion_scores.json")
    table = Table(Fashion(), judge, path, fresh=options.fresh)
    table.real(part(train, SEEN))
    table.plain()
    for method, value in wanted(options.also, options.quick):
        table.method(method, value)


if __name__ == "__main__":
    main()
