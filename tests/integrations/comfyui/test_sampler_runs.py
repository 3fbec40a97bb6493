"""Samplers of ComfyUI with a cached model: exact to caches by hand, and nothing left on the model."""

import logging
from types import SimpleNamespace

import comfy_stand_in as comfy
import pytest
import torch

from dithooks import DitCacheConfig, Mask, handle_of
from dithooks.errors import InvalidSetting, WrongType
from dithooks.integrations.comfyui.cached_run import CachedRun
from dithooks.integrations.comfyui.model_cache import report_of
from dithooks.integrations.comfyui.run_report import summary_line

BITS = tuple(int(bit) for bit in "11101001010010101001")
SIGMAS = torch.cat([torch.linspace(1.0, 0.05, 20), torch.zeros(1)])
SAMPLERS = {"euler": comfy.euler, "heun": comfy.heun}
SHAPES = {"flux": comfy.Flux, "wan": comfy.Wan}
PROMPTS = [torch.full((1, 3, 6), 0.3), torch.full((1, 3, 6), -0.7)]


@pytest.fixture(autouse=True)
def interfaces(monkeypatch, tmp_path):
    comfy.install(monkeypatch, tmp_path)


def patcher_of(shape):
    torch.manual_seed(1)
    return comfy.Patcher(comfy.BaseModel(SHAPES[shape]()))


def cached(patcher, bits=BITS):
    return CachedRun(DitCacheConfig(cache_block_start=1, policy=Mask(bits)), "by mask").put_on(patcher)


def noise(tokens=5):
    return torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(2))


def draw(patcher, sampler="euler", sigmas=SIGMAS, fits=lambda evaluation: True, start=None, callback=None):
    return comfy.Guider(patcher, PROMPTS, fits).sample(
        noise() if start is None else start, sigmas, SAMPLERS[sampler], callback
    )


class ByHand:
    """The same guidance, with a cache of dicts: each set of prompts has its residual, of the step it was made at.

    A call is computed where the mask has 1, or where the calls of its step are not those of the step before up to it.
    """

    def __init__(self, model, bits, fits):
        self.model, self.bits, self.fits = model.diffusion_model, bits, fits
        self.kept, self.now, self.before, self.evaluations, self.step = {}, [], [], 0, 0
        self.computed = []

    def __call__(self, x, sigma):
        step = int((self.sigmas[:-1] == sigma[0]).nonzero()[0])
        if step != self.step:
            self.before, self.now, self.step = self.now, [], step
        batches = [(1, 0)] if self.fits(self.evaluations) else [(1,), (0,)]
        self.evaluations += 1
        out = {}
        for batch in batches:
            self.now.append(batch)
            place = len(self.now)
            kept = self.kept.get(place)
            if self.bits[step] or self.now != self.before[:place] or kept is None:
                kept = None
                self.computed.append(step)
            latents, time = torch.cat([x] * len(batch)), torch.cat([sigma] * len(batch))
            context = torch.cat([PROMPTS[number] for number in batch])
            velocity, self.kept[place] = self.model.by_hand(latents, time, context, kept)
            out |= zip(batch, (latents - velocity * time.view(-1, 1, 1)).chunk(len(batch)), strict=True)
        return out[1] + 3.0 * (out[0] - out[1])

    def sample(self, x, sigmas, sampler):
        self.sigmas = sigmas
        return SAMPLERS[sampler](self, sigmas, None, None, x)


def state(model):
    return {
        name: (each, sorted(vars(each)), len(each._forward_hooks), len(each._forward_pre_hooks))
        for name, each in model.named_modules()
    }


@pytest.mark.parametrize("fits", [True, False], ids=["one batch", "a call each"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_drawn_is_that_of_a_cache_by_hand(shape, sampler, fits):
    patcher = patcher_of(shape)
    before = state(patcher.model)
    clone = cached(patcher)
    drawn = draw(clone, sampler, fits=lambda _: fits)
    right = ByHand(patcher.model, BITS, lambda _: fits)
    assert torch.allclose(drawn, right.sample(noise(), SIGMAS, sampler), rtol=0, atol=1e-5)
    assert (drawn - draw(patcher, sampler)).abs().max() > 1e-3  # the cache is no clone of the uncached run
    assert state(patcher.model) == before
    assert str(report_of(clone)).startswith("10 of 20 steps reused, ")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_may_change_from_step_to_step(sampler):
    """As memory runs short for some evaluations; what has not been called so at the step before is computed."""

    def fits(evaluation):
        return not 8 <= evaluation < 23

    patcher = patcher_of("flux")
    right = ByHand(patcher.model, BITS, fits)
    drawn, expected = draw(cached(patcher), sampler, fits=fits), right.sample(noise(), SIGMAS, sampler)
    assert torch.allclose(drawn, expected, rtol=0, atol=1e-5)
    assert {step for step in right.computed if not BITS[step]}  # it does cost something


def test_each_mode_of_a_mixed_step_counts_the_blocks_that_ran():
    patcher, ran = patcher_of("wan"), []
    patcher.model.diffusion_model.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    draw(cached(patcher), fits=lambda _: False)
    assert len(ran) == 2 * sum(BITS)


def test_one_of_two_samplers_on_a_model_is_cached():
    patcher = patcher_of("flux")
    plain, clone = draw(patcher), cached(patcher)
    first = draw(clone)
    assert torch.equal(draw(patcher), plain)
    assert torch.equal(draw(clone), first)
    assert torch.equal(draw(patcher), plain)


def test_a_clone_of_the_cached_clone_is_cached_as_well():
    """As that of a LoRA's node behind it; the node before it is not."""
    patcher = patcher_of("wan")
    clone = cached(patcher)
    later = clone.clone()
    assert torch.equal(draw(later), draw(clone))
    assert len(report_of(clone).lines) == 2
    assert not patcher.wrappers
    assert not patcher.attachments


def test_of_two_caches_on_one_model_the_last_counts():
    patcher = patcher_of("wan")
    one = cached(patcher, tuple(BITS[:2] + (1,) * 18))
    assert torch.equal(draw(cached(one)), draw(cached(patcher)))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_cancelled_run_leaves_nothing_behind(kind):
    patcher = patcher_of("flux")
    before, clone = state(patcher.model), cached(patcher)
    right = draw(clone)

    def cancel(step):
        if step == 7:
            raise kind

    with pytest.raises(kind):
        draw(clone, callback=cancel)
    assert state(patcher.model) == before
    assert handle_of(patcher.model.diffusion_model) is None
    assert torch.equal(draw(clone), right)


def test_a_second_sampler_goes_on_at_a_later_step_and_another_size():
    patcher = patcher_of("flux")
    clone, bits = cached(patcher, BITS[:10]), BITS[:10]
    first = draw(clone, sigmas=SIGMAS[:11])
    start = torch.cat([first, first.flip(1)], 1)
    drawn = draw(clone, sigmas=SIGMAS[10:], start=start)
    one, two = (ByHand(patcher.model, bits, lambda _: True) for _ in range(2))
    right = one.sample(noise(), SIGMAS[:11], "euler")
    right = two.sample(torch.cat([right, right.flip(1)], 1), SIGMAS[10:], "euler")
    assert torch.allclose(drawn, right, rtol=0, atol=1e-5)


def test_a_mask_is_resampled_by_the_noise_levels_of_the_sampler():
    """Made for even levels, it refreshes at 0.3; by the number of the step it would be at 0.2."""
    patcher, ran = patcher_of("wan"), []
    made = Mask((1, 0, 0, 0, 0, 1, 0, 0), sigmas=(0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))
    clone = CachedRun(DitCacheConfig(cache_block_start=1, policy=made), "by mask").put_on(patcher)
    block = patcher.model.diffusion_model.blocks[2]
    block.register_forward_hook(lambda *given: ran.append(float(given[2]["e"][0])), with_kwargs=True)
    draw(clone, sigmas=torch.tensor([0.8, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.0]))
    assert ran == pytest.approx([0.8, 0.3])


def test_an_empty_schedule_draws_nothing():
    assert torch.equal(draw(cached(patcher_of("wan")), sigmas=SIGMAS[:1]), noise())


def test_calls_outside_of_a_sampler_are_plain():
    patcher = patcher_of("flux")
    clone = cached(patcher)
    options = {"wrappers": clone.around(comfy.WrappersMP.APPLY_MODEL)}
    right = patcher.model.apply_model(noise(), torch.ones(1), c_crossattn=PROMPTS[0])
    for _ in range(3):
        given = {"c_crossattn": PROMPTS[0], "transformer_options": options}
        assert torch.equal(patcher.model.apply_model(noise(), torch.ones(1), **given), right)


def test_where_nothing_is_reused_it_is_said_aloud(caplog):
    clone = cached(patcher_of("wan"), (1,) * 20)
    with caplog.at_level(logging.INFO, "dithooks"), pytest.warns(UserWarning, match="nothing will be reused"):
        draw(clone)
    assert str(report_of(clone)) == "NOTHING was reused in 20 steps: mask 20× (Wan, by mask)"
    assert [each.levelname for each in caplog.records if "NOTHING" in each.message] == ["WARNING"]


def test_steps_of_which_some_calls_were_reused_are_counted_apart():
    """As where a prompt holds from a later step on: its first call there is computed."""
    reused = {0: (False, False), 1: (True, False), 2: (True, True), 3: (True, True)}
    decisions = [SimpleNamespace(step=step, reuse=each) for step, pair in reused.items() for each in pair]
    stats = SimpleNamespace(blocks_total=32, blocks_run=12, reasons={})
    told_of = summary_line(SimpleNamespace(decisions=decisions, stats=stats), 4)
    assert told_of == ("2 of 4 steps reused and 1 in part, 2.7× fewer blocks", False)


def test_what_is_no_model_is_refused():
    with pytest.raises(WrongType, match="connect that of a loader"):
        cached(object())


def test_an_old_comfyui_is_refused(monkeypatch):
    monkeypatch.delattr(comfy.WrappersMP, "SAMPLER_SAMPLE")
    with pytest.raises(InvalidSetting, match="update it"):
        cached(patcher_of("wan"))


def test_another_cache_in_the_same_run_is_refused():
    patcher = patcher_of("wan")
    patcher.options["easycache"] = object()
    with pytest.raises(InvalidSetting, match="EasyCache"):
        draw(cached(patcher))
    draw(patcher)


def test_a_model_without_a_cache_has_no_report():
    with pytest.raises(InvalidSetting, match="Apply plan"):
        report_of(patcher_of("wan"))
