"""A cache on the model of a ComfyUI workflow, which is attached while a sampler draws, and taken off again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from ...errors import InvalidSetting, WrongType
from ...validation import shown
from .run_report import RunReport
from .sampler_clock import SamplerSession, entered, sampler_session

KEY = "dithooks"
OTHERS = {"easycache": "EasyCache or LazyCache"}  # by the entry that they have in transformer_options


@dataclass(eq=False)
class ModelCache(ABC):
    """What a node puts on a clone of a model: it draws each run of a sampler in its own way.

    Two wrappers do all of it: one around the sampler's loop, which is entered when the model is loaded and patched, and
    left before anything else can use it, also by an exception; and one around each call of the model, which notes the
    step and branch. The model's other clones, and the model between two runs, have nothing of it.

    Args:
        report: of the runs drawn so far, shared by all clones of the clone.
    """

    report: RunReport = field(default_factory=RunReport, init=False)

    @abstractmethod
    def draw(self, model: nn.Module, draw: Callable[[], Any], session: SamplerSession) -> Any:
        """Draw with the model, and return what was drawn."""

    def put_on(self, patcher: Any) -> Any:
        """Return a clone of a model that is cached so. Of several caches on one model, the last one counts.

        Raises:
            WrongType: it is no model of ComfyUI's.
            InvalidSetting: its ComfyUI is too old.
        """
        if not hasattr(getattr(patcher, "model", None), "diffusion_model"):
            raise WrongType(f"model={shown(patcher)} is not a diffusion model of ComfyUI's: connect that of a loader")
        wrappers = {"SAMPLER_SAMPLE": self.around_sampler, "APPLY_MODEL": self.around_call}
        kinds = vars(import_module("comfy.patcher_extension").WrappersMP)
        if wrappers.keys() - kinds.keys():
            raise InvalidSetting("this ComfyUI has no wrappers around samplers and models: update it")
        clone = patcher.clone()
        for name, wrapper in wrappers.items():
            clone.remove_wrappers_with_key(kinds[name], KEY)
            clone.add_wrapper_with_key(kinds[name], KEY, wrapper)
        clone.set_attachments(KEY, self)
        return clone

    def around_sampler(self, executor: Any, guider: Any, sigmas: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a sampler's loop with the model cached: a wrapper of the kind ``SAMPLER_SAMPLE``."""
        options = given.get("model_options", {}).get("transformer_options", {})
        for entry, name in OTHERS.items():
            if entry in options:
                raise InvalidSetting(f"{name} is at work on this model, too: take its node off, or that of dithooks")

        def draw() -> Any:
            return executor(guider, sigmas, given, *args, **kwargs)

        session = SamplerSession(sigmas.tolist())
        if not session.levels:
            return draw()
        with entered(session):
            return self.draw(guider.inner_model.diffusion_model, draw, session)

    def around_call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Note where in the sampler's run a call stands: a wrapper of the kind ``APPLY_MODEL``."""
        session = sampler_session()
        if session is not None:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, dict) and "uuids" in each]
            options = given[0] if given else {}
            sigma = options.get("sigmas")
            group = getattr(getattr(executor.class_obj, "current_patcher", None), "current_hooks", None)
            hooks = getattr(group, "hooks", ())
            session.place_call(args[0], options, args[1] if sigma is None else sigma, hooks)
        return executor(*args, **kwargs)


def report_of(patcher: Any) -> RunReport:
    """Return the report of the cache on a model.

    Raises:
        InvalidSetting: nothing is.
    """
    cache = patcher.get_attachment(KEY)
    if not isinstance(cache, ModelCache):
        raise InvalidSetting("this model has no cache of dithooks: connect what 'dithooks: Apply plan' hands on")
    return cache.report
