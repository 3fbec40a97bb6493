"""One call of a whole transformer on a batch whose rows belong to several requests: it is made with some rows only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..environment.torch_api import OutOfMemoryError
from ..errors import InvalidSetting, WiringError
from ..stats import warnings as wording
from .arguments import CallArguments
from .batch_dimensions import RowSelection
from .decider import CallDecider
from .output_form import OutputForm, form_of
from .replay import Replay
from .row import PlacedRow
from .row_states import RowCall, RowStates, corrections_of
from .row_survey import RowArguments


class OutputRows:
    """The rows of the calls of one transformer that is left out as a whole.

    Args:
        decider: of the transformer's cache.
        model: the transformer.
        states: the state of each row.
    """

    def __init__(self, decider: CallDecider, model: nn.Module, states: RowStates) -> None:
        self._decider, self._model, self._states = decider, model, states
        self._dimensions = RowArguments(decider.name, lambda: decider.latents_name)
        self._is_sliced = True  # until a call with some rows has given another output

    def call(
        self,
        placed: Sequence[PlacedRow],
        arguments: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watch: Callable[[tuple[Any, ...], dict[str, Any]], Callable[[], list[str]]],
    ) -> Any:
        """Return the output for a batch, of which some rows are computed and the others forecast.

        Args:
            placed: the rows.
            arguments: of the transformer, by name.
            args: its positional arguments.
            kwargs: its named arguments.
            watch: notes what a call is given; what that returns finds what the call has written into it.

        Raises:
            InvalidSetting: the batch has another number of rows.
        """
        latents = arguments.get(self._decider.latents_name or "")
        if not isinstance(latents, Tensor) or not latents.dim() or latents.shape[0] != len(placed):
            what = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise InvalidSetting(
                f"{self._decider.name}: cache.rows names {len(placed)} row{'s' * (len(placed) != 1)}, and the latents "
                f"are {what}: give one for each row of the batch, which is the latents' first dimension"
            )
        rows = self._states.decide(placed, arguments)
        forms = [self._form_of(row) for row in rows]
        computed = [row.number for row in rows if not row.is_reused]
        output, form, tensors = None, next((each for each in forms if each is not None), None), list[Tensor]()
        if computed:
            output, selection = self._computed(computed, len(rows), args, kwargs, watch, rows)
            taken = form_of(output, CallArguments({}, frozenset()))
            whole = len(selection)
            if taken is None or any(each.dim() == 0 or each.shape[0] != whole for each in taken[1]):
                self._decider.warn("output", wording.output_cannot_be_made(self._decider.name, type(output).__name__))
                return self._unsplit(rows, computed, output, args, kwargs)
            form, tensors = taken[0], list(taken[1])
            if whole > len(computed):
                tensors = [each.index_select(0, torch.tensor(computed, device=each.device)) for each in tensors]
        assert form is not None
        made = self._assembled(rows, computed, tensors)
        self._keep(rows, computed, form, tensors)
        if output is not None and len(computed) == len(rows) and not corrections_of(rows):
            result = output
        else:
            result = form.build(self._corrected(rows, made))
        self._states.commit(rows)
        return result

    def knows(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call may be made with some of its rows only: it is known which arguments hold them."""
        return self._is_sliced and self._dimensions.is_known(batch, args, kwargs)

    def learn(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Find out which arguments hold rows, in a further call with a few of them, unless one has shown that it fails.

        Args:
            batch: number of rows.
            args: positional arguments of a call with all of them.
            kwargs: its named arguments.
            output: of that call.
        """
        self._dimensions.note(batch, args, kwargs)
        if not self._is_sliced:
            return
        try:
            self._try(args, kwargs, output)
        except OutOfMemoryError:  # the call itself has gone well: nothing but a saving is lost
            self._is_sliced = False

    def some(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: RowSelection
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with some of its rows, where it is known which hold them."""
        return self._dimensions.taken(args, kwargs, rows)

    def _form_of(self, row: RowCall) -> OutputForm | None:
        """Return the form of a reused row's output; if it has none, compute the row."""
        branch = row.call.branch
        if not row.is_reused or branch is None:
            return None
        if branch.output_form is None:
            row.compute()
        return branch.output_form

    def _computed(
        self,
        numbers: Sequence[int],
        batch: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watch: Callable[[tuple[Any, ...], dict[str, Any]], Callable[[], list[str]]],
        rows: Sequence[RowCall],
    ) -> tuple[Any, RowSelection]:
        """Call the transformer with the rows to be computed, or with all where it is not known how; return which."""
        everything = RowSelection(range(batch), batch)
        chosen = RowSelection(numbers, batch)
        is_some = len(numbers) < batch and self._is_sliced
        if is_some and not self._dimensions.is_known(batch, args, kwargs):
            is_some = False
            output, written = self._watched(args, kwargs, watch)
            self._try(args, kwargs, output)
        elif is_some:
            output, written = self._watched(*self._dimensions.taken(args, kwargs, chosen), watch)
        else:
            self._dimensions.note(batch, args, kwargs)
            output, written = self._watched(args, kwargs, watch)
        if written:  # the call has done more than its output shows, and must not be left out
            for number in numbers:
                rows[number].call.range = None
        return output, chosen if is_some else everything

    def _watched(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Any) -> tuple[Any, list[str]]:
        written = watch(args, kwargs)
        output = self._model(*args, **kwargs)
        return output, written()

    def _try(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Find out which arguments hold rows; if that is unclear, call the transformer with all of them always."""

        def call(some_args: tuple[Any, ...], some_kwargs: dict[str, Any]) -> Any:
            return Replay(self._model, some_args, some_kwargs)(eager=False).output

        if not Replay(self._model, args, kwargs).safe:
            self._is_sliced = False
            return
        try:
            self._dimensions.learn(call, args, kwargs, output)
        except WiringError:
            self._is_sliced = False

    def _assembled(self, rows: Sequence[RowCall], computed: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the whole batch's output."""
        places = {number: place for place, number in enumerate(computed)}
        count = len(tensors) or len(rows[0].call.deltas)
        made = []
        for slot in range(count):
            parts = [
                row.call.deltas[slot] if row.is_reused else tensors[slot][places[row.number] : places[row.number] + 1]
                for row in rows
            ]
            made.append(torch.cat(parts))
        return made

    def _keep(
        self, rows: Sequence[RowCall], computed: Sequence[int], form: OutputForm, tensors: Sequence[Tensor]
    ) -> None:
        """Keep what each computed row has returned."""
        own_shapes = tuple((torch.Size((1, *shape[1:])), dtype, device) for shape, dtype, device in form.shapes)
        own = replace(form, shapes=own_shapes)
        for place, number in enumerate(computed):
            call = rows[number].call
            branch, captured = call.branch, call.range
            if captured is None or branch is None:
                continue
            branch.take_form(own)
            captured.deltas = tuple(each[place : place + 1].detach().clone() for each in tensors)
            captured.complete = True

    def _corrected(self, rows: Sequence[RowCall], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors with the rows corrected whose plans say so."""
        made = list(tensors)
        for number, correction in corrections_of(rows).items():
            own = tuple(each[number : number + 1] for each in made)
            found = correction(rows[number].call, own, _nothing)
            for each, value in zip(made, found or (), strict=False):
                each[number : number + 1] = value
        return made

    def _unsplit(
        self,
        rows: Sequence[RowCall],
        computed: Sequence[int],
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return an output whose rows are unknown: that of a call with all of them. Nothing is kept."""
        if len(computed) < len(rows):
            for row in rows:
                if row.is_reused:
                    row.compute()
            output = self._model(*args, **kwargs)
        for row in rows:
            row.call.range = None
        self._states.commit(rows)
        return output


def _nothing() -> None:
    """Conclude nothing: rows are committed together."""
