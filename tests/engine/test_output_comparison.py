"""What two calls leave behind is compared tensor by tensor, each by the path to it."""

from types import SimpleNamespace

import pytest
import torch

from dithooks.engine.output_comparison import difference, first_not_finite, first_unlike, tensors_in


class Layer:
    __slots__ = ("k", "v")

    def __init__(self, k, v):
        self.k, self.v = k, v


def test_paths_lead_through_containers_and_objects():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    node = SimpleNamespace(layers=[Layer(a, None)], more={"b": b, (1, 2): c})
    node.me = node
    found = tensors_in((node, torch.nn.Linear(1, 1), "text"))
    assert {path: len(tensor) for path, tensor in found.items()} == {
        "[0].layers[0].k": 1,
        "[0].more['b']": 2,
        "[0].more[key 1]": 3,
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "path"),
    [
        ({"a": 2}, {"a": 2}, None),
        ({"a": 2}, {"a": 2, "b": 1}, "b"),
        ({"a": 2, "b": 1}, {"a": 2}, "b"),
        ({"a": 2, "b": 1}, {"a": 2, "b": 3}, "b"),
    ],
)
def test_the_first_tensor_that_only_one_has(ours, theirs, path):
    made = [{name: torch.zeros(size) for name, size in each.items()} for each in (ours, theirs)]
    assert first_unlike(*made) == path


def test_distance_over_all_tensors():
    assert (
        difference([torch.tensor([3.0]), {"a": torch.tensor([0.0])}], [torch.tensor([3.0]), {"a": torch.tensor([4.0])}])
        == 0.8
    )


@pytest.mark.parametrize(("value", "path"), [(1.0, None), (float("nan"), "['a'][1]"), (float("inf"), "['a'][1]")])
def test_the_first_tensor_that_is_not_finite(value, path):
    assert first_not_finite({"a": [torch.ones(1), torch.tensor([1.0, value])], "i": torch.ones(1).int()}) == path
