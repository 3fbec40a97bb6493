"""Arguments are copied so that what a repeat of the call writes into them does not reach the caller's."""

import dataclasses
import enum
import functools
import threading
import types
import uuid
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dithooks.engine.argument_copies import Uncopyable, copied, copied_where_possible, is_copyable


class Way(enum.Enum):
    LEFT = "left"


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: object


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Pair(NamedTuple):
    value: object
    other: int = 0


@pytest.mark.parametrize(
    "value",
    [
        *(None, 2, 1.5, "name", b"bytes", True, range(3), ..., Way.LEFT, uuid.uuid4(), Path("a"), object()),
        *(Frozen(2), Frozen((Way.LEFT, frozenset({1}))), Pair("a"), (1, ("b", None)), frozenset({2})),
        *(np.float32(1), np.dtype("int8"), torch.Size([2]), torch.float16, torch.device("cpu"), torch.strided),
        *(len, pytest.fixture, Way, types, torch.nn.Linear(1, 1), lambda: 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nothing_can_be_written_into_is_the_same_object(value):
    assert copied([value])[0] is value


@pytest.mark.parametrize(
    "holder",
    [
        lambda value: [value],
        lambda value: {"a": {("b", 1): value}},
        lambda value: Frozen(value),
        lambda value: Slotted(value),
        lambda value: Pair(value),
        lambda value: types.SimpleNamespace(inner=[value]),
        lambda value: deque([value]),
        lambda value: functools.partial(len, value),
        lambda value: slice(value),
    ],
)
def test_a_tensor_in_it_is_copied(holder):
    tensor = torch.zeros(2)
    given = {"holder": holder(tensor)}
    copy = copied((given, tensor))  # also given alone: the copy of both is one
    assert type(copy[0]["holder"]) is type(given["holder"])
    copy[1].add_(1)
    assert tensor.tolist() == [0, 0]
    assert repr(torch.ones(2)) in repr_of(copy[0]["holder"])


def repr_of(value):
    return repr(value.value) if isinstance(value, Slotted) else repr(value)


def test_what_is_written_into_an_object_stays_in_its_copy():
    seen, cache = [], types.SimpleNamespace(calls=0, keys=[])
    copies = copied({"note": seen.append, "seen": seen, "cache": cache})
    copies["note"](1)
    copies["cache"].keys.append(2)
    copies["cache"].calls += 1
    assert (copies["seen"], copies["cache"].keys, copies["cache"].calls) == ([1], [2], 1)
    assert (seen, cache.keys, cache.calls) == ([], [], 0)


def test_arrays_and_random_generators_are_copied():
    array, generator = np.zeros(2), torch.Generator().manual_seed(3)
    copies = copied((array, generator))
    copies[0][:] = 1
    assert array.tolist() == [0, 0]
    drawn = torch.rand(2, generator=copies[1])
    assert torch.equal(torch.rand(2, generator=generator), drawn)


def test_an_object_that_holds_itself_and_a_module():
    module, node = torch.nn.Linear(1, 1), types.SimpleNamespace()
    node.me, node.module = node, module
    copy = copied(node)
    assert copy is not node
    assert copy.me is copy
    assert copy.module is module


def test_a_method_is_copied_with_its_object():
    class Counter:
        def __init__(self):
            self.count = 0

        def up(self):
            self.count += 1

    counter = Counter()
    copies = copied((counter, counter.up))
    copies[1]()
    assert (copies[0].count, counter.count) == (1, 0)


@pytest.mark.parametrize(
    "make",
    [lambda: iter([1]), lambda: (each for each in [1]), threading.Lock, Path(__file__).open],
)
def test_what_cannot_be_copied(make):
    value = make()
    assert not is_copyable({"given": [value]})
    with pytest.raises(Uncopyable):
        copied({"given": [value]})
    tensor = torch.zeros(1)
    copy = copied_where_possible({"given": [value], "tensor": tensor})
    copy["tensor"].add_(1)
    assert tensor.tolist() == [0]
    if hasattr(value, "close"):
        value.close()
