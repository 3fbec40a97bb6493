"""Models that nobody registered: the Open-Sora-Plan and DiT shapes, block lists found by themselves, in whole loops."""

from itertools import pairwise

import pytest
import torch
from models import ClassTransformer, VideoTransformer

from dithooks import DitCacheConfig, dit_cache, timestep_scope

STEPS = 8
CONFIG = DitCacheConfig(cache_step_start=2, cache_step_interval=2, cache_block_start=1, cache_num_blocks=3)
COMPUTED = {0, 1, 2, 4, 6}  # of the eight steps


class Video:
    """Open-Sora-Plan's: Euler steps, guidance by two calls, the loop tells the step."""

    def __init__(self):
        self.model = VideoTransformer()
        self.blocks = self.model.transformer_blocks
        self.texts = [torch.randn(1, 5, 16), torch.randn(1, 5, 16)]
        self.masks = {
            "attention_mask": torch.ones(1, 3, 8, 8),
            "encoder_attention_mask": torch.tensor([[1.0] * 4 + [0]]),
        }
        self.masks["attention_mask"][..., 6:] = 0  # padded on the right
        self.noise = torch.randn(1, 4, 3, 8, 8)
        self.calls_per_step = 2

    def once(self, value=500.0, x=None):
        x = self.noise if x is None else x
        return self.model(x, torch.tensor([float(value)]), self.texts[0], **self.masks).sample

    def sample(self, models=None):
        x, models = self.noise, models or [self.model, self.model]
        for step in range(STEPS):
            with timestep_scope(step):
                time = torch.tensor([1000 * (1 - step / STEPS)])
                pairs = zip(models, self.texts, strict=True)
                none, given = (model(x, time, text, **self.masks, return_dict=False)[0] for model, text in pairs)
                x = x - (none + 3 * (given - none)) / STEPS
        return x


class Classes:
    """The original DiT's: DDIM steps, guidance in one batch by ``forward_with_cfg``, integer timesteps called t."""

    def __init__(self):
        self.model = ClassTransformer()
        self.blocks = self.model.blocks
        self.labels = torch.tensor([3, 7, self.model.none, self.model.none])
        self.noise = torch.randn(2, 4, 8, 8)
        self.calls_per_step = 1

    def once(self, value=500, x=None):
        x = self.noise if x is None else x
        return self.model(x, torch.full((len(x),), value), self.labels[: len(x)])

    def sample(self, guided=None):
        guided = guided or (lambda x, t: self.model.forward_with_cfg(x, t, self.labels, 3.0))
        x = torch.cat([self.noise, self.noise])
        levels = torch.linspace(0.01, 0.99, STEPS + 1).flip(0)  # variance of the noise
        for step, (now, then) in enumerate(pairwise(levels)):
            with timestep_scope(step):
                epsilon = guided(x, torch.full((4,), int(1000 * now)))[:, :4]
            clean = (x - now.sqrt() * epsilon) / (1 - now).sqrt()
            x = (1 - then).sqrt() * clean + then.sqrt() * epsilon
        return x[:2]


@pytest.fixture(params=[Video, Classes])
def case(request):
    return request.param()


@pytest.fixture
def ran(case):
    """Of each block, how often it has run."""
    counts = [0] * len(case.blocks)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    hooks = [block.register_forward_hook(count(index)) for index, block in enumerate(case.blocks)]
    yield counts
    for hook in hooks:
        hook.remove()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("start", "count"), [(0, None), (0, 1), (0, 3), (1, 2), (2, 1), (1, None), (-1, 1)])
def test_on_the_inputs_of_the_computed_step_a_reused_one_gives_its_output(case, ran, start, count):
    """``None`` is all to the last, -1 the last."""
    depth = len(case.blocks)
    start %= depth
    count = count or depth - start
    plain = case.once()
    with dit_cache(case.model, DitCacheConfig(0, 2, start, count)) as cache:
        for step in (0, 1):
            ran[:] = [0] * depth
            with timestep_scope(step):
                out = case.once()
            if step == 0:
                assert torch.equal(out, plain)
        assert cache.stats.reasons == {"refresh": 1, "reuse": 1}
    assert ran == [int(not start <= index < start + count) for index in range(depth)]
    assert distance(out, plain) <= 1e-5


def test_what_is_outside_the_range_still_sees_its_inputs(case):
    """Blocks before the range, and what comes after, work on the new latents and timestep."""
    with dit_cache(case.model, DitCacheConfig(0, 3, 2, 2)) as cache:
        outputs = []
        for step, given in enumerate([{}, {"x": case.noise.flip(-1)}, {"value": 20}]):
            with timestep_scope(step):
                outputs.append(case.once(**given))
        assert cache.stats.reused_calls == 2
    for given, out in zip([{"x": case.noise.flip(-1)}, {"value": 20}], outputs[1:], strict=True):
        assert distance(out, outputs[0]) > 0.1
        assert distance(out, case.once(**given)) > 1e-3  # the range was reused, so it is not exact, either


def test_a_loop_without_reuse_gives_the_same_bits(case, ran):
    plain = case.sample()
    handle = dit_cache(case.model, DitCacheConfig(STEPS, 2, 1, 3))
    ran[:] = [0] * len(ran)
    assert torch.equal(case.sample(), plain)
    assert handle.stats.reasons == {"warm-up": STEPS * case.calls_per_step}
    with pytest.warns(UserWarning, match="reused nothing"):
        handle.remove()
    assert ran[0] == ran[2] == STEPS * case.calls_per_step


def test_a_loop_runs_the_blocks_that_were_planned(case, ran):
    plain = case.sample()
    with dit_cache(case.model, CONFIG, verify=False) as cache:  # the test of the first residual calls once more
        for _ in range(2):  # the second run starts afresh
            ran[:] = [0] * len(ran)
            out = case.sample()
            inside, outside = len(COMPUTED) * case.calls_per_step, STEPS * case.calls_per_step
            assert ran == [inside if 1 <= index < 4 else outside for index in range(len(ran))]
        assert cache.stats.blocks_run == 2 * sum(ran)
        assert torch.equal(case.sample(), out)
    assert 1e-4 < distance(out, plain) < 0.5


def test_each_branch_of_guidance_has_its_own_residual():
    """Two calls of one model give what two copies of it do, each with a cache and a branch of its own."""
    video, (none, given) = Video(), (VideoTransformer(), VideoTransformer())
    with dit_cache(video.model, CONFIG) as cache:
        together = video.sample()
        assert cache.stats.reused_calls == 2 * (STEPS - len(COMPUTED))
    with dit_cache(none, CONFIG), dit_cache(given, CONFIG):
        assert torch.equal(video.sample([none, given]), together)


def test_an_argument_called_t_tells_the_step():
    classes = Classes()
    with dit_cache(classes.model, CONFIG) as cache:
        for step in range(STEPS):
            classes.once(999 - 100 * step)
        assert cache.stats.reasons == {"warm-up": 2, "refresh": 3, "reuse": 3}


def test_guidance_around_forward_needs_a_scope():
    """``forward_with_cfg`` calls ``forward``, not the model: the cache sees no timestep, and names the remedy.

    The first such call in a thread runs plain: it may be the rest of one that began before the cache was attached.
    """
    classes = Classes()
    labels, x = classes.labels, torch.cat([classes.noise, classes.noise])
    plain = classes.model.forward_with_cfg(x, torch.full((4,), 500), labels, 3.0)
    with dit_cache(classes.model, CONFIG):
        assert torch.equal(classes.model.forward_with_cfg(x, torch.full((4,), 500), labels, 3.0), plain)
        with pytest.raises(ValueError, match=r"dithooks\.steps"):
            classes.model.forward_with_cfg(x, torch.full((4,), 500), labels, 3.0)
        with timestep_scope(0):
            assert torch.equal(classes.model.forward_with_cfg(x, torch.full((4,), 500), labels, 3.0), plain)


def test_guidance_in_one_batch_is_the_same_seen_or_not():
    """Called as a model or through its ``forward``, the loop reuses the same."""
    classes = Classes()

    def guided(x, t):
        out = classes.model(torch.cat([x[:2], x[:2]]), t, classes.labels)
        given, none = out[:, :4].chunk(2)
        return torch.cat([none + 3.0 * (given - none)] * 2)

    with dit_cache(classes.model, CONFIG) as cache:
        seen = classes.sample(guided=guided)
        assert cache.stats.reused_calls == STEPS - len(COMPUTED)
    with dit_cache(classes.model, CONFIG):
        assert torch.equal(classes.sample(), seen)


def test_removal_leaves_the_model_as_it_was(case):
    blocks, keys, names = list(case.blocks), list(case.model.state_dict()), [n for n, _ in case.model.named_modules()]
    plain = case.sample()
    handle = dit_cache(case.model, CONFIG)
    case.sample()
    assert list(case.model.state_dict()) == keys
    handle.remove()
    assert all(block is before for block, before in zip(case.blocks, blocks, strict=True))
    assert list(case.model.state_dict()) == keys
    assert [name for name, _ in case.model.named_modules()] == names
    assert torch.equal(case.sample(), plain)
