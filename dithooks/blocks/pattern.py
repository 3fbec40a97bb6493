"""The six ways in which most transformer blocks take and return their streams, by number."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ..errors import InvalidSetting


class ForwardPattern(Enum):
    """A block's arguments and outputs: h is the denoised stream, e the second stream, as a rule the text.

    Patterns are observed; declare one (``BlockAdapter``) only where observation is ambiguous. In patterns 0 to 2 both
    streams are arguments; in 3 to 5 only h is. The second output of 4 and 5 carries on no argument: a reused step
    returns it as it was last computed.

    Example:
        >>> ForwardPattern(1), ForwardPattern(1).text
        (<ForwardPattern.Pattern_1: 1>, '(h, e) -> (e, h)')
    """

    Pattern_0 = 0
    Pattern_1 = 1
    Pattern_2 = 2
    Pattern_3 = 3
    Pattern_4 = 4
    Pattern_5 = 5

    @property
    def takes_text(self) -> bool:
        """Whether e is an argument of the block."""
        return self.value <= 2

    @property
    def returns(self) -> str:
        """The streams that the block returns, in order, as letters h and e."""
        return ("he", "eh", "h", "h", "he", "eh")[self.value]

    @property
    def text(self) -> str:
        """The pattern in letters, such as ``(h, e) -> (e, h)``."""
        given = "(h, e)" if self.takes_text else "h"
        return f"{given} -> {f'({self.returns[0]}, {self.returns[1]})' if len(self.returns) == 2 else 'h'}"

    def carries(self, names: Sequence[str]) -> tuple[str | None, ...]:
        """Return the argument that each output carries on, ``None`` for none, given the names of a block's arguments.

        h is ``hidden_states`` and e is ``encoder_hidden_states``; without these names, the first and second argument.

        Raises:
            ValueError: the block has fewer arguments than the pattern has streams.
        """
        streams: dict[str, str] = {}
        for letter, usual in (("h", "hidden_states"), ("e", "encoder_hidden_states"))[: 1 + self.takes_text]:
            left = [name for name in names if name not in streams.values() and name != "encoder_hidden_states"]
            name = usual if usual in names else next(iter(left), None)
            if name is None:
                raise InvalidSetting(
                    f"forward pattern {self.value}, {self.text}, does not fit: the arguments are {[*names]}"
                )
            streams[letter] = name
        return tuple(streams.get(letter) for letter in self.returns)


def pattern_of(given: Sequence[str], carries: Sequence[str | None]) -> ForwardPattern | None:
    """Return the pattern of a block from its arguments' names and what its outputs carry on; ``None`` if none fits."""
    streams = [name for name in carries if name is not None]
    if len(streams) > 2 or not streams or not given or len(carries) > 2:
        return None
    if len(carries) == 1:
        return ForwardPattern(2 if "encoder_hidden_states" in given and streams[0] != "encoder_hidden_states" else 3)
    if len(streams) == 1:
        return ForwardPattern(4 if carries[0] is not None else 5)
    if sum(name.startswith("encoder_") for name in streams) != 1:
        return None
    return ForwardPattern(1 if streams[0].startswith("encoder_") else 0)
