"""cache-dit's ``BlockAdapter`` and its registry, translated into this library's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, TypeVar

from torch import nn

from ...blocks.adapter import BlockAdapter as Adapter
from ...blocks.adapter import flat
from ...blocks.block_io import PatchFunctor as Reader
from ...blocks.module_paths import walk
from ...blocks.registry import BlockAdapterRegistry as Registry
from ...blocks.registry import chains_of
from ...errors import InvalidSetting, WrongType
from ...handle import handles_of
from ...inspection.model_table import classes
from ...validation import shown
from .configs import check_fields
from .functors import PatchFunctor
from .modifiers import ParamsModifier

AdapterFactory = TypeVar("AdapterFactory", bound=Callable[..., Any])
PREFIXES = (
    "transformer",
    "single_transformer",
    "blocks",
    "layers",
    "single_stream_blocks",
    "double_stream_blocks",
)


@dataclass(eq=False)
class BlockAdapter:
    """The blocks of a model, named for :func:`enable_cache`.

    Options per list of blocks take one value for all lists or a sequence with one entry per list, nested by
    transformer or not.

    Args:
        pipe: a pipeline; without one, the calls' ``timestep`` argument determines the step.
        transformer: one or several modules of the pipeline.
        blocks: the lists of blocks; may be left out with ``auto`` or ``blocks_name``.
        blocks_name: names of the attributes that hold the lists, if ``blocks`` is left out.
        forward_pattern: how blocks take and return their streams. This is observed; the pattern decides only where
            observation is ambiguous, and a wrong pattern causes a warning.
        params_modifiers: settings that differ, per list.
        patch_functor: rewrites the transformers first; :func:`disable_cache` undoes that.
        has_separate_cfg: whether guidance takes two calls per step. This is observed; a wrong value causes a warning.
        auto: whether to find the lists.

    The other fields are accepted and have no effect: ``unique_blocks_name``, ``dummy_blocks_names``,
    ``check_forward_pattern``, ``check_num_outputs``, ``allow_prefixes``, ``check_prefixes``, ``allow_suffixes``,
    ``check_suffixes``, ``blocks_policy`` and ``skip_post_init``.

    Raises:
        TypeError: there is no such field, or one is of the wrong type.
        ValueError: there is neither a pipeline nor a transformer, or there are no blocks.
    """

    pipe: Any = None
    transformer: Any = None
    blocks: Any = None
    blocks_name: Any = None
    unique_blocks_name: Any = field(default_factory=list)
    dummy_blocks_names: Any = field(default_factory=list)
    forward_pattern: Any = None
    params_modifiers: Any = None
    check_forward_pattern: bool | None = None
    check_num_outputs: bool = False
    patch_functor: PatchFunctor | Reader | None = None
    has_separate_cfg: bool | None = None
    auto: bool = False
    allow_prefixes: Sequence[str] = PREFIXES
    check_prefixes: bool = True
    allow_suffixes: Sequence[str] = ("TransformerBlock",)
    check_suffixes: bool = False
    blocks_policy: str = "max"
    skip_post_init: bool = False

    def __new__(cls, *args: Any, **values: Any) -> BlockAdapter:
        check_fields(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        functor = self.patch_functor
        if functor is not None and not isinstance(functor, (PatchFunctor, Reader)):
            raise WrongType(f"patch_functor: {shown(functor)} ({type(functor).__name__}) is not a PatchFunctor")
        if self.has_separate_cfg not in (None, True, False):
            raise WrongType(f"has_separate_cfg={shown(self.has_separate_cfg)} is neither True, False nor None")
        self.plain()

    def plain(self) -> Adapter:
        """Translate the adapter into this library's own, without configurations.

        Raises:
            TypeError, ValueError: as :class:`dithooks.BlockAdapter`.
        """
        return Adapter(
            pipe=self.pipe,
            transformer=self.transformer,
            blocks=self._named() if self.blocks is None and self.blocks_name else self.blocks,
            forward_pattern=self.forward_pattern,
            patch_functor=self.patch_functor if isinstance(self.patch_functor, Reader) else None,
            auto=self.auto,
            strict=False,
        )

    @staticmethod
    def assert_normalized(adapter: BlockAdapter) -> None:
        """Do nothing: an adapter is checked when it is made."""

    @staticmethod
    def is_cached(target: object) -> bool:
        """Return whether something is cached in an adapter's modules, a pipeline, a transformer, or each of a list."""
        if isinstance(target, Sequence) and not isinstance(target, str):
            return bool(target) and all(map(BlockAdapter.is_cached, target))
        return bool(handles_of(target.plain() if isinstance(target, BlockAdapter) else target))

    def modifiers(self, given: object, over: bool) -> list[ParamsModifier]:
        """Return the modifier of each list in order: the adapter's own, or else the given ones.

        Args:
            given: the modifiers given to :func:`enable_cache`.
            over: whether the given modifiers replace the adapter's own.

        Raises:
            TypeError: an entry is not a :class:`ParamsModifier`.
        """
        own = self.params_modifiers
        chosen = given if own is None or (over and given is not None) else own
        found = [] if chosen is None else list(flat(chosen))
        for each in found:
            if each is not None and not isinstance(each, ParamsModifier):
                raise WrongType(f"params_modifiers: {shown(each)} ({type(each).__name__}) is not a ParamsModifier")
        return found

    def transformers(self) -> list[Any]:
        """Return the given transformers, else the pipeline's.

        Raises:
            ValueError: the pipeline has no transformer.
        """
        if self.transformer is not None:
            return list(flat(self.transformer))
        if getattr(self.pipe, "transformer", None) is None:
            raise InvalidSetting(f"{type(self.pipe).__name__} has no transformer: give BlockAdapter(transformer=...)")
        return [self.pipe.transformer]

    def _named(self) -> list[nn.ModuleList]:
        """Return the lists that ``blocks_name`` names."""
        owners = self.transformers()
        names = [self.blocks_name] if isinstance(self.blocks_name, str) else self.blocks_name
        each = names if len(owners) > 1 and len(names) == len(owners) else [names] * len(owners)
        return [walk(owner, name) for owner, own in zip(owners, each, strict=True) for name in flat(own)]


class BlockAdapterRegistry:
    """Adapters by the beginning of a pipeline's class name, kept in :class:`dithooks.BlockAdapterRegistry`.

    Example:
        >>> @BlockAdapterRegistry.register("TwoStreams")
        ... def two_streams(pipe, **kwargs):
        ...     return BlockAdapter(pipe=pipe, transformer=pipe.transformer, auto=True, **kwargs)
        >>> BlockAdapterRegistry.unregister("TwoStreams")
    """

    @classmethod
    def register(cls, name: str, supported: bool = True) -> Callable[[AdapterFactory], AdapterFactory]:
        """Decorate a function that makes the adapter of a pipeline whose class's name begins with ``name``.

        Args:
            name: of a pipeline's class, or of a transformer's; for a transformer, the function receives an object that
                has it as ``transformer``.
            supported: whether to register the function at all.

        Raises:
            ValueError: the name has an adapter already.
        """

        def decorate(make: AdapterFactory) -> AdapterFactory:
            if supported:
                Registry.register(f"{name}*")(_Registered(make))
            return make

        return decorate

    @classmethod
    def unregister(cls, name: str) -> None:
        """Remove an adapter.

        Raises:
            KeyError: the name has no adapter.
        """
        Registry.unregister(f"{name}*")

    @classmethod
    def is_supported(cls, pipe_or_module: object) -> bool:
        """Return whether a pipeline or transformer has an adapter, or lists of blocks that are found without one."""
        try:
            return bool(chains_of(adapter_of(pipe_or_module).plain(), None))
        except (TypeError, ValueError):
            return False

    @classmethod
    def get_adapter(cls, pipe_or_module: object, **fields: Any) -> BlockAdapter | None:
        """Return the adapter that :func:`enable_cache` would take: a registered one, or one that finds the lists.

        Args:
            pipe_or_module: a pipeline or a transformer.
            **fields: fields of the adapter to set.

        Returns:
            The adapter; ``None`` if the pipeline or transformer is not supported.

        Raises:
            TypeError: there is no such field.
        """
        check_fields(BlockAdapter, fields)
        return replace(adapter_of(pipe_or_module), **fields) if cls.is_supported(pipe_or_module) else None

    @classmethod
    def supported_pipelines(cls) -> tuple[int, list[str]]:
        """Return the number and names of the known models: registered beginnings of names, and tried classes.

        The latter are the transformer classes of diffusers that were tried; what can be cached of each is in
        ``docs/models.md``. Other models are looked at in the same way, and need no name here.
        """
        known = [*(name.removesuffix("*") for name in Registry.names()), *classes()]
        return len(known), known


class _Registered:
    """A registered function: makes this library's adapter when called, and cache-dit's by ``theirs``."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, model: Any) -> Adapter:
        return self.theirs(model).plain()

    def theirs(self, model: Any) -> BlockAdapter:
        """Make the registered adapter of a pipeline or a transformer."""
        alone = isinstance(model, nn.Module)
        adapter = self.make(SimpleNamespace(transformer=model) if alone else model)
        if not isinstance(adapter, BlockAdapter):
            raise WrongType(f"{shown(self.make)}, which is registered, made {shown(adapter)}, not a BlockAdapter")
        return replace(adapter, pipe=None) if alone else adapter


def adapter_of(pipe_or_adapter: object) -> BlockAdapter:
    """Return an adapter for what :func:`enable_cache` was given: itself, a registered one, or one that finds the lists.

    Raises:
        TypeError: ``pipe_or_adapter`` is an adapter of :mod:`dithooks` itself.
    """
    if isinstance(pipe_or_adapter, BlockAdapter):
        return pipe_or_adapter
    if isinstance(pipe_or_adapter, Adapter):
        raise WrongType("this is a dithooks.BlockAdapter, which goes with dit_cache; here, give one of this module's")
    registered = Registry.hint_for(pipe_or_adapter)
    if isinstance(registered, _Registered):
        return registered.theirs(pipe_or_adapter)
    if isinstance(pipe_or_adapter, nn.Module):
        return BlockAdapter(transformer=pipe_or_adapter, auto=True)
    return BlockAdapter(pipe=pipe_or_adapter, auto=True)
