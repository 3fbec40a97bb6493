"""From what the user names to the blocks: the transformer that owns them, their lists, their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_WRAPPED = "_orig_mod"

Blocks = str | nn.ModuleList | Sequence["str | nn.ModuleList"] | None


@dataclass(frozen=True)
class Site:
    """A block's place: entry ``index`` of ``blocks``, called ``path`` in the model."""

    blocks: nn.ModuleList
    index: int
    path: str

    @property
    def block(self) -> nn.Module:
        return self.blocks[self.index]

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is the entry; a list may have been cut shorter."""
        return self.index < len(self.blocks) and self.blocks[self.index] is module

    def put(self, module: nn.Module) -> None:
        """Make another module the entry."""
        self.blocks[self.index] = module


@dataclass(frozen=True)
class Chain:
    """The block lists of one transformer, one after another, as the config counts them."""

    owner: nn.Module
    path: str  # of the owner, from the target; "" for the target itself
    sites: tuple[Site, ...]

    @property
    def compiled(self) -> bool:
        """Whether the owner was reached through a wrapper of ``torch.compile``."""
        return _WRAPPED in self.path.split(".")

    @property
    def name(self) -> str:
        return f"{self.path} ({type(self.owner).__name__})" if self.path else type(self.owner).__name__

    def fingerprint(self) -> str:
        """16 hex digits that tell the architecture: classes, lists and widths; not weights, dtype or adapters."""
        config = getattr(self.owner, "config", None)
        if isinstance(config, Mapping):
            shape: Any = {k: v for k, v in sorted(config.items()) if not k.startswith("_")}
        else:
            parameters = self.sites[0].block.named_parameters()
            shape = sorted((name, list(value.shape)) for name, value in parameters if "lora_" not in name)
        prefix = len(self.path) + 1 if self.path else 0
        blocks = [(site.path[prefix:], type(site.block).__name__) for site in self.sites]
        text = json.dumps([type(self.owner).__name__, blocks, shape], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_chains(target: object, blocks: Blocks) -> list[Chain]:
    """The block lists to work on: those that ``blocks`` names, else those of the target's transformer(s).

    Raises:
        TypeError: the target is neither a module nor a pipeline, or ``blocks`` neither path nor list.
        ValueError: a path that does not lead to a non-empty ``nn.ModuleList``, or nothing found.
    """
    if isinstance(target, type) or not (isinstance(target, nn.Module) or _modules_of(target)):
        raise TypeError(
            f"target is {target!r} ({type(target).__name__}): give a pipeline with a transformer, a transformer, "
            "or an nn.Module with blocks='path.to.its.block_list'"
        )
    if isinstance(target, nn.ModuleList):
        raise ValueError("target is a block list by itself: give the model that calls it, and the list as blocks=...")
    if blocks is None:
        return [_default_chain(owner, path) for path, owner in _transformers(target)]
    named = [blocks] if isinstance(blocks, (str, nn.ModuleList)) else blocks
    if not isinstance(named, Sequence):
        raise TypeError(f"blocks={blocks!r}: give a dotted path, an nn.ModuleList, or a list of these")
    if not named:
        raise ValueError("blocks is an empty list: name at least one nn.ModuleList, or leave it out")
    found = [_resolve(target, item) for item in named]
    if len({id(module_list) for _, module_list in found}) < len(found):
        raise ValueError(f"blocks={[path for path, _ in found]} names a list twice")
    owners: dict[str, list[tuple[str, nn.ModuleList]]] = {}
    for path, module_list in found:
        owners.setdefault(_owner_path(path, target), []).append((path, module_list))
    if len(owners) > 1 and isinstance(target, nn.Module):
        raise ValueError(
            f"blocks={[path for path, _ in found]} belong to different modules ({sorted(owners)}): "
            "attach to each of them by itself"
        )
    return [Chain(_walk(target, owner), owner, _sites(lists)) for owner, lists in owners.items()]


def _modules_of(target: object) -> dict[str, nn.Module]:
    """The named modules of a pipeline; ``None`` components are tolerated."""
    components = getattr(target, "components", None)
    source = components if isinstance(components, Mapping) else getattr(target, "__dict__", {})
    return {name: value for name, value in source.items() if isinstance(value, nn.Module)}


def _transformers(target: object) -> list[tuple[str, nn.Module]]:
    if isinstance(target, nn.Module):
        return [_unwrapped("", target)]
    modules = _modules_of(target)
    found = [_unwrapped(name, module) for name, module in modules.items() if name.split("_")[0] == "transformer"]
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no component called transformer (it has {sorted(modules)}): "
            "name the block list with blocks='component.path.to.list'"
        )
    return found


def _unwrapped(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The model inside what ``torch.compile(model)`` returns."""
    inner = module._modules.get(_WRAPPED)
    return (path, module) if inner is None else (f"{path}.{_WRAPPED}".lstrip("."), inner)


def _default_chain(owner: nn.Module, path: str) -> Chain:
    """The trunk: the owner's own lists of repeated blocks, without those much shorter than the longest."""
    lists = [(name, child) for name, child in owner.named_children() if isinstance(child, nn.ModuleList) and len(child)]
    repeated = getattr(owner, "_repeated_blocks", None)
    if repeated:
        lists = [entry for entry in lists if all(type(block).__name__ in repeated for block in entry[1])] or lists
    lists = [entry for entry in lists if any(True for _ in entry[1].parameters())] or lists
    if not lists:
        below = [name for name, module in owner.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
        hint = (
            f"below there is {[f'{path}.{name}'.strip('.') for name in below]}" if below else "nor is there one below"
        )
        raise ValueError(
            f"{type(owner).__name__} has no nn.ModuleList of blocks of its own ({hint}): name one with blocks='path'"
        )
    longest = max(len(child) for _, child in lists)
    prefix = f"{path}." if path else ""
    return Chain(owner, path, _sites([(prefix + name, child) for name, child in lists if len(child) * 4 >= longest]))


def _sites(lists: Sequence[tuple[str, nn.ModuleList]]) -> tuple[Site, ...]:
    return tuple(
        Site(module_list, index, f"{path}.{index}") for path, module_list in lists for index in range(len(module_list))
    )


def _resolve(target: object, item: object) -> tuple[str, nn.ModuleList]:
    if isinstance(item, nn.ModuleList):
        roots = {"": target} if isinstance(target, nn.Module) else _modules_of(target)
        for root, module in roots.items():
            for name, child in module.named_modules():
                if child is item:
                    path = ".".join(part for part in (root, name) if part)
                    break
            else:
                continue
            break
        else:
            raise ValueError(f"blocks: the given nn.ModuleList of {len(item)} is not part of {type(target).__name__}")
    elif item == "":
        raise ValueError("blocks='' is empty: give a dotted path such as 'transformer.transformer_blocks'")
    elif isinstance(item, str):
        path, item = item, _walk(target, item)
    else:
        raise TypeError(f"blocks: {item!r} ({type(item).__name__}) is neither a dotted path nor an nn.ModuleList")
    if not isinstance(item, nn.ModuleList):
        raise ValueError(f"blocks={path!r} leads to a {type(item).__name__}, not to an nn.ModuleList")
    if not len(item):
        raise ValueError(f"blocks={path!r} leads to an empty nn.ModuleList: there is no block to cache")
    return path, item


def _walk(target: object, path: str) -> Any:
    """Follow a dotted path; indices of lists are parts like any other."""
    if path == "" and isinstance(target, nn.Module):
        return target
    parts = path.split(".")
    if not all(part.isidentifier() or part.isdigit() for part in parts):
        raise ValueError(f"blocks={path!r} is not a dotted path such as 'transformer.transformer_blocks'")
    here: Any = target
    for depth, part in enumerate(parts):
        try:
            here = here[int(part)] if part.isdigit() and isinstance(here, nn.ModuleList) else getattr(here, part)
        except (AttributeError, IndexError):
            before = ".".join(parts[:depth]) or type(target).__name__
            options = sorted(_modules_of(here) if not isinstance(here, nn.Module) else dict(here.named_children()))
            raise ValueError(f"blocks={path!r}: {before} has no {part!r}; it has {options}") from None
    return here


def _owner_path(path: str, target: object) -> str:
    """Of the nearest module above a list that is itself called: not a list or dict of modules."""
    parts = path.split(".")[:-1]
    while parts and isinstance(_walk(target, ".".join(parts)), (nn.ModuleList, nn.ModuleDict)):
        parts.pop()
    if not parts and not isinstance(target, nn.Module):
        raise ValueError(f"blocks={path!r} hangs on the pipeline itself, not on a module that calls it")
    return ".".join(parts)
