"""Which configuration holds for which blocks: the one given, and what it says of a transformer or list by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..blocks.block_lists import BlockList, Chain
from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting


def assign(
    chains: Sequence[tuple[Chain, DitCacheConfig | None]], config: DitCacheConfig
) -> list[tuple[Chain, DitCacheConfig]]:
    """Each range's chain and configuration.

    A list is called by its path from the target, or the end of that; a transformer likewise. Where a list is named,
    the lists of its transformer are ranges of their own.

    Args:
        chains: with a configuration of their own, where an adapter has given one: it counts as it is.
        config: for the others.

    Raises:
        ValueError: a name is of nothing, or of several things, or of something that has a configuration of its own.
    """
    names = {name: _meant(name, [chain for chain, _ in chains]) for name in config.overrides}
    for name, path in names.items():
        if (other := next(each for each in names if names[each] == path)) != name:
            raise InvalidSetting(f"overrides names {path} twice, as {other!r} and as {name!r}: give one of both")
    assigned: list[tuple[Chain, DitCacheConfig]] = []
    for chain, own in chains:
        of_lanes = {path: name for name, path in names.items() if path in [lane.path for lane in chain.lanes]}
        whole = next((name for name, path in names.items() if path == chain.path and path not in of_lanes), None)
        if own is not None:
            if of_lanes or whole is not None:
                raise InvalidSetting(
                    f"overrides names {', '.join(map(repr, of_lanes.values() or [whole]))}, which has a configuration "
                    "of its own in the adapter: give one of both"
                )
            assigned.append((chain, own))
            continue
        base = config if whole is None else config.overridden(whole)
        if not of_lanes:
            assigned.append((chain, base))
        for lane in chain.lanes if of_lanes else ():
            here = _of_lane(config, whole, of_lanes.get(lane.path))
            assigned.append((replace(chain, lanes=(lane,), part=len(chain.lanes) > 1), here))
    return assigned


def _of_lane(config: DitCacheConfig, whole: str | None, name: str | None) -> DitCacheConfig:
    """What holds for a list: what is said of its transformer, then of itself."""
    base = config if whole is None else config.overridden(whole)
    return base if name is None else replace(base, overrides={name: config.overrides[name]}).overridden(name)


def _meant(name: str, chains: Sequence[Chain]) -> str:
    """The path of the transformer or list that a name is for."""
    lanes: list[BlockList] = [lane for chain in chains for lane in chain.lanes]
    paths = list(dict.fromkeys([chain.path for chain in chains if chain.path] + [lane.path for lane in lanes]))
    found = [path for path in paths if path == name] or [path for path in paths if path.endswith(f".{name}")]
    if len(found) != 1:
        what = "is none of" if not found else f"could be {' or '.join(found)}; there are"
        raise InvalidSetting(f"overrides: {name!r} {what} {', '.join(paths)}")
    return found[0]
