"""What a model adds to its streams between the blocks of a range, held against a loop that keeps what blocks do."""

import warnings
from itertools import pairwise

import pytest
import torch
from toys import Double, Single

from dithooks import DitCacheConfig, Interval, Taylor, dit_cache, timestep_scope

pytestmark = pytest.mark.core

STEPS, BLOCKS, WIDTH = 8, 5, 8
NEAR = {"rtol": 1e-4, "atol": 1e-5}


class Controlled(torch.nn.Module):
    """Blocks, with a tensor added after each: in place, or not."""

    def __init__(self, in_place=False):
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.side = in_place, None
        self.blocks = torch.nn.ModuleList(Single(WIDTH) for _ in range(BLOCKS))

    def add(self, h, control):
        if control is None:
            return h
        if not self.in_place:
            return h + control
        h += control
        return h

    def forward(self, hidden_states, timestep, control=None):
        h, temb = hidden_states.clone(), timestep.expand(len(hidden_states), WIDTH)
        control = self.side if control is None else control
        for index, block in enumerate(self.blocks):
            h = self.add(block(h, temb), None if control is None else control[index])
        return h


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents():
    return [drawn(0, 2, 6, WIDTH) + 0.1 * drawn(1, 2, 6, WIDTH) * step for step in range(STEPS)]


def times():
    return [torch.tensor(1 - step / STEPS) for step in range(STEPS)]


def controls(factors):
    base = [drawn(10 + index, 2, 6, WIDTH) for index in range(BLOCKS)]
    return [None if factor is None else [factor * each for each in base] for factor in factors]


CONTROLS = {
    "changing": [(1 - step / STEPS) ** 2 for step in range(STEPS)],
    "constant": [1.0] * STEPS,
    "zero at first": [0.0, 0.0, 0.0, 0.0, 1.0, 0.8, 0.6, 0.4],
    "starting at a computed step": [None] * 4 + [1.0, 0.8, 0.6, 0.4],
    "starting at a reused step": [None] * 3 + [1.0, 0.8, 0.6, 0.4, 0.2],
    "ending": [1.0, 0.9, 0.8, 0.7, 0.6, None, None, None],
}


def by_hand(model, given, computed, first, last, weights=lambda steps, now: [1.0]):
    """The outputs of a loop that keeps what the blocks do alone; ``weights`` of it, newest first."""
    kept, outputs = [], []
    for step, (x, t, control) in enumerate(zip(latents(), times(), given, strict=True)):
        h, temb, effect = x, t.expand(len(x), WIDTH), torch.zeros_like(x)
        if step not in computed:
            shares = weights([at for at, _ in kept], step)
            effect = sum(share * each for share, (_, each) in zip(shares, kept, strict=False))
        for index, block in enumerate(model.blocks):
            inside = first <= index <= last
            if not inside or step in computed:
                after = block(h, temb)
                effect = effect + (after - h) if inside else effect
                h = after
            elif index == first:
                h = h + effect
            if control is not None:
                h = h + control[index]
        if step in computed:
            kept.insert(0, (step, effect))
        outputs.append(h)
    return outputs


def cached(model, config, given, **options):
    """The outputs with the cache, and the steps that were computed."""
    outputs = []
    with dit_cache(model, config, **options) as cache:
        for step, (x, t, control) in enumerate(zip(latents(), times(), given, strict=True)):
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, t, control).clone())
        return outputs, {each.step for each in cache.decisions if not each.reuse}


def near(got, wanted):
    assert len(got) == len(wanted)
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(one, other, **NEAR, msg=lambda text, step=step: f"step {step}: {text}")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 3)])
def test_each_step_has_its_own_additions(name, in_place, first, last, mode):
    if name == "zero at first" and in_place and mode is torch.inference_mode:
        pytest.skip("without versions, nothing shows that zeros were written into a tensor")
    model, given = Controlled(in_place), controls(CONTROLS[name])
    with mode():
        got, computed = cached(model, DitCacheConfig(2, 2, first, last - first + 1), given)
        assert 2 <= STEPS - len(computed) <= 3
        near(got, by_hand(model, given, computed, first, last))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["changing", "starting at a computed step"])
def test_a_line_through_two_residuals_is_through_what_the_blocks_did(name, in_place):
    def line(steps, now):
        if len(steps) < 2:
            return [1.0]
        newest, older = steps[:2]
        share = (now - older) / (newest - older)
        return [share, 1 - share]

    model, given = Controlled(in_place), controls(CONTROLS[name])
    config = DitCacheConfig(2, 2, 0, BLOCKS, predictor=Taylor(1, axis="step"))
    got, computed = cached(model, config, given)
    # Where residuals are of another kind from a step on, those from before are of no use.
    kinds = [4] if name != "changing" else []
    fresh = lambda steps, now: line([at for at in steps if not kinds or (at >= 4) == (now >= 4)], now)  # noqa: E731
    near(got, by_hand(model, given, computed, 0, BLOCKS - 1, fresh))


def test_two_guidance_branches_of_which_one_is_controlled():
    """As in guess mode: the call without a prompt comes first, and has no control."""
    model, given = Controlled(), controls(CONTROLS["changing"])
    got, computed = {0: [], 1: []}, set()
    with dit_cache(model, DitCacheConfig(2, 2, 0, BLOCKS)) as cache:
        for step, (x, t) in enumerate(zip(latents(), times(), strict=True)):
            for branch, control in enumerate((None, given[step])):
                with timestep_scope(step, steps=STEPS, branch=branch):
                    got[branch].append(model(x, t, control))
        computed = [{each.step for each in cache.decisions if not each.reuse and each.branch == b} for b in (0, 1)]
    near(got[0], by_hand(model, [None] * STEPS, computed[0], 0, BLOCKS - 1))
    near(got[1], by_hand(model, given, computed[1], 0, BLOCKS - 1))
    assert all(len(each) < STEPS for each in computed)


@pytest.mark.parametrize("in_place", [False, True])
def test_additions_that_no_argument_tells_of(in_place):
    """The first reused step that has some is without; as what was kept may hold some, nothing is reused after that."""
    model, given = Controlled(in_place), controls([None] * 3 + [1.0, 0.8, 0.6, 0.4, 0.2])
    outputs = []
    with dit_cache(model, DitCacheConfig(0, 4, 0, BLOCKS)) as cache:
        for step, (x, t) in enumerate(zip(latents(), times(), strict=True)):
            model.side = given[step]
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, t))
        computed = {each.step for each in cache.decisions if not each.reuse}
    assert computed == {0, 4}
    wanted = by_hand(model, given, computed, 0, BLOCKS - 1)
    late = [*given[3]]
    wanted[3] = wanted[3] - sum(late[:-1])  # what is added after the last block is no matter of the range
    near(outputs, wanted)


def test_additions_that_no_argument_tells_of_before_a_refresh_is_due():
    """Nor is what was kept reused at the next step: that is computed, and looked at."""
    model, given = Controlled(), controls([None] * 2 + [1.0, 0.8, 0.6, 0.4, 0.2, 0.1])
    with dit_cache(model, DitCacheConfig(policy=Interval(0, 8), cache_num_blocks=BLOCKS)) as cache:
        outputs = []
        for step, (x, t) in enumerate(zip(latents(), times(), strict=True)):
            model.side = given[step]
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, t))
        computed = {each.step for each in cache.decisions if not each.reuse}
    assert computed == {0, 3}
    wanted = by_hand(model, given, computed, 0, BLOCKS - 1)
    wanted[2] = wanted[2] - sum(given[2][:-1])
    near(outputs, wanted)


class Several(torch.nn.Module):
    """Two streams, returned in the other order; what is added to each is its own. ``joined``: then blocks of one."""

    def __init__(self, joined, swap=True):
        super().__init__()
        torch.manual_seed(0)
        self.doubles = torch.nn.ModuleList(Double(WIDTH, swap) for _ in range(3))
        self.singles = torch.nn.ModuleList(Single(WIDTH) for _ in range(3 if joined else 0))
        self.swap = swap

    def forward(self, hidden_states, timestep, encoder_hidden_states, control):
        h, e, temb = hidden_states.clone(), encoder_hidden_states.clone(), timestep.expand(2, WIDTH)
        for block, (image, text) in zip(self.doubles, control, strict=False):
            e, h = block(h, e, temb) if self.swap else block(h, e, temb)[::-1]
            h = h + image
            e += text
        if self.singles:
            both = torch.cat([e, h], 1)
            for block, (image, _) in zip(self.singles, control[3:], strict=True):
                both = block(both, temb)
                both[:, e.shape[1] :] += image
            e, h = both[:, : e.shape[1]], both[:, e.shape[1] :]
        return torch.cat([e, h], 1)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("swap", [True, False])
def test_several_streams(joined, swap):
    """Also where they are joined within the range, and part of them is written into."""
    model, text = Several(joined, swap), drawn(5, 2, 3, WIDTH)
    pairs = [(drawn(20 + k, 2, 6, WIDTH), drawn(40 + k, 2, 3, WIDTH)) for k in range(6)]
    given = [[((1 - step / 9) * a, (0.5 + step / 9) * b) for a, b in pairs] for step in range(STEPS)]
    outputs = []
    with dit_cache(model, DitCacheConfig(1, 2), blocks=["doubles", "singles"] if joined else "doubles") as cache:
        for step, (x, t) in enumerate(zip(latents(), times(), strict=True)):
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, t, text, given[step]))
        computed = {each.step for each in cache.decisions if not each.reuse}
    assert len(computed) < STEPS

    effect, wanted = None, []  # of [text; image], in which form both leave the range
    for step, (x, t) in enumerate(zip(latents(), times(), strict=True)):
        both, temb = torch.cat([text, x], 1), t.expand(2, WIDTH)
        if step in computed:
            effect = torch.zeros_like(both)
        else:
            both = both + effect
        for index in range(6 if joined else 3):
            if step in computed:
                if index < 3:
                    out = model.doubles[index](both[:, 3:], both[:, :3], temb)
                    after = torch.cat(out if swap else out[::-1], 1)
                else:
                    after = model.singles[index - 3](both, temb)
                effect, both = effect + (after - both), after
            image, words = given[step][index]
            both = both + torch.cat([words if index < 3 else torch.zeros_like(words), image], 1)
        wanted.append(both)
    near(outputs, wanted)


class Gated(Controlled):
    """Scales the stream between its blocks."""

    def add(self, h, control):
        return h * (1 + 0.3 * control.mean().tanh())


@pytest.mark.parametrize(("name", "warned"), [("changing", 1), ("constant", 0)])
def test_a_stream_that_is_scaled_is_reused_as_it_was_and_that_is_said_once(name, warned):
    model, given = Gated(), [[5.0 * factor + 0 * drawn(0, 1)] * BLOCKS for factor in CONTROLS[name]]
    x, t = latents()[0], times()[0]
    with warnings.catch_warnings(record=True) as caught, dit_cache(model, DitCacheConfig(2, 2, 0, BLOCKS)) as cache:
        warnings.simplefilter("always")
        outputs = []
        for step in range(STEPS):
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, t, given[step]))
        reused = [each.step for each in cache.decisions if each.reuse]
    told = [str(each.message) for each in caught if "changes from step to step" in str(each.message)]
    assert len(told) == warned
    assert all("blocks.0 and blocks.1" in text and "last computed step" in text for text in told)
    gates = [1 + 0.3 * control[0].mean().tanh() for control in given]
    assert reused == [3, 5, 7]
    for step in reused:  # the whole effect of the last step; the gate after the last block is the step's own
        torch.testing.assert_close(outputs[step], outputs[step - 1] / gates[step - 1] * gates[step], **NEAR)


@pytest.mark.parametrize(("name", "warned"), [("changing", 1), ("constant", 0)])
def test_without_the_test_nothing_is_told_apart(name, warned):
    """``verify=False``: what was added at the last computed step counts, and that is said if it changes."""
    model, given = Controlled(), controls(CONTROLS[name])
    x, t, outputs = latents()[0], times()[0], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dit_cache(model, DitCacheConfig(2, 2, 0, BLOCKS), verify=False):
            for step in range(STEPS):
                with timestep_scope(step, branch=0, steps=STEPS):
                    outputs.append(model(x, t, given[step]))
    assert len([each for each in caught if "changes from step to step" in str(each.message)]) == warned
    for step in (3, 5, 7):
        torch.testing.assert_close(outputs[step] - given[step][-1], outputs[step - 1] - given[step - 1][-1], **NEAR)


def test_a_model_that_adds_nothing_is_not_looked_at():
    model, seen = Controlled(), []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    with dit_cache(model, DitCacheConfig(0, 2, 1, 3)) as cache:
        for step, (x, t) in enumerate(zip(latents()[:4], times(), strict=False)):
            with timestep_scope(step, branch=0, steps=STEPS):
                model(x, t)
        assert cache.stats.reused_calls == 2
    # computed and tested with blocks 1 to 3 left out; reused; computed; reused
    assert seen == [0, 1, 2, 3, 4, 0, 4, 0, 4, 0, 1, 2, 3, 4, 0, 4]


def test_half_precision_is_told_from_what_depends_on_the_stream():
    """Rounding alone is not taken for dependence."""
    model, given = Controlled(True).bfloat16(), controls([1.0, 0.0, -1.0, 1.0])
    given = [[each.bfloat16() for each in control] for control in given]
    x, t = latents()[0].bfloat16(), times()[0].bfloat16()
    with dit_cache(model, DitCacheConfig(0, 8, 0, BLOCKS)):
        outputs = []
        for step in range(4):
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, t, given[step]).float())
    for (before, after), (old, new) in zip(pairwise(outputs), pairwise(given), strict=False):
        change = sum(b.float() - a.float() for a, b in zip(old, new, strict=True))
        assert float((after - before - change).norm()) < 0.1 * float(change.norm())
