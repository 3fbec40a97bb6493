"""The notebooks: what is committed is whole, and they run from top to bottom in a fresh kernel."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 2_500_000  # bytes of all of them
# Of this machine or of any other: where people, temporary files and packages are.
PLACES = re.compile(
    r"(?<![\w./-])/(?:home|root|tmp|var|work|usr|opt|mnt|srv|private|Users|workspace|content|site-packages)/"
    r"|[A-Z]:\\\\?\w|site-packages|ipykernel_\d"
)
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def build():
    """``notebooks/build.py`` as a module."""
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed():
    return sorted(path.name for path in FOLDER.iterdir() if not path.name.startswith(("__", ".")))


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(output):
    """All text of an output."""
    texts = [output.get("text", "")]
    texts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(value if isinstance(value, str) else str(value) for value in texts)


def forms(cell):
    """Of what kinds a cell's outputs are, stderr aside."""
    return [
        (output.output_type, output.get("name"), sorted(output.get("data", {})))
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]


def prints(source):
    """Whether a cell prints whenever it is run: not in a function, and not under a condition."""
    if source.startswith("%%"):
        return False
    plain = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    waiting = list(ast.parse(plain).body)
    for node in waiting:
        if isinstance(node, (ast.For, ast.With)):
            waiting += node.body
        elif isinstance(node, ast.Expr) and ast.unparse(node).startswith("print("):
            return True
    return False


def of_ours(stderr):
    """Lines of stderr that are warnings, but for those that other packages raise in their own files."""
    lines = [line for line in stderr.splitlines() if re.search(r"\bdithooks\b|Warning: ", line)]
    return [line for line in lines if "site-packages" not in line or "site-packages/dithooks" in line]


def test_all_are_there():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < LARGEST


@named
def test_committed_as_they_came_out(path):
    """Run from top to bottom, no cell left out, and nothing but what a reader sees."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert "pip install" in notebook.cells[0].source
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not cell.metadata, f"metadata of:\n{cell.source}"
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        if prints(cell.source):
            assert any(output.get("name") == "stdout" for output in cell.outputs), f"no output of:\n{cell.source}"


@named
def test_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    own = {str(FOLDER.parent), str(Path.home()), sys.prefix} - {"/"}
    for cell in notebook.cells:
        texts = [said(output) for output in cell.get("outputs", [])]
        texts += [cell.source] if cell.cell_type == "code" else []
        for text in texts:
            assert not PLACES.search(text), f"{PLACES.search(text)[0]} in:\n{text}"
            assert not any(each in text for each in own)


@named
def test_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
                assert (FOLDER / link).exists(), link
            for name in re.findall(r"`(\w+\.ipynb)`", cell.source):
                assert (FOLDER / name).exists(), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@named
def test_runs(path, build):
    """In a fresh kernel, without an error and without a warning of ours, with outputs as they are committed."""
    before = path.read_bytes()
    files = listed()
    fresh = build.execute(path)
    assert path.read_bytes() == before
    assert listed() == files, "a notebook leaves files behind"
    stderr = "".join(
        output.text for cell in code_of(fresh) for output in cell.outputs if output.get("name") == "stderr"
    )
    assert of_ours(stderr) == []
    committed = nbformat.read(path, as_version=4)
    for now, then in zip(code_of(build.cleaned(fresh)), code_of(committed), strict=True):
        assert forms(now) == forms(then), f"outputs are not as committed of:\n{now.source}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print(1)", True),
        ("for n in range(3):\n    print(n)", True),
        ("with a as b:\n    c()\nprint(b)", True),
        ("def f():\n    print(1)", False),
        ("if a:\n    print(1)", False),
        ("%%writefile x.py\nprint(1)", False),
        ("a = 1", False),
    ],
)
def test_what_prints(source, expected):
    assert prints(source) is expected


def test_what_counts_as_a_path_of_a_machine():
    for text in (
        "/home/me/x.py",
        "see /tmp/a/b",
        "'/root/.cache/x'",
        r"C:\\Users\\me",
        "lib/python3/site-packages/x.py",
    ):
        assert PLACES.search(text), text
    for text in (
        "docs/npu.md",
        "../docs/models.md",
        "https://download.pytorch.org/whl/cpu",
        "24/48",
        "path/to/file.py",
    ):
        assert not PLACES.search(text), text


def test_what_is_a_warning_of_ours():
    ours = "/somewhere/dithooks/runs.py:164: UserWarning: coefficients were fitted for 28 steps"
    cell = "/somewhere/ipykernel_7/12.py:3: UserWarning: nothing was reused"
    theirs = "/venv/site-packages/torch/x.py:1: FutureWarning: old\nFailed to load /dithooks/site-packages/y.so"
    assert of_ours(f"{ours}\n{cell}\n{theirs}") == [ours, cell]


def test_what_is_kept(build):
    """No times, no stderr, one format of each picture, no address; twice cleaned is as once."""
    data = {
        "text/plain": "<PIL.Image.Image size=1x1 at 0x7F00aa>".replace("F", "f"),
        "image/png": "p",
        "image/jpeg": "j",
    }
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("stream", name="stdout", text="a line"),
        nbformat.v4.new_output("display_data", data=data, metadata={"image/png": {"width": 3}}),
    ]
    cell = nbformat.v4.new_code_cell(
        "1", outputs=outputs, execution_count=1, metadata={"execution": {"iopub.status.busy": "now"}}
    )
    notebook = build.cleaned(nbformat.v4.new_notebook(cells=[cell]))
    nbformat.validate(notebook)
    assert [output.output_type for output in notebook.cells[0].outputs] == ["stream", "display_data"]
    assert notebook.cells[0].outputs[1].data == {"text/plain": "<PIL.Image.Image size=1x1>", "image/png": "p"}
    assert not notebook.cells[0].metadata
    assert nbformat.writes(build.cleaned(notebook)) == nbformat.writes(notebook)
