"""Do the tests notice a broken engine? ``python -m bench.checks.mutants [--only NAME] [--jobs N] [--json FILE]``.

Each mutant is one edit of a function that a reader would call a bug: a comparison turned, a reset or a guard left out.
It is made in a copy of the package in a temporary folder, and a few quick test files run against that copy. The mutant
is killed if they fail or hang, and survives if they pass. A survivor has to be explained in ``EXPLAINED``.

An edit is found by its syntax within a function, wherever that stands; where it is no longer there, or there more than
once, the check ends with an error. ``--list`` makes every edit and runs nothing.

``--json`` writes each verdict there as it comes, and a table beside it; with ``--only``, the verdicts on other mutants
that are there already stay. Exit codes: 0 every mutant is killed, or explained; 1 one is not, or the tests fail on the
package as it is.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import datetime
import inspect
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dithooks
from bench.checks.mutant_list import EXPLAINED, MUTANTS, TESTS, Mutant
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

ROOT = Path(dithooks.__file__).parent.parent
SECONDS = 60  # of the processor, for a test file: many times what one takes
NOT_RUN = (3, 4, 5, 71)  # pytest's exit codes for its own errors and for no tests; the fork server's


@dataclass(frozen=True)
class Verdict:
    """What the tests made of a mutant.

    Args:
        name: of the mutant.
        where: the function that is edited.
        edit: the edit in words.
        outcome: ``"killed"``, ``"survived"`` or ``"timeout"``.
        seconds: that the tests took.
        by: the first test that failed.
        why: the explanation of a survivor.
    """

    name: str
    where: str
    edit: str
    outcome: str
    seconds: float
    by: str = ""
    why: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the mutant is killed, or explained."""
        return self.outcome != "survived" or self.why is not None


class Swap(ast.NodeTransformer):
    """Replaces every node that reads like ``old``, and counts them."""

    def __init__(self, old: ast.AST, new: list[ast.stmt] | ast.expr) -> None:
        self.wanted, self.new, self.found = ast.dump(old), new, 0

    def visit(self, node: ast.AST) -> Any:
        """Return the node, or what replaces it."""
        if ast.dump(node) != self.wanted:
            return self.generic_visit(node)
        self.found += 1
        return self.new


def parsed(text: str) -> ast.stmt | ast.expr:
    """Return a fragment's syntax: that of one expression or one statement."""
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def located(where: Any) -> tuple[Path, list[str]]:
    """Return the file of a module, class, function, method or property, and the names that lead to it there."""
    if isinstance(where, ModuleType):
        return Path(str(where.__file__)), []
    function: Any = where.fget if isinstance(where, property) else inspect.unwrap(getattr(where, "__func__", where))
    return Path(str(sys.modules[function.__module__].__file__)), function.__qualname__.split(".")


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """Return the source of a mutant's file, of the package or of a copy of it.

    Raises:
        LookupError: the edit's place is not there, or there several times.
    """
    path, names = located(mutant.where)
    tree: Any = ast.parse((root / path.relative_to(ROOT)).read_text(encoding="utf-8"))
    scope = tree
    for name in names:
        scope = next(node for node in scope.body if getattr(node, "name", None) == name)
    old, body = parsed(mutant.old), ast.parse(mutant.new).body
    is_expression = isinstance(old, ast.expr)
    swap = Swap(old, body[0].value if is_expression and isinstance(body[0], ast.Expr) else body)
    swap.generic_visit(scope)
    if swap.found != 1:
        raise LookupError(f"{mutant.name}: {mutant.old!r} stands {swap.found} times in {place(mutant)}, not once")
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def place(mutant: Mutant) -> str:
    """Return the edited function in words."""
    if isinstance(mutant.where, ModuleType):
        return mutant.where.__name__.removeprefix("dithooks.")
    return ".".join(located(mutant.where)[1])


def copied(folder: Path) -> Path:
    """Return a copy of the package and its tests, compiled, so that each run compiles the edited file only."""
    for name in ("dithooks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder / "pyproject.toml")
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)
    return folder


class Workplace:
    """A copy of the package, and a process that runs tests against it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = copied(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench.checks.fork_server"]
        pipe = subprocess.PIPE
        self.passing: set[str] = set()  # files that pass on the package as it is
        self.server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def outcome(self, tests: tuple[str, ...]) -> tuple[str, str, str]:
        """Run test files until one fails; return the outcome, the file that failed and the test in it.

        Raises:
            RuntimeError: the tests could not be run.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        for test in tests:
            print(json.dumps([str(self.folder), test, SECONDS]), file=self.server.stdin, flush=True)
            code, failed = json.loads(self.server.stdout.readline())
            if code == -signal.SIGXCPU:
                return "timeout", test, test
            if code in NOT_RUN:
                raise RuntimeError(f"{test} could not be run: exit code {code}")
            if code:
                return "killed", test, failed or test
        return "survived", "", ""


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    """Return the test files that a mutant is tried against: its own first, then those of its module."""
    module = inspect.getmodule(mutant.where.fget if isinstance(mutant.where, property) else mutant.where)
    assert module is not None
    return tuple(dict.fromkeys((*mutant.tests, *TESTS[module])))


def tried(mutant: Mutant, workplace: Workplace) -> Verdict:
    """Try one mutant in a copy of its own, and put the copy right again.

    Raises:
        SystemExit: the tests that fail do so without the mutant.
    """
    path = workplace.folder / located(mutant.where)[0].relative_to(ROOT)
    original = path.read_bytes()
    stamp = path.stat()
    began = time.monotonic()
    try:
        path.write_text(mutated(mutant, workplace.folder), encoding="utf-8")
        outcome, file, by = workplace.outcome(tests_of(mutant))
    finally:
        path.write_bytes(original)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    if file and file not in workplace.passing:
        if workplace.outcome((file,))[0] != "survived":
            raise SystemExit(f"{file} fails on the package as it is: the check has to begin with tests that pass")
        workplace.passing.add(file)
    why = EXPLAINED.get(mutant.name) if outcome == "survived" else None
    edit = " ".join(f"`{mutant.old}` → `{mutant.new}`".split())
    return Verdict(mutant.name, place(mutant), edit, outcome, round(time.monotonic() - began, 1), by, why)


def run(mutants: list[Mutant], jobs: int) -> Iterator[Verdict]:
    """Try mutants, several at a time; yield the verdicts in the mutants' order.

    Raises:
        SystemExit: the tests fail on the package as it is.
    """
    with tempfile.TemporaryDirectory(prefix="mutants") as temporary:
        workplaces = [Workplace(Path(temporary) / str(number)) for number in range(jobs)]
        free: queue.Queue[Workplace] = queue.Queue()
        for workplace in workplaces:
            free.put(workplace)

        def one(mutant: Mutant) -> Verdict:
            workplace = free.get()
            try:
                verdict = tried(mutant, workplace)
            finally:
                free.put(workplace)
            print(f"{verdict.outcome:8} {verdict.seconds:5.1f} s  {verdict.name}", file=sys.stderr, flush=True)
            return verdict

        try:
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                yield from pool.map(one, mutants)
        finally:
            for workplace in workplaces:
                workplace.server.terminate()
                workplace.server.wait()


def page(verdicts: list[Verdict]) -> str:
    """Return the verdicts in Markdown."""
    killed = sum(verdict.outcome != "survived" for verdict in verdicts)
    unexplained = sum(not verdict.ok for verdict in verdicts)
    lines = [
        "# Mutants of the engine",
        "",
        f"By `python -m bench.checks.mutants`, on {machine()}; {datetime.date.today().isoformat()}. "
        f"Of {len(verdicts)} mutants {killed} are killed, {len(verdicts) - killed - unexplained} survive and are "
        f"explained, {unexplained} survive unexplained.",
        "",
        "| mutant | where | edit | outcome | by |",
        "|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        outcome = verdict.outcome if verdict.outcome != "survived" else "**survived**"
        by = (verdict.why or verdict.by).replace("|", "\\|").replace("tests/", "")
        edit = verdict.edit.replace("|", "\\|")
        lines.append(f"| {verdict.name} | `{verdict.where}` | {edit} | {outcome} | {by} |")
    return "\n".join(lines)


def write(verdicts: list[Verdict], path: Path) -> None:
    """Write verdicts to a file, beside those of other mutants, and a table of all."""
    former = json.loads(path.read_text(encoding="utf-8"))["mutants"] if path.exists() else []
    by_name = {verdict.name: verdict for verdict in [*(Verdict(**each) for each in former), *verdicts]}
    every = [by_name[mutant.name] for mutant in MUTANTS if mutant.name in by_name]
    found = {"machine": machine(), "date": datetime.date.today().isoformat(), "mutants": [vars(each) for each in every]}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(path.with_suffix(".md"), page(every) + "\n")


def main() -> int:
    """Try the mutants, and print or write what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="mutants whose name holds this; repeatable")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time, each in its own copy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there, and a table beside it")
    parser.add_argument("--list", action="store_true", help="make every edit, and run nothing")
    args = parser.parse_args()
    chosen = [each for each in MUTANTS if not args.only or any(name in each.name for name in args.only)]
    names = [mutant.name for mutant in MUTANTS]
    if len(set(names)) < len(names) or not set(EXPLAINED) <= set(names) or not chosen:
        raise SystemExit("mutants have one name each, and what is explained or chosen is a mutant")
    for mutant in MUTANTS:
        mutated(mutant)
    if args.list:
        print(*(f"{mutant.name}: {place(mutant)}" for mutant in chosen), sep="\n")
        return 0
    verdicts = []
    for verdict in run(chosen, args.jobs):
        verdicts.append(verdict)
        if args.json is not None:
            write(verdicts, args.json)
    print(page(verdicts))
    return 0 if all(verdict.ok for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
