"""A user's declaration of where the blocks are and how they are called, where observation alone is ambiguous."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WrongType
from ..validation import shown
from .block_io import PatchFunctor
from .block_lists import Chain
from .discovery import find_chains, group, resolve
from .module_paths import modules_of, path_of
from .pattern import ForwardPattern


@dataclass(frozen=True, eq=False)
class BlockAdapter:
    """The blocks of a model, named in as much detail as needed; given to :func:`dit_cache` in place of the model.

    Options per list take one value for all lists, or a sequence with one entry (``None``: not declared) per list;
    sequences may be nested by transformer, as the lists may. Lists count in the order in which the model calls them.

    Args:
        pipe: a pipeline, whose scheduler determines the step. May be left out if ``transformer`` is given.
        transformer: one or several modules of the pipeline, themselves or by name; found if left out.
        blocks: lists of blocks, themselves or as dotted paths from ``pipe`` (without a pipeline, from
            ``transformer``); found if left out.
        forward_pattern: how the blocks take and return their streams, if that cannot be observed. Per list.
        patch_functor: reads and builds the streams of blocks that fit no pattern. Per list.
        params: a :class:`DitCacheConfig` per list: every list is then a range of its own, whose blocks count from 0,
            with its own schedule; for ``None``, the config given to ``dit_cache`` holds.
        has_separate_cfg: whether guidance takes two calls per step (``True``), distinguished by their order alone, or
            one (``False``), so that all calls of a step are one branch. Left out, calls are distinguished by their
            arguments. One for all, or one per transformer.
        auto: whether to find missing arguments; ``False`` makes them an error.
        strict: whether a forward pattern that contradicts observation is an error. With ``False``, observation
            prevails, the pattern decides where observation is ambiguous, and a contradiction causes a warning.

    Raises:
        TypeError: an entry is of the wrong type.
        ValueError: there is nothing to find the blocks in, or no blocks are given and ``auto`` is off.

    Example:
        >>> import torch
        >>> class Swaps(torch.nn.Module):  # nothing shows which output carries on which argument
        ...     def forward(self, image, text):
        ...         return text + 1, image + 2
        >>> model = torch.nn.Module()
        >>> model.blocks = torch.nn.ModuleList(Swaps() for _ in range(4))
        >>> BlockAdapter(transformer=model, blocks="blocks", forward_pattern=1).forward_pattern
        <ForwardPattern.Pattern_1: 1>
    """

    pipe: object = None
    transformer: nn.Module | str | Sequence[nn.Module | str] | None = None
    blocks: Any = None
    forward_pattern: Any = None
    patch_functor: Any = None
    params: Any = None
    has_separate_cfg: bool | Sequence[bool | None] | None = None
    auto: bool = True
    strict: bool = True

    def __post_init__(self) -> None:
        if self.pipe is None and self.transformer is None:
            raise InvalidSetting("BlockAdapter needs a pipe or a transformer: there is nothing to find blocks in")
        if self.blocks is None and not self.auto:
            raise InvalidSetting("BlockAdapter(auto=False) looks for nothing: give blocks, or auto=True")
        if isinstance(self.transformer, str) and self.pipe is None:
            raise InvalidSetting(f"transformer={shown(self.transformer)} is a name, but there is no pipe that has it")
        if self.blocks is not None and not list(flat(self.blocks)):
            raise InvalidSetting("blocks is an empty list: name at least one nn.ModuleList, or leave it out")
        object.__setattr__(self, "forward_pattern", _each(self.forward_pattern, _pattern))
        for name, kind in (("patch_functor", PatchFunctor), ("params", DitCacheConfig)):
            for item in flat(getattr(self, name)):
                if item is not None and not isinstance(item, kind):
                    raise WrongType(f"{name}: {shown(item)} ({type(item).__name__}) is not a {kind.__name__}")
        for item in flat(self.has_separate_cfg):
            if item is not None and not isinstance(item, bool):
                raise WrongType(f"has_separate_cfg: {shown(item)} is neither True, False nor None")

    @property
    def target(self) -> object:
        """The pipeline; without one, the transformer, or a namespace that holds several."""
        if self.pipe is not None:
            return self.pipe
        several = list(flat(self.transformer))
        return several[0] if len(several) == 1 else SimpleNamespace(**_numbered(several))

    def chains(self) -> list[tuple[Chain, DitCacheConfig | None]]:
        """Return the blocks as chains, each with its own config or ``None``.

        Raises:
            TypeError, ValueError: as :func:`~.discovery.find_chains`, or an option per list has another number of
                entries than there are lists.
        """
        target = self.target
        self._check()
        if self.blocks is None:
            found = [chain for chain in find_chains(target, None) if self._wanted(chain)]
            if not found:
                raise InvalidSetting(f"transformer={self._named()} is not among those that have lists of blocks")
            block_lists = [each for chain in found for each in chain.block_lists]
        else:
            block_lists = [resolve(target, item) for item in flat(self.blocks)]
            found = group(target, block_lists)
            foreign = [chain.name for chain in found if not self._wanted(chain)]
            if foreign:
                raise InvalidSetting(
                    f"blocks are those of {foreign}, not of transformer={self._named()}: give one of both"
                )
        patterns, functors, params = (
            _spread(name, getattr(self, name), block_lists) for name in ("forward_pattern", "patch_functor", "params")
        )
        declared = {
            each.path: replace(each, pattern=pattern, functor=functor, strict=self.strict)
            for each, pattern, functor in zip(block_lists, patterns, functors, strict=True)
        }
        own = dict(zip(declared, params, strict=True))
        separate = _spread("has_separate_cfg", self.has_separate_cfg, found)
        chains: list[tuple[Chain, DitCacheConfig | None]] = []
        for chain, separate_cfg in zip(found, separate, strict=True):
            members = [declared[each.path] for each in chain.block_lists]
            own_range = any(own[each.path] is not None for each in members)
            ranges = [[each] for each in members] if own_range else [members]
            for some in ranges:
                changed = replace(
                    chain, block_lists=tuple(some), separate_cfg=separate_cfg, part=len(ranges) > 1, rivals=()
                )
                chains.append((changed, own[some[0].path] if len(ranges) > 1 or len(members) == 1 else None))
        return chains

    def _check(self) -> None:
        """Refuse a transformer that is not part of the pipeline."""
        if self.pipe is None or self.transformer is None:
            return
        modules = modules_of(self.pipe)
        for item in flat(self.transformer):
            there = item in modules if isinstance(item, str) else path_of(self.pipe, item) is not None
            if not there:
                name = repr(item) if isinstance(item, str) else type(item).__name__
                raise InvalidSetting(f"{type(self.pipe).__name__} has no transformer {name}; it has {sorted(modules)}")

    def _named(self) -> str:
        return str([item if isinstance(item, str) else type(item).__name__ for item in flat(self.transformer)])

    def _wanted(self, chain: Chain) -> bool:
        """Whether a chain is of a transformer that is given."""
        wanted = list(flat(self.transformer))
        inside = set(chain.owner.modules())
        return self.transformer is None or any(
            chain.path.split(".")[0] == item
            if isinstance(item, str)
            else item is chain.owner or item in inside or path_of(item, chain.owner) is not None
            for item in wanted
        )


def flat(value: Any) -> Iterable[Any]:
    """Iterate over the entries of nested sequences; a list of blocks is an entry."""
    if isinstance(value, Sequence) and not isinstance(value, (str, nn.ModuleList)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_each(item, change) for item in value]
    return change(value)


def _pattern(value: Any) -> ForwardPattern | None:
    if value is None or isinstance(value, ForwardPattern):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise WrongType(
            f"forward_pattern: {shown(value)} ({type(value).__name__}) is neither a ForwardPattern nor 0 to 5"
        )
    try:
        return ForwardPattern(operator.index(value))  # NumPy's integers, too
    except ValueError:
        raise InvalidSetting(f"forward_pattern={value}: there are the patterns 0 to 5") from None


def _spread(name: str, value: Any, over: Sequence[Any]) -> list[Any]:
    """Return one entry for each list or transformer, given one for all or one for each."""
    if not isinstance(value, Sequence):
        return [value] * len(over)
    entries = list(flat(value))
    if len(entries) != len(over):
        paths = [item.path for item in over]
        raise InvalidSetting(f"{name} has {len(entries)} entries, but there are {len(over)}: {paths}")
    return entries


def _numbered(modules: Sequence[Any]) -> dict[str, Any]:
    return {f"transformer_{number}": module for number, module in enumerate(modules, 1)}
