"""The weight of an error at each step, and what skipping blocks saves, by hand."""

import dataclasses

import numpy as np
import pytest
from planning.test_planner import Drawn, recording_of

from dithooks.planning.costs import Savings, error_weights
from dithooks.recording.noise_levels import noise_levels

pytestmark = pytest.mark.filterwarnings("error")


class TestPrices:
    @pytest.mark.parametrize(
        ("axis", "times", "steps", "wanted"),
        [
            ("sigma", [1.0, 0.6, 0.1], 3, [1, 0.6, 0.1]),
            ("sigma", [0.6, 0.3], 5, [0.6, 0.3]),  # of pictures that are drawn over: part of the way is behind
            ("sigma", [80.0, 3.0, 0.25], 3, [80 / 81, 0.75, 0.2]),
            ("timestep", [1000.0, 500.0, 1.0], 3, [1, 0.5, 0.001]),
            ("timestep", [600.0, 200.0], 5, [0.6, 0.2]),
            ("timestep", [1.0, 0.75, 0.5], 4, [1, 0.75, 0.5]),
            ("step", [0.0, 1.0, 4.0], 5, [1, 0.8, 0.2]),
        ],
    )
    def test_levels(self, axis, times, steps, wanted):
        np.testing.assert_allclose(noise_levels(np.array(times), axis, steps), wanted, rtol=1e-12)

    @staticmethod
    def trace(**fields):
        norms = np.array([[1.0, 1, 1], [2, 4, 5], [10, 10, 10]])
        made = dataclasses.replace(Drawn(0, 3, 3).trace, ranges=np.array([[0, 1], [1, 2]]), norms=norms)
        return dataclasses.replace(made, **{"times": np.array([1.0, 0.6, 0.3]), **fields})

    def test_of_a_whole_run(self):
        """σ falls by 0.4, 0.3 and, behind the last step, 0.3; the first range ends where ‖h‖ is 2, 4, 5."""
        wanted = np.array([0.4 / 10, 0.3 / 10**0.6, 0.3 / 10**0.3])
        np.testing.assert_allclose(error_weights(self.trace(), 3, 10.0), [wanted / [2, 4, 5], wanted / 10], rtol=1e-12)
        np.testing.assert_allclose(error_weights(self.trace(), 3, 1.0)[1], [0.04, 0.03, 0.03], rtol=1e-12)

    def test_where_another_transformer_goes_on(self):
        """Behind its last step the noise falls on as before, not to nothing: by 0.2, not by 0.5."""
        trace = self.trace(times=np.array([1.0, 0.7, 0.5]))
        np.testing.assert_allclose(error_weights(trace, 5, 1.0)[1], [0.03, 0.02, 0.02], rtol=1e-12)
        np.testing.assert_allclose(error_weights(trace, 3, 1.0)[1], [0.03, 0.02, 0.05], rtol=1e-12)

    def test_the_one_that_goes_on(self):
        trace = self.trace(steps=np.array([2, 3, 4]))
        np.testing.assert_allclose(error_weights(trace, 5, 1.0)[1], [0.04, 0.03, 0.03], rtol=1e-12)

    def test_of_steps(self):
        trace = self.trace(axis="step", times=np.array([0.0, 1.0, 2.0]))
        wanted = [0.1 / 8, 0.1 / 8 ** (2 / 3), 0.1 / 8 ** (1 / 3)]
        np.testing.assert_allclose(error_weights(trace, 3, 8.0)[1], wanted, rtol=1e-12)

    def test_of_timesteps(self):
        trace = self.trace(axis="timestep", times=np.array([1000.0, 600.0, 300.0]))
        np.testing.assert_allclose(
            error_weights(trace, 3, 10.0), 1000 * error_weights(self.trace(), 3, 10.0), rtol=1e-12
        )

    def test_nothing_there_is_worth_nothing(self):
        norms = np.array([[1.0, 1, 1], [2, 0, 5], [0, 0, 0]])
        found = error_weights(self.trace(norms=norms), 3, 1.0)
        np.testing.assert_allclose(found, [[0.2, 0, 0.06], [0, 0, 0]], rtol=1e-12)

    def test_savings(self):
        """Blocks of 1, 2 and 4 ms, with two calls a step, in three runs of four steps; one of 5 ms at two steps."""
        one, two = Drawn(0, 3, 4, block_ms=[1, 2, 4], branches=2.0), Drawn(1, 1, 2, block_ms=[5])
        recording = recording_of(one, two, run_ms=999.0, runs=3)
        time, blocks = Savings.of(recording, "time"), Savings.of(recording, "blocks")
        assert one.ranges == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
        np.testing.assert_allclose(time.step[0], [6, 18, 42, 12, 36, 24, 48])
        np.testing.assert_allclose(blocks.step[0], [6, 12, 18, 6, 12, 6, 18])
        np.testing.assert_allclose(np.concatenate([time.step[1], blocks.step[1]]), [15, 18, 3, 3])
        assert (time.total, blocks.total) == (999.0, 3 * 2 * 4 * 3 + 3 * 2)
        assert time.needed(3.0) == pytest.approx(666.0)
        assert (time.speedup(0.0), time.speedup(666.0)) == pytest.approx((1.0, 3.0))
        with pytest.raises(ValueError, match="cost='memory': there are 'time'"):
            Savings.of(recording, "memory")
