"""Run the notebooks from top to bottom and keep what they print.

    python notebooks/build.py                       # all of them
    python notebooks/build.py 03_search.ipynb       # one

A notebook is its own source: edit it, then build it. What is kept is what a reader sees: no times of execution, no
stderr, no addresses in memory, of each picture one format.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 300  # for one cell, on a machine that is busy
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> Any:
    """A notebook as it comes out of a fresh kernel with one thread, stderr included; the file is not changed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as profile:  # the user's own start-up files would count, too
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": profile, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"}
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(HERE)}},
        )
        client.execute(env={**os.environ, **own})
    return notebook


def cleaned(notebook: Any) -> Any:
    """The same notebook with that only which is kept."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
                if "metadata" in output:
                    output.metadata = nbformat.from_dict({})
                if "text/plain" in output.get("data", {}):
                    output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
    return notebook


def main(names: list[str]) -> None:
    """Build those that are named, or all."""
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        notebook = cleaned(execute(path))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
