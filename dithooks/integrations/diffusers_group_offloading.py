"""Weights that come and go in groups: what skipped blocks would have done for others.

With diffusers' group offloading, the forwards of blocks and layers move weights to the device and off it, also for
other blocks: the rest of their group or, with streams, the group that runs next. On a reused step the forwards of a
range do not run, and other blocks would run without their weights, or leave theirs on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

REGISTRY, HOOK = "_diffusers_hook", "group_offloading"  # names that diffusers gives them


def grouped(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of some modules, or a module in them, has a hook of group offloading."""
    inner = (vars(each).get(REGISTRY) for module in modules for each in module.modules())
    return any(registry is not None and registry.get_hook(HOOK) is not None for registry in inner)


def hand_over(blocks: Iterable[nn.Module]) -> None:
    """Leave the groups as if a range had run: what came for it gone, and what runs after it on its way.

    Args:
        blocks: of the range, in which nothing ran.
    """
    modules = [module for block in blocks for module in block.modules()]
    inside = {id(vars(module)) for module in modules}  # a stand-in shares its block's
    hooks = [hook for module in modules if (hook := _hook(module)) is not None]
    for group in _once(hook.group for hook in hooks):
        if id(vars(group.offload_leader)) in inside and any(
            tensor.device != group.offload_device for tensor in _tensors(group)
        ):
            group.offload_()
    shared = [hook.group for hook in hooks if not all(id(vars(module)) in inside for module in hook.group.modules)]
    led = [group for group in shared if group.onload_leader is not None and id(vars(group.onload_leader)) in inside]
    ahead = [hook.next_group for hook in hooks if hook.next_group is not None and not hook.next_group.onload_self]
    for group in _once([*led, *(group for group in ahead if id(vars(group.onload_leader)) not in inside)]):
        group.onload_()


def _hook(module: nn.Module) -> Any:
    """What moves a module's group, unless it stands outside of the stand-in: there it is reached at every step."""
    registry = vars(module).get(REGISTRY)
    return registry.get_hook(HOOK) if registry is not None and "forward" in vars(module) else None


def _once(groups: Iterable[Any]) -> list[Any]:
    return list({id(group): group for group in groups}.values())


def _tensors(group: Any) -> Iterator[Tensor]:
    for module in group.modules:
        yield from module.parameters()
        yield from module.buffers()
    yield from group.parameters
    yield from group.buffers
