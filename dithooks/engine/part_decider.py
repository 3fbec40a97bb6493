"""The decider of calls on a guided batch, whose equal parts have weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Size, Tensor, nn

from ..config.cache_config import DitCacheConfig
from ..predictors.predictor import Predictor
from .anchor import sum_by_part
from .arguments import CallArguments
from .batch_parts import is_repeated, repeated_argument
from .call import Call
from .decider import CallDecider
from .run import Branch, Run


class PartDecider(CallDecider):
    """Decider of calls on a guided batch, whose equal parts have weights of their own.

    Example: with guidance by one call on a batch of both, the forecast of its first half is the sum by the weights
    of the first branch, and of its second half that by those of the second.
    """

    def _predicted(self, call: Call, branch: Branch) -> tuple[Tensor, ...]:
        newest = branch.anchors[0]
        fitting = [anchor for anchor in branch.anchors if anchor.signature == newest.signature]
        moments = [anchor.moment for anchor in fitting]
        weights = self.weights_by_part(call, newest.kept, lambda own: own.weights(moments, call.moment))
        if not weights:
            return super()._predicted(call, branch)
        largest = [max(map(abs, column)) for column in zip(*weights, strict=True)]
        if newest.check is not None and newest.check.is_narrow and self._is_beyond(call, fitting, largest):
            return ()
        return sum_by_part(fitting[: len(largest)], weights)

    def predictor_of(self, run: Run | None, branch: Branch) -> Predictor:
        return self.predictor  # calls of a step are no parts

    def weights_by_part(
        self, call: Call, tensors: Sequence[Tensor], weights_of: Callable[[Predictor], tuple[float, ...] | None]
    ) -> list[tuple[float, ...]]:
        count = self.predictor.parts
        found = [weights_of(self.predictor.of_branch(number, count)) for number in range(count)]
        known, shared = [each for each in found if each], weights_of(self.predictor)
        is_own = len(known) == len(found) and any(each != shared for each in known)
        return known if is_own and self._parts(call, tensors) == count else []  # asked last: it waits for the device

    def _parts(self, call: Call, tensors: Sequence[Tensor]) -> int:
        """Return of how many parts with weights of their own a call's batch is made; 1: it is not, or not known."""
        run, branch = call.run, call.branch
        if run is None or branch is None:
            return 1
        count = parts_of(self._model, run, branch, self.predictor.parts)
        latents = repeated_latents(self._model, branch.given)
        return 1 if latents is None or any(each.shape[:1] != latents.shape[:1] for each in tensors) else count


def parts_of(model: nn.Module, run: Run, branch: Branch, count: int, again: bool = False) -> int:
    """Return of how many equal parts the batch of a run's calls is made; 1: it is not of so many, or not known.

    Args:
        model: the transformer.
        run: whose latents are compared once, which waits for the device.
        branch: of the call.
        count: of parts that are asked for.
        again: compare them once more.
    """
    latents = repeated_latents(model, branch.given)
    if latents is None or run.history.branches > 1:
        return 1
    return compared(run, latents.shape, count, lambda: latents, again)


def compared(run: Run, form: Size, count: int, latents: Callable[[], Tensor], again: bool = False) -> int:
    """Return of how many equal parts a run's latents are, which are compared once for each form: ``count``, or 1."""
    if again or run.parts is None or run.parts[0] != form:
        run.parts = form, count if is_repeated(latents(), count) else 1
    return run.parts[1]


def repeated_latents(model: nn.Module, given: CallArguments) -> Tensor | None:
    """Return the argument of a call whose parts are compared; ``None``: it is no tensor, or is not given."""
    return {**given.latents, **given.conditioning}.get(repeated_argument(model)[1])


def decider_for(config: DitCacheConfig) -> type[CallDecider]:
    """Return the kind of decider that a configuration takes."""
    return PartDecider if config.predictor.parts > 1 else CallDecider
