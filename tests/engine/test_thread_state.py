"""What the state of a thread's call looks like to a compiler, which reads it without running Python's own look-up."""

import pytest

from dithooks.engine.range_cache import CallState

pytestmark = pytest.mark.core


def test_no_value_of_the_class_hides_that_of_the_thread():
    """PyTorch 2.8 to 2.12 look at the class before the thread, and would take a default for what is there."""
    assert [name for name in vars(CallState) if not name.startswith("__")] == []
