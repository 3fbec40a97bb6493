"""What the UNet is trained on: a few emoji, looking left or right, in different places of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.video.clips import NAMES
from dithooks.demo.emoji import SIZE, Emoji

from .model import MARGIN


class Pictures:
    """Emoji of some names, from which pictures are drawn by chance.

    Args:
        data: all emoji.
        names: the names of those that are used.

    Raises:
        ValueError: there is no emoji of a name.
    """

    def __init__(self, data: Sequence[Emoji], names: Sequence[str] = NAMES) -> None:
        known = {caption: emoji for emoji in reversed(data) for caption in reversed(emoji.captions)}
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"there is no picture called {missing[0]!r}")
        self.names = tuple(names)
        pixels = torch.stack([torch.from_numpy(known[name].pixels.copy()) for name in names])
        self.large = pad(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, (MARGIN,) * 4, value=1.0)

    @property
    def words(self) -> list[str]:
        """Of all names, each once, in order."""
        return sorted({word for name in self.names for word in name.split()})

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """Pictures (count, 3, 32, 32) in −1…1, their names, and the corners of their crops, (count, 2)."""
        which = torch.randint(len(self.names), (count,), generator=generator)
        corners = torch.randint(2 * MARGIN + 1, (count, 2), generator=generator)
        turned = torch.rand(count, generator=generator) < 0.5
        large = torch.where(turned.view(-1, 1, 1, 1), self.large[which].flip(3), self.large[which])
        made = [
            picture[:, top : top + SIZE, left : left + SIZE]
            for picture, (top, left) in zip(large, corners.tolist(), strict=True)
        ]
        return torch.stack(made), [self.names[number] for number in which], corners
