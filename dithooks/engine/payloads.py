"""The attachments of a handle, by what each of them forecasts: the residual of a range, or a transformer's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..blocks.adapter import BlockAdapter
from ..blocks.block_lists import Chain
from ..blocks.discovery import Blocks
from ..blocks.model_kinds import why_not_a_trunk
from ..blocks.module_paths import enclosing_modules
from ..blocks.registry import chains_of
from ..blocks.whole_models import models_of
from ..config.cache_config import DitCacheConfig
from ..config.cache_plan import CachePlan
from ..errors import InvalidSetting
from ..stats.types import CallRecord
from ..stats.warnings import no_call_was_left_to, no_call_was_seen
from ..validation import shown
from .attachment import Attachment, check, prepare
from .clock import StepSettings
from .hooks import caches_of
from .output_attachment import OutputAttachment, check_output, prepare_output, refuse_cached, unwrapped
from .output_cache import OutputCache, output_caches_of
from .protocols import Integrations
from .range_cache import RangeCache
from .rank_consensus import RankConsensus
from .watched_method import module_with

AnyAttachment = Attachment | OutputAttachment
AnyCache = RangeCache | OutputCache


class HandleSettings(NamedTuple):
    """What a user has given to attach a cache with, beside the configuration.

    Args:
        target: the pipeline, model or adapter.
        scheduler: a function that returns the current scheduler, or ``None``.
        verify: whether the first residual is tested on its own call.
        consensus: the ranks that decide together; ``None`` if this rank decides alone.
        on_decision: a callback for the record of each decision.
        step_settings: the user's settings of what identifies the steps.
        method: name of the method that stands for the transformer's call, if there is one.
    """

    target: Any
    scheduler: Callable[[], Any]
    verify: bool
    consensus: RankConsensus | None
    on_decision: Callable[[CallRecord], object] | None
    step_settings: StepSettings
    method: str | None

    @property
    def held(self) -> object:
        """The pipeline or model."""
        return self.target.target if isinstance(self.target, BlockAdapter) else self.target

    def method_of(self, chain: Chain) -> tuple[nn.Module, str] | None:
        """Return the module and method that stand for the call of a chain's transformer; ``None``: its own call."""
        return None if self.method is None else (module_with(self.method, self.held, chain.owner), self.method)


def chains_for(
    config: DitCacheConfig | CachePlan, target: object, blocks: Blocks, chosen: Collection[str]
) -> list[tuple[Chain, DitCacheConfig | None]]:
    """Return the transformers of a target; those without lists of blocks only if the config forecasts outputs.

    Raises:
        TypeError, ValueError: as :func:`~dithooks.blocks.registry.chains_of`.
    """
    find = models_of if _forecasts_outputs(config) else chains_of
    return [(unwrapped(chain), own) for chain, own in find(target, blocks, chosen)]


def check_payload(chain: Chain, config: DitCacheConfig, settings: HandleSettings, mine: list[nn.Module]) -> None:
    """Raise if a transformer or range cannot be cached, before anything is touched; ``mine``: about to be removed.

    Raises:
        WrongType, WiringError, InvalidSetting: as :func:`~.attachment.check`, or
            :func:`~.output_attachment.check_output`.
    """
    if config.payload == "output":
        if settings.method is not None:
            raise InvalidSetting(
                f"method={shown(settings.method)} and payload='output' exclude each other: a method is watched, "
                "and not left out. Cache the residual, or let the loop call the transformer"
            )
        check_output(chain, config, settings.target, mine)
        return
    if not chain.block_lists:
        raise InvalidSetting(
            why_not_a_trunk(chain.owner) or f"{chain.name} has no list of blocks: give it payload='output'"
        )
    check(chain, config, mine)
    refuse_cached(chain, mine)
    settings.method_of(chain)


def prepare_payload(
    chain: Chain, config: DitCacheConfig, settings: HandleSettings, integrations: Integrations
) -> AnyAttachment:
    """Return the attachment of a range or transformer, created without touching the model.

    Raises:
        WrongType: a block or the transformer cannot be given a stand-in.
        InvalidSetting: another library's cache is at work in the model.
    """
    target, scheduler, verify, consensus, on_decision, step_settings, _ = settings
    held, waits = settings.held, bool(chain.rivals)
    around = enclosing_modules(held, chain.owner)
    if config.payload == "output":
        return prepare_output(
            chain, config, target, scheduler, integrations, consensus, on_decision, step_settings, around, waits
        )
    method = settings.method_of(chain)
    return prepare(
        chain, config, scheduler, verify, integrations, consensus, on_decision, step_settings, around, waits, method
    )


def unseen(attachments: Sequence[AnyAttachment]) -> list[str]:
    """Word that no call was seen at all."""
    names = [each.log.name for each in attachments]
    of_outputs = all(isinstance(each, OutputAttachment) for each in attachments)
    return [(no_call_was_left_to if of_outputs else no_call_was_seen)(names)]


def all_caches_of(modules: Iterable[nn.Module]) -> Sequence[RangeCache | OutputCache]:
    """Return the caches on some modules, each once: found by hooks, or of transformers with a stand-in."""
    listed = list(modules)
    return [*caches_of(listed), *output_caches_of(listed)]


def _forecasts_outputs(config: DitCacheConfig | CachePlan) -> bool:
    """Return whether a configuration or plan forecasts the output of any transformer."""
    if isinstance(config, CachePlan):
        return any(piece.payload == "output" for piece in config.pieces)
    return "output" in (config.payload, *(changes.get("payload") for changes in config.overrides.values()))
