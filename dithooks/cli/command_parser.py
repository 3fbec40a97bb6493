"""The parser of a command, which knows the files that its options name, and checks them before anything is done."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DitHooksError, UsageError
from ..validation import shown

SHIPPED_PLANS = Path(__file__).parents[1] / "demo" / "plans"
Files = Callable[[argparse.Namespace], Iterable[Any]]  # the files that an option names, of the arguments
Ships = Callable[[argparse.Namespace], bool]  # whether the name of a plan may be that of one that ships


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line in one line, and shows its options in groups.

    Options belong to the group of the last :meth:`begin_group`.
    Options that name files are added by :meth:`add_output`, :meth:`add_folder`, :meth:`add_plan` and
    :meth:`add_input`. After parsing, :meth:`check_files` checks all of them at once.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._outputs: list[Files] = []
        self._folders: list[Files] = []
        self._inputs: list[Files] = []
        self._plans: list[tuple[Files, Ships]] = []
        self._group: Any = None

    def begin_group(self, title: str) -> None:
        """Begin a group of options, those that are added from now on."""
        self._group = self.add_argument_group(title)

    def add_argument(self, *names: Any, former: str | None = None, **options: Any) -> argparse.Action:
        """Add an argument to the group that was begun last.

        Args:
            names: as for argparse.
            former: an earlier name of an option, which goes on to work, and which the help does not show.
            options: as for argparse.
        """
        self.names = [*vars(self).get("names", ()), *names]
        group = vars(self).get("_group")
        add = super().add_argument if group is None else group.add_argument
        action: argparse.Action = add(*names, **options)
        if former is not None:
            hidden = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            super().add_argument(former, **{**options, **hidden})
        return action

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def add_output(self, *names: str, files: Files | None = None, **options: Any) -> None:
        """Add an option whose file is written.

        Args:
            names: as for ``add_argument``.
            files: the files, of the arguments, where these are not the values themselves.
            options: as for ``add_argument``.
        """
        action = self.add_argument(*names, **options)
        self._outputs.append(files or _given(action))

    def add_folder(self, *names: str, **options: Any) -> None:
        """Add an option whose folder is written into, and made if it does not exist."""
        self._folders.append(_given(self.add_argument(*names, **options)))

    def add_input(self, *names: str, **options: Any) -> None:
        """Add an option whose file is read."""
        self._inputs.append(_given(self.add_argument(*names, **options)))

    def add_plan(self, *names: str, ships: Ships, **options: Any) -> None:
        """Add an option whose file is a plan or a configuration; ``ships``: or the name of a plan that ships."""
        self._plans.append((_given(self.add_argument(*names, **options)), ships))

    def refuse_unknown(self, arguments: list[str]) -> None:
        """Refuse arguments that the command does not take, and name the option that is nearest.

        Raises:
            UsageError: there are some.
        """
        if not arguments:
            return
        option = arguments[0].partition("=")[0]
        close = difflib.get_close_matches(option, [name for name in self.names if name.startswith("--")], n=1)
        self.error(f"there is no {shown(option)} here{f': do you mean {close[0]}?' if close else ''}")

    def check_files(self, args: argparse.Namespace) -> None:
        """Check that input files are there, and that output files can be written; no trace is left.

        Raises:
            UsageError: it is not, or cannot; two results would go to one file, or one to a file that is read.
        """
        from .output_files import check_folder, check_results

        plans = {name: ships(args) for files, ships in self._plans for name in files(args)}
        inputs = [name for files in self._inputs for name in files(args)]
        for name, ships in plans.items():
            _check_plan(name, ships)
        for name in inputs:
            _check_input(name)
        check_results([Path(name) for files in self._outputs for name in files(args)], [*map(Path, [*plans, *inputs])])
        for name in (name for files in self._folders for name in files(args)):
            check_folder(Path(name))


def wrapped(text: str) -> str:
    """Return a text of a command's help, in lines that fit the terminal.

    Lines that begin with spaces stay as they are, but those of two columns, of which the second is wrapped.

    Args:
        text: paragraphs, examples, and terms, each with its explanation two spaces or more behind it.
    """
    width = max(40, shutil.get_terminal_size().columns - 2)
    lines: list[str] = []
    for line in _joined(text.strip("\n").splitlines()):
        term = re.match(r" +\S+(?: \S+)*?  +(?=\S)", line)
        if term is not None:
            lines += textwrap.wrap(line, width, subsequent_indent=" " * term.end(), break_on_hyphens=False)
        elif line.startswith(" ") or not line:
            lines.append(line)
        else:
            lines += textwrap.wrap(line, width, break_on_hyphens=False)
    return "\n".join(lines)


def _joined(lines: list[str]) -> list[str]:
    """Join the lines of a paragraph."""
    joined: list[str] = []
    for line in lines:
        if joined and line and joined[-1] and not line.startswith(" ") and not joined[-1].endswith(":"):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined


def _given(action: argparse.Action) -> Files:
    """The files of an option are what it is given, once or again and again."""

    def files(args: argparse.Namespace) -> Iterable[Any]:
        value = getattr(args, action.dest)
        return [name for name in (value if isinstance(value, list) else [value]) if name not in (None, "-")]

    return files


def _check_input(name: str) -> None:
    from ..storage.regular_file import check_readable

    try:
        check_readable(name)
    except DitHooksError as error:
        raise UsageError(str(error)) from None


def _check_plan(name: str, ships: bool) -> None:
    from ..config.safe_json import parsed, read_file

    names = sorted(path.stem for path in SHIPPED_PLANS.glob("*.json"))
    if ships and name in names and not Path(name).is_file():
        return
    try:
        read_file(name, lambda text: parsed(text, "CachePlan"))
    except FileNotFoundError:
        if not ships:
            raise UsageError(f"there is no file {name}: give a plan that a search wrote") from None
        raise UsageError(
            f"there is no plan {shown(name)}: give a file that a search wrote, or one of those that ship with "
            f"dithooks: {', '.join(names)}"
        ) from None
    except DitHooksError as error:
        raise UsageError(str(error)) from None
