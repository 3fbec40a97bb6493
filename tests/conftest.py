"""Fixtures shared by all tests."""

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
