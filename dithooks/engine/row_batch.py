"""One call of a batch whose rows belong to several requests: its blocks run on the rows to be computed alone.

At each block these rows are gathered from what the model hands on, and what comes out is put back among the others. So
what the model does between two blocks, it does to the whole batch, as ever. A row that is reused has h_in + Δ̂ from the
range's first block on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.stream_transforms import Stream
from ..blocks.wiring import Wiring
from ..errors import RunMismatch
from .additions import arriving
from .batch_dimensions import BatchDimensions, RowSelection
from .call import AFTER, CAPTURE, INSIDE, MISMATCH, PLAIN, REUSE, ROWS, Call
from .output_correction import floating_in, with_tensors
from .residual import apply_residual, measured_outputs, take_residual
from .row_states import RowCall, RowStates, capture_of, corrections_of, mask_among


class RowBatch:
    """The rows of one call of a range.

    Args:
        name: of the transformer, for messages.
        call: of the whole batch.
        rows: of the batch, decided.
        states: their states.
        dimensions: where the rows are in each block's arguments.
        arguments: of the transformer, by name.
    """

    def __init__(
        self,
        name: str,
        call: Call,
        rows: Sequence[RowCall],
        states: RowStates,
        dimensions: BatchDimensions,
        arguments: Mapping[str, Any],
    ) -> None:
        self.name, self.call, self.rows, self.states, self.dimensions = name, call, rows, states, dimensions
        self.looks = True in [row.looks for row in rows]  # whether the change of a row is to be measured
        self._find_mask = mask_among(arguments, len(rows))
        self._wiring: Wiring | None = None
        self._may_change: tuple[bool, ...] = ()  # by output, whether the width of its stream may
        # Of a batch in which some rows are computed and some reused:
        self._computed = self._reused = RowSelection([], len(rows))
        self._entry: list[Tensor] | None = None  # −h_in of the computed rows
        self._results: list[Tensor] = []  # h_in + Δ̂ of the reused rows
        self._predicted: tuple[Tensor, ...] = ()  # Δ̂ of these
        self._deltas: tuple[Tensor, ...] = ()  # Δ of the computed rows
        self._measured: tuple[Tensor, ...] = ()  # h_out of theirs, of the streams that are looked at

    # -- the range's first block -----------------------------------------------------------------------------------

    def settle(self, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Settle what each row does, now that the range's first block is reached, and with it the call's mode."""
        call, io = self.call, wiring.block_ios[0]
        streams = [io.read(name, args, kwargs) for name in wiring.entry]
        self._wiring = wiring
        measured = {wiring.entry[number] for number in wiring.measured}
        names = [wiring.entry[bridge.number] if type(bridge) is Stream else None for bridge in wiring.outputs]
        self._may_change = tuple(name is not None and name not in measured for name in names)
        batch = len(self.rows)
        if not all(isinstance(stream, Tensor) and stream.dim() and stream.shape[0] == batch for stream in streams):
            for row in self.rows:  # a call that leaves a stream out, say
                if row.is_reused:
                    row.compute()
            call.mode = PLAIN
            return
        forms = _forms(wiring, streams)
        for row in self.rows:
            if row.is_reused:
                self._fit(row, wiring, streams, forms)
        reused, computed = self._numbers()
        if reused and computed and not self._begin_mixed(wiring, streams, reused, computed):
            for number in reused:
                self.rows[number].compute()
            reused = []
        if not reused:
            call.range = capture_of(self.rows)
            call.mode = PLAIN if call.range is None else CAPTURE
        elif not computed:
            call.deltas = tuple(map(_joined, zip(*(row.call.deltas for row in self.rows), strict=True)))
            call.mode = REUSE

    def _numbers(self) -> tuple[list[int], list[int]]:
        kinds = [row.is_reused for row in self.rows]
        return [n for n, reused in enumerate(kinds) if reused], [n for n, reused in enumerate(kinds) if not reused]

    def _fit(self, row: RowCall, wiring: Wiring, streams: Sequence[Tensor], forms: Sequence[torch.Size | None]) -> None:
        """Bring a row's residual to the widths of this call's streams; if it does not fit, compute the row.

        Args:
            row: reused so far.
            wiring: of the range.
            streams: of the whole batch.
            forms: that a row's residuals have to have; ``None`` of one that the streams do not determine.
        """
        deltas = row.call.deltas
        if [delta.shape for delta in deltas] == forms:  # as nearly always: then none is ``None``
            return
        if len(deltas) != len(forms):
            row.compute()
            return
        shapes = [form or torch.Size((1, *delta.shape[1:])) for form, delta in zip(forms, deltas, strict=True)]
        fitted = self.states.refitted(row, deltas, shapes, self._may_change, self._find_mask)
        alone = [stream[row.number : row.number + 1] for stream in streams]
        if fitted is None or (None in forms and apply_residual(wiring, alone, fitted) is None):
            row.compute()
        else:
            row.call.deltas = fitted

    def _begin_mixed(
        self, wiring: Wiring, streams: Sequence[Tensor], reused: Sequence[int], computed: Sequence[int]
    ) -> bool:
        """Prepare to run the blocks for some rows only; return whether the residuals of the others fit."""
        batch = len(self.rows)
        self._computed, self._reused = RowSelection(computed, batch), RowSelection(reused, batch)
        columns = zip(*(self.rows[number].call.deltas for number in reused), strict=True)
        self._predicted = tuple(map(_joined, columns))
        results = apply_residual(wiring, [self._reused.of(stream, 0) for stream in streams], self._predicted)
        if results is None:
            return False
        self._results = results
        for number in reused:
            self.rows[number].call.deltas = ()
        if not self.call.counted:
            self._predicted = ()
        if any(self.rows[number].captures for number in computed):
            self._entry = [self._computed.of(stream, 0).neg_() for stream in streams]
        return True

    # -- blocks that run for some rows -----------------------------------------------------------------------------

    def run(self, offset: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a block's output for the whole batch, with the block run on the rows to be computed.

        Where it is not known which part of an argument is whose row, it runs on all of them; what comes of the others
        is not used.
        """
        wiring = self._wiring
        if wiring is None or self.call.stage is not INSIDE:
            return block(*args, **kwargs)
        io, last = wiring.block_ios[offset], len(wiring.block_ios) - 1
        few = self.dimensions.taken(offset, args, kwargs, self._computed)
        if few is None:
            output = block(*args, **kwargs)
            if self.call.counted:  # the additions are unknown then, and so no residual is kept
                self._entry = None
        else:
            if self.call.counted and self.call.sums is not None:
                self.call.sums.enter(offset, *few)
            output = block(*few[0], **few[1])
        values = list(io.take(output))
        if len(values) != len(io.carries):
            raise RunMismatch(f"{self.name}: a block returned something of another form than in the first call")
        if few is None:
            values = [self._computed.of(value, 0) if isinstance(value, Tensor) else value for value in values]
        elif self.call.counted and self.call.sums is not None and offset < last:
            self.call.sums.leave(offset, output)
        if offset == last:
            self.call.stage = AFTER
            self._leave(wiring, values)
            others = self._left(wiring, args, kwargs)
        else:
            others = self._handed(wiring, offset, args, kwargs)
        whole = [self._whole(value, other) for value, other in zip(values, others, strict=True)]
        return io.build(whole, args, kwargs)

    def _handed(
        self, wiring: Wiring, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, bool] | None]:
        """Return what a block before the last one hands on of the reused rows, and whether it is of all rows."""
        io, found = wiring.block_ios[offset], list[tuple[Tensor, bool] | None]()
        results = dict(zip(wiring.hands_on, self._results, strict=True)) if wiring.hands_on and not offset else {}
        for name in io.carries:
            if name in results:
                found.append((results[name], False))
            else:
                value = None if name is None else io.read(name, args, kwargs)
                found.append((value, True) if isinstance(value, Tensor) else None)
        return found

    def _left(self, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, bool] | None]:
        """Return what leaves the range of the reused rows: h_in + Δ̂, and what was added on the way where it counts."""
        results, counted = self._results, self.call.counted
        if counted and any(counted):
            arrived = arriving(wiring, args, kwargs)
            results = [
                self._with_additions(wiring, number, arrived[number]) if counts else results[number]
                for number, counts in enumerate(counted)
            ]
        remaining = iter(results)
        return [None if bridge is None else (next(remaining), False) for bridge in wiring.leave]

    def _with_additions(self, wiring: Wiring, number: int, arrived: Any) -> Tensor:
        delta = self._predicted[number]
        value = self._reused.of(arrived, 0) if isinstance(arrived, Tensor) else None
        if value is None or value.shape != delta.shape:
            raise RunMismatch(
                f"{self.name}: the model brought a stream to the range's last block in another form than on the "
                "computed step. Choose other blocks"
            )
        if not (wiring.hands_on and len(wiring.block_ios) > 1 and wiring.is_handed_on[number]):
            value = value.to(delta.dtype) + delta
        return value.to(delta.dtype)

    def _leave(self, wiring: Wiring, values: Sequence[Any]) -> None:
        """Take Δ of the computed rows."""
        if self._entry is not None:
            if any(row.decider.policy.metric == "rate" for row in self.rows):
                self._measured = measured_outputs(wiring, values) or ()
            self._deltas, self._entry = take_residual(wiring, self._entry, values), None
            if self.call.counted and self.call.sums is not None:
                self._deltas = self.call.sums.taken_from(self._deltas, self.call.counted)

    def _whole(self, value: Any, other: tuple[Tensor, bool] | None) -> Any:
        """Return the whole batch of an output: of the rows that were computed, and of the others."""
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0 or value.shape[0] != len(self._computed):
            raise RunMismatch(
                f"{self.name}: a block of {len(self._computed)} rows returned {list(value.shape)}: what it makes of "
                "each is unknown. Choose blocks that keep the batch in the first dimension"
            )
        index = self._computed.index(value.device)
        if other is not None and other[1] and other[0].shape[1:] == value.shape[1:]:
            return other[0].to(value.device, value.dtype).index_copy(0, index, value)
        form = len(self.rows), *value.shape[1:]
        is_known = other is not None and not other[1]
        whole = value.new_empty(form) if is_known else value.new_zeros(form)
        whole.index_copy_(0, index, value)
        if other is not None and is_known:
            whole.index_copy_(0, self._reused.index(value.device), other[0].to(value.device, value.dtype))
        return whole

    # -- the transformer returns -----------------------------------------------------------------------------------

    def finish(self, output: Any) -> Any:
        """Commit each row; return the output with corrected rows, or ``None`` where none is corrected."""
        call = self.call
        if call.stage is INSIDE and call.mode is ROWS:
            raise RunMismatch(
                f"{self.name}: rows were reused, but the model did not call the range's last block: the output lacks "
                "the range's effect. Choose a range that ends before blocks that are skipped at times"
            )
        if call.mode is MISMATCH:
            for row in self.rows:
                row.compute()
        self._hand_out()
        corrected = self._corrected(output)
        self.states.commit(self.rows)
        return corrected

    def _hand_out(self) -> None:
        """Give each computed row its residual."""
        captured, places = self.call.range, list(range(len(self.rows)))
        deltas, outputs = tuple[Tensor, ...](), tuple[Tensor, ...]()
        if self.call.mode is ROWS:
            deltas, outputs, places = self._deltas, self._measured, self._computed.rows
        elif captured is not None and captured.complete:
            deltas, outputs = captured.deltas, captured.output or ()
        if not deltas or any(delta.shape[:1] != (len(places),) for delta in deltas):
            return
        for place, number in enumerate(places):
            row = self.rows[number]
            if row.call.range is not None:
                # A copy: the others' memory is not to be held as long as this row's is.
                own = deltas if len(places) == 1 else _row_of(deltas, place)
                row.call.range.deltas, row.call.range.complete = own, True
                row.call.range.output = _row_of(outputs, place) if outputs and row.looks else None
                self.states.unify(row, own, self._may_change, self._find_mask)

    def _corrected(self, output: Any) -> Any:
        """Return the output with each row corrected by its plan; ``None`` where none is."""
        corrections = corrections_of(self.rows)
        if not corrections:
            return None
        tensors = floating_in(output)
        if any(tensor.dim() == 0 or tensor.shape[0] != len(self.rows) for tensor in tensors):
            tensors = []
        made: dict[int, Tensor] = {}
        for number, correction in corrections.items():
            own = tuple(tensor[number : number + 1] for tensor in tensors)
            found = correction(self.rows[number].call, own, _nothing)
            for tensor, value in zip(tensors, found or (), strict=False):
                if id(tensor) not in made:
                    made[id(tensor)] = tensor.clone()
                made[id(tensor)][number : number + 1] = value
        return with_tensors(output, made) if made else None


def _forms(wiring: Wiring, streams: Sequence[Tensor]) -> list[torch.Size | None]:
    """Return the shape of one row's residuals; ``None`` of one whose stream changes its form within the range."""
    return [
        torch.Size((1, *streams[bridge.number].shape[1:])) if type(bridge) is Stream else None
        for bridge in wiring.outputs
    ]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _row_of(tensors: Sequence[Tensor], place: int) -> tuple[Tensor, ...]:
    return tuple(tensor[place : place + 1].clone() for tensor in tensors)


def _nothing() -> None:
    """Conclude nothing: rows are committed together."""
