"""Whether a run draws what was recorded: by what the transformer is given first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..blocks.ports import bind, parameter_names
from ..branch import tensors
from ..replay import replaying

Inputs = dict[str, NDArray[np.float32]]
NUMBERS = 1024  # that are kept of each tensor
ALIKE = 0.05  # relative distance: what is worked out anew may come out a little different, another prompt is far off


def first_inputs(module: nn.Module, arguments: Mapping[str, Any]) -> Inputs:
    """A sample of every tensor of a call that is not a timestep, by name."""
    primary = next(iter(parameter_names(module)), None)
    latents, conditioning = tensors(arguments, primary)
    found = {**latents, **conditioning}
    return {name: _sampled(value) for name, value in found.items() if value.is_floating_point() and not value.is_meta}


@contextmanager
def same_inputs(module: nn.Module, known: Mapping[str, NDArray[np.float32]]) -> Iterator[None]:
    """See that the first call of a module inside is given what is known.

    Raises:
        ValueError: it is given something else, in the call itself.
    """
    names, seen = parameter_names(module), list[bool]()

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if seen or replaying.get():
            return
        seen.append(True)
        now = first_inputs(module, bind(names, args, kwargs))
        differing = sorted(name for name in known.keys() | now.keys() if not _alike(known.get(name), now.get(name)))
        if differing:
            raise ValueError(
                f"run does not draw what was recorded: at its first step {type(module).__name__} is given another "
                f"{', '.join(differing)}. It has to draw the same pictures whenever it is called: seed its generator "
                "inside of it, and keep to the same prompts; a recording or journal of others is of no use to it"
            )

    hook = module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _sampled(tensor: Tensor) -> NDArray[np.float32]:
    flat = tensor.detach().flatten()
    sample: NDArray[np.float32] = flat[:: -(-max(flat.numel(), 1) // NUMBERS)].float().cpu().numpy().copy()
    return sample


def _alike(then: NDArray[np.float32] | None, now: NDArray[np.float32] | None) -> bool:
    if then is None or now is None or then.shape != now.shape:
        return False
    return bool(np.linalg.norm(then - now) <= ALIKE * np.linalg.norm(then)) or np.array_equal(then, now, equal_nan=True)
