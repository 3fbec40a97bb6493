"""Fixtures shared by all tests."""

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
