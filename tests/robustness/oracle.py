"""A model whose output tells which calls it was made of, and a witness that holds this against what it has seen itself.

Every block adds the number of the call under way, as a one in a channel of its own. So what a range adds on a reused
step shows, weight by weight, which calls its residual was taken from; and nothing of the library is asked for that.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from dithooks.policies.interval import Interval
from dithooks.predictors.polynomial import lagrange_weights
from dithooks.predictors.predictor import Moment

MARKS = 160  # calls that can be told apart
WIDTH = MARKS + 1  # and one channel that changes as it is told to, for policies to look at


class Speaking(nn.Module):
    """(h, e) → (e + what is said, h + what is said), or h alone."""

    def __init__(self, now: SimpleNamespace, pair: bool) -> None:
        super().__init__()
        self.now, self.pair, self.leaf = now, pair, nn.Identity()

    def forward(self, hidden_states, encoder_hidden_states=None):
        h = self.leaf(hidden_states)
        said = torch.zeros(WIDTH, dtype=h.dtype)
        said[self.now.mark], said[-1] = 1, self.now.drift
        return (encoder_hidden_states + said, h + said) if self.pair else h + said


class Speaker(nn.Module):
    """Speaking blocks, with a head before and a tail behind them. ``now.at`` is told of every place that runs."""

    def __init__(self, depth: int, pair: bool = False, now: SimpleNamespace | None = None) -> None:
        super().__init__()
        self.now = now or SimpleNamespace(mark=0, drift=1.0, at=None)
        self.pair = pair
        self.blocks = nn.ModuleList(Speaking(self.now, pair) for _ in range(depth))
        self.ran: Counter[int] = Counter()  # executions by block
        for number, block in enumerate(self.blocks):
            block.leaf.register_forward_hook(lambda *_, number=number: self._within(number))

    def _within(self, number: int) -> None:
        self.ran[number] += 1
        self._at(f"block {number}")

    def _at(self, place: str) -> None:
        if self.now.at is not None:
            self.now.at(place)

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
        self._at("head")
        h, e = hidden_states * 1, None if encoder_hidden_states is None else encoder_hidden_states * 1
        for block in self.blocks:
            if self.pair:
                e, h = block(h, encoder_hidden_states=e)
            else:
                h = block(h)
            self._at("between")
        self._at("tail")
        return torch.cat([h, e], 1) if self.pair else h + 0


@dataclass
class Told:
    """One call, as the loop that made it knows it."""

    mark: int
    request: int
    branch: int
    step: int
    time: float
    form: tuple
    reused: bool | None = None  # by the executions that were counted; None: it came to no end
    weights: dict[int, float] = field(default_factory=dict)


class Oracle:
    """Makes the calls of a cached model, and sees that each is made of what it may be made of.

    Args:
        model: a speaker.
        first: block of the range, and
        last: of them.
        predictor: makes residuals of
        policy: is obeyed as far as it says how old they may be.
        axis: of the times that the predictor sees.
    """

    def __init__(self, model, first, last, predictor, policy=None, axis="sigma"):
        self.model, self.twin = model, Speaker(len(model.blocks), model.pair)
        self.range, self.predictor, self.policy, self.axis = range(first, last + 1), predictor, policy, axis
        self.calls: list[Told] = []
        self.counted_steps = True  # that the library counts steps as the loop does
        self.around = nullcontext()  # of a call of the model, and nothing else

    def drop(self):
        """Nothing from before is to be used."""
        for told in self.calls:
            told.reused = None

    def forget(self):
        """Begin to count anew, as calls that can be told apart are few; what is cached is not to be used either."""
        self.calls.clear()

    def call(self, request, branch, step, time, drift, x, prompt=None, **given):
        """One call, checked when it is over; where it raises, it was none."""
        assert len(self.calls) < MARKS, "there are too many calls to tell them apart"
        told = Told(len(self.calls), request, branch, step, time, (x.shape, x.dtype))
        self.calls.append(told)
        now = self.model.now
        now.mark, now.drift = told.mark, drift
        self.model.ran.clear()
        given = given if prompt is None else {**given, "encoder_hidden_states": prompt}
        with self.around:
            out = self.model(x, **given)
        self._check(told, x, prompt, out, given)
        return out

    def reused(self):
        return sum(told.reused is True for told in self.calls)

    def _check(self, told, x, prompt, out, given):
        blocks = range(len(self.model.blocks))
        ran = [self.model.ran[number] for number in blocks]
        inside, outside = [ran[n] for n in self.range], [ran[n] for n in blocks if n not in self.range]
        assert inside in ([0] * len(inside), [1] * len(inside)), f"{told}: blocks of the range ran {inside} times"
        # The first residual is tested by calls without the range; one such call, as no stream is made anew in between.
        assert set(outside) <= {1} or set(outside) == {2}, f"{told}: blocks outside of the range ran {outside} times"
        reused = not any(inside)
        twin = self.twin.now
        twin.mark, twin.drift = told.mark, self.model.now.drift
        plain = self.twin(x, **given)
        assert (out.shape, out.dtype) == (plain.shape, plain.dtype), f"{told}: {out.shape}, {out.dtype}"
        if reused:
            self._check_sources(told, x, prompt, out, len(outside))
        else:
            assert torch.equal(out, plain), f"{told}: was computed, and is not as without the cache"
        told.reused = reused

    def _check_sources(self, told, x, prompt, out, outside):
        entered = torch.cat([x, prompt], 1) if self.model.pair else x
        added = (out.double() - entered.double())[..., :MARKS].flatten(0, -2)
        near = 2e-3 if out.dtype == torch.float32 else 1e-4 if out.dtype == torch.float64 else 0.1
        assert (added - added[:1]).abs().max() <= near, f"{told}: not all of it is made of the same"
        own = added[0][told.mark].item()
        assert abs(own - outside) <= near, f"{told}: the blocks outside of the range count {own:.3f}, not {outside}"
        weights = {n: w / len(self.range) for n, w in enumerate(added[0].tolist()) if n != told.mark and abs(w) > near}
        told.weights = weights
        former = [each for each in reversed(self.calls[: told.mark]) if self._serves(each, told)]
        assert former, f"{told}: was reused, and there was nothing to reuse"
        allowed = []
        for count in range(1, min(self.predictor.anchors, len(former)) + 1):
            moments = [Moment(each.step, each.time, self.axis) for each in former[:count]]
            wanted = self.predictor.weights(moments, Moment(told.step, told.time, self.axis))
            if wanted is None:
                wanted = lagrange_weights(moments[:2], Moment(told.step, told.time, self.axis), "sigma")
            allowed.append({each.mark: weight for each, weight in zip(former, wanted, strict=False)})
        assert any(self._alike(weights, wanted, near) for wanted in allowed), (
            f"{told}: is made of {weights}, and could be of {allowed}"
        )
        if isinstance(self.policy, Interval) and self.counted_steps:
            assert former[0].step >= self.policy.last_refresh(told.step), f"{told}: {former[0]} is out of date"
        cap = getattr(self.policy, "max_continuous_cached_steps", None)
        if cap is not None and self.policy.separate_branches:  # else that is up to the branch that decided for all
            since = [
                e
                for e in self.calls[former[0].mark :]
                if e.reused and (e.request, e.branch) == (told.request, told.branch)
            ]
            assert len(since) < cap, f"{told}: {len(since)} were reused since {former[0]}"

    @staticmethod
    def _serves(each, told):
        """Whether a call was computed, for the same request, branch and form."""
        return each.reused is False and (each.request, each.branch, each.form) == (told.request, told.branch, told.form)

    @staticmethod
    def _alike(weights, wanted, near):
        return all(abs(weights.get(n, 0.0) - wanted.get(n, 0.0)) <= near for n in weights.keys() | wanted.keys())
