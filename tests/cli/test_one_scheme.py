"""One scheme for all commands: the same words for the same things, in the same order, with their defaults."""

import argparse
import inspect
import math
import re

import pytest

from dithooks import search
from dithooks.cli.command_parser import wrapped
from dithooks.cli.main import COMMANDS, build_parser, main

# Options that mean the same wherever they are: how their value is called, and how their help begins
SAME = {
    "--prompt": ("TEXT", ("draw this; repeatable", "demo: draw this; repeatable")),
    "--steps": ("N", ("sampling steps",)),
    "--guidance": ("G", ("guidance scale", "demo: guidance scale")),
    "--seed": ("N", ("of the first", "demo: of the first", "where the noise comes from")),
    "--plan": ("FILE", ("with this plan or configuration", "a plan or configuration")),
    "--target": ("X", ("the speed-up", "with a policy that steers to this speed-up")),
    "--payload": (None, ("with --target: forecast the residual of the blocks, or the output",)),
    "--pairs": ("N", ("timed runs of each",)),
    "--out": ("FILE", ("the picture", "the plan")),
    "--json": ("FILE", ("write the figures, too; - prints them instead", "the figures; - prints them")),
    "--quiet": (None, ("show no progress",)),
}
ORDER = [
    *("--prompt", "--negative-prompt", "--steps", "--guidance", "--seed"),
    *("--plan", "--tier", "--target", "--policy-free", "--payload"),
    *("--executor", "--device", "--pairs", "--metric", "--out", "--report", "--markdown", "--json", "--quiet"),
]
WITHOUT_DEFAULT = {  # what is not done, or given, where they are left out
    *("--json", "--record", "--recording", "--journal", "--report", "--markdown", "--negative-prompt", "--tier"),
    *("--set", "--metric"),
}
NOT_CACHED = {("compare", "--plan"), ("compare", "--target"), ("generate", "--plan"), ("generate", "--target")}
DRAWN = {("search", "--prompt"), ("compare", "--prompt"), ("profile", "--prompt"), ("demo", "--prompt")} | {
    ("generate", "--prompt")
}


def options(shown=True):
    """The arguments of each command, those that its help shows or those that it hides."""
    (group,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {
        name: [each for each in parser._actions if each.dest != "help" and (each.help != argparse.SUPPRESS) is shown]
        for name, parser in group.choices.items()
    }


def named(action):
    return action.option_strings[-1] if action.option_strings else ""


EVERY = [(name, action) for name, actions in options().items() for action in actions]


@pytest.mark.parametrize(("name", "action"), EVERY, ids=[f"{name} {named(each) or each.dest}" for name, each in EVERY])
def test_every_option_says_its_default_and_means_the_same(name, action):
    option = named(action)
    if not option:
        assert (action.dest, action.metavar, action.help) == ("model", "MODEL", "what is run, see below")
        return
    if option in SAME:
        metavar, begins = SAME[option]
        assert action.metavar == metavar
        assert action.help.startswith(begins), action.help
    if action.nargs == 0 or option in WITHOUT_DEFAULT or (name, option) in NOT_CACHED | DRAWN:
        return
    shown = re.search(r"\(default[^:]*: ([^)]+)\)", action.help)
    assert shown, action.help
    if action.default is not None and "%" not in shown[1] and action.default != []:
        assert shown[1] == str(action.default)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_stand_in_one_order(name):
    there = [named(each) for each in options()[name]]
    assert [each for each in there if each in ORDER] == [each for each in ORDER if each in there]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("demo", "env")])
def test_the_model_is_called_model(name):
    assert [each.metavar for each in options()[name] if not each.option_strings] == ["MODEL"]
    command = COMMANDS[name]
    assert command.EPILOG.startswith("what MODEL can be:\n")
    assert command.USAGE.startswith("MODEL ")
    assert not re.search(r"\bTARGET\b", command.EPILOG + command.DESCRIPTION)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_the_exit_codes(name):
    codes = COMMANDS[name].EPILOG.partition("exit codes:\n")[2].splitlines()
    numbers = [int(line.split()[0]) for line in codes]
    assert numbers == sorted(numbers)
    assert {0, 2} <= set(numbers) <= {0, 1, 2, 3, 130}
    assert (3 in numbers) == ("--target" in [named(each) for each in options()[name]])


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal(name, width, monkeypatch, capsys):
    """But for lines to be copied, which are not broken."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([*([name] if name else []), "--help"])
    lines = capsys.readouterr().out.splitlines()
    copied = ("  dithooks ", "      return pipe", "      pipe = ", "      return model", "      noise = ")
    assert [line for line in lines if len(line) > width and not line.startswith(copied)] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["search", "demo", "--tarbet", "2"],
            "there is no '--tarbet' here: do you mean --target? (see dithooks search",
        ),
        (["compare", "demo", "--plans=x"], "there is no '--plans' here: do you mean --plan? (see dithooks compare"),
        (["demo", "--qqq"], "there is no '--qqq' here (see dithooks demo --help)"),
        (["--frob"], "there is no '--frob' here"),
    ],
)
def test_a_misspelt_option_names_the_nearest(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dithooks: error: {message}")


# Options of a search that are no arguments of it in Python, and why. Two more have a meaning of their own, the same in
# every command: --target is target_speedup (or targets), and one --steps is num_inference_steps.
OWN_NAMES = {
    "--prompt --guidance --seed": "of the demo's run",
    "--metric --mode": "metrics and modes: one at a time",
    "--workers": "of Actors, which an executor may be",
    "--record --out --report --json": "files of what Python returns",
    "--quiet": "verbose=False",
}


def test_options_of_a_search_have_the_names_of_python():
    arguments = {f"--{each.replace('_', '-')}" for each in inspect.signature(search).parameters}
    there = {named(each) for each in options()["search"] if each.option_strings}
    assert there - arguments == set(" ".join(OWN_NAMES).split())


def test_former_names_work_and_are_not_shown(capsys):
    hidden = {name: [each.option_strings for each in found] for name, found in options(shown=False).items()}
    assert {name: found for name, found in hidden.items() if found} == {"search": [["--evals"], ["--seconds"]]}
    for given in (["--evals", "3", "--seconds", "9.5"], ["--max-evals", "3", "--max-seconds", "9.5"], []):
        found = build_parser().parse_args(["search", "demo", *given])
        assert (found.max_evals, found.max_seconds) == ((3, 9.5) if given else (None, math.inf))
        assert not {"evals", "seconds"} & set(vars(found))
    assert main(["search", "demo", "--evls", "3"]) == 2
    assert "do you mean --max-evals?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = capsys.readouterr().out
    assert "--max-evals N" in shown
    assert not re.search(r"--(evals|seconds)\b", shown)


def test_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "42")
    text = """terms:
  demo    the small pipeline that ships with it
  a long  one

A paragraph in
two lines that is joined and wrapped anew.

  an example that is longer than the line is wide
"""
    assert wrapped(text).splitlines() == [
        "terms:",
        "  demo    the small pipeline that ships",
        "          with it",
        "  a long  one",
        "",
        "A paragraph in two lines that is joined",
        "and wrapped anew.",
        "",
        "  an example that is longer than the line is wide",
    ]
