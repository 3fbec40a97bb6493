"""Where the blocks are and how they are called, said by the user: for what observation alone can't settle."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WrongType
from .block_io import PatchFunctor
from .block_lists import Chain, Expected
from .discovery import find_chains, group, resolve
from .module_paths import modules_of, path_of
from .pattern import ForwardPattern


@dataclass(frozen=True, eq=False)
class BlockAdapter:
    """Names the blocks of a model, in as much detail as needed; given to :func:`dit_cache` in place of the model.

    What is per list can be given once, for all lists, or as a sequence with one entry (``None``: nothing said) for
    each list; sequences may be nested by transformer, as the lists may. Lists count in the order in which the model
    calls them.

    Args:
        pipe: a pipeline; its scheduler tells the step. May be left out if ``transformer`` is given.
        transformer: one of its modules or several, themselves or by name; left out, they are found.
        blocks: lists of blocks, themselves or as dotted paths from ``pipe`` (without one, from ``transformer``); left
            out, they are found.
        forward_pattern: how the blocks take and return their streams, if that cannot be observed. Per list.
        patch_functor: how to read and build them, for blocks that fit no pattern. Per list.
        params: a :class:`DitCacheConfig` per list: then every list is a range of its own, whose blocks count from 0,
            with its own schedule; where it is ``None``, ``dit_cache``'s config holds.
        has_separate_cfg: guidance by two calls per step (``True``), told apart by their order alone, or by one
            (``False``), so that all calls of a step are alike. Left out, calls are told apart by what they are given.
            One for all, or one per transformer.
        auto: find what is not given. ``False``: an error instead.
        strict: a forward pattern that does not fit what is observed is an error. ``False``: what is observed counts,
            the pattern is asked where that is not clear, and one that turns out otherwise is remarked upon.
        expected: an :class:`~dithooks.blocks.block_lists.Expected`: what is believed of the runs, to be told where they
            turn out otherwise. One for all, or one per transformer.

    Raises:
        TypeError: an entry is of the wrong type.
        ValueError: nothing to find the blocks in, or they are not given and ``auto`` is off.

    Example:
        >>> import torch
        >>> class Swaps(torch.nn.Module):  # nothing tells which output carries on which argument
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
    expected: Expected | Sequence[Expected | None] | None = None

    def __post_init__(self) -> None:
        if self.pipe is None and self.transformer is None:
            raise InvalidSetting("BlockAdapter needs a pipe or a transformer: there is nothing to find blocks in")
        if self.blocks is None and not self.auto:
            raise InvalidSetting("BlockAdapter(auto=False) looks for nothing: give blocks, or auto=True")
        if isinstance(self.transformer, str) and self.pipe is None:
            raise InvalidSetting(f"transformer={self.transformer!r} is a name, but there is no pipe that has it")
        if self.blocks is not None and not list(flat(self.blocks)):
            raise InvalidSetting("blocks is an empty list: name at least one nn.ModuleList, or leave it out")
        object.__setattr__(self, "forward_pattern", _each(self.forward_pattern, _pattern))
        for name, kind in (("patch_functor", PatchFunctor), ("params", DitCacheConfig)):
            for item in flat(getattr(self, name)):
                if item is not None and not isinstance(item, kind):
                    raise WrongType(f"{name}: {item!r} ({type(item).__name__}) is not a {kind.__name__}")
        for item in flat(self.has_separate_cfg):
            if item is not None and not isinstance(item, bool):
                raise WrongType(f"has_separate_cfg: {item!r} is neither True, False nor None")
        for item in flat(self.expected):
            if item is not None and not isinstance(item, Expected):
                raise WrongType(f"expected: {item!r} ({type(item).__name__}) is not an Expected")

    @property
    def target(self) -> object:
        """The pipeline, else the transformer, or a stand-in for a pipeline of several."""
        if self.pipe is not None:
            return self.pipe
        several = list(flat(self.transformer))
        return several[0] if len(several) == 1 else SimpleNamespace(**_numbered(several))

    def chains(self) -> list[tuple[Chain, DitCacheConfig | None]]:
        """The blocks, with the config of those that have one of their own.

        Raises:
            TypeError, ValueError: as :func:`~.discovery.find_chains`, or the numbers of lists and of what
                is given per list differ.
        """
        target = self.target
        self._check()
        if self.blocks is None:
            found = [chain for chain in find_chains(target, None) if self._wanted(chain)]
            if not found:
                raise InvalidSetting(f"transformer={self._named()} is not among those that have lists of blocks")
            lanes = [lane for chain in found for lane in chain.lanes]
        else:
            lanes = [resolve(target, item) for item in flat(self.blocks)]
            found = group(target, lanes)
            strange = [chain.name for chain in found if not self._wanted(chain)]
            if strange:
                raise InvalidSetting(
                    f"blocks are those of {strange}, not of transformer={self._named()}: give one of both"
                )
        patterns, functors, params = (
            _spread(name, getattr(self, name), lanes) for name in ("forward_pattern", "patch_functor", "params")
        )
        declared = {
            lane.path: replace(lane, pattern=pattern, functor=functor, strict=self.strict)
            for lane, pattern, functor in zip(lanes, patterns, functors, strict=True)
        }
        own = dict(zip(declared, params, strict=True))
        separate = _spread("has_separate_cfg", self.has_separate_cfg, found)
        expected = _spread("expected", self.expected, found)
        chains: list[tuple[Chain, DitCacheConfig | None]] = []
        for chain, by_two, believed in zip(found, separate, expected, strict=True):
            here = [declared[lane.path] for lane in chain.lanes]
            alone = [[lane] for lane in here] if any(own[lane.path] is not None for lane in here) else [here]
            for some in alone:  # what is wrong of one range's runs is wrong of all: once is enough
                told = believed if some is alone[0] else None
                changed = replace(chain, lanes=tuple(some), separate_cfg=by_two, expected=told, part=len(alone) > 1)
                chains.append((changed, own[some[0].path] if len(alone) > 1 or len(here) == 1 else None))
        return chains

    def _check(self) -> None:
        """That every transformer that is given is part of the pipeline."""
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
        wanted = list(flat(self.transformer))
        inside = set(chain.owner.modules())
        return self.transformer is None or any(
            chain.path.split(".")[0] == item
            if isinstance(item, str)
            else item is chain.owner or item in inside or path_of(item, chain.owner) is not None
            for item in wanted
        )


def flat(value: Any) -> Iterable[Any]:
    """Entries of sequences within sequences; a list of blocks is an entry."""
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
        raise WrongType(f"forward_pattern: {value!r} ({type(value).__name__}) is neither a ForwardPattern nor 0 to 5")
    try:
        return ForwardPattern(operator.index(value))  # NumPy's integers, too
    except ValueError:
        raise InvalidSetting(f"forward_pattern={value}: there are the patterns 0 to 5") from None


def _spread(name: str, value: Any, over: Sequence[Any]) -> list[Any]:
    """One entry for each list or transformer, from one for all or one for each."""
    if not isinstance(value, Sequence):
        return [value] * len(over)
    entries = list(flat(value))
    if len(entries) != len(over):
        paths = [item.path for item in over]
        raise InvalidSetting(f"{name} has {len(entries)} entries, but there are {len(over)}: {paths}")
    return entries


def _numbered(modules: Sequence[Any]) -> dict[str, Any]:
    return {f"transformer_{number}": module for number, module in enumerate(modules, 1)}
