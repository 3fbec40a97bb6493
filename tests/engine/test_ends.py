"""How runs end: what is freed, what is said, and whose residuals stay."""

import warnings
import weakref

import pytest
import torch
from profiling.test_profile import sequence
from torch import nn
from toys import Net, Pipe, latents, prompt

from dithooks import (
    BlockAdapter,
    Budget,
    DitCacheConfig,
    EasyCache,
    Linear,
    MagnitudeRatio,
    PatchFunctor,
    Threshold,
    dit_cache,
    profile,
    timestep_scope,
)
from dithooks.engine import anchor
from dithooks.engine.anchor import _moved

pytestmark = pytest.mark.core


class Guided(Pipe):
    """Two prompts at the steps for which ``on`` holds, one at the others; ``begin`` leaves the first steps out."""

    def __call__(self, x, steps=20, prompts=(), on=lambda step: True, begin=0):
        self.scheduler.set_timesteps(steps)
        self.scheduler.begin_index = begin or None
        for step in range(begin, steps):
            t = self.scheduler.timesteps[step]
            outs = [self.transformer(x, t / 1000, e) for e in (prompts if on(step) else prompts[:1])]
            x = x - sum(outs) / len(outs) / steps
            self.scheduler.step()
        return x


class Experts(Pipe):
    """One transformer for the steps before ``boundary``, another from there on; or both at every step."""

    def __init__(self):
        super().__init__(Net())
        self.transformer_2 = Net()

    def __call__(self, x, steps=20, boundary=8, both=False):
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            models = [self.transformer, self.transformer_2]
            for model in models if both else models[step >= boundary :][:1]:
                x = x - model(x, timestep=t / 1000) / steps
            self.scheduler.step()
        return x


WHEN = {
    "first half": lambda step: step < 10,
    "second half": lambda step: step >= 10,
    "every other": lambda step: step % 2 == 1,
    "middle": lambda step: 4 <= step < 14,
    "always": lambda step: True,
}


@pytest.mark.parametrize("on", WHEN)
@pytest.mark.parametrize("target", [1.5, 2.0, 3.0])
def test_budgets_count_over_all_calls_whatever_guidance_does(on, target):
    """To within a call or two: what guidance will do at the steps to come cannot be known."""
    pipe = Guided(Net("swapped"))
    with warnings.catch_warnings(), dit_cache(pipe, DitCacheConfig(policy=Budget(target))) as cache:
        warnings.simplefilter("ignore")
        pipe(latents(), prompts=[prompt(), prompt()], on=WHEN[on])
        stats = cache.stats
    assert abs(stats.reused_calls - stats.calls * (1 - 1 / target)) <= 2


@pytest.mark.parametrize("on", WHEN)
def test_nothing_is_kept_or_held_at_the_end(on):
    pipe, prompts = Guided(Net("swapped")), [prompt(), prompt()]
    kept = [weakref.ref(each) for each in prompts]
    with dit_cache(pipe, DitCacheConfig(policy=Threshold(9.0, 1), predictor=Linear())) as cache:
        pipe(latents(), prompts=prompts, on=WHEN[on])
        assert cache.stats.bytes_peak > cache.stats.bytes_held == 0
        del prompts
        assert [ref() for ref in kept] == [None, None]


def test_guidance_that_ends_before_the_last_step_leaves_its_residuals_to_the_next_run():
    pipe, prompts = Guided(Net("swapped")), [prompt(), prompt()]
    with dit_cache(pipe, DitCacheConfig(0, 2)) as cache:
        pipe(latents(), prompts=prompts, on=lambda step: step < 19)
        held = cache.stats.bytes_held
        assert held > 0
        pipe(latents(), prompts=prompts)
        assert cache.stats.bytes_held == 0


def test_the_next_picture_of_a_model_of_one_step_is_another_run():
    pipe = Pipe(Net("swapped"))
    with dit_cache(pipe, DitCacheConfig(0, 2)) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            pipe(latents(), steps=1, prompts=[prompt()])
        assert {each.branch for each in cache.decisions} == {0}
        assert len({each.run for each in cache.decisions}) == 20


@pytest.mark.parametrize("boundary", [1, 8, 19])
def test_an_expert_is_freed_when_the_other_has_ended_the_run(boundary):
    pipe = Experts()
    with dit_cache(pipe, DitCacheConfig(0, 2, predictor=Linear())) as cache:
        pipe(latents(), boundary=boundary)
        assert (cache.stats.calls, cache.stats.bytes_held) == (20, 0)


def test_two_that_are_called_at_every_step_keep_theirs_to_the_last():
    pipe = Experts()
    with dit_cache(pipe, DitCacheConfig(0, 2)) as cache:
        pipe(latents(), both=True)
        assert cache.stats.reasons == {"refresh": 20, "reuse": 20}
        assert cache.stats.bytes_held == 0


def test_a_run_that_ends_frees_no_other_under_way():
    """Two models of one handle in runs of their own, told by scopes alone."""
    pipe, x = Experts(), latents()
    with dit_cache(pipe, DitCacheConfig(0, 4)) as cache:
        for step in range(12):
            with timestep_scope(step, steps=12):
                pipe.transformer(x, torch.tensor(0.5))
            if step == 5:
                for other in range(3):
                    with timestep_scope(other, steps=3):
                        pipe.transformer_2(x, torch.tensor(0.5))
        made = {each.step: each.reason for each in cache.decisions if each.range == "transformer.blocks"}
    assert made == {step: "refresh" if step % 4 == 0 else "reuse" for step in range(12)}


class TestSaid:
    def said(self, recwarn):
        return [str(each.message) for each in recwarn if issubclass(each.category, UserWarning)]

    def test_experts_are_weighed_together(self, recwarn):
        """15 steps of one and 5 of the other: what one lacks, the other makes up for, or it is said."""
        pipe = Experts()
        with dit_cache(pipe, DitCacheConfig(policy=Budget(2.0))) as cache:
            pipe(latents(), boundary=15)
            stats = cache.stats
        met = abs(stats.blocks_total / stats.blocks_run / 2 - 1) <= 0.05
        assert bool(self.said(recwarn)) != met

    def test_an_expert_that_ends_in_its_warm_up(self, recwarn):
        pipe = Experts()
        with dit_cache(pipe, DitCacheConfig(policy=Threshold(9.0, 6))):
            pipe(latents(), boundary=5)
        (message,) = self.said(recwarn)
        assert message.startswith("transformer (Net): a run of 5 steps reused nothing (calls computed for warm-up: 5)")

    def test_a_short_run_does_not_use_up_the_warning(self, recwarn):
        pipe = Pipe(Net())
        with dit_cache(pipe, DitCacheConfig(policy=Threshold(1e-6, 3))):
            for steps in (1, 3, 12, 12):
                pipe(latents(), steps=steps)
        assert ["of 3 steps" in self.said(recwarn)[0], "of 12 steps" in self.said(recwarn)[1]] == [True, True]
        assert len(self.said(recwarn)) == 2

    def test_ratios_of_which_one_branch_could_use_its_own(self, recwarn):
        policy = MagnitudeRatio(((1.0, *[5.0] * 19), (1.0,) * 20), threshold=0.1, retention_ratio=0.1)
        pipe = Pipe(Net("swapped"))
        with dit_cache(pipe, DitCacheConfig(policy=policy)) as cache:
            pipe(latents(), steps=20, prompts=[prompt(), prompt()])
            assert cache.stats.reused_calls > 0
        assert not self.said(recwarn)

    def test_which_limit_it_was(self, recwarn):
        pipe = Pipe(Net())
        with dit_cache(pipe, DitCacheConfig(policy=Threshold(9.0, 1, max_accumulated_diff=1e-6))):
            pipe(latents())
        assert "max_accumulated_diff is 1e-06" in self.said(recwarn)[0]


class TestWhatIsLookedAt:
    """Text and picture are told apart by name only."""

    class Blocks(nn.Module):
        def __init__(self, names):
            super().__init__()
            self.names, self.proj = names, nn.Linear(4, 4)

        def forward(self, state):
            return {name: value + 0.1 * self.proj(value) for name, value in state.items()}

    class State(PatchFunctor):
        def read(self, args, kwargs):
            return list(args[0].values())

        def take(self, output):
            return list(output.values())

        def build(self, streams, args, kwargs):
            return dict(zip(args[0], streams, strict=True))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(TestWhatIsLookedAt.Blocks(("image", "text")) for _ in range(4))

        def forward(self, x, text):
            state = {"image": x, "text": text}
            for block in self.blocks:
                state = block(state)
            return state["image"]

    @pytest.mark.parametrize("tokens", [3, 300])
    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("policy", [Threshold(0.05, 1), EasyCache(0.05, 2)])
    def test_a_picture_that_changes_is_seen_however_long_the_text(self, tokens, first, policy):
        model, text = self.Model(), torch.randn(1, tokens, 4)
        adapter = BlockAdapter(transformer=model, blocks="blocks", patch_functor=self.State())
        with (
            warnings.catch_warnings(),
            dit_cache(adapter, DitCacheConfig(cache_block_start=first, policy=policy)) as cache,
        ):
            warnings.simplefilter("ignore")
            for step in range(6):
                with timestep_scope(step):
                    model(torch.randn(1, 16, 4), text)
            values = [each.value for each in cache.decisions[policy.max_warmup_steps :]]
            assert cache.stats.reused_calls == 0
        assert min(values) > 0.5


def test_a_first_output_that_is_not_finite_is_no_reason_to_refuse():
    """The test of the first residual waits for a call that can tell, and nothing is reused of the one that cannot."""
    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache:
        for step, given in enumerate([x * float("nan"), x, x, x]):
            with timestep_scope(step):
                out = net(given, torch.tensor(0.5))
        assert torch.isfinite(out).all()
        assert [each.reuse for each in cache.decisions] == [False, False, False, True]


def test_profiles_of_a_run_that_begins_later():
    """Steps are those of the schedule: what is predicted is what comes of it, and so are ratios and weights."""
    pipe, x, prompts = Guided(Net("swapped")), latents(), [prompt(), prompt()]
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.2, 1))
    with torch.no_grad():
        found = profile(pipe, lambda: pipe(x, prompts=prompts, begin=12), config)
    branch = found.of()[0]
    assert [moment.step for moment in branch.moments] == list(range(12, 20))
    assert found.reuse(9.0, branch) == 7 / 8
    assert [len(each) for each in found.ratios()] == [20, 20]
    assert set(found.ratios()[0][:13]) == {1.0}
    weights = found.fitted((1, 0) * 10).coefficients
    assert [each is None for each in weights] == [True] * 13 + [False, True] * 3 + [False]


def test_predictions_of_a_run_that_begins_later_come_true():
    net = Net("swapped")
    whole = sequence(net, steps=20)

    def run():
        draw = torch.Generator().manual_seed(0)
        x, away, e = (torch.randn(2, n, c, generator=draw) for n, c in ((6, 4), (6, 4), (3, 8)))
        with torch.no_grad():
            for step in range(9, 20):
                t = 1 - step / 20
                with timestep_scope(step, sigma=t, steps=20):
                    net(x * t + away * (1 - t) ** 2, torch.tensor(t), encoder_hidden_states=e)

    whole()
    found = profile(net, run, DitCacheConfig(cache_block_start=1, policy=Threshold(0.1, 8)))
    for threshold in (0.2, 0.3, 0.5, 0.9):
        policy = Threshold(threshold, 8)
        with dit_cache(net, DitCacheConfig(cache_block_start=1, policy=policy)) as cache:
            run()
            made = [each.reuse for each in cache.decisions]
        assert [decision.reuse for decision in found.of()[0].decisions(policy)] == made


class OnADevice:
    """Stands for a tensor on an accelerator, which this machine has not: notes what is asked of it."""

    def __init__(self):
        self.device, self.shape, self.dtype, self.asked = torch.device("cuda"), torch.Size([2, 3]), torch.float32, []

    def to(self, *where, **how):
        self.asked.append((where, how))
        return "a copy that waits"


class TestTheHostsMemory:
    def test_copies_there_are_pinned_and_wait_for_nothing(self, monkeypatch):
        made = []

        class Home:
            def copy_(self, source, non_blocking=False):
                made.append((source, non_blocking))
                return self

        def empty(shape, *, dtype, device, pin_memory):
            made.append((shape, dtype, device, pin_memory))
            return Home()

        monkeypatch.setattr(anchor.torch, "empty", empty)
        there = OnADevice()
        assert isinstance(_moved(there, "cpu"), Home)
        assert made == [(torch.Size([2, 3]), torch.float32, "cpu", True), (there, True)]

    def test_where_memory_cannot_be_pinned_they_wait(self, monkeypatch):
        def empty(*_, **__):
            raise RuntimeError("cannot pin")

        monkeypatch.setattr(anchor.torch, "empty", empty)
        there = OnADevice()
        assert _moved(there, "cpu") == "a copy that waits"
        assert there.asked == [(("cpu",), {})]

    def test_what_is_there_already_is_not_copied(self):
        tensor = torch.ones(2)
        assert _moved(tensor, "cpu") is tensor
        pipe, x = Pipe(Net()), latents()
        with dit_cache(pipe, DitCacheConfig(1, 2, predictor=Linear())):
            expected = pipe(x)
        with dit_cache(pipe, DitCacheConfig(1, 2, predictor=Linear(), cache_device="cpu")):
            assert torch.equal(pipe(x), expected)
