"""``pytest -m core``: what it collects, and that this takes little."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLLECT = """
import os, sys, pytest, torch
pytest.main(["-m", "core", "--collect-only", "-q", "-n", "0"])
heavy = {"diffusers", "peft", "ray", "torch._dynamo", "transformers"} & sys.modules.keys()
print("imported", sorted(heavy), "on", torch.get_num_threads(), os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.slow
def test_it_imports_what_the_core_needs():
    """None of what takes seconds, twice with two workers; and without variables of the environment, one thread."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTEST_"))}
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, env=given, capture_output=True, text=True)
    assert int(re.search(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.M)[1]) > 1000
    assert done.stdout.endswith("imported [] on 1 1\n")
