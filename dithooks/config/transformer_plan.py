"""The plan of one transformer: its range, its steps, and the weights of each reused step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from ..errors import InvalidSetting, WrongType
from ..policies.conditional import Conditional, check_conditional
from ..policies.mask import Mask
from ..predictors.fitted import BranchWeights, Fitted
from ..stats.step_pictures import sign_of
from ..validation import brief, check_choice, check_count, check_text, set_field, shown

Payload = Literal["residual", "output"]  # the forecast of a reused step: of the range, or of the transformer
PAYLOADS: tuple[Payload, ...] = ("residual", "output")


@dataclass(frozen=True, repr=False)
class TransformerPlan:
    """The plan of one transformer: its range, its steps, and the weights of each reused step.

    Args:
        path: path of the transformer from the target; "" for the target itself.
        first: first block of the range, counted over the transformer's lists.
        blocks: number of blocks in the range.
        total: number of blocks of the transformer.
        steps: 1 (computed) or 0 (reused) for each step of the run, the first a 1.
        coefficients: weights of each reused step, as in :class:`Fitted`; ``None`` where the step is computed.
        sigmas: time of each step; ``None`` where it is not known.
        axis: what the times are: ``"sigma"``, ``"timestep"`` or ``"step"``.
        called: the step at which the transformer is called first, and the step after its last call: (0, 14) for the
            first of two experts. The steps outside are 1. ``None``: it is called at all steps.
        payload: what the coefficients forecast: ``"residual"`` of the range, or ``"output"`` of the whole transformer,
            whose call is left out; ``first`` is 0 and ``blocks`` is ``total`` then.
        corrections: weights of each step at which the transformer's output is corrected, as in :class:`Fitted`;
            ``None`` where it is used as it is, and for all steps if none is corrected.
        branches: the weights of each branch of guidance, where they have weights of their own, as in :class:`Fitted`.
        others: plans of the same range that were fitted for other numbers of steps: they count in a run that is theirs,
            and in one near it (:class:`Mask`, :class:`Fitted`).
        in_batch: whether the branches are equal parts of the batch of a step's only call, as in :class:`Fitted`.
        more_ranges: plans of further ranges of the same transformer, which begin behind this one: at a step at which
            this range is reused and the last one computed, the tail of the blocks runs. They have coefficients alone.
        conditional: computed steps at which one branch of guidance alone is computed, with ``payload="output"``; they
            may be corrected, and later sums use what they gave, as at any computed step. ``None``: all are computed.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range, or does not fit the others.

    Example:
        >>> weights = (None, None, (1.5, -0.5), None)
        >>> piece = TransformerPlan("transformer", 1, 4, 8, (1, 1, 0, 1), weights, (1.0, 0.8, 0.6, 0.3))
        >>> piece.policy
        Mask(steps=(1, 1, 0, 1), sigmas=(1.0, 0.8, 0.6, 0.3), dynamic=None)
        >>> piece.saved  # 4 of 8 blocks, at one step of four
        0.125
    """

    path: str
    first: int
    blocks: int
    total: int
    steps: tuple[int, ...]
    coefficients: tuple[tuple[float, ...] | None, ...]
    sigmas: tuple[float, ...] | None
    axis: str = "sigma"
    called: tuple[int, int] | None = None
    payload: Payload = field(default="residual", metadata={"written": "where given"})
    corrections: tuple[tuple[float, ...] | None, ...] | None = field(default=None, metadata={"written": "where given"})
    branches: tuple[BranchWeights, ...] = field(default=(), metadata={"written": "where given"})
    others: tuple[TransformerPlan, ...] = field(default=(), repr=False, metadata={"written": "where given"})
    in_batch: bool = field(default=False, metadata={"written": "where given"})
    more_ranges: tuple[TransformerPlan, ...] = field(default=(), repr=False, metadata={"written": "where given"})
    conditional: Conditional | None = field(default=None, metadata={"written": "where given"})

    def __post_init__(self) -> None:
        set_field(self, "path", check_text("path", self.path, empty=True))
        for name, least in (("first", 0), ("blocks", 1), ("total", 1)):
            set_field(self, name, check_count(name, getattr(self, name), least))
        if self.first + self.blocks > self.total:
            raise InvalidSetting(f"first={self.first} and blocks={self.blocks} reach past the end: total={self.total}")
        steps: Any = self.steps
        steps = steps.tolist() if hasattr(steps, "tolist") else steps
        if not isinstance(steps, Iterable) or isinstance(steps, str):
            raise WrongType(f"steps must be a 1 or 0 for each step, not {shown(self.steps)}")
        bits = tuple(int(bit) if bit in (0, 1) else -1 for bit in steps)
        if -1 in bits or bits[:1] != (1,):
            raise InvalidSetting(
                f"steps={shown(self.steps)}: give 1 (computed) or 0 (reused) for each step, the first a 1"
            )
        fitted = Fitted(self.coefficients, self.sigmas, self.corrections, self.branches, in_batch=self.in_batch)
        set_field(self, "steps", bits)
        set_field(self, "coefficients", fitted.coefficients)
        set_field(self, "sigmas", fitted.sigmas)
        set_field(self, "corrections", fitted.corrections)
        set_field(self, "branches", fitted.branches)
        set_field(self, "in_batch", fitted.in_batch)
        if len(self.coefficients) != len(bits):
            raise InvalidSetting(f"coefficients has {len(self.coefficients)} entries, but there are {len(bits)} steps")
        for step, (bit, weights) in enumerate(zip(bits, self.coefficients, strict=True)):
            if bool(bit) != (weights is None):
                raise InvalidSetting(
                    f"step {step} is {'computed (1), but has' if bit else 'reused (0), but has no'} coefficients"
                )
        check_choice("axis", self.axis, ("sigma", "timestep", "step"))
        self._check_payload()
        if self.axis == "sigma" and any(sigma < 0 for sigma in self.sigmas or ()):
            raise InvalidSetting(
                f"sigmas={self.sigmas}: a noise level is not negative; give axis if these are other times"
            )
        if self.called is not None:
            set_field(self, "called", _span(self.called, len(bits)))
            self._check_called()
        self._check_conditional()
        self._check_others()
        self._check_more_ranges()

    @property
    def policy(self) -> Mask:
        """When to reuse: the steps, with their noise levels where the steps of another run can be placed among them."""
        falls = all(a > b for a, b in pairwise(self.sigmas or ()))
        sigmas = self.sigmas if self.axis == "sigma" and falls else None
        others = tuple(other.policy for other in self.others)
        return Mask(self.steps, sigmas, others=others, conditional=self.conditional)

    @property
    def predictor(self) -> Fitted:
        """What to add: the coefficients and corrections, and the times they were found for."""
        others = tuple(other.predictor for other in self.others)
        return Fitted(self.coefficients, self.sigmas, self.corrections, self.branches, others, self.in_batch)

    @property
    def executions(self) -> tuple[int, float]:
        """The number of block executions in a run, and the number of them that are left out.

        A step at which one branch alone is computed counts half, as where guidance makes two calls, or one on a batch
        of both. Without guidance it is a computed step.
        """
        calls = sum(map(self._is_called, range(len(self.steps))))
        left_out = float(sum((len(each.steps) - sum(each.steps)) * each.blocks for each in self.ranges))
        if self.conditional is not None:
            left_out += sum(self.conditional.steps) / 2 * self.blocks
        return calls * self.total, left_out

    @property
    def picture(self) -> str:
        """The steps: ● is computed, ◐ of one branch only, ○ reused, · not called.

        Of several ranges, ◑ computes only the last, ◒ others.
        """
        alone = self.conditional.steps if self.conditional is not None else (0,) * len(self.steps)
        ranges = zip(*(each.steps for each in self.ranges), strict=True)
        signs = ("◐" if half else sign_of(bits) for bits, half in zip(ranges, alone, strict=True))
        return "".join(sign if self._is_called(step) else "·" for step, sign in enumerate(signs))

    @property
    def ranges(self) -> tuple[TransformerPlan, ...]:
        """The plan of each range, this one's first; usually of this one alone."""
        return (self, *self.more_ranges)

    @property
    def span(self) -> str:
        """The blocks of the range, as its name has them where there are several."""
        return span_name(self.first, self.blocks)

    @property
    def schedule(self) -> tuple[object, ...]:
        """What is computed at which steps, without weights: plans that have this in common differ in these alone."""
        blocks = ((each.first, each.blocks, each.steps) for each in self.ranges)
        return (self.path, self.payload, self.conditional, *blocks)

    @property
    def saved(self) -> float:
        """Share of the transformer's block executions that are left out."""
        total, left_out = self.executions
        return left_out / total

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a configuration."""
        number = self.blocks if self.payload == "residual" else None
        where: dict[str, Any] = {"cache_block_start": self.first, "cache_num_blocks": number, "payload": self.payload}
        if self.more_ranges:
            where["more_ranges"] = tuple(each.settings for each in self.more_ranges)
        return {**where, "policy": self.policy, "predictor": self.predictor}

    def _is_called(self, step: int) -> bool:
        return self.called is None or self.called[0] <= step < self.called[1]

    def _check_payload(self) -> None:
        """Refuse another range than the whole transformer with its output, and corrections of reused steps."""
        check_choice("payload", self.payload, PAYLOADS)
        if self.payload != "output":
            return
        if (self.first, self.blocks) != (0, self.total):
            raise InvalidSetting(
                f"payload='output' leaves the whole transformer out: first={self.first} and blocks={self.blocks} "
                f"should be 0 and {self.total}"
            )
        for step, (bit, weights) in enumerate(zip(self.steps, self.corrections or (), strict=False)):
            if not bit and weights is not None:
                raise InvalidSetting(f"step {step} leaves the transformer out: it has coefficients, and no corrections")

    def _check_conditional(self) -> None:
        """Refuse steps of one branch alone that the plan has no use for, or that its branches do not go with."""
        check_conditional(self.conditional, self.steps, self.called)
        if self.conditional is None:
            return
        if self.payload != "output":
            raise InvalidSetting(
                f"payload={shown(self.payload)} has conditional steps: one branch alone is computed where the whole "
                "transformer is left out, so give payload='output', or leave conditional out"
            )
        if self.branches and self.conditional.in_batch != self.in_batch:
            raise InvalidSetting(
                f"in_batch={self.in_batch}, but conditional.in_batch={self.conditional.in_batch}: branches are calls "
                "of a step, or halves of its batch, for both"
            )
        if self.branches and self.conditional.branch >= len(self.branches):
            raise InvalidSetting(
                f"conditional.branch={self.conditional.branch}, but there are weights of {len(self.branches)} "
                "branches: give one of them"
            )

    def _check_others(self) -> None:
        """Refuse plans of another range, and those of the same number of steps."""
        others: Any = self.others
        if not isinstance(others, (tuple, list)) or not all(isinstance(each, TransformerPlan) for each in others):
            raise WrongType(f"others must be a tuple of TransformerPlan, not {shown(self.others)}")
        set_field(self, "others", tuple(others))
        for other in self.others:
            for name in ("path", "first", "blocks", "total", "payload", "axis", "more_ranges"):
                if getattr(other, name) != getattr(self, name):
                    raise InvalidSetting(
                        f"one of others has {name}={brief(getattr(other, name))}, and not {brief(getattr(self, name))}"
                    )
        counts = [len(each.steps) for each in (self, *self.others)]
        if len(set(counts)) < len(counts):
            raise InvalidSetting(f"others are of {counts[1:]} steps, beside {counts[0]}: give one of each number")
        if self.others:
            _ = self.predictor  # it checks the rest

    def _check_more_ranges(self) -> None:
        """Refuse ranges of another transformer or run, such as share blocks, and weights that belong to all of them."""
        more: Any = self.more_ranges
        if not isinstance(more, (tuple, list)) or not all(isinstance(each, TransformerPlan) for each in more):
            raise WrongType(f"more_ranges must be a tuple of TransformerPlan, not {shown(more)}")
        set_field(self, "more_ranges", tuple(more))
        if not more:
            return
        if self.payload == "output" or self.others:
            given = "payload='output'" if self.payload == "output" else "a plan with others"
            raise InvalidSetting(f"{given} is of the whole transformer in one range: leave more_ranges out")
        for before, each in pairwise(self.ranges):
            if each.first < before.first + before.blocks:
                raise InvalidSetting(
                    f"more_ranges: the range from block {each.first} on begins before block "
                    f"{before.first + before.blocks}, where the one before it ends: give them in order, and apart"
                )
            for name in ("path", "total", "axis", "called", "sigmas", "payload"):
                if getattr(each, name) != getattr(self, name):
                    raise InvalidSetting(
                        f"one of more_ranges has {name}={brief(getattr(each, name))}, and not "
                        f"{brief(getattr(self, name))}"
                    )
            if len(each.steps) != len(self.steps):
                raise InvalidSetting(
                    f"one of more_ranges is of {len(each.steps)} steps, and the first range of {len(self.steps)}"
                )
            if own := [name for name in _OF_FIRST if getattr(each, name)]:
                raise InvalidSetting(f"one of more_ranges has {own[0]}: that belongs to the first range, or to none")

    def _check_called(self) -> None:
        """Refuse steps that take more residuals than were computed before them."""
        computed = 0
        for step, (bit, weights) in enumerate(zip(self.steps, self.coefficients, strict=True)):
            if not self._is_called(step) and not bit:
                raise InvalidSetting(f"called={self.called}, but steps has 0 (reused) at step {step}, outside of it")
            if len(weights or ()) > computed or (not bit and not computed):
                raise InvalidSetting(
                    f"called={self.called}: step {step} takes {len(weights or ())} residuals, and {computed} are "
                    "computed before it"
                )
            computed += bit and self._is_called(step)

    def __str__(self) -> str:
        return f"{self.path or 'blocks'}: {self.blocks_shown}  {self.picture}  {self.reused_shown} steps reused"

    def __repr__(self) -> str:
        return f"<TransformerPlan {self}>"

    @property
    def blocks_shown(self) -> str:
        """The blocks that are left out, in words."""
        if self.payload == "output":
            return "output"
        ranges = (f"{each.first} … {each.first + each.blocks - 1}" for each in self.ranges)
        return f"{' and '.join(ranges)} of {self.total}"

    @property
    def reused_shown(self) -> str:
        """How many steps are reused, in words."""
        reused = [len(each.steps) - sum(each.steps) for each in self.ranges]
        return f"{' and '.join(map(str, reused))} of {len(self.steps)}"


def span_name(first: int, blocks: int) -> str:
    """The name of one of several ranges of the same blocks, behind theirs.

    Example:
        >>> span_name(3, 2)
        '[3:5]'
    """
    return f"[{first}:{first + blocks}]"


_OF_FIRST = ("corrections", "branches", "others", "more_ranges")  # what a further range has none of


def _span(value: Any, steps: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise WrongType(f"called must be the first step and the one after the last, or None, not {shown(value)}")
    first, end = (check_count("called", step, 0) for step in value)
    if not first < end <= steps:
        raise InvalidSetting(f"called=({first}, {end}) is out of range: there are {steps} steps, from 0 on")
    return first, end
