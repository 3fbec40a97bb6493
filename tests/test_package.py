"""What is published, and how it is installed: built by the release script from a copy of what git tracks."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import dithooks

ROOT = Path(__file__).parent.parent
NAME = f"dithooks-{dithooks.__version__}"
MADE = {"MANIFEST.in", "PKG-INFO", "setup.cfg"}  # by the build; MANIFEST.in is tracked, too
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command, **options):
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def published(*arguments):
    """The function of setup.py that makes PyPI's page of README.md."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.published(*arguments)


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks, as far as they are there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    if not files:
        pytest.skip("these files are no checkout of git: they have been published already")
    return files


@pytest.fixture(scope="module")
def clone(tracked, tmp_path_factory):
    """A copy of them, in a folder of the package's own name, with what work leaves behind in it."""
    folder = tmp_path_factory.mktemp("work") / "dithooks"
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for left in ("tests/__pycache__/a.pyc", "bench/.ipynb_checkpoints/a.ipynb", "dithooks/__pycache__/a.pyc"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """The two archives, of which the wheel is built from the other: their names, and the wheel's metadata."""
    pytest.importorskip("build")
    pytest.importorskip("twine")
    folder = tmp_path_factory.mktemp("release") / "dist"
    run(clone / ".ci" / "release", folder, "--no-isolation")
    wheel, archive = folder / f"{NAME}-py3-none-any.whl", folder / f"{NAME}.tar.gz"
    with tarfile.open(archive) as opened:
        source = {entry.name.partition("/")[2] for entry in opened if entry.isfile()}
    with zipfile.ZipFile(wheel) as opened:
        metadata = message_from_bytes(opened.read(f"{NAME}.dist-info/METADATA"))
        files = {name for name in opened.namelist() if not name.endswith("/")}
    return SimpleNamespace(wheel=wheel, source=source, files=files, metadata=metadata)


class TestArchives:
    def test_the_source_has_all_that_git_tracks(self, built, tracked):
        """So the tests can be run from it, and nothing else is in it."""
        source = {name for name in built.source if not name.startswith("dithooks.egg-info/")}
        assert source - MADE == tracked - MADE

    def test_the_wheel_has_the_package_only(self, built, tracked):
        package = {name for name in tracked if name.startswith("dithooks/")}
        assert {name for name in built.files if not name.startswith(f"{NAME}.dist-info/")} == package
        assert {"dithooks/py.typed", "dithooks/tiny/models.json"} < package
        assert {f"{NAME}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} < built.files

    def test_it_says_what_it_is(self, built):
        about = built.metadata
        assert (about["Name"], about["Version"]) == ("dithooks", dithooks.__version__)
        assert (about["License-Expression"], about["License"]) == ("Apache-2.0", None)
        assert (about["Author"], about["Requires-Python"]) == ("The dithooks maintainers", ">=3.10")
        assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(about.get_all("Classifier"))
        assert not [each for each in about.get_all("Classifier") if each.startswith("License ::")]
        assert about["Description-Content-Type"] == "text/markdown"
        assert about.get_payload(decode=True).decode().strip() == published(README).strip()

    def test_the_command_is_in_it(self, built, tmp_path):
        """It runs from the wheel alone, and no other module comes with it."""
        run(sys.executable, "-m", "zipfile", "-e", built.wheel, tmp_path)
        code = "from importlib.metadata import entry_points as e; print(e(group='console_scripts', name='dithooks'))"
        assert "dithooks.cli.main:main" in run(sys.executable, "-c", code, env={"PYTHONPATH": str(tmp_path)})
        call = [sys.executable, "-S", "-m", "dithooks.cli", "--version"]
        assert run(*call, cwd="/", env={"PYTHONPATH": str(tmp_path)}) == f"dithooks {dithooks.__version__}\n"


# -- the description ----------------------------------------------------------------------------------------------


class Addresses(HTMLParser):
    """All links and pictures of a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src", "srcset")]


def test_pypi_shows_no_dead_link():
    render = pytest.importorskip("readme_renderer.markdown").render
    assert len([each for each in Addresses(render(README)).found if ":" not in each]) > 20  # of the repository
    for source in (None, "https://host/dithooks"):
        found = Addresses(render(published(README, source))).found
        assert not [each for each in found if not each.startswith(("https://", "#"))]
    assert "https://host/dithooks/docs/measured.md" in found


@pytest.mark.parametrize(
    ("text", "without", "absolute"),
    [
        ("see [a page](docs/a.md#b).", "see a page (`docs/a.md#b`).", "see [a page](S/docs/a.md#b)."),
        ("[a](https://b.c) [d](#e)", "[a](https://b.c) [d](#e)", "[a](https://b.c) [d](#e)"),
        ("a\n\n![b](docs/c.png)\n\nd", "a\n\nd", "a\n\nd"),
        ("![b](https://c.d/e.png)", "![b](https://c.d/e.png)", "![b](https://c.d/e.png)"),
        ("[![b](https://c.d/e.svg)](docs/f.md)", "![b](https://c.d/e.svg) (`docs/f.md`)",
         "[![b](https://c.d/e.svg)](S/docs/f.md)"),
        ("[![b](c.svg)](docs/f.md)", "", ""),
        ('<img width="9" src="a.png"> b <img src="https://c.d">', ' b <img src="https://c.d">',
         ' b <img src="https://c.d">'),
        ("[docs](docs)", "docs", "[docs](S/docs)"),
        ("```sh\n[a](b.md)\n```\n[c](d)", "```sh\n[a](b.md)\n```\nc (`d`)", "```sh\n[a](b.md)\n```\n[c](S/d)"),
    ],
)  # fmt: skip
def test_links_of_the_description(text, without, absolute):
    assert published(text, None) == without
    assert published(text, "S") == absolute


# -- what pages and messages say of it ----------------------------------------------------------------------------


def test_extras_that_are_named_are_there():
    """In messages, docstrings and pages: ``pip install "dithooks[demo]"``."""
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set()
    for path in (*ROOT.glob("*.md"), *(path for room in ("dithooks", "docs", "examples", "notebooks", "bench")
                                       for path in (ROOT / room).rglob("*.*"))):  # fmt: skip
        if path.suffix in (".py", ".md", ".ipynb"):
            text = path.read_text(encoding="utf-8").replace("\\", "")
            named |= {
                each for found in re.findall(r"(?:dithooks|-e [\"']\.)\[([\w,]+)\]", text) for each in found.split(",")
            }
    assert {"demo", "plot", "lpips", "ray", "hub", "notebooks", "test"} <= named
    assert named <= extras["optional-dependencies"].keys()


def test_one_version():
    """That of the package is in the citation, and has its place in the list of changes."""
    assert f"\nversion: {dithooks.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.M)[1] == dithooks.__version__


# -- an editable install ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editable(clone, tmp_path_factory):
    """An environment with the packages of this one, in which pip has installed the copy by ``pip install -e``."""
    folder = tmp_path_factory.mktemp("editable")
    code = "import sys; from setuptools.build_meta import build_editable; print(build_editable(sys.argv[1]))"
    wheel = run(sys.executable, "-c", code, folder, cwd=clone).splitlines()[-1]
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    run(sys.executable, "-m", "zipfile", "-e", folder / wheel, packages)
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others))
    return SimpleNamespace(python=folder / "venv" / "bin" / "python", packages=packages)


def test_it_is_a_path(editable, clone):
    """And no import hook, which type checkers do not follow, and which a folder of the package's name goes before."""
    own = sorted(path.name for path in editable.packages.iterdir() if path.name != "others.pth")
    assert own == [f"__editable__.{NAME}.pth", f"{NAME}.dist-info"]
    assert (editable.packages / own[0]).read_text().strip() == str(clone)


@pytest.mark.parametrize("place", ["above", "beside", "inside"])
def test_a_folder_with_its_name_does_not_hide_it(editable, clone, tmp_path, place):
    """Python is started where the clone is, or where another folder has its name, or in the clone itself."""
    (tmp_path / "dithooks").mkdir()
    folder = {"above": clone.parent, "beside": tmp_path, "inside": clone}[place]
    code = "import dithooks; print(dithooks.__file__, dithooks.__version__)"
    found = run(editable.python, "-c", code, cwd=folder, env={})
    assert found == f"{clone / 'dithooks' / '__init__.py'} {dithooks.__version__}\n"


USE = """\
import torch
from pipelines import DiffusionPipeline, WanPipeline
from torch import nn

import dithooks
from dithooks import CachePlan, DitCacheConfig, Threshold, dit_cache, search


class Model(nn.Module):
    pass


class Pipe:
    def __init__(self) -> None:
        self.transformer = Model()


def run(pipe: Pipe) -> list[torch.Tensor]:
    return []


def cached(wan: WanPipeline, other: DiffusionPipeline) -> None:
    dit_cache(wan, Threshold(0.1))
    dit_cache(other, "plan.json")


pipe = Pipe()
cache = dit_cache(pipe, DitCacheConfig(1, 2, 0, 3))
reveal_type(cache)  # dithooks.handle.CacheHandle
reveal_type(cache.stats)  # dithooks.stats.types.CacheStats
reveal_type(cache.stats.reused_calls)  # int
found = search(pipe, run)
reveal_type(found)  # dithooks.tuning.result.SearchResult
reveal_type(found.plan)  # dithooks.config.cache_plan.CachePlan
reveal_type(CachePlan.load("plan.json"))  # dithooks.config.cache_plan.CachePlan
dithooks.search(Model(), run, target_speedup=2.0)
dithooks.plot.steps(cache)
dit_cache(Model(), Threshold(0.1), blocks="blocks")
"""
PIPELINES = """\
from typing import Any

class WanPipeline:  # as in diffusers/utils/dummy_torch_and_transformers_objects.py, which mypy reads first
    @classmethod
    def from_pretrained(cls, *args, **kwargs): ...

class DiffusionPipeline:  # as in diffusers/pipelines/pipeline_utils.py
    @property
    def components(self) -> dict[str, Any]: ...
"""
WRONG = {
    "dit_cache(pipe, 3)": "arg-type",
    "dit_cache(3, Threshold(0.1))": "arg-type",
    "search(3, run)": "arg-type",
    "dithooks.serach": "attr-defined",
    "cache.stats.reused": "attr-defined",
    'DitCacheConfig(1, "2", 0, 3)': "arg-type",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["above", "elsewhere"])
def test_type_checkers_see_its_types(editable, clone, tmp_path, place):
    """What mypy says of a user's script, by the comments in it; wrong lines are errors, and no other is."""
    (tmp_path / "use.py").write_text("\n".join([USE, *WRONG]))
    (tmp_path / "pipelines.pyi").write_text(PIPELINES)  # to follow diffusers' own imports takes mypy a minute
    checked = ["--strict", "--python-executable", editable.python, "--cache-dir", editable.packages.parent / "mypy"]
    call = [sys.executable, "-m", "mypy", *checked, tmp_path / "use.py"]
    folder = clone.parent if place == "above" else tmp_path
    done = subprocess.run([*map(str, call)], cwd=folder, env={}, capture_output=True, text=True)
    lines = [*USE.splitlines(), "", *WRONG]
    said = re.findall(r"^(?:.*/)?use\.py:(\d+): (\w+): (.*)$", done.stdout, re.M)
    assert said, done.stdout + done.stderr
    revealed = {int(number): re.search('"(.*)"', text)[1] for number, kind, text in said if kind == "note"}
    wanted = {number: line.partition("# ")[2] for number, line in enumerate(lines, 1) if "reveal_type" in line}
    assert {number: text.replace("builtins.", "") for number, text in revealed.items()} == wanted
    errors = {lines[int(number) - 1]: text for number, kind, text in said if kind == "error"}
    assert {line: re.search(r"\[([\w-]+)\]$", text)[1] for line, text in errors.items()} == WRONG
