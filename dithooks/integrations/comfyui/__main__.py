"""Write the entry into a ``custom_nodes`` folder, by which ComfyUI finds the nodes of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import DitHooksError, MissingFile
from ...storage.replacement import write_text

FILE = "dithooks_nodes.py"
TEXT = '''"""The nodes of dithooks, which is installed in ComfyUI's own Python: pip install -U dithooks updates them."""

from dithooks.integrations.comfyui import exports

globals().update(exports())  # comfy_entrypoint, or NODE_CLASS_MAPPINGS where ComfyUI is older than that
'''


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the entry; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dithooks.integrations.comfyui", description=__doc__)
    parser.add_argument("folder", type=Path, help="ComfyUI's folder custom_nodes")
    folder: Path = parser.parse_args(arguments).folder
    try:
        if not folder.is_dir():
            raise MissingFile(f"{folder} is no folder: give that of the custom nodes, such as ComfyUI/custom_nodes")
        write_text(folder / FILE, TEXT)
    except DitHooksError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder / FILE} is written: restart ComfyUI, and look for nodes called dithooks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
