"""The library's own promises about its source: what it never does to a model, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dithooks"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
LOCKS = {"Lock", "RLock"}
IMMUTABLE_CALLS = {"ContextVar", "Path", "frozenset", "getLogger", "dataclass", "namedtuple", "TypeVar", *LOCKS}
REGISTERED = {"_HINTS"}  # what users tell of their models is the process's by nature; the one thing that is


def named(path):
    return path.relative_to(PACKAGE).as_posix()


def test_there_is_something_to_check():
    assert {"handle.py", "blocks/wiring.py"} <= {named(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_forward_is_assigned_and_no_class_patched(path):
    """Not ``x.forward = f``, not ``setattr(x, "forward", f)``, not an attribute of a class or an imported module."""
    tree = TREES[path]
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"cls", "type"}
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []:
            if not isinstance(target, ast.Attribute):
                continue
            assert target.attr not in ("forward", "__call__", "__class__"), f"line {node.lineno} assigns {target.attr}"
            if isinstance(target.value, ast.Name):
                assert target.value.id not in imported | classes, f"line {node.lineno} patches {target.value.id}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            raise AssertionError(f"line {node.lineno} calls {node.func.id}")


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_mutable_state_of_module_or_class(path):
    """At module and class level: constants, context variables, dataclass fields; nothing that code fills."""
    tree = TREES[path]
    bodies = [tree.body] + [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in (statement for body in bodies for statement in body):
        assert not any(isinstance(inner, ast.Global) for inner in ast.walk(node)), f"line {node.lineno}: global"
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        constant = isinstance(target, ast.Name) and (target.id.strip("_").isupper() or target.id == "__all__")
        theirs = isinstance(target, ast.Name) and target.id == "_callback_tensor_inputs"  # a name that diffusers reads
        if isinstance(node.value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
            assert constant or theirs, f"line {node.lineno}: mutable {ast.unparse(target)}"
            mutated = [
                use.lineno
                for use in ast.walk(tree)
                if isinstance(use, ast.Subscript)
                and isinstance(use.ctx, ast.Store)
                and ast.unparse(use.value).removeprefix("cls.") == ast.unparse(target)
                and ast.unparse(target) not in REGISTERED
            ]
            assert not mutated, f"{ast.unparse(target)} is written in lines {mutated}"
        if isinstance(node.value, ast.Call) and node in tree.body:
            function = ast.unparse(node.value.func).rpartition(".")[2]
            assert function in IMMUTABLE_CALLS, f"line {node.lineno}: {ast.unparse(target)} = {function}(...)"


def rooms(path):
    """The modules of the package that a file imports at its top, as paths of files."""
    found = set()
    for node in TREES[path].body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            module = base.joinpath(*(node.module or "").split("."))
            for target in [module, *(module / alias.name for alias in node.names)]:
                found |= {candidate for candidate in (target.with_suffix(".py"),) if candidate in TREES}
    return found


def test_imports_go_one_way():
    order, left = [], {path: rooms(path) for path in SOURCES}
    while left:
        free = [path for path, needs in left.items() if not needs - set(order) - {path}]
        assert free, f"these import each other: {[named(path) for path in left]}"
        order += free
        left = {path: needs for path, needs in left.items() if path not in free}


def test_the_core_imports_torch_and_numpy_only():
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    for path in SOURCES:
        if named(path).startswith(("demo/", "ray/")):
            continue
        for node in TREES[path].body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{named(path)} line {node.lineno}"


def test_importing_is_cheap_and_needs_no_diffusers():
    """What it adds to importing torch: no third-party package, and little time."""
    code = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import dithooks
spent = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"dithooks", "numpy"} - set(sys.stdlib_module_names)), spent)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert done[0] == "[]"
    assert float(done[1]) < 2.0  # some milliseconds on a machine that has nothing else to do


def test_public_names():
    import dithooks

    assert set(dithooks.__all__) <= set(dir(dithooks))
    for name in dithooks.__all__:
        if not name.startswith("__"):
            assert getattr(dithooks, name).__doc__, name
