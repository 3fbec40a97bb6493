"""Which argument each output of a block carries on: by where its outputs went, or as declared.

Identity comes first: an output that the next block receives as ``hidden_states`` carries on ``hidden_states``. Where
the model makes new tensors in between, the other blocks of the list decide; then the form, if only one argument has it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from ..errors import BlockError
from .block_io import BlockIO, may_become, show
from .observation import BlockCall, Observation, ObservedBlock
from .passed_parts import passed_parts, step_at, step_of
from .pattern import ForwardPattern


def block_io_of(observation: Observation, call: BlockCall, streams: Collection[str] = ()) -> BlockIO:
    """Determine which arguments a block carries on, and in what form it returns them.

    Args:
        observation: the calls of all blocks.
        call: the block's.
        streams: arguments that are streams though the block returns them as they are.

    Raises:
        WiringError: the outputs could carry on several arguments, or none.
    """
    block = observation.observed[call.index]
    passed = passed_parts(block.reader, call, lambda position: _carried(observation, call, position))
    kept = {position: name for position, name in passed.kept.items() if name not in streams}
    if odd := [what for position, what in call.odd.items() if position not in kept]:
        raise BlockError(
            f"{block.path} returns {', '.join(odd)}; tensors, alone or in tuples, dicts or dataclasses, are "
            "understood. Say where its streams are with BlockAdapter(patch_functor=...)"
        )
    carries, remark = _declared(observation, block, call) if block.pattern and block.strict else None, ""
    if carries is None:
        try:
            carries = tuple(
                None
                if form is None or position in kept
                else passed.kept.get(position) or _carried(observation, call, position)
                for position, form in enumerate(call.outputs)
            )
            remark = _otherwise(observation, block, call, carries)
        except BlockError:
            if block.pattern is None:
                raise
            carries = _declared(observation, block, call)
    twice = [name for name in carries if name is not None and carries.count(name) > 1]
    if twice:
        raise BlockError(f"{block.path}: two outputs seem to carry on the same argument, {twice[0]}: {_advice(call)}")
    new_forms = tuple(
        form if name is None and position not in kept else None
        for position, (form, name) in enumerate(zip(call.outputs, carries, strict=True))
    )
    for form, name in zip(call.outputs, carries, strict=True):
        if name is not None and form is not None and not (form[1].is_floating_point or form[1].is_complex):
            raise BlockError(
                f"{block.path} returns {name}, {show(form)}, as if it were a stream, and such have no residual: say "
                "where its streams are with BlockAdapter(patch_functor=...)"
            )
    if all(name is None for name in carries):
        seen = ", ".join(f"{name} {show(form)}" for name, form in call.inputs.items())
        raise BlockError(
            f"{block.path}: which argument does output 0, {', '.join(map(show, call.outputs[:1]))}, carry on? Its "
            f"arguments are {seen}; none is alike"
        )
    builder = call.output_builder
    if passed.containers:
        builder = builder.derived(passed.readers(block.reader), frozenset(kept))
    names = tuple(kept.get(position) for position in range(len(carries))) if kept else ()
    return BlockIO(block.reader, builder, carries, new_forms, remark, names)


def _otherwise(observation: Observation, block: ObservedBlock, call: BlockCall, carries: tuple[str | None, ...]) -> str:
    """Describe how a declared pattern differs from what was observed; empty if it does not."""
    if block.pattern is None:
        return ""
    with suppress(ValueError):  # zip: another number of them, or no such argument
        pairs = zip(_by_pattern(block.pattern, observation, call), carries, call.outputs, strict=True)
        if all(declared == name for declared, name, form in pairs if form is not None):
            return ""
    streams = ", ".join(map(str, carries))
    return (
        f"forward pattern {block.pattern.value}, {block.pattern.text}, was declared for {block.group}, but "
        f"{block.path} returns {len(carries)} value(s) that carry on {streams}: what was seen counts"
    )


def _declared(observation: Observation, block: ObservedBlock, call: BlockCall) -> tuple[str | None, ...]:
    """Return what the outputs carry on by the declared pattern, after checking it against forms and destinations."""
    assert block.pattern is not None
    pattern = f"forward pattern {block.pattern.value}, {block.pattern.text}"
    alike = call.next is not None and observation.observed[call.next.index].group == block.group
    if len(block.pattern.returns) != len(call.outputs):
        raise BlockError(
            f"{block.path} returns {len(call.outputs)} value(s), but {pattern}, says {len(block.pattern.returns)}"
        )
    try:
        carries = _by_pattern(block.pattern, observation, call)
    except ValueError as error:
        raise BlockError(f"{block.path}: {error}") from None
    for position, name in enumerate(carries):
        if name is None and alike and position in call.fed:
            raise BlockError(
                f"{block.path}: by {pattern}, output {position} is no stream, "
                f"but the model hands it to the next block as {call.fed[position]}"
            )
        output = call.outputs[position]
        if name is not None and output is not None and not may_become(call.inputs[name], output):
            raise BlockError(
                f"{block.path}: by {pattern}, output {position} carries on {name}, "
                f"but they are {show(call.outputs[position])} and {show(call.inputs[name])}"
            )
        if alike and name is not None and call.fed.get(position, name) != name:
            raise BlockError(
                f"{block.path}: by {pattern}, output {position} carries on {name}, "
                f"but the model hands it to the next block as {call.fed[position]}"
            )
    return tuple(name if call.outputs[p] is not None else None for p, name in enumerate(carries))


def _by_pattern(pattern: ForwardPattern, observation: Observation, call: BlockCall) -> tuple[str | None, ...]:
    """Return what the outputs carry on by a pattern; of outputs that are one tensor, the first stands for all.

    Where they are declared as several streams, it is the one that the model hands to the next block, or to this one.

    Raises:
        ValueError: the block has fewer arguments than the pattern has streams.
    """
    carries = list(pattern.carries(list(call.inputs)))
    if len(carries) == len(call.outputs):
        for twin, first in call.output_builder.twins:
            names = [name for name in (carries[first], carries[twin]) if name is not None]
            before = _before(observation, call)
            fed = [call.fed.get(first), *(before.fed.values() if before is not None else ())]
            carries[first], carries[twin] = next((name for name in [*fed, *names] if name in names), None), None
    return tuple(carries)


def _carried(observation: Observation, call: BlockCall, position: int) -> str | None:
    """Return the argument that output ``position`` carries on; ``None`` for an output that is no stream."""
    observed, block, form = observation.observed, observation.observed[call.index], call.outputs[position]
    # An argument of another dtype is as likely, if no other output has that dtype.
    others = [other for p, other in enumerate(call.outputs) if p != position]
    loosely = [
        n for n, other in call.inputs.items() if may_become(other, form) and (other == form or other not in others)
    ]
    alike = [name for name in loosely if call.inputs[name] == form] or loosely
    kin = [
        other
        for other in observation.calls
        if observed[other.index].cls is block.cls and len(other.outputs) == len(call.outputs)
    ]
    # Destinations of outputs, from the nearest blocks of this class whose next block is in the same list, its own list
    # first; destinations in another list, which may take the streams differently, only where nothing else is known.
    going_on = [
        other
        for other in kin
        if other.next is not None and observed[other.next.index].group == observed[other.index].group
    ]
    own = [other for other in going_on if observed[other.index].group == block.group and other.fed]
    fed: dict[int, str] = {}
    for other in [*sorted(own or going_on, key=lambda other: abs(other.index - call.index)), call]:
        fed = {**other.fed, **fed}
    # Another list may configure blocks of this class differently: what it shows has to agree with the values.
    if not own and any(call.near.get(p, name) != name for p, name in fed.items()):
        fed = {}
    if fed.get(position) in loosely:  # this block has an argument of the same name
        return fed[position]
    alike = [name for name in alike if name not in {to for p, to in fed.items() if p != position}]
    step = step_at(call, position)
    alike = [name for name in alike if step_of(block.reader, name) == step] or alike  # a field of the same name
    if call.next is None and (before := _before(observation, call)) is not None:
        alike = [name for name in alike if name in before.fed.values()] or alike
    if "hidden_states" in alike and len(call.outputs) == 1:
        return "hidden_states"
    if len(alike) == 1:
        return alike[0]
    carried = any(may_become(given, other) for other in others for given in call.inputs.values())
    if not loosely and position not in call.fed and carried:
        return None
    seen = ", ".join(f"{name} {show(other)}" for name, other in call.inputs.items())
    why = f"alike: {', '.join(alike or loosely)}: {_advice(call)}" if loosely else "none is alike"
    raise BlockError(
        f"{block.path}: which argument does output {position}, {show(form)}, carry on? Its arguments are {seen}; {why}"
    )


def _advice(call: BlockCall) -> str:
    """Name the declaration that would resolve the ambiguity."""
    if len(call.outputs) > 2:
        return "say where its streams are with BlockAdapter(patch_functor=...)"
    patterns = "0, (h, e) -> (h, e), or 1, (h, e) -> (e, h)" if len(call.outputs) == 2 else "2 or 3"
    return f"say which with BlockAdapter(forward_pattern=...), {patterns}"


def _before(observation: Observation, call: BlockCall) -> BlockCall | None:
    """Return the call before this one."""
    return next((other for other in observation.calls if other.next is call), None)
