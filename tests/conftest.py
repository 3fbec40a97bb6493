"""Fixtures shared by all tests, how many threads they run on, and what ``pytest -m core`` collects."""

import gc
import os

import pytest
import torch

from dithooks.compat.msmodelslim.step_index import set_step_index

if "OMP_NUM_THREADS" not in os.environ:  # models are small: threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_noise_everywhere():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def no_step_index():
    """No step index that one test has set is left to the next."""
    yield
    set_step_index(None)


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """Output is as wide as it is off a terminal: the workers of pytest have a variable with the width of its own."""
    monkeypatch.delenv("COLUMNS", raising=False)


class CoreFiles:
    """A plug-in that leaves all other files out unread, in every folder: to import diffusers would take longer."""

    def pytest_ignore_collect(self, collection_path):
        if collection_path.suffix != ".py" or "mark.core" in collection_path.read_text(encoding="utf-8"):
            return None
        return True


def pytest_configure(config):
    if config.option.markexpr == "core":
        config.pluginmanager.register(CoreFiles())


def pytest_collection_finish():
    """Keep what is there by now out of Python's collector: some tests, and observation, walk through all objects."""
    gc.collect()
    gc.freeze()
