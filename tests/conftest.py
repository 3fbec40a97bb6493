"""Fixtures shared by all tests, and what ``pytest -m core`` collects."""

import pytest
import torch

from dithooks.engine.sessions import tell_step


@pytest.fixture(autouse=True)
def _same_noise_everywhere():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def untold():
    """No step that one test has told is left to the next."""
    yield
    tell_step(None)


def pytest_ignore_collect(collection_path, config):
    """Leave files out unread where ``-m core`` asks for a few: to import diffusers for the others would take longer."""
    if config.option.markexpr != "core" or collection_path.suffix != ".py":
        return None
    return None if "mark.core" in collection_path.read_text(encoding="utf-8") else True
