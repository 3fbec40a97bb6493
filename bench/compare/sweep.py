"""Every method at every value of its knob, on one model: ``python -m bench.compare.sweep --help``.

Each test case is drawn once without a cache and once with each setting, in batches of {group}; what looks at what it
draws decides for such a batch. Measured are the quality of each picture against its uncached twin (``quality.py``), how
many block executions it took (``subject.py``), and the time of one thread: one case drawn without and with the method
in turns, processor time, so that others on the same machine do not count. What a method has to find out beforehand it
does on calibration cases; a knob's best value is left to whoever has the test pictures before him: curves are compared.

Where a method fails, the row says how. Rows are kept in ``compare_NAME.json``, which is written after each; those in it
are not measured again, unless with ``--fresh``; with ``--only``, of the methods that are named.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from bench.compare.quality import EQUAL, Quality, compare
from bench.compare.subject import Case, Subject, counting
from bench.peers.peer import Attached, Knob, Method, Spent
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

GROUP = 4  # cases in a batch
PAIRS = 3  # of timed runs
SUBJECTS = {"emoji": "Emoji", "fashion": "Fashion", "video": "Video"}
PEERS = ("own", "fewer_steps", "with_cache_dit", "with_diffusers", "with_msmodelslim", "spectrum", "dpcache")


@dataclass(frozen=True)
class Row:
    """One setting of one method.

    Args:
        library: whose, with its version.
        method: which of its methods.
        knob: what was turned.
        value: to which value.
        shown: what that came to.
        fraction: of the uncached run's block executions, that were done.
        time: of the uncached run's, that was taken; the median of some pairs.
        quality: of each test case.
        spent: on finding it, beforehand.
        failed: why it has no figures, if it has none.
        remarks: warnings on the way.
        machine: that took its time; empty: that of the whole file.
    """

    library: str
    method: str
    knob: str
    value: Knob
    shown: str = ""
    fraction: float | None = None
    time: float | None = None
    quality: Quality | None = None
    spent: Spent | None = None
    failed: str = ""
    remarks: tuple[str, ...] = ()
    machine: str = ""

    @property
    def key(self) -> tuple[str, str, Knob]:
        return self.library, self.method, self.value

    @property
    def title(self) -> str:
        return f"{self.library}: {self.method}"

    def to_dict(self) -> dict[str, Any]:
        """For a file, which keeps six digits of what was measured."""
        made = asdict(self)
        if self.quality is not None:
            made["quality"] = {
                name: None if values is None else [float(f"{value:.6g}") for value in values]
                for name, values in made["quality"].items()
            }
        return made

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Row:
        quality, spent = given["quality"], given["spent"]
        given = given | {"remarks": tuple(given["remarks"]), "spent": None if spent is None else Spent(**spent)}
        if quality is not None:
            given["quality"] = Quality(
                **{name: None if values is None else tuple(values) for name, values in quality.items()}
            )
        return cls(**given)


class Sweep:
    """A subject, and what was drawn with it without a cache.

    Args:
        cases: what is measured; all test cases by default.
    """

    def __init__(self, subject: Subject, cases: Sequence[Case] | None = None, pairs: int = PAIRS) -> None:
        self.subject, self.pairs = subject, pairs
        self.cases = tuple(subject.test if cases is None else cases)
        self.original = subject.pipe.transformer
        with counting(self.original) as self.whole:
            self.plain = self.draw()
        self.pictures = subject.pictures(self.plain)

    def draw(self, steps: int | None = None) -> Tensor:
        """All cases, in batches."""
        batches = [self.cases[at : at + GROUP] for at in range(0, len(self.cases), GROUP)]
        return torch.cat([self.subject.draw(batch, steps) for batch in batches])

    def measure(self, method: Method, value: Knob) -> Row:
        """One row; a method that fails has the error in it. Each is given a transformer that no other has touched."""
        given = method.library, method.name, method.knob, value
        self.subject.pipe.transformer = copy.deepcopy(self.original)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with method.attach(self.subject, value) as attached:
                    figures = self.figures(attached)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = (str(error).splitlines() or [""])[0]
                place = f"{Path(where.filename).name}:{where.lineno}"
                figures = {"failed": f"{type(error).__name__}: {text[:200]} ({place})"}
            finally:
                self.subject.pipe.transformer = self.original
        remarks = {str(each.message).splitlines()[0][:200] for each in caught if issubclass(each.category, UserWarning)}
        return Row(*given, **figures, remarks=tuple(sorted(remarks)), machine=machine())

    def figures(self, attached: Attached) -> dict[str, Any]:
        """What is measured while a method is attached."""
        with counting(self.subject.pipe.transformer) as work:
            made = self.draw(attached.steps)
        quality = compare(made, self.plain, self.subject.pictures(made), self.pictures)
        fraction = work.executions(self.whole) / len(self.whole.done)
        shown = f"{attached.shown} ({attached.by})" if attached.by else attached.shown
        taken = self.timed(attached)
        return {"shown": shown, "fraction": fraction, "time": taken, "quality": quality, "spent": attached.spent}

    def timed(self, attached: Attached) -> float:
        """The processor time of one case, as a share of that without the method, which another transformer draws."""
        pipe, case = self.subject.pipe, self.cases[:1]
        with_method = pipe.transformer
        ratios = []
        for pair in range(self.pairs + 1):
            taken = {}
            for name in ("plain", "method")[:: 1 if pair % 2 else -1]:
                pipe.transformer = self.original if name == "plain" else with_method
                begun = time.process_time()
                self.subject.draw(case, attached.steps if name == "method" else None)
                taken[name] = time.process_time() - begun
            if pair:  # the first is to warm up
                ratios.append(taken["method"] / taken["plain"])
        pipe.transformer = with_method
        return median(ratios)


def all_methods(only: Sequence[str] = ()) -> Iterator[Method | str]:
    """Of every library that is installed; of one that is not, why. ``only``: those with one of these in their title."""
    for peer in PEERS:
        try:
            found = import_module(f"bench.peers.{peer}").methods()
        except ImportError as error:
            yield f"{peer} is left out: {error}"
            continue
        yield from (each for each in found if not only or any(part in each.title for part in only))


def subject_named(name: str) -> Subject:
    """One of :data:`SUBJECTS`."""
    made: Subject = getattr(import_module(f"bench.compare.{name}"), SUBJECTS[name])()
    return made


def line(row: Row) -> str:
    """A row in short."""
    start = f"{row.title} | {row.knob} {row.value} | "
    if row.quality is None or row.fraction is None or row.time is None:
        return start + row.failed
    mean = fmean(row.quality.psnr)
    return f"{start}{1 / row.fraction:.2f}x fewer blocks, {1 / row.time:.2f}x faster, {mean:.2f} dB | {row.shown[:60]}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``compare_NAME.json`` after every row."""
    text = (__doc__ or "").replace("{group}", str(GROUP))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS, help="the model")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="of a method's title; repeatable")
    parser.add_argument("--quick", action="store_true", help="four cases, two values a knob")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    subject = subject_named(options.subject)
    sweep = Sweep(subject, subject.test[:4] if options.quick else None, 1 if options.quick else PAIRS)
    path = options.out / f"compare_{subject.name}.json"
    about: dict[str, Any] = {
        "subject": subject.name,
        "steps": subject.steps,
        "cases": sweep.cases,
        "calibration": subject.calibration,
        "group": GROUP,
        "equal": EQUAL,
        "machine": machine(),
        "versions": versions("dithooks", "diffusers", "cache-dit", "msmodelslim", "scikit-image", "stlpips-pytorch"),
    }
    rows: list[Row] = []
    with suppress(FileNotFoundError):
        if options.only or not options.fresh:
            kept = json.loads(path.read_text())
            if kept["about"]["cases"] != [list(case) for case in sweep.cases]:
                raise SystemExit(f"{path} has other test cases: --fresh measures all again, --out writes elsewhere")
            rows = [Row.from_dict(each) for each in kept["rows"]]
            about["versions"] = kept["about"]["versions"] | about["versions"]  # rows of what is not installed here stay
    if options.fresh:
        rows = [row for row in rows if options.only and not any(part in row.title for part in options.only)]
    known = {row.key for row in rows}
    for method in all_methods(options.only):
        if isinstance(method, str):
            print(method)
            continue
        for value in method.values[:: max(1, len(method.values) // 2)] if options.quick else method.values:
            if (method.library, method.name, value) in known:
                continue
            row = sweep.measure(method, value)
            rows.append(row)
            print(line(row), flush=True)
            text = json.dumps({"about": about, "rows": [each.to_dict() for each in rows]})
            write_text(path, text.replace('{"library"', '\n{"library"') + "\n")


if __name__ == "__main__":
    main()
