"""The check that a run draws what was recorded: by the transformer's inputs and the number of its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..blocks.block_io import bind, parameter_names
from ..engine.arguments import CallArguments
from ..engine.replay import replaying
from ..environment.torch_api import is_dynamo_compiling
from ..errors import InvalidSetting

Inputs = dict[str, NDArray[np.float32]]
SECOND = " at its second step"
NUMBERS = 1024  # kept of each tensor
ALIKE = 0.01  # relative distance: inputs that are recomputed differ a little, those of another prompt much more


class InputSamples:
    """A sample of a transformer's inputs: all at its first call, the latents at the first call of its second step.

    Every plan computes the first step, so both are the same with and without a cache. The latents of the second step
    show other weights, guidance or schedules, and noise that the sampler adds.

    Args:
        module: the transformer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names, self.calls, self.second = parameter_names(module), 0, 0
        self.inputs: Inputs = {}

    def note(self, arguments: Mapping[str, Any], second: bool) -> None:
        """Note a call's arguments, and whether it is the first of the second step."""
        if self.calls == 0 or second:
            given = CallArguments(arguments, frozenset(self.names[:1]))
            latents, conditioning = given.latents, given.conditioning
            found = latents if second else {**latents, **conditioning}
            found = {name: value for name, value in found.items() if value.is_floating_point() and not value.is_meta}
            self.inputs |= {f"{name}{SECOND if second else ''}": _sampled(value) for name, value in found.items()}
            self.second = self.calls if second else self.second
        self.calls += 1


@contextmanager
def same_inputs(
    module: nn.Module, known: Mapping[str, NDArray[np.float32]], second: int, calls: int | None
) -> Iterator[None]:
    """Check inside that a module is given the inputs that were recorded, and called as often.

    Args:
        module: the transformer.
        known: inputs of the recorded run, as :class:`InputSamples` noted them.
        second: number of the first call of the second step; 0: there is none.
        calls: number of calls in the recorded run; ``None``: some may be left out.

    Raises:
        ValueError: the module is given other inputs, which the call itself raises, or called more or less often.
    """
    samples = InputSamples(module)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling() or replaying.get():
            return
        number = samples.calls
        samples.note(bind(samples.names, args, kwargs), bool(second) and number == second)
        if number in (0, second):
            due = {name for name in known.keys() | samples.inputs.keys() if name.endswith(SECOND) == bool(number)}
            for name in sorted(due):
                if not _alike(known.get(name), samples.inputs.get(name)):
                    raise _another(f"{type(module).__name__} is given another {name}")

    hook = module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
    if calls is not None and samples.calls not in (0, calls):  # 0: the module is compiled as a whole, and runs no hooks
        raise _another(f"it calls {type(module).__name__} {samples.calls} times, and the recorded one {calls} times")


def _another(what: str) -> InvalidSetting:
    return InvalidSetting(
        f"run does not draw what was recorded: {what}. It has to draw the same pictures whenever it is called: seed "
        "its generators inside of it, and keep to the same prompts, steps, guidance and weights; a recording or "
        "journal of another run is of no use to it"
    )


def _sampled(tensor: Tensor) -> NDArray[np.float32]:
    flat = tensor.detach().flatten()  # waits for the device, but at two calls only, and not while a block is timed
    sample: NDArray[np.float32] = flat[:: -(-max(flat.numel(), 1) // NUMBERS)].float().cpu().numpy().copy()
    return sample


def _alike(then: NDArray[np.float32] | None, now: NDArray[np.float32] | None) -> bool:
    if then is None or now is None or then.shape != now.shape:
        return False
    return bool(np.linalg.norm(then - now) <= ALIKE * np.linalg.norm(then)) or np.array_equal(then, now, equal_nan=True)
