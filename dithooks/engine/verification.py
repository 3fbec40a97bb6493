"""Calls made again: to take the first residual for granted only where it has been seen to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..blocks.block_io import BlockIO
from ..blocks.wiring import Wiring
from ..errors import WiringError
from ..stats.warnings import argument_may_be_written
from .call import Call
from .noise_probe import ALIKE, NoiseProbe, few, likeness
from .replay import Replay, difference, finite, tolerance

if TYPE_CHECKING:
    from .range_cache import RangeCache


class Verification:
    """What a flow tries out by replays of a call of its transformer."""

    def __init__(self, flow: RangeCache) -> None:
        self.flow = flow

    def repeat(self, replay: Replay, call: Call, eager: bool = False) -> Any:
        """The output of a call made again, as ``call``; other caches on the model do as they did in it."""
        flow = self.flow
        call.stale = False
        flow.under_way.add(call)
        flows = [flow, *flow.others()]
        under_way: list[Call | None] = [each.current for each in flows]
        for other in flows[1:]:
            other.current = _again(other)
        flow.current = call
        try:
            return replay(eager)
        finally:
            for each, former in zip(flows, under_way, strict=True):
                each.current = former

    def test(self, replay: Replay, deltas: tuple[Tensor, ...], output: Any) -> bool:
        """On the call it was taken from, the residual has to give that call's output.

        Returns whether that could be told: not where the output is not finite.

        Raises:
            WiringError: it does not; or what was recognised between the blocks is not what the model does there.
        """
        flow, layout = self.flow, self.flow.layout
        if argument := replay.unsafe_argument:
            flow.runs.say("strange", argument_may_be_written(flow.runs.name, argument))
            return True
        if not finite(output):
            return False
        trial = Call(reuse=True, deltas=deltas)
        error = difference(self.repeat(replay, trial), output)
        if trial.stale:  # the range was taken off, or moved, in the middle of it
            return False
        if not error <= tolerance(output, flow.runs.config.dtype):
            raise WiringError(
                f"{flow.runs.name}: with {layout.first} … {layout.last} skipped and their residual added, the call it "
                f"was taken from comes out {error:.2g} off (relative L2): the model uses more of these blocks than "
                "what leaves the last one (outputs collected on the way, say), or is not deterministic. Choose other "
                "blocks; or, if you know better, give verify=False"
            )
        assert layout.wiring is not None
        if layout.wiring.certain:
            return True
        quiet = self._probed(replay, layout.wiring, None)
        for seed in range(4):
            noisy = self._probed(replay, layout.wiring, seed)
            if quiet is None or noisy is None:
                return False
            for name, alike in zip(layout.wiring.ports[-1].carries, likeness(quiet, noisy), strict=True):
                if alike < ALIKE:
                    raise WiringError(
                        f"{flow.runs.name}: between {layout.first} and {layout.last} the model does more to {name} "
                        "than was recognised: noise put in at the former comes out at the latter otherwise than "
                        f"expected (alike by {alike:.2f} of 1). Is it rearranged, or another stream? Choose a range on "
                        "one side of that; or, if you know better, give verify=False"
                    )
            if not few(noisy):
                break
        return True

    def _probed(self, replay: Replay, wiring: Wiring, seed: int | None) -> NoiseProbe | None:
        """One passage, wholly made by the range as it is; ``None``: it was taken off, or moved, in the middle."""
        probe = NoiseProbe(wiring, seed)
        trial = Call(reuse=True, probe=probe)
        self.repeat(replay, trial, eager=self.flow.compiled())
        return None if trial.stale else probe

    def passed(self, call: Call, probe: NoiseProbe, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's output where the range is only passed through."""
        wiring = self.flow.layout.wiring
        assert wiring is not None
        ports = wiring.ports[offset]
        values = [None if name is None else ports.read(name, args, kwargs) for name in ports.carries]
        if offset == 0:
            values = probe.enter({name: ports.read(name, args, kwargs) for name in wiring.entry}, values)
        if offset == len(wiring.ports) - 1:
            call.left = True
            probe.leave([None if name is None else ports.read(name, args, kwargs) for name in ports.carries])
        return ports.build(filled(ports, values, {}), args, kwargs)


def filled(ports: BlockIO, values: Sequence[Any], shapes: Mapping[int, torch.Size]) -> list[Any]:
    """What a block passes on, with zeros for outputs that carry on nothing, in the given shapes or as first seen."""
    if not any(ports.born):
        return list(values)
    like = next(value for value in values if isinstance(value, Tensor))
    return [
        value if form is None else like.new_zeros(shapes.get(position, form[0]), dtype=form[1])
        for position, (value, form) in enumerate(zip(values, ports.born, strict=True))
    ]


def _again(flow: RangeCache) -> Call | None:
    """A flow's call under way, or else its last, to be made again: reused with the same residuals, or plain."""
    call = flow.current or flow.latest
    if call is None or not call.reuse or call.stale:
        return None
    return Call(reuse=True, deltas=call.deltas)
