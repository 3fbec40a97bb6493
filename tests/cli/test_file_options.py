"""The files that a command line names are checked before anything else is done, and without a trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dithooks.cli.command_parser import Parser
from dithooks.cli.main import COMMANDS, build_parser, main
from dithooks.demo import PLANS

ROOT = Path(__file__).parents[2]
GIVEN = {"generate": ["demo", "--prompt", "rocket"], "env": [], "demo": [], "inspect": ["FluxPipeline"]}
NAMING = (  # options that name files
    *("--out", "--json", "--markdown", "--record", "--report", "--journal", "--plan", "--recording"),
)
WRITTEN = [
    (command, option)
    for command, options in {
        "demo": ["--out", "--json"],
        "inspect": ["--json"],
        "search": ["--out", "--json", "--record", "--report"],
        "generate": ["--out", "--json"],
        "compare": ["--out", "--json"],
        "profile": ["--json"],
        "env": ["--json"],
    }.items()
    for option in options
]
READ = [("demo", "--plan"), ("generate", "--plan"), ("compare", "--plan"), ("search", "--recording")]


@pytest.fixture
def nothing_is_done(monkeypatch, tmp_path):
    """No command is run."""

    def run(args):
        raise AssertionError("the command has begun")

    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", run)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert os.listdir(tmp_path) == []


def subparsers():
    return next(each for each in build_parser()._actions if each.dest == "command").choices


@pytest.mark.parametrize(("command", "option"), WRITTEN)
@pytest.mark.parametrize("place", ["no/such/file.png", "/dev/null/file.png", ".", "x" * 300 + ".png"])
def test_what_cannot_be_written(command, option, place, nothing_is_done, capsys):
    assert main([command, *GIVEN.get(command, ["demo"]), option, place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dithooks: error: ")
    assert "cannot be written: " in line


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no such folder")
@pytest.mark.parametrize("option", ["--journal", "--out"])
def test_a_folder_that_takes_nothing_whatever_its_permissions_say(option, nothing_is_done, capsys):
    assert main(["search", "demo", option, "/proc/place"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dithooks: error: /proc/place cannot be ")


def test_a_folder_that_is_a_link_to_nothing(tmp_path, monkeypatch, capsys):
    """A folder of that name cannot be made."""
    monkeypatch.setattr(COMMANDS["search"], "run", lambda args: 1 / 0)
    (tmp_path / "link").symlink_to("nothing")
    assert main(["search", "demo", "--journal", str(tmp_path / "link")]) == 2
    assert "link is a link to nothing: give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "option"), READ)
@pytest.mark.parametrize("place", ["none.json", "/dev/zero", "/"])
def test_what_cannot_be_read(command, option, place, nothing_is_done, capsys):
    assert main([command, *GIVEN.get(command, ["demo"]), option, place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert place in line


@pytest.mark.parametrize("command", ["demo", "generate", "compare"])
def test_a_plan_that_is_no_json(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(COMMANDS[command], "run", lambda args: 1 / 0)
    (tmp_path / "plan.json").write_text("{")
    assert main([command, *GIVEN.get(command, ["demo"]), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "plan.json: not a CachePlan: the text is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "generate", "compare"])
def test_a_folder_of_the_name_of_a_plan_that_ships(command, tmp_path, monkeypatch):
    """The plan is meant, as it is where it is read."""
    begun = []
    monkeypatch.setattr(COMMANDS[command], "run", lambda args: begun.append(command) or 0)
    (tmp_path / "2x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main([command, *GIVEN.get(command, ["demo"]), "--plan", "2x"]) == 0
    assert begun == [command]


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(COMMANDS["compare"], "run", lambda args: 1 / 0)
    (tmp_path / "2x.json").write_bytes((PLANS / "2x.json").read_bytes())
    assert main(["compare", "demo", "--plan", "2x.json", "--json", "2x.json"]) == 2
    assert "2x.json would be overwritten" in capsys.readouterr().err
    assert main(["compare", "demo", "--target", "2", "--out", "a.png", "--json", "./a.png"]) == 2
    assert "two results would go to a.png" in capsys.readouterr().err


def test_a_sound_command_line_leaves_no_trace(tmp_path, monkeypatch):
    """The check passes, the work fails: no empty file is left."""
    monkeypatch.chdir(tmp_path)

    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["search"], "run", run)
    command = [
        "search",
        "demo",
        "--out",
        "p-{target}.json",
        "--record",
        "r.npz",
        "--json",
        "n.json",
        "--journal",
        "new/j",
    ]
    assert main(command) == 130
    assert os.listdir(tmp_path) == []


def test_every_option_that_names_a_file_is_checked():
    """Whoever adds an option that names a file has to add it as one."""
    for name, parser in subparsers().items():
        named = [action for action in parser._actions if set(action.option_strings) & set(NAMING)]
        files = [action for action in parser._actions if action.metavar in ("FILE", "FOLDER", "PLAN")]
        assert set(files) <= set(named), name
        checked = parser._outputs + parser._folders + parser._inputs + [files for files, _ in parser._plans]
        assert len(checked) == len(named), name
        assert isinstance(parser, Parser)
        assert parser.get_default("parser") is parser


def test_it_fails_before_pytorch_is_imported(tmp_path):
    """The installed command: neither PyTorch nor NumPy is imported where a file cannot be written."""
    code = (
        "import sys; from dithooks.cli.main import main; sys.argv = 'dithooks search demo --out no/plan.json'.split(); "
        "code = main(); print(code, sorted({'torch', 'numpy', 'dithooks.handle'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2 []\n"
    assert "no/plan.json cannot be written" in done.stderr
