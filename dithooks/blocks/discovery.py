"""The transformers of a target and their lists of blocks, as named by the user or as found."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from ..errors import InvalidSetting, WrongType
from ..validation import shown
from .block_lists import WRAPPED, BlockList, Chain
from .module_paths import denoisers_of, modules_of, path_of, walk
from .trunk_heuristics import LIGHT, Owner, find_owners

Blocks = str | nn.ModuleList | Sequence[str | nn.ModuleList] | None


def find_chains(target: object, blocks: Blocks, chosen: Collection[str] = ()) -> list[Chain]:
    """Return the block lists to work on: those that ``blocks`` names, else those of the target's transformer(s).

    Args:
        target: the model or pipeline.
        blocks: lists by path, or themselves.
        chosen: as for :func:`owners_of`.

    Raises:
        TypeError: the target is neither a module nor a pipeline, or ``blocks`` is neither a path nor a list.
        ValueError: a path does not lead to a non-empty ``nn.ModuleList``, or no list was found.
    """
    named = [blocks] if isinstance(blocks, (str, nn.ModuleList)) else blocks
    # A path through an object without modules may be wrong, too; an error names it where it is walked.
    may_hold = isinstance(blocks, str) and hasattr(target, "__dict__")
    if isinstance(target, type) or not (isinstance(target, nn.Module) or modules_of(target) or may_hold):
        raise WrongType(
            f"target is {shown(target)} ({type(target).__name__}): give a pipeline with a transformer, a transformer, "
            "or an nn.Module with blocks='path.to.its.block_list'"
        )
    if isinstance(target, nn.ModuleList):
        raise InvalidSetting(
            "target is a block list by itself: give the model that calls it, and the list as blocks=..."
        )
    if blocks is None:
        return [_chain(owner) for owner in owners_of(target, chosen)]
    if not isinstance(named, Sequence):
        raise WrongType(f"blocks={shown(blocks)}: give a dotted path, an nn.ModuleList, or a list of these")
    if not named:
        raise InvalidSetting("blocks is an empty list: name at least one nn.ModuleList, or leave it out")
    return group(target, [resolve(target, item) for item in named])


def owners_of(target: object, chosen: Collection[str] = ()) -> list[Owner]:
    """Find the modules that call the long lists of a model or pipeline, in the target's order, with paths from it.

    Args:
        target: the model or pipeline.
        chosen: paths of modules that are preferred to others that may denoise as well.

    Raises:
        ValueError: the target has no such list.
    """
    modules = {"": target} if isinstance(target, nn.Module) else denoisers_of(target)
    found: list[Owner] = []
    for name, module in modules.items():
        assert isinstance(module, nn.Module)
        inner = dict(module.named_children()).get(WRAPPED)  # the model inside what torch.compile(model) returns
        prefix, top = (name, module) if inner is None else (f"{name}.{WRAPPED}".lstrip("."), inner)
        within = [path.removeprefix(f"{prefix}.") for path in chosen] if prefix else chosen
        found += [owner.below(prefix) for owner in find_owners(top, within)]
    if not found:
        held = sorted(modules_of(target)) if not isinstance(target, nn.Module) else "no nn.ModuleList"
        raise InvalidSetting(
            f"{type(target).__name__} has no list of blocks that a transformer would call (it has {held}): name it "
            "with blocks='path.to.list'"
        )
    if isinstance(target, nn.Module) or any(name.split("_")[0] == "transformer" for name in modules):
        return found
    loads = [max(listed.parameters for listed in owner.trunk) for owner in found]
    return [owner for owner, load in zip(found, loads, strict=True) if load * LIGHT >= max(loads)]


def _chain(owner: Owner) -> Chain:
    lists = tuple(BlockList(listed.path, listed.blocks) for listed in owner.trunk)
    return Chain(owner.module, owner.path, lists, True, rivals=tuple(map(_chain, owner.rivals)))


def group(target: object, block_lists: Sequence[BlockList]) -> list[Chain]:
    """Group named lists into chains: the lists of one owner form one chain, in the order given.

    Raises:
        ValueError: a list is named twice.
    """
    if len({id(each.blocks) for each in block_lists}) < len(block_lists):
        raise InvalidSetting(f"blocks={[each.path for each in block_lists]} names a list twice")
    owners: dict[str, list[BlockList]] = {}
    for each in block_lists:
        owners.setdefault(_owner_path(each.path, target), []).append(each)
    return [Chain(walk(target, path), path, tuple(members)) for path, members in owners.items()]


def resolve(target: object, item: object) -> BlockList:
    """Return a list of blocks, given by its path or by itself.

    Raises:
        TypeError: ``item`` is neither a path nor a list.
        ValueError: the list is empty, not part of the target, or no ``nn.ModuleList``.
    """
    if isinstance(item, nn.ModuleList):
        path = path_of(target, item)
        if path is None:
            raise InvalidSetting(
                f"blocks: the given nn.ModuleList of {len(item)} is not part of {type(target).__name__}"
            )
    elif item == "":
        raise InvalidSetting("blocks='' is empty: give a dotted path such as 'transformer.transformer_blocks'")
    elif isinstance(item, str):
        path, item = item, walk(target, item)
    else:
        raise WrongType(f"blocks: {shown(item)} ({type(item).__name__}) is neither a dotted path nor an nn.ModuleList")
    if isinstance(item, nn.Sequential):
        raise InvalidSetting(
            f"blocks={shown(path)} leads to an nn.Sequential, whose blocks are not called by the model: in a model "
            "that runs over its entries, make it an nn.ModuleList of these"
        )
    if not isinstance(item, nn.ModuleList):
        raise InvalidSetting(f"blocks={shown(path)} leads to a {type(item).__name__}, not to an nn.ModuleList")
    if not len(item):
        raise InvalidSetting(f"blocks={shown(path)} leads to an empty nn.ModuleList: there is no block to cache")
    if all(isinstance(entry, nn.ModuleList) for entry in item):
        inner = [f"{path}.{index}" for index in range(len(item))]
        raise InvalidSetting(f"blocks={shown(path)} leads to a list of lists: name these, blocks={inner}")
    return BlockList(path, item)


def _owner_path(path: str, target: object) -> str:
    """Return the path of the nearest module above a list that is called itself; without one, the list's own path."""
    parts = path.split(".")[:-1]
    while parts:
        above = walk(target, ".".join(parts))
        if isinstance(above, nn.Module) and not isinstance(above, (nn.ModuleList, nn.ModuleDict)):
            break
        parts.pop()
    return ".".join(parts) if parts or isinstance(target, nn.Module) else path
