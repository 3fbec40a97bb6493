"""The decider of rows by a plan of a guided batch, whose parts are the rows of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config.cache_config import DitCacheConfig
from ..predictors.predictor import Predictor
from .arguments import CallArguments
from .batch_parts import repeated_argument
from .call import Call
from .decider import CallDecider
from .part_decider import PartDecider, compared


class RequestRows(CallArguments):
    """What a row is given: beside its form, until the call is over, the latents of all rows of its request.

    Args:
        form: of the row.
        batch: the latents of the whole call; ``None`` if these are no tensor of its rows.
        numbers: of the request's rows in it.
    """

    __slots__ = ("batch", "numbers")

    def __init__(self, form: CallArguments, batch: Tensor | None, numbers: Sequence[int]) -> None:
        super().__init__({}, frozenset())
        self.form, self.scales = form.form, form.scales
        self.batch, self.numbers = batch, numbers

    def latents_of_request(self) -> Tensor:
        """Return the latents of the request's rows, as the batch that they would be alone."""
        assert self.batch is not None
        return torch.cat([self.batch[each : each + 1] for each in self.numbers])


class RowPartDecider(PartDecider):
    """Decider of rows by a plan whose branches are the parts of a guided batch.

    Example: of a request's two rows, the first has the weights of the first branch and the second those of the second,
    if both have the same latents; two pictures without guidance have the weights for all.
    """

    def given_to_row(self, form: CallArguments, batch: CallArguments, numbers: Sequence[int]) -> RequestRows:
        """Return what a row is given.

        Args:
            form: of the row.
            batch: what the whole call is given.
            numbers: of the rows of its request.
        """
        latents = {**batch.latents, **batch.conditioning}.get(repeated_argument(self._model)[1])
        fits = latents is not None and latents.dim() and len(latents) > max(numbers)
        return RequestRows(form, latents if fits else None, numbers)

    def commit(self, call: Call) -> None:
        super().commit(call)
        if call.branch is not None and isinstance(call.branch.given, RequestRows):
            call.branch.given.batch = None  # the others' memory is not to be held as long as this request's

    def weights_by_part(
        self, call: Call, tensors: Sequence[Tensor], weights_of: Callable[[Predictor], tuple[float, ...] | None]
    ) -> list[tuple[float, ...]]:
        """Return the weights of the one row, where its request's rows have weights of their own."""
        weights = super().weights_by_part(call, tensors, weights_of)
        branch = call.branch
        if not weights or branch is None or not isinstance(branch.given, RequestRows):
            return []
        part = branch.history.number * len(weights) // len(branch.given.numbers)
        return weights[part : part + 1]

    def _parts(self, call: Call, tensors: Sequence[Tensor]) -> int:
        run, branch = call.run, call.branch
        if run is None or branch is None or not isinstance(branch.given, RequestRows) or branch.given.batch is None:
            return 1
        given, rows = branch.given, len(branch.given.numbers)
        if run.history.branches > rows:  # the others are in another call: which is which part is not known
            return 1
        form = torch.Size((rows, *branch.given.batch.shape[1:]))
        return compared(run, form, self.predictor.parts, given.latents_of_request)


def row_decider_for(config: DitCacheConfig) -> type[CallDecider]:
    """Return the kind of decider that rows by a configuration take."""
    return RowPartDecider if config.predictor.parts > 1 else CallDecider
