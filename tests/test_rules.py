"""The library's own promises about its source: what it never does to a model, and what importing it costs."""

import ast
import collections.abc
import dataclasses
import graphlib
import inspect
import re
import subprocess
import sys
import typing
from collections import Counter
from enum import Enum
from pathlib import Path

import pytest
import torch

import dithooks.fork
from dithooks.engine.call import Call, Mode, Stage
from dithooks.engine.run import Branch, Run

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dithooks"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
LOCKS = {"Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "RLock", "Semaphore"}
IMMUTABLE_CALLS = {
    *("ContextVar", "Path", "frozenset", "getLogger", "dataclass", "namedtuple", "TypeVar", "exit_codes"),
    *(
        "attrgetter",
        "object",
        "Moment",
        "Match",
        "StepSettings",
        "ForkLock",
        "_Stance",
        "DynamoLock",
        "Platform",
        "exit_codes",
    ),
}
REGISTERED = {"_HINTS"}  # what users tell of their models is the process's by nature
OF_THE_PROCESS = {"_EACH"}  # so is a fork: weak references to what a forked child has to let go of

# From the ground up: what stands on one line does not import each other.
FLOORS = (
    "errors",
    "fork validation environment tiny progress_bars markup",
    "storage user_run",
    "policies",
    "predictors stats",
    "config",
    "blocks",
    "engine",
    "integrations",
    "handle",
    "recording",
    "planning",
    "tuning inspection profiling",
    "demo plots compat",
    "plot sharing",
    "public_names",
    "__init__",
    "cli ray adapters",
)
NOUNS = {"loading", "matching", "offloading", "timing", "warning", "wiring", "wording"}  # that look like participles
MIRRORED = {  # by compat
    *("BlockAdapter", "BlockAdapterRegistry", "CacheStats", "DitCacheConfig", "ForwardPattern", "PatchFunctor"),
}
PUBLIC_ROOMS = {"plot", "ray", "compat", "demo", "cli"}
PUBLIC_UNDERSCORES = {"_exit", "_fields", "_replace", "_repr_png_"}  # documented: os, namedtuple, IPython
BY_NAME = {"attrgetter", "delattr", "getattr", "hasattr", "map", "setattr"}  # take the name of an attribute
PYTORCH = {  # what hooks, stand-ins and the watch on weights need, and what has no public name
    "_C",  # torch._C.DisableTorchFunctionSubclass
    "_buffers",
    "_compiled_call_impl",
    "_dynamo",  # which functions are about to be compiled, and which it is not to read
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_modules",
    "_parameters",
    "_schema",  # which arguments an operation writes into
    "_version",
}
EXCEPTIONS = {
    ("engine", "_get_running_loop"),  # in asyncio.__all__; get_running_loop raises, at 10 times the cost
    ("engine", "_get_backend"),  # torch.distributed has no other way to a group's time limit
    ("engine", "_timeout"),
    ("engine", "_is_any_autocast_enabled"),  # torch.is_autocast_enabled asks one kind of device
    ("engine", "_current_graph_task_id"),  # torch.utils.checkpoint tells a backward pass by it
    ("demo", "_execution_device"),  # what diffusers offers to pipelines, which are its subclasses
}
WRITING_NO_RESULTS = {  # but what a check works on; and what a test has printed, by a process without PyTorch
    *("bench/__main__.py", "bench/batch.py", "bench/checks/hostile_files.py", "bench/checks/mutants.py"),
}
WRITTEN_BY_SEVERAL = {  # by the decider, and by the range cache, which learns meanwhile how the call goes
    Call: {"deltas", "marks", "metric_inputs", "mode", "range", "stage", "stale"},
    Run: {"in_flight"},
    Branch: {"anchors"},
}


def named(path):
    return path.relative_to(PACKAGE).as_posix()


def test_there_is_something_to_check():
    assert len(SOURCES) > 100


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
        if isinstance(node.value, ast.Call) and node in tree.body and not isinstance(target, ast.Tuple):
            function = ast.unparse(node.value.func).rpartition(".")[2]
            held = isinstance(target, ast.Name) and target.id in OF_THE_PROCESS
            assert held or function in IMMUTABLE_CALLS, f"line {node.lineno}: {ast.unparse(target)} = {function}(...)"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_lock_is_freed_in_a_forked_child(path):
    """All locks are made by the one file that makes them anew after a fork."""
    if PACKAGE / named(path) == Path(dithooks.fork.__file__):
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module in ("threading", "multiprocessing", "_thread"):
            assert not LOCKS & {alias.name for alias in node.names}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("threading", "multiprocessing", "_thread"):
            assert node.attr not in LOCKS, f"line {node.lineno}: {ast.unparse(node)}"


def files_imported(path):
    """The files of the package that a file imports: at its top, in functions and for the type checker alike."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "dithooks"):
            base = path.parents[node.level - 1] if node.level else PACKAGE.parent
            module = base.joinpath(*(node.module or "").split("."))
            for name in node.names:
                places = (module / name.name, module)
                files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
                yield next(file for file in files if file in TREES)


def room(path):
    """The folder of the package that a file is in; for those at its top, the file.

    Folders within ``integrations/`` adapt the whole library to a program that uses it: they stand on the top floor.
    """
    is_adapter = path.parent.parent == PACKAGE / "integrations"
    return "adapters" if is_adapter else named(path).partition("/")[0].removesuffix(".py")


IMPORTS = {path: set(files_imported(path)) - {path} for path in SOURCES}


def test_no_files_import_each_other():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" <- ".join(map(named, error.args[1]))) from None


def test_imports_go_down():
    """Each room imports from those on floors below its own only."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    assert floor.keys() == {room(path) for path in SOURCES}, "FLOORS lists each room once"
    rooms = [(path, other) for path in SOURCES for other in IMPORTS[path] if room(path) != room(other)]
    assert not [f"{named(a)} imports {named(b)}" for a, b in rooms if floor[room(a)] <= floor[room(b)]]


def test_no_two_files_have_one_name():
    count = Counter(path.stem for path in SOURCES if path.stem not in ("__init__", "__main__"))
    assert not [name for name, number in count.items() if number > 1]


def test_a_file_is_named_by_a_noun():
    """No adverb, no participle, unless that is what the one class in it is called."""
    for path in SOURCES:
        classes = {node.name.lower() for node in TREES[path].body if isinstance(node, ast.ClassDef)}
        word = path.stem.rpartition("_")[2]
        assert not word.endswith(("ly", "ed", "ing")) or word in NOUNS | classes, named(path)


def test_no_two_classes_or_aliases_have_one_name():
    places = {}
    for path in SOURCES:
        aliases = [
            target.id
            for node in TREES[path].body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and re.match("_?[A-Z].*[a-z]", target.id)
        ]
        classes = [node.name for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef)]
        for name in {*classes, *aliases}:
            if name not in MIRRORED or room(path) != "compat":
                places.setdefault(name, []).append(named(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_few_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_private_names_of_others_stand_in_integrations():
    """Attributes, and strings that ``getattr`` and its like take; own are those that the package assigns or defines."""
    own = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(node, ast.Attribute | ast.Name):
            own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    allowed = own | PUBLIC_UNDERSCORES | PYTORCH
    for path in (path for path in SOURCES if room(path) not in ("integrations", "adapters")):
        nodes = list(ast.walk(TREES[path]))
        text = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME]
        given = [inner for node in calls for arg in node.args for inner in ast.walk(arg)]
        names = {(node.lineno, node.attr) for node in nodes if isinstance(node, ast.Attribute)}
        names |= {
            (each.lineno, each.value) for each in given if isinstance(each, ast.Constant) and id(each) not in text
        }
        for line, name in names:
            if isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name):
                assert name in allowed or (room(path), name) in EXCEPTIONS, f"{named(path)} line {line}: {name}"


def test_no_file_of_the_package_is_known_by_its_name():
    """Neither code nor a test depends on where something is, but by importing it."""
    root = PACKAGE.parent
    folders = ("tests", "bench", "notebooks", "examples")
    outside = [path for folder in folders for path in root.glob(f"{folder}/**/*.py")]
    files = {path.name for path in SOURCES if not path.stem.startswith("__")} - {path.name for path in outside}
    modules = {f"dithooks.{named(path).removesuffix('.py').replace('/', '.')}" for path in SOURCES}
    private = {name for name in modules if name.split(".")[1] not in PUBLIC_ROOMS}
    for path in [*SOURCES, *outside]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = node.value.split(".")
                known = {".".join(parts[: length + 1]) for length in range(len(parts))} & private
                known |= {node.value.rpartition("/")[2]} & files
                assert not known, f"{path.relative_to(root)} line {node.lineno}: {node.value!r}"


def test_a_call_is_a_stage_and_a_mode():
    """Its state are two enums, beside at most three flags."""
    kinds = Counter(str(field.type) for field in dataclasses.fields(Call))
    assert kinds["Stage"] == kinds["Mode"] == 1
    assert issubclass(Stage, Enum)
    assert issubclass(Mode, Enum)
    assert kinds["bool"] <= 3


@pytest.mark.parametrize("cls", [Call, Run, Branch], ids=lambda cls: cls.__name__)
def test_one_file_writes_an_attribute(cls):
    """Beside the class's own methods; a variable ``call`` is a Call, and so on. Exceptions are listed, and used."""
    writers = {}
    for path in SOURCES:
        for node in ast.walk(TREES[path]) if path.stem != cls.__module__.rpartition(".")[2] else ():
            is_written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_written and ast.unparse(node.value).rpartition(".")[2] == cls.__name__.lower():
                writers.setdefault(node.attr, set()).add(path.stem)
    several = {name for name, files in writers.items() if len(files) > 1}
    assert several == WRITTEN_BY_SEVERAL[cls]


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


def test_results_are_written_by_the_one_writer():
    """Not in place: a process that is killed meanwhile, or a full disk, would take the former results along."""
    root, found = PACKAGE.parent, set()
    for path in [*SOURCES, *root.glob("bench/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_writing = isinstance(node, ast.Attribute) and node.attr in ("write_text", "write_bytes")
            if is_writing and ast.unparse(node.value) not in ("draft", "replacement"):
                found.add(path.relative_to(root).as_posix())
    assert found == WRITING_NO_RESULTS


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_error_prints_a_value_as_it_prints_itself(path):
    """A model or a tensor would fill the screen: ``validation.shown`` names it, and quotes texts as ``!r`` does."""
    errors = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Raise)]
    fields = [inner for each in errors for inner in ast.walk(each) if isinstance(inner, ast.FormattedValue)]
    assert not [f"line {field.lineno}: {ast.unparse(field.value)}" for field in fields if field.conversion == ord("r")]


def test_importing_the_package_imports_nothing():
    """Not even PyTorch, until a public name is used."""
    code = """
import sys, time
start = time.process_time()
import dithooks
dithooks.__version__, dir(dithooks)
spent = time.process_time() - start
print(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)), spent)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    names, _, spent = done.stdout.partition("] ")
    assert names == "['__main__', 'dithooks'"
    assert float(spent) < 0.5


def test_importing_is_cheap_and_needs_no_diffusers():
    """What it adds to importing torch: no third-party package, and little work, whatever else the machine does."""
    code = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
from dithooks import dit_cache
spent = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"dithooks", "numpy"} - set(sys.stdlib_module_names)), spent)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert done[0] == "[]"
    assert float(done[1]) < 2.0  # some milliseconds on a machine that has nothing else to do


def test_public_names():
    """Those that are listed, those that type checkers read, and those that there are."""
    import dithooks
    from dithooks import public_names

    assert set(dithooks.__all__) <= set(dir(dithooks))
    imported = [node for node in TREES[Path(public_names.__file__)].body if isinstance(node, ast.ImportFrom)]
    aliases = [alias for node in imported for alias in node.names]
    assert sorted(alias.asname for alias in aliases) == sorted(set(dithooks.__all__) - {"__version__"})
    assert all(alias.asname == alias.name for alias in aliases)  # so that they are of the module that hands them on
    for name in dithooks.__all__:
        if not name.startswith("__"):
            assert getattr(dithooks, name).__doc__, name
    assert set(dithooks.__all__) <= vars(dithooks).keys()  # once one of them has been used
    with pytest.raises(AttributeError, match="module 'dithooks' has no attribute 'nothing'"):
        dithooks.nothing  # noqa: B018


def _annotated(name):
    """A public name and, of a class, its methods and properties: what has annotations."""
    found = getattr(dithooks, name)
    members = [inspect.getattr_static(found, each) for each in dir(found)] if inspect.isclass(found) else []
    functions = [getattr(each, "__func__", getattr(each, "fget", getattr(each, "func", each))) for each in members]
    return [each for each in (found, *functions) if inspect.isclass(each) or inspect.isfunction(each)]


@pytest.mark.parametrize("name", sorted(set(dithooks.__all__) - {"__version__"}))
def test_annotations_of_public_names_can_be_read_at_run_time(name):
    """As checkers of arguments and makers of schemas do: each name in them is there, and stands for a type."""
    for each in _annotated(name):
        for hint in typing.get_type_hints(each).values():
            assert hint is None or not isinstance(hint, (str, typing.ForwardRef)), hint


def test_annotations_stand_for_the_types_that_they_name():
    hints = typing.get_type_hints(dithooks.search)
    assert hints["return"] is dithooks.SearchResult
    assert set(typing.get_args(hints["blocks"])) == {
        str,
        torch.nn.ModuleList,
        collections.abc.Sequence[str | torch.nn.ModuleList],
        type(None),
    }


# Words that stood for too many things here, with what to write in their place.
PLAINER = {
    "told": "given, shown, known, distinguished",
    "tells": "gives, shows, identifies",
    "said": "reported, set, or name the warning",
    "anew": "again",
    "in vain": "without effect",
    "let go": "release",
}


@pytest.mark.parametrize("word", PLAINER)
def test_prose_has_the_plainer_word(word):
    """Of the package, its documentation and README; messages of the package are in its code."""
    root = PACKAGE.parent
    files = [*PACKAGE.rglob("*.py"), *(root / "docs").rglob("*.md"), root / "README.md"]
    assert len(files) > 300
    found = [
        f"{file.relative_to(root)}:{number}: {line.strip()[:80]}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(rf"\b{word}\b", line, re.IGNORECASE)
    ]
    assert not found, f"write {PLAINER[word]}: {found[:5]}"
