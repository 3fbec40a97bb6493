"""Errors of the user's own code: with the frames of that code and of what it calls, and none of this package's."""

import os
import re

import pytest

from dithooks.cli import user_errors
from dithooks.cli.main import main

FILE = """
import sys
import torch

def helper():
    raise KeyError("the user's own")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.calls = 0
    def forward(self, x, t):
        self.calls += 1
        if self.calls > 3:
            raise RuntimeError("in the model, under our hooks")
        for block in self.blocks:
            x = block(x)
        return x

class Pipe:
    def __init__(self):
        self.transformer = Model()
    def __call__(self, prompt, steps=4):
        pass

def factory():
    helper()

def run():
    return Model(), lambda model: helper()

def model():
    def draw(model):
        x = torch.ones(1, 4)
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - model(x, t)
        return [x]
    return Model(), draw

def leaves():
    sys.exit(0)

def no_such_argument():
    return Pipe(), {"prompt": "a cat", "step": 4}

def chained():
    try:
        helper()
    except KeyError as error:
        raise ValueError("no weights") from error
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("def make(:\n    pass\n")
    (tmp_path / "lacking.py").write_text("import no_such_module_anywhere\n")
    return tmp_path


def frames(text):
    """The functions of a traceback's frames, by the file that they stand in."""
    return re.findall(r'File "([^"]+)", line \d+(?:, in (\S+))?', text)


@pytest.mark.parametrize("command", ["search", "compare", "profile"])
@pytest.mark.parametrize(
    ("name", "functions", "last"),
    [
        ("own.py:factory", ["factory", "helper"], 'KeyError: "the user\'s own"'),
        ("own.py:run", ["<lambda>", "helper"], 'KeyError: "the user\'s own"'),
        ("own.py:chained", ["chained", "helper", "chained"], "ValueError: no weights"),
        ("own.py:no_such_argument", [], "TypeError: "),
        ("broken.py:make", [""], "SyntaxError: "),
        ("lacking.py:make", ["<module>"], "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ],
)
def test_frames_are_the_users_only(command, name, functions, last, folder, capsys):
    options = ["--target", "2"] if command != "profile" else []
    assert main([command, name, *options]) == 1
    *text, end = capsys.readouterr().err.strip().splitlines()
    seen = [(file, function) for file, function in frames("\n".join(text)) if "site-packages" not in file]
    assert all(file.endswith(name.partition(":")[0]) for file, _ in seen)
    assert sorted(function for _, function in seen) == sorted(functions)
    assert text[-1].startswith(last)
    assert end == f"dithooks: error: {name} raised this: it is not of dithooks"


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_file_that_leaves_python_is_no_success(command, folder, capsys):
    """``sys.exit(0)`` in the user's own code ends the command, which has not done what it was to do."""
    assert main([command, "own.py:leaves", *(["--target", "2"] if command == "compare" else [])]) == 1
    shown = capsys.readouterr().err
    assert "SystemExit: 0" in shown
    assert "own.py:leaves raised this" in shown


def test_a_folder_beside_the_package_is_the_users(monkeypatch, tmp_path):
    """Its name may begin as the package's own."""
    monkeypatch.setattr(user_errors, "PACKAGE", f"{tmp_path / 'dithooks'}{os.sep}")
    place = str(tmp_path / "dithooks_models" / "make.py")
    names = {}
    exec(compile("def make():\n    raise ValueError('mine')", place, "exec"), names)
    with pytest.raises(ValueError, match="mine") as caught:
        user_errors.call_user(names["make"])
    assert place in user_errors.user_traceback(caught.value)


def test_frames_in_between_are_left_out(folder, capsys):
    """The model fails at its fourth call, below hooks of this package: what is shown is the user's, and PyTorch's."""
    assert main(["search", "own.py:model", "--cost", "blocks", "--quiet"]) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: in the model, under our hooks" in shown
    files = [file for file, _ in frames(shown)]
    assert files
    assert not [file for file in files if file.startswith(str(user_errors.PACKAGE))]
    assert [function for _, function in frames(shown) if function in ("draw", "forward")] == ["draw", "forward"]


def test_faults_of_this_package_keep_their_traceback(folder, monkeypatch):
    """Outside of the user's code, and within it, where the last frame is of this package."""
    from dithooks.cli.targets import runnable

    monkeypatch.setattr(runnable, "_repeated", None)
    with pytest.raises(TypeError, match="not callable"):
        main(["profile", "own.py:run"])
    assert user_errors.user_traceback(ValueError("never raised")) is None
