"""Which configuration holds for which range: from a plan or a configuration, with its overrides by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..blocks.block_lists import WRAPPED, BlockList, Chain, fingerprint
from ..config.cache_config import DitCacheConfig
from ..config.cache_plan import CachePlan
from ..config.transformer_plan import TransformerPlan, span_name
from ..errors import InvalidSetting
from ..validation import shown


def config_of_plan(plan: CachePlan, chains: Sequence[tuple[Chain, DitCacheConfig | None]]) -> DitCacheConfig:
    """The configuration of a model that a plan asks for. A transformer that the plan has no piece of stays uncached.

    Args:
        plan: the plan.
        chains: the model's transformers, each with a configuration of its own where an adapter has given one.

    Raises:
        ValueError: the plan was made for another model, names a transformer that is not there, or names one that has a
            configuration of its own.
    """
    here = fingerprint([chain for chain, _ in chains])
    if here != plan.made.fingerprint:
        model = "+".join(type(chain.owner).__name__ for chain, _ in chains)
        blocks = sum(len(chain.block_refs) for chain, _ in chains)
        raise InvalidSetting(
            f"the plan was made for another model, {plan.made.model} with {plan.made.blocks} blocks (fingerprint "
            f"{plan.made.fingerprint}); here is {model} with {blocks} (fingerprint {here}): search a plan for "
            "this one, or take the numbers over with dataclasses.replace(plan.config, fingerprint=None)"
        )
    by_path = {_without_wrappers(chain.path): chain for chain, _ in chains}
    if len(chains) == len(plan.pieces) == 1:  # one transformer: its path depends on what it is reached from
        by_path = {_without_wrappers(plan.pieces[0].path): chains[0][0]}
    planned: dict[str, TransformerPlan] = {}
    for piece in plan.pieces:
        if (chain := by_path.get(_without_wrappers(piece.path))) is None:
            raise InvalidSetting(
                f"the plan is for {shown(piece.path)}, which is none of {', '.join(map(repr, by_path))}"
            )
        planned[chain.path] = piece
    for chain, own in chains:
        if own is not None and chain.path in planned:
            raise InvalidSetting(f"{chain.name} has a configuration of its own in the adapter: give one of both")
    unplanned = [chain.path for chain, own in chains if own is None and chain.path not in planned]
    bare = [chain.path for chain, own in chains if own is None and not chain.block_lists]
    return plan.config_for_paths({**planned, **dict.fromkeys(unplanned)}, bare)


def configure_ranges(
    chains: Sequence[tuple[Chain, DitCacheConfig | None]], config: DitCacheConfig
) -> list[tuple[Chain, DitCacheConfig]]:
    """The chain and configuration of each range.

    An override names a transformer or block list by its path from the target, or by the end of that path. Where a block
    list is named, each list of its transformer is a range of its own.

    Args:
        chains: the model's transformers. A configuration that an adapter has given for one holds unchanged.
        config: the configuration of the others.

    Raises:
        ValueError: an override names nothing, several things, or a transformer that has a configuration of its own.
    """
    paths = {name: _path_named(name, [chain for chain, _ in chains]) for name in config.overrides}
    for name, path in paths.items():
        if (other := next(each for each in paths if paths[each] == path)) != name:
            raise InvalidSetting(
                f"overrides names {path} twice, as {shown(other)} and as {shown(name)}: give one of both"
            )
    ranges: list[tuple[Chain, DitCacheConfig]] = []
    for chain, own in chains:
        list_paths = [block_list.path for block_list in chain.block_lists]
        of_lists = {path: name for name, path in paths.items() if path in list_paths}
        whole = next((name for name, path in paths.items() if path == chain.path and path not in of_lists), None)
        if own is not None:
            if of_lists or whole is not None:
                raise InvalidSetting(
                    f"overrides names {', '.join(map(repr, of_lists.values() or [whole]))}, which has a configuration "
                    "of its own in the adapter: give one of both"
                )
            ranges.append((chain, own))
            continue
        if not of_lists:
            ranges.append((chain, config if whole is None else config.overridden(whole)))
        for block_list in chain.block_lists if of_lists else ():
            list_config = _config_of_list(config, whole, of_lists.get(block_list.path))
            ranges.append((replace(chain, block_lists=(block_list,), part=len(chain.block_lists) > 1), list_config))
    return [pair for chain, own in ranges for pair in _separate(chain, own)]


def _separate(chain: Chain, config: DitCacheConfig) -> list[tuple[Chain, DitCacheConfig]]:
    """Several ranges of one chain, each with a name of its own; no block counts in two of them."""
    if not config.more_ranges:
        return [(chain, config)]
    total, pairs = len(chain.block_refs), list[tuple[Chain, DitCacheConfig]]()
    lengths = [each.cache_num_blocks or total - each.cache_block_start - each.compute_last for each in config.ranges]
    cached = [place for place, each in enumerate(config.ranges) if not each.when.never_reuses]
    for place, (each, length) in enumerate(zip(config.ranges, lengths, strict=True)):
        # The first that is cached counts the blocks of none, too.
        elsewhere = sum(lengths[other] for other in cached if other > place) if place in cached[:1] else None
        span = span_name(each.cache_block_start, length)
        pairs.append((replace(chain, span=span, elsewhere=elsewhere, is_behind=place > 0), each))
    return pairs


def _config_of_list(config: DitCacheConfig, transformer: str | None, name: str | None) -> DitCacheConfig:
    """The configuration of a block list: the override of its transformer applied first, then its own."""
    base = config if transformer is None else config.overridden(transformer)
    return base if name is None else replace(base, overrides={name: config.overrides[name]}).overridden(name)


def _path_named(name: str, chains: Sequence[Chain]) -> str:
    """The path of the one transformer or block list that an override's name stands for."""
    lists: list[BlockList] = [block_list for chain in chains for block_list in chain.block_lists]
    paths = list(
        dict.fromkeys([chain.path for chain in chains if chain.path] + [block_list.path for block_list in lists])
    )
    matches = [path for path in paths if path == name] or [path for path in paths if path.endswith(f".{name}")]
    if len(matches) != 1:
        what = "is none of" if not matches else f"could be {' or '.join(matches)}; there are"
        raise InvalidSetting(f"overrides: {shown(name)} {what} {', '.join(paths)}")
    return matches[0]


def _without_wrappers(path: str) -> str:
    """A transformer's path without the wrappers of ``torch.compile``."""
    return ".".join(part for part in path.split(".") if part != WRAPPED)
