"""What a block that is passed over hands on, where names and positions tell all."""

import pytest
from torch import Tensor, nn

from dithooks.blocks.block_io import BlockIO, CallReader, FunctorReader, OutputBuilder, PatchFunctor

pytestmark = pytest.mark.core


class Block(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None, temb=None): ...


class Functor(PatchFunctor):
    def read(self, args, kwargs):
        return list(args)

    def take(self, output):
        return [output]

    def build(self, streams, args, kwargs):
        return streams[0]


def block_io(carries, output_builder=None, reader=None):
    """Of a block that returns what it carries in a tuple."""
    return BlockIO(
        reader or CallReader(Block()), output_builder or OutputBuilder(tuple), carries, (None,) * len(carries)
    )


@pytest.mark.parametrize(
    ("args", "kwargs"), [(("h", "e"), {}), (("h",), {"encoder_hidden_states": "e"}), ((), {"x": 1})]
)
def test_streams_are_found_by_position_or_name(args, kwargs):
    """In the order of the output; what was not passed is None, as the slower way has it."""
    both = block_io(("encoder_hidden_states", "hidden_states"))
    assert both.slots == (("encoder_hidden_states", 1), ("hidden_states", 0))
    assert both.pass_on(args, kwargs) == (("e", "h") if args else (None, None))
    assert both.pass_on(args, kwargs) == both.build(
        [both.read(name, args, kwargs) for name in both.carries], args, kwargs
    )


def test_the_form_is_the_blocks_own():
    """A tensor alone, or a list."""
    assert block_io(("hidden_states",), OutputBuilder(Tensor)).pass_on(("h",), {}) == "h"
    assert block_io(("hidden_states",), OutputBuilder(list)).pass_on((), {"hidden_states": "h"}) == ["h"]


@pytest.mark.parametrize(
    "given",
    [
        {"carries": ("hidden_states", None)},  # an output that carries on none
        {"carries": ("hidden_states[0]",)},  # one of several in a tuple
        {"carries": ("*3",)},  # a position without a name
        {"carries": ("unknown",)},  # taken by **kwargs
        {"carries": ("hidden_states",), "output_builder": OutputBuilder(dict, ("sample",))},
        {
            "carries": ("0",),
            "reader": FunctorReader(Functor()),
            "output_builder": OutputBuilder(PatchFunctor, (), Functor()),
        },
    ],
)
def test_all_else_goes_the_slower_way(given):
    """There are no slots, which is what tells."""
    assert block_io(**given).slots == ()
