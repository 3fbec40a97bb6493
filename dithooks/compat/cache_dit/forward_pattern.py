"""cache-dit's ``ForwardPattern``: the patterns of this library, with the properties that cache-dit has of each."""

from __future__ import annotations

from enum import Enum

from ...blocks.pattern import ForwardPattern as Pattern

STREAMS = {"h": "hidden_states", "e": "encoder_hidden_states"}


class ForwardPattern(Enum):
    """A block's arguments and outputs, by number, as in :class:`dithooks.ForwardPattern`, which is taken as well.

    Example:
        >>> ForwardPattern.Pattern_1.In, ForwardPattern.Pattern_1.Out
        (('hidden_states', 'encoder_hidden_states'), ('encoder_hidden_states', 'hidden_states'))
    """

    Pattern_0 = 0
    Pattern_1 = 1
    Pattern_2 = 2
    Pattern_3 = 3
    Pattern_4 = 4
    Pattern_5 = 5

    def __index__(self) -> int:
        return self.value

    @property
    def Return_H_First(self) -> bool:
        """Whether the block returns two streams, the denoised one first."""
        return Pattern(self.value).returns == "he"

    @property
    def Return_H_Only(self) -> bool:
        """Whether the block returns the denoised stream alone."""
        return Pattern(self.value).returns == "h"

    @property
    def Forward_H_only(self) -> bool:
        """Whether the denoised stream is the only one among the block's arguments."""
        return not Pattern(self.value).takes_text

    @property
    def In(self) -> tuple[str, ...]:
        """The arguments that are streams, in order."""
        return tuple(STREAMS.values())[: 1 + Pattern(self.value).takes_text]

    @property
    def Out(self) -> tuple[str, ...]:
        """The streams that the block returns, in order."""
        return tuple(STREAMS[letter] for letter in Pattern(self.value).returns)

    @property
    def Supported(self) -> bool:
        """Whether such blocks can be cached: always."""
        return True

    @staticmethod
    def supported_patterns() -> list[ForwardPattern]:
        """Return all patterns."""
        return list(ForwardPattern)
