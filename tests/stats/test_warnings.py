"""The wording of warnings, from plain values; and the collector of the warnings of this package."""

import inspect
import math
import re
import warnings as python_warnings
from collections import Counter

import pytest
import torch
from toys import Net, latents

from dithooks import DitCacheConfig, Interval, Mask, Threshold, dit_cache, timestep_scope
from dithooks.policies.history import Schedule
from dithooks.stats import warnings
from dithooks.stats.log import RunCounts
from dithooks.stats.warning_collector import collect_warnings
from dithooks.stats.warnings import nothing_was_reused, nothing_will_be_reused


def test_the_table_lists_every_warning():
    """The module's docstring is where to look for a warning: it names all functions that word one."""
    functions = {
        name
        for name, function in vars(warnings).items()
        if inspect.isfunction(function) and function.__module__ == warnings.__name__ and not name.startswith("_")
    }
    assert set(re.findall(r"^:func:`(\w+)`", warnings.__doc__, re.M)) == functions


@pytest.mark.parametrize(
    ("policy", "steps", "why"),
    [
        (Threshold(0.1, max_warmup_steps=9), 8, "warm-up: 8, max_warmup_steps is 9 (Threshold("),
        (Interval(8, 2), 8, "warm-up: 8 (Interval("),
        (Mask((1, 1, 1)), 3, "mask: 3 (Mask("),
        (Interval(2, 2), 8, None),
        (Threshold(0.1, max_warmup_steps=7), 8, None),
    ],
)
def test_a_run_of_which_no_step_can_be_reused(policy, steps, why):
    message = nothing_will_be_reused("net", policy, Schedule(steps), policy)
    if why is None:
        assert message is None
    else:
        assert message.startswith(f"net: nothing will be reused in a run of {steps} steps: {why}")


def test_a_run_in_which_nothing_was_reused():
    reasons = Counter({"warm-up": 1, "threshold": 2})
    message = nothing_was_reused("net", 3, RunCounts(3, 0, reasons, [0.3, math.nan, 0.2]), Threshold(0.1))
    assert message.startswith("net: a run of 3 steps reused nothing (calls computed for warm-up: 1, threshold: 2): ")
    assert "0.2" in message
    assert nothing_was_reused("net", 3, RunCounts(3, 1, reasons), Threshold(0.1)) is None
    assert nothing_was_reused("net", 1, RunCounts(1, 0, Counter(mask=1)), Threshold(0.1)) is None
    assert nothing_was_reused("net", 3, RunCounts(), Threshold(0.1)) is None


def test_warnings_of_this_package_are_collected_once_each():
    messages, net = [], Net()
    with python_warnings.catch_warnings(record=True) as shown:
        python_warnings.simplefilter("always")
        with collect_warnings(messages):
            for _ in range(2):
                with dit_cache(net, DitCacheConfig(5, 2)):
                    for step in range(3):
                        with timestep_scope(step, steps=3):
                            net(latents(), torch.tensor(0.5))
            python_warnings.warn("another's", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another's"]
    assert messages == ["Net: nothing will be reused in a run of 3 steps: warm-up: 3 (Interval(start=5, interval=2))"]
