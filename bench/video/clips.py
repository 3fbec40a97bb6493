"""The video model's training data: short clips of emoji that move over white, with captions that say how.

A clip is drawn from four random numbers, its emoji and its motion. Frames are sampled three times finer than they are
kept and then averaged, so that an emoji moves by fractions of a pixel and shrinks without losing thin lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from dithooks.demo.emoji import Emoji

FRAMES = 8
SIZE = 24
FINER = 3  # samples along each side of a pixel

# Pictures that stay apart from each other at a dozen pixels, by the name that the data gives them.
NAMES = (
    "cat face",
    "panda face",
    "frog face",
    "pig face",
    "fox face",
    "penguin",
    "octopus",
    "turtle",
    "tropical fish",
    "lady beetle",
    "butterfly",
    "red apple",
    "banana",
    "watermelon",
    "strawberry",
    "pineapple",
    "grapes",
    "carrot",
    "hamburger",
    "slice of pizza",
    "doughnut",
    "birthday cake",
    "taxi",
    "fire engine",
    "rocket",
    "sailboat",
    "sunflower",
    "maple leaf",
    "evergreen tree",
    "cactus",
    "snowman",
    "snowflake",
    "ghost",
    "robot face",
    "grinning face",
    "sun with face",
)

# Direction of travel in pixels, right and down.
TRAVELS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*TRAVELS, "growing", "shrinking", "turning")

SIDE = (13.0, 16.0)  # of an emoji that keeps its size, in pixels
SMALL, LARGE = (7.0, 9.0), (15.0, 17.0)  # at the two ends of growing and shrinking
TRAVEL = (6.0, 10.0)  # pixels from the first frame to the last
TURN = (2 * math.pi / 3, math.pi)  # clockwise, from upright
OUTSIDE = 1.0  # pixels by which an emoji's square may leave the picture


def caption(name: str, motion: str) -> str:
    """``"cat face moving left"``: what a clip is called."""
    return f"{name} {motion}"


def vocabulary() -> list[str]:
    """All words of all captions, sorted."""
    return sorted({word for part in (*NAMES, *MOTIONS) for word in part.split()})


class Clips:
    """Draws clips from pictures.

    Args:
        data: the pictures, as ``load_emoji`` reads them; those of ``names`` are used.
        names: which, by their first caption.

    Raises:
        ValueError: a name that the data doesn't have.
    """

    def __init__(self, data: Sequence[Emoji], names: Sequence[str] = NAMES) -> None:
        found = {emoji.captions[0]: emoji for emoji in data}
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"the data has no picture called {', '.join(map(repr, missing))}")
        self.names = tuple(names)
        pixels = torch.stack([torch.from_numpy(found[name].pixels.copy()) for name in names])
        # Darkness is zero on white, and so is what lies beyond a picture's edge.
        self.darkness = 1 - pixels.permute(0, 3, 1, 2).float() / 255

    def draw(self, emoji: torch.Tensor, motion: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """Clips, (n, frames, 3, height, width) in 0…1.

        Args:
            emoji: numbers into ``names``, (n,).
            motion: numbers into ``MOTIONS``, (n,).
            chance: (n, 4) in 0…1, for where, how large and how fast; equal numbers give equal clips.
        """
        x, y, side, angle = (part.flatten() for part in paths(motion, chance))
        scale = SIZE / side  # of the picture's coordinates, which run over -1…1 as the frame's do
        sine, cosine = angle.sin() * scale, angle.cos() * scale
        right, down = 2 * x / SIZE - 1, 2 * y / SIZE - 1
        rows = (cosine, sine, -(cosine * right + sine * down), -sine, cosine, sine * right - cosine * down)
        fine = SIZE * FINER
        source = self.darkness[emoji].repeat_interleave(FRAMES, 0)
        grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(source), 3, fine, fine], align_corners=False)
        frames = avg_pool2d(grid_sample(source, grid, padding_mode="zeros", align_corners=False), FINER)
        return (1 - frames).view(len(emoji), FRAMES, 3, SIZE, SIZE)

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """``count`` clips of any emoji and motion, and their captions."""
        emoji = torch.randint(len(self.names), (count,), generator=generator)
        motion = torch.randint(len(MOTIONS), (count,), generator=generator)
        chance = torch.rand(count, 4, generator=generator)
        pairs = zip(emoji.tolist(), motion.tolist(), strict=True)
        return self.draw(emoji, motion, chance), [caption(self.names[e], MOTIONS[m]) for e, m in pairs]


def paths(motion: torch.Tensor, chance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Centre from the left and the top, side of the emoji's square, clockwise angle: each (n, frames).

    The centre is in pixels of the frame, and such that the square stays inside but for ``OUTSIDE`` pixels.
    """
    time = torch.linspace(0, 1, FRAMES)
    direction = torch.tensor([TRAVELS.get(name, (0, 0)) for name in MOTIONS]).float()[motion]
    grows, shrinks, turns = ((motion == MOTIONS.index(name)).float() for name in MOTIONS[len(TRAVELS) :])
    place, size, speed = chance[:, :2], chance[:, 2], chance[:, 3]

    small, large, steady = (_between(*ends, size) for ends in (SMALL, LARGE, SIDE))
    changes = grows + shrinks
    first = grows * small + shrinks * large + (1 - changes) * steady
    last = grows * large + shrinks * small + (1 - changes) * steady
    side = torch.lerp(first[:, None], last[:, None], time)

    travel = direction * _between(*TRAVEL, speed)[:, None]
    room = (SIZE - side.amax(1, keepdim=True) - travel.abs() + 2 * OUTSIDE).clamp(min=0)
    middle = SIZE / 2 + (place - 0.5) * room
    centre = middle[:, None] + travel[:, None] * (time - 0.5)[None, :, None]
    angle = (turns * _between(*TURN, speed))[:, None] * time
    return centre[..., 0], centre[..., 1], side, angle


def _between(low: float, high: float, chance: torch.Tensor) -> torch.Tensor:
    return low + (high - low) * chance
