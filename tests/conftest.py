"""Fixtures shared by all tests, and what ``pytest -m core`` collects."""

import pytest
import torch

from dithooks.compat.msmodelslim.step_index import set_step_index


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


def pytest_ignore_collect(collection_path, config):
    """Leave files out unread where ``-m core`` asks for a few: to import diffusers for the others would take longer."""
    if config.option.markexpr != "core" or collection_path.suffix != ".py":
        return None
    return None if "mark.core" in collection_path.read_text(encoding="utf-8") else True
