"""Blocks are watched by hooks that leave nothing behind, neither on the model nor in copies of it."""

import copy
import pickle
import sys
import threading
import time

import pytest
import torch

from dithooks.blocks.tap import hooks_on, remove_hooks, tap


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.ReLU()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Refusing(torch.nn.Identity):
    def register_forward_hook(self, *args, **kwargs):
        raise KeyboardInterrupt


def listening(model, events, owner=None):
    return tap(
        model.blocks,
        lambda index, args, kwargs: events.append(("enter", index, *args)),
        lambda index, output: events.append(("leave", index, output)),
        lambda args, kwargs: events.append(("begin", kwargs["x"])),
        lambda output: events.append(("end", output)),
        model=model,
        owner=owner,
    )


def test_what_enters_and_leaves_in_order():
    model, events = Stack(), []
    x = torch.ones(1)
    with listening(model, events):
        y = model(x=x)
    model(x=x)
    assert [event[:-1] for event in events] == [
        ("begin",),
        ("enter", 0),
        ("leave", 0),
        ("enter", 1),
        ("leave", 1),
        ("end",),
    ]
    assert events[0][-1] is x
    assert events[-1][-1] is y
    assert not [*hooks_on(model.modules())]


def test_one_tap_is_removed_and_the_other_stays():
    model, first, second = Stack(), [], []
    owner = object()
    one, _other = listening(model, first, owner), listening(model, second, owner)
    one.remove()
    one.remove()
    model(x=torch.ones(1))
    assert (len(first), len(second)) == (0, 6)
    remove_hooks(owner, model.modules())
    assert not [*hooks_on(model.modules())]
    assert not any(module._forward_hooks_with_kwargs or module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks_with_kwargs or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_watched(copied):
    model, events = Stack(), []
    with listening(model, events):
        other = copied(model)
        other(x=torch.ones(1))
        assert not events
        assert not [*hooks_on(other.modules())]


def test_interrupted_it_leaves_no_hook():
    model = Stack()
    model.blocks.append(Refusing())
    with pytest.raises(KeyboardInterrupt):
        listening(model, [])
    assert not [*hooks_on(model.modules())]


def test_threads_that_watch_one_module_do_not_trip_each_other():
    module, ends, failed = torch.nn.Identity(), time.monotonic() + 0.5, []

    def watch():
        try:
            while time.monotonic() < ends:
                with tap([module, module], lambda *_: None, lambda *_: None):
                    pass
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=watch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert not [*hooks_on([module])]
