"""The correction of what a transformer returns: a sum of its own output and of those of computed steps before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..blocks.containers import leaves_of, part_of, replaced, steps_of
from ..stats import warnings as wording
from .anchor import Anchor
from .arguments import Signature
from .batch_parts import combined_by_part
from .call import REUSE, Call
from .decider import CallDecider


class OutputCorrection:
    """The correction of one transformer's outputs, by the weights of a predictor.

    Example: with the weights (1.2, -0.2) at step 3, the pipeline is given 1.2 times what the transformer returns
    there, less 0.2 times what it returned at the computed step before.

    Args:
        decider: the decider of the calls.
    """

    def __init__(self, decider: CallDecider) -> None:
        self.decider, self.predictor = decider, decider.predictor

    def __call__(self, call: Call | None, output: Any, conclude: Callable[[], object]) -> Any:
        """Conclude a call, and return what takes the place of its output; ``None``: the output is used as it is.

        Args:
            call: the call, not committed yet; ``None`` for one that is not the cache's.
            output: of the transformer, which is not written into.
            conclude: commits the call; it may free stored outputs.
        """
        if call is None or call.stale or call.branch is None or call.run is None:
            conclude()
            return None
        signature: Signature = (*call.signature[:1], *call.branch.given.form)  # without additions between blocks
        tensors, earlier = floating_in(output), [each for each in call.branch.outputs if each.signature == signature]
        corrected = self._corrected(call, tensors, earlier)
        kept = None if call.mode is REUSE else self._copy(call, signature, tensors)
        conclude()
        if kept is not None and not call.stale and not call.run.finished:
            self._keep(call, [kept, *earlier])
        return None if corrected is None else with_tensors(output, corrected)

    def _corrected(self, call: Call, tensors: Sequence[Tensor], earlier: Sequence[Anchor]) -> dict[int, Tensor] | None:
        """Return the sum for each tensor of an output, by the tensor's id; ``None`` where none is planned or fits."""
        weights = self._weights(call, earlier)
        if weights is None:
            return None
        terms = earlier[: len(weights) - 1] if weights else ()
        if not weights or not tensors or not all(_fits(each, tensors) for each in terms):
            steps = [each.moment.step for each in earlier]
            self.decider.warn("unfitted", wording.output_is_not_corrected(self.decider.name, call.moment.step, steps))
            return None
        columns = zip(*(each.kept for each in terms), strict=True) if terms else [()] * len(tensors)
        by_part = self._by_part(call, tensors, earlier) if self.predictor.parts > 1 else []
        return {
            id(own): combined_by_part(by_part, (own, *column)) if by_part else combined(weights, (own, *column))
            for own, column in zip(tensors, columns, strict=True)
        }

    def _weights(self, call: Call, earlier: Sequence[Anchor]) -> tuple[float, ...] | None:
        """Return the weights; none at all where they, or the forecast of a reused step, are not as planned."""
        assert call.branch is not None
        predictor, is_forecast = self.decider.predictor_of(call.run, call.branch), call.mode is REUSE
        weights = predictor.output_weights([each.moment for each in earlier], call.moment, is_forecast)
        if weights and is_forecast:
            anchors = [anchor.moment for anchor in call.branch.anchors]
            if predictor.weights(anchors, call.moment) is None:
                return ()
        return weights

    def _by_part(self, call: Call, tensors: Sequence[Tensor], earlier: Sequence[Anchor]) -> list[tuple[float, ...]]:
        """Return the weights of each part of a batch, where these have weights of their own."""
        moments, is_forecast = [each.moment for each in earlier], call.mode is REUSE
        return self.decider.weights_by_part(
            call, tensors, lambda own: own.output_weights(moments, call.moment, is_forecast)
        )

    def _copy(self, call: Call, signature: Signature, tensors: Sequence[Tensor]) -> Anchor | None:
        """Copy a computed step's output, which the pipeline, or a repeat of the call, may write into."""
        if not self.predictor.outputs:
            return None
        assert call.run is not None
        copies = [tensor.clone() for tensor in tensors]
        return Anchor.keep(call.moment, signature, copies, None, None, is_checked=call.run.checks)

    def _keep(self, call: Call, outputs: Sequence[Anchor]) -> None:
        """Keep outputs of computed steps, the newest first, as far as they are of use."""
        branch, run, decider = call.branch, call.run, self.decider
        assert branch is not None
        assert run is not None
        branch.outputs = [*outputs[: self.predictor.outputs]]
        branch.update_nbytes()
        decider.log.hold(decider.bytes_held(), run.number, branch.history.number, branch.nbytes)


def combined(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ w_k x_k as a new tensor of the first one's dtype, added up in float32 at least.

    Example:
        >>> combined((1.5, -0.5), (torch.tensor([2.0]), torch.tensor([4.0])))
        tensor([1.])
    """
    own, *others = tensors
    total = own.to(torch.promote_types(own.dtype, torch.float32)) * weights[0]
    for tensor, weight in zip(others, weights[1:], strict=True):
        if weight != 0:
            total.add_(tensor, alpha=weight)
    return total.to(own.dtype)


def floating_in(output: Any) -> list[Tensor]:
    """Return the floating tensors of an output and its containers, each once, in their order."""
    found = {id(leaf): leaf for _, leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    return list(found.values())


def with_tensors(output: Any, tensors: Mapping[int, Tensor], above: tuple[Any, ...] = ()) -> Any:
    """Return an output of the same containers with some tensors replaced, and leave the given one as it is.

    Args:
        output: a tensor, or containers of some.
        tensors: what takes the place of a tensor, by the id of that.
        above: the containers around it: one that holds itself ends there.
    """
    if isinstance(output, Tensor):
        return tensors.get(id(output), output)
    steps = steps_of(output)
    if steps is None or any(output is each for each in above):
        return output
    parts = {step: part_of(output, step) for step in steps}
    made = {step: with_tensors(part, tensors, (*above, output)) for step, part in parts.items()}
    return replaced(output, {step: part for step, part in made.items() if part is not parts[step]})


def _fits(earlier: Anchor, tensors: Sequence[Tensor]) -> bool:
    """Return whether an earlier output has the form of this one, and is finite as far as that is known."""
    if list(map(_form, earlier.kept)) != list(map(_form, tensors)):
        return False
    check = earlier.check
    return check is None or check.is_out_of_reach or isfinite(check.peak)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
