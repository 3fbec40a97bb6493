"""One recorded run: its differences, the reuse it predicts, and the parts that are made of it."""

import itertools

import numpy as np
import pytest
import torch
from engine.test_attach import snapshot
from torch import nn
from toys import Net, Pipe, latents, prompt

from dithooks import (
    BlockAdapter,
    DitCacheConfig,
    Fitted,
    Interval,
    Linear,
    MagnitudeRatio,
    Mask,
    Threshold,
    dit_cache,
    profile,
    timestep_scope,
)
from dithooks.profiling.change_recorder import SAMPLE

STEPS = 14


def sequence(net, seed=0, branches=1, steps=STEPS):
    """A run whose inputs do not depend on what the model returned: reuse changes nothing in what is looked at."""
    draw = torch.Generator().manual_seed(seed)
    x, away = (torch.randn(2, 6, 4, generator=draw) for _ in range(2))
    prompts = [torch.randn(2, 3, 8, generator=draw) for _ in range(branches)]

    @torch.no_grad()
    def run():
        outs = []
        for step in range(steps):
            for number, e in enumerate(prompts):
                t = 1 - step / steps
                with timestep_scope(step, branch=number, sigma=t, steps=steps):
                    outs.append(net(x * t + away * (1 - t) ** 2, torch.tensor(t), encoder_hidden_states=e))
        return outs

    return run


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net("swapped")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_differences_by_hand(net, first):
    seen, given = [], {}
    net.blocks[0].register_forward_pre_hook(lambda _, args: given.update(h=args[0].clone()))
    net.blocks[max(first - 1, 0)].register_forward_hook(lambda _, __, out: seen.append(out[1] - given["h"]))
    if first == 0:
        net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    found = profile(net, sequence(net), DitCacheConfig(cache_block_start=first, policy=Threshold(0.1)))
    if first == 0:
        seen = seen[::2]
    (branch,) = found.of()
    expected = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(seen)]
    np.testing.assert_allclose(branch.changes, expected, rtol=1e-4)
    assert [moment.step for moment in branch.moments] == list(range(STEPS))


@pytest.mark.parametrize(
    "policy", [Threshold(0.1, max_warmup_steps=2), Threshold(0.1, 0, max_continuous_cached_steps=2)]
)
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.filterwarnings("ignore:.*reused nothing.*")
def test_predicted_reuse_is_what_comes_of_it(net, policy, reduce, first):
    policy = Threshold(**{**vars(policy), "reduce": reduce})
    run = sequence(net, branches=2)
    found = profile(net, run, DitCacheConfig(cache_block_start=first, policy=policy))
    shares = []
    for threshold in (0.05, 0.1, 0.15, 0.2, 0.4, 0.8):
        changed = Threshold(**{**vars(policy), "residual_diff_threshold": threshold})
        with dit_cache(net, DitCacheConfig(cache_block_start=first, policy=changed)) as cache:
            run()
            for branch in found.of():
                made = [each.reuse for each in cache.decisions if each.branch == branch.branch]
                assert [decision.reuse for decision in branch.decisions(changed)] == made
                shares.append(found.reuse(threshold, branch))
                assert shares[-1] == pytest.approx(sum(made) / STEPS)
    assert len(set(shares)) > 3


def test_each_list_by_itself_where_nothing_is_said():
    pipe = Pipe(Net("two_lists"))
    found = profile(pipe, lambda: pipe(latents(), prompts=[prompt(), prompt()]))
    assert [(each.range, each.branch, each.schedule.skipped, each.schedule.blocks) for each in found.branches] == [
        ("transformer.blocks", 0, 4, 5),
        ("transformer.blocks", 1, 4, 5),
        ("transformer.singles", 0, 4, 5),
        ("transformer.singles", 1, 4, 5),
    ]
    assert [each.branch for each in found.of("singles")] == [0, 1]
    with pytest.raises(ValueError, match=r"there are transformer\.blocks, transformer\.singles"):
        found.of()


def test_it_prints_quantiles_and_predictions(net):
    found = profile(net, sequence(net, branches=2), thresholds=(0.125, 0.5))
    text, changes = str(found), found.of()[1].changes
    row = next(line for line in text.splitlines() if line.startswith("blocks") and "  1 " in line)
    for quantile in (0, 25, 50, 75, 95, 100):
        assert f"{np.percentile(changes, quantile):.3f}" in row
    assert "min    p25    p50    p75    p95    max" in text
    assert "0.125" in text
    assert f"{found.reuse(0.5, found.of()[1]):.0%}" in text


def test_numbers_that_are_none_are_counted(net):
    def run():
        with torch.no_grad():
            for step in range(6):
                with timestep_scope(step):
                    net(latents() * (float("nan") if step == 3 else 1.0), torch.tensor(0.5), prompt())

    text = str(profile(net, run))
    assert "2 not finite" in text


class Turning(nn.Module):
    """A block whose effect turns in a plane: two residuals span it, and no line through them stays in its circle."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, hidden_states, angle):
        return hidden_states + torch.cos(angle) * self.a + torch.sin(angle) * self.b


class Plane(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Turning() for _ in range(2))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep * 2)
        return hidden_states


def test_fitted_weights_are_exact_where_two_residuals_span_all():
    model, x = Plane(), torch.randn(1, 3, 4)

    @torch.no_grad()
    def run():
        outs = []
        for step, sigma in enumerate([1.0, 0.93, 0.8, 0.72, 0.6, 0.41, 0.3, 0.1]):
            with timestep_scope(step, sigma=sigma, steps=8):
                outs.append(model(x, torch.tensor(sigma)))
        return torch.stack(outs)

    plain, mask = run(), (1, 1, 0, 0, 1, 0, 1, 0)
    found = profile(model, run, DitCacheConfig(policy=Threshold(0.1)))
    errors = {}
    for predictor in (found.fitted(mask, ridge=0.0), found.fitted(mask), Linear()):
        with dit_cache(model, DitCacheConfig(policy=Mask(mask), predictor=predictor)) as cache:
            errors[predictor] = float((run() - plain).abs().max())
            assert cache.stats.reused_calls == 4
    exact, pulled, line = errors.values()
    assert exact < 1e-4 < pulled < line
    assert isinstance(next(iter(errors)), Fitted)


def test_ratios_are_those_of_the_residuals(net):
    pipe, x, prompts = Pipe(net), latents(), [prompt(), prompt()]
    sizes, given = [], {}
    net.blocks[1].register_forward_pre_hook(lambda _, args: given.update(h=args[0].clone()))
    net.blocks[4].register_forward_hook(lambda _, __, out: sizes.append(float((out[1] - given["h"]).norm())))
    found = profile(pipe, lambda: pipe(x, prompts=prompts), DitCacheConfig(1, 2, 1, 4))
    for number, ratios in enumerate(found.ratios()):
        mine = sizes[number::2]
        np.testing.assert_allclose(ratios, [1.0, *(b / a for a, b in itertools.pairwise(mine))], rtol=1e-4)
    policy = MagnitudeRatio(found.ratios(), threshold=0.3, retention_ratio=0.1)
    with dit_cache(pipe, DitCacheConfig(cache_block_start=1, policy=policy)) as cache:
        pipe(x, prompts=prompts)
        assert cache.stats.reused_calls > 0


def test_large_tensors_are_sampled_alike_at_every_step():
    class Wide(Net):
        def __init__(self):
            super().__init__("single", width=64)

    net, x = Wide(), torch.randn(2, 3000, 4)

    @torch.no_grad()
    def run():
        for step in range(4):
            with timestep_scope(step):
                net(x * (1 - step / 8), torch.tensor(1 - step / 8))

    (branch,) = profile(net, run, DitCacheConfig(policy=Threshold(0.1))).of()
    assert branch.probes[0].size <= 4 * SAMPLE
    # What enters is affine in x, sampled over all tokens and channels: near the change of the whole.
    with torch.no_grad():
        h = [net.embed(x * (1 - step / 8)) for step in range(4)]
    expected = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(h)]
    np.testing.assert_allclose(branch.changes, expected, rtol=0.02)


class TestErrors:
    def test_nothing_is_left_behind(self, net):
        before = snapshot(net)

        def broken():
            sequence(net, steps=3)()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            profile(net, broken)
        assert snapshot(net) == before
        profile(net, sequence(net))
        assert snapshot(net) == before

    def test_what_is_not_a_run(self, net):
        with pytest.raises(TypeError, match="run must be a function that makes the run"):
            profile(net, sequence(net)())
        with pytest.raises(ValueError, match="run made no step of the target"):
            profile(net, lambda: None)
        with pytest.raises(ValueError, match="call made 2 runs of blocks: profile one at a time"):
            profile(net, lambda: [sequence(net)(), sequence(net)()])
        with pytest.warns(UserWarning, match="gradients"), pytest.raises(ValueError, match="or with gradients"):
            profile(net, torch.enable_grad()(lambda: net(latents(), torch.tensor(0.5), prompt())))

    def test_a_cache_in_the_way(self, net):
        with dit_cache(net, DitCacheConfig(1, 2)), pytest.raises(ValueError, match="is cached already"):
            profile(net, sequence(net))

    def test_a_mask_of_another_length(self, net):
        found = profile(net, sequence(net))
        with pytest.raises(ValueError, match="a mask of 3 steps does not fit a run of 14"):
            found.fitted((1, 0, 0))

    def test_no_word_of_a_useless_cache(self, net, recwarn):
        profile(net, sequence(net), DitCacheConfig(policy=Interval(0, 3)))
        profile(BlockAdapter(transformer=net, blocks="blocks"), sequence(net))
        assert not recwarn.list
