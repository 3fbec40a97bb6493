"""The branches of guidance in what the model has returned, against outputs made by hand."""

import pytest
import torch

from dithooks.recording.guidance_shares import branches_of

pytestmark = pytest.mark.core

ONE, OTHER, GUIDED = (torch.full((2, 4, 3), value) for value in (1.0, 2.0, 4.0))


def with_variance(output):
    return torch.cat([output, output + 7], dim=1)


def test_a_variance_is_no_part_of_what_is_guided():
    """Half of the channels, of two calls as of a batch: the others never reach the solver."""
    calls = [(with_variance(ONE), None), (with_variance(OTHER), None)]
    found = branches_of(calls, GUIDED)
    assert [each.unique().tolist() for each in found.outputs] == [[1.0], [2.0]]
    assert [each.shape for each in found.outputs] == [GUIDED.shape] * 2
    assert not found.in_batch
    batch = with_variance(torch.cat([ONE, OTHER]))
    found = branches_of([(batch, torch.zeros(4, 4, 3))], GUIDED)
    assert [each.unique().tolist() for each in found.outputs] == [[1.0], [2.0]]
    assert found.in_batch


@pytest.mark.parametrize("shape", [(2, 4), (2, 12, 3), (2, 8, 5), (2, 8), (2,)])
def test_other_outputs_are_none(shape):
    assert branches_of([(torch.ones(shape), None)] * 2, GUIDED).outputs == ()
