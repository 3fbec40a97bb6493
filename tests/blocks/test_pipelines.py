"""The cache on diffusers' own pipelines, run end to end: which blocks run, what comes out, what stays behind.

Executions are counted by hooks on the blocks, and outputs compared with a cache written out by hand below, which shares
nothing with the library.
"""

import inspect
from functools import partial

import diffusers
import pytest
import torch
from pipelines import FAMILIES, NOISE, controlled, flux, noise, sd3, wan, z_image

from dithooks import DitCacheConfig, dit_cache, timestep_scope

START, INTERVAL, STEPS = 2, 3, 8  # computed: 0, 1, 2, 5
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning", "ignore:`FluxPosEmbed`:FutureWarning")


class Case:
    """A pipeline of one family, ready to be run."""

    def __init__(self, name, built=None):
        self.family = FAMILIES[name]
        self.pipe, self.call = built or self.family.build()
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer
        self.blocks = self.family.blocks(self.transformer)

    def config(self, start=0, count=None, step_start=START, interval=INTERVAL):
        return DitCacheConfig(step_start, interval, start, count or len(self.blocks))

    def run(self, **changes):
        torch.manual_seed(0)  # for what no generator reaches: noise of DDPM in DiT, of the VAE in SD3's ControlNet
        given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)} | self.call | changes
        return torch.as_tensor(self.pipe(**given)[0])

    def attach(self, config, **options):
        return dit_cache(self.pipe, config, **options)

    def cached(self, config, **changes):
        with self.attach(config):
            return self.run(**changes)

    def by_hand(self, config, places, **changes):
        with ByHand(self.family, self.transformer, config, places):
            return self.run(**changes)

    def places(self, guided=True):
        return places(range(STEPS), self.family.calls if guided else 1)


def places(steps, calls=1):
    """Step and branch of every call of the transformer."""
    return [(step, branch) for step in steps for branch in range(calls)]


def reusable(step, kept, config):
    """Whether a branch whose residual is of step ``kept`` may reuse it: it has to be the schedule's last refresh's."""
    if step < config.cache_step_start or kept is None:
        return False
    since = (step - config.cache_step_start) % config.cache_step_interval
    return since > 0 and kept >= step - since


def planned(config, blocks, places):
    """The blocks that every call has to run: all, or those outside of the range."""
    everything, end = list(range(blocks)), config.cache_block_start + config.cache_num_blocks
    outside = [*range(config.cache_block_start), *range(end, blocks)]
    plan, kept = [], {}
    for step, branch in places:
        reuse = reusable(step, kept.get(branch), config)
        plan.append(outside if reuse else everything)
        if not reuse:
            kept[branch] = step
    return plan


class Executions:
    """The blocks that ran, in each call of the transformer. Made before a cache is attached."""

    def __init__(self, transformer, blocks):
        self.calls = []
        transformer.register_forward_pre_hook(lambda *_: self.calls.append([]))
        for number, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, number=number: self.calls[-1].append(number))

    def take(self):
        calls, self.calls[:] = list(self.calls), []
        return calls


class ByHand:
    """The cache written out: its streams are declared, the place of every call is given, nothing is observed.

    Without a schedule (``places`` is empty) the range is left out, and nothing is put in its place.
    """

    def __init__(self, family, transformer, config, places):
        blocks = family.blocks(transformer)[config.cache_block_start :][: config.cache_num_blocks]
        self.blocks, self.first, self.last = blocks, blocks[0], blocks[-1]
        self.streams, self.transformer, self.config = family.streams, transformer, config
        self.places, self.kept, self.number = places, {}, -1

    def __enter__(self):
        self.hook = self.transformer.register_forward_pre_hook(self.begin)
        for block in self.blocks:
            block.forward = partial(self.forward, block, block.forward)

    def __exit__(self, *_):
        self.hook.remove()
        for block in self.blocks:
            del block.forward

    def begin(self, *_):
        self.number, self.entry, self.reuse = self.number + 1, None, True
        if self.places:
            self.step, self.branch = self.places[self.number]
            self.reuse = reusable(self.step, self.kept.get(self.branch, (None,))[0], self.config)

    def forward(self, block, original, *args, **kwargs):
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        h = [given.get(name) for name in self.streams]
        if block is self.first:
            self.entry = h
        if not self.reuse:
            output = original(*args, **kwargs)
            if block is self.last and self.entry is not None:
                out = [output] if len(h) == 1 else output
                deltas = [None if b is None else b - laid_out(a, b) for a, b in zip(self.entry, out, strict=True)]
                self.kept[self.branch] = self.step, deltas
            return output
        if block is self.last and self.places:
            _, deltas = self.kept[self.branch]
            h = [None if d is None else laid_out(a, d) + d for a, d in zip(self.entry, deltas, strict=True)]
        return h[0] if len(h) == 1 else tuple(h)


def laid_out(h, like):
    """Tokens by frame or frames by token, as Latte's spatial and temporal blocks take them."""
    if h.shape == like.shape:
        return h
    return h.reshape(-1, like.shape[1], *h.shape[1:]).transpose(1, 2).reshape(like.shape)


def modules(pipe):
    """Every module of a pipeline, by name and identity, with the number of its hooks."""
    parts = [(name, part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    return [
        (part, name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for part, whole in parts
        for name, module in whole.named_modules()
    ]


def far(a, b):
    return float((a - b).norm())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models as small as these only wait for a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return Case(name)


@pytest.fixture(params=[True, False], ids=["guided", "unguided"])
def guided(request):
    return request.param


@pytest.fixture
def changes(case, guided):
    return {} if guided else case.family.off


class TestEveryFamily:
    def test_attached_but_always_computing_changes_nothing(self, case):
        plain = case.run()
        with case.attach(case.config(step_start=STEPS)) as cache:
            with pytest.warns(UserWarning, match="nothing will be reused"):
                attached = case.run()
            assert cache.stats.blocks_run == cache.stats.blocks_total > 0
        assert torch.equal(attached, plain)

    @pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
    def test_runs_what_the_schedule_says(self, case, guided, changes, inner):
        config = case.config(1, 3) if inner else case.config()
        ran = Executions(case.transformer, case.blocks)
        with case.attach(config, verify=False) as cache:
            case.run(**changes)
            stats = cache.stats
        calls = ran.take()
        assert calls == planned(config, len(case.blocks), case.places(guided))
        assert stats.calls == len(calls)
        assert stats.blocks_run == sum(map(len, calls))
        assert stats.blocks_total == len(calls) * len(case.blocks)
        assert stats.reused_calls == len(calls) // 2

    def test_the_first_residual_is_tested_by_one_more_call(self, case):
        config = case.config(1, 3)
        ran = Executions(case.transformer, case.blocks)
        with case.attach(config) as cache:
            case.run()
            stats = cache.stats
        plan = planned(config, len(case.blocks), case.places())
        assert stats.blocks_run == sum(map(len, plan))  # the test is not counted
        first = START * case.family.calls
        # all blocks, then those outside of the range; five times more where the model makes new tensors between its
        # blocks, to ask how it hands them on, without noise and with (Latte exchanges frames and tokens)
        plan[first] = plan[first] + plan[-1] * (6 if case.family.interleaved else 1)
        if case.family.is_told_apart:  # asked once whether anything is added between blocks, for arguments new to it
            plan[first + 1] = plan[-1] + plan[first + 1]
        assert ran.take() == plan

    @pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
    def test_same_as_a_cache_written_by_hand(self, case, guided, changes, inner):
        config = case.config(1, 3) if inner else case.config()
        cached = case.cached(config, **changes)
        assert cached.isfinite().all()
        by_hand = case.by_hand(config, case.places(guided), **changes)
        if case.family.interleaved:  # Latte adds positions between its blocks, which count apart from the residual
            torch.testing.assert_close(cached, by_hand, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(cached, by_hand)

    def test_near_the_plain_output_and_far_from_it_without_the_range(self, case):
        config = case.config(interval=2)
        plain, cached, without = case.run(), case.cached(config), case.by_hand(config, [])
        assert 0 < far(cached, plain) < far(without, plain) / 1.5
        assert far(without, plain) > 0.01 * far(plain, plain.mean())  # or the other tests would show nothing

    def test_nothing_stays_behind(self, case):
        plain, before = case.run(), modules(case.pipe)
        case.cached(case.config())
        assert modules(case.pipe) == before
        assert torch.equal(case.run(), plain)

    def test_another_number_of_steps_on_the_same_handle(self, case):
        fresh = case.cached(case.config(), num_inference_steps=11)
        with case.attach(case.config()):
            first = case.run()
            assert torch.equal(case.run(num_inference_steps=11), fresh)
            assert torch.equal(case.run(), first)


class TestGuidanceByTwoCalls:
    @pytest.fixture(params=[name for name, family in FAMILIES.items() if family.calls == 2])
    def name(self, request):
        return request.param

    def test_the_two_are_not_mixed(self, case):
        """Mixing them up by hand, the first call given what the second one kept, comes out differently."""
        cached = case.cached(case.config())
        assert torch.equal(cached, case.by_hand(case.config(), case.places()))
        assert far(cached, case.by_hand(case.config(), [(step, 0) for step, _ in case.places()])) > 1e-3

    def test_between_two_equal_prompts_it_is_none(self, case):
        equal = {key: case.call[key.removeprefix("negative_")] for key in case.call if key.startswith("negative_")}
        guided = case.cached(case.config(), **equal)
        assert torch.equal(guided, case.cached(case.config(), **case.family.off))

    def test_on_an_attached_cache_it_comes_and_goes(self, case):
        on, off = case.cached(case.config()), case.cached(case.config(), **case.family.off)
        with case.attach(case.config()):
            for changes, expected in (({}, on), (case.family.off, off), ({}, on)):
                assert torch.equal(case.run(**changes), expected)


def test_guidance_that_ends_in_the_middle():
    """Of a batch of two only one is left then: the other residual is no good for it."""
    case = Case("z_image")
    where = [(step, int(step >= 6)) for step in range(STEPS)]
    ran = Executions(case.transformer, case.blocks)
    batches = []
    case.transformer.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with case.attach(case.config(), verify=False):
        cached = case.run(cfg_truncation=0.45)
    assert batches == [2] * 6 + [1] * 2
    assert ran.take() == planned(case.config(), len(case.blocks), where)
    assert torch.equal(cached, case.by_hand(case.config(), where, cfg_truncation=0.45))


def test_guidance_that_pauses():
    """Off at steps 4 to 6, so without the refresh of 5: the second call of step 7 finds no residual of its own.

    It would be too old, and was freed with the first call of that step: none of the two before had a second.
    """
    case = Case("wan")
    where = [(step, branch) for step in range(STEPS) for branch in ((0,) if 4 <= step <= 6 else (0, 1))]

    def pause(pipe, step, *_):
        pipe._guidance_scale = 1.0 if 4 <= step + 1 <= 6 else 2.0
        return {}

    ran = Executions(case.transformer, case.blocks)
    with case.attach(case.config(), verify=False) as cache:
        cached = case.run(callback_on_step_end=pause)
        assert cache.stats.reasons["no anchor"] == 1
    calls = ran.take()
    assert calls == planned(case.config(), len(case.blocks), where)
    assert [len(blocks) for blocks in calls[-2:]] == [0, len(case.blocks)]
    assert torch.equal(cached, case.by_hand(case.config(), where, callback_on_step_end=pause))


class TestImageToImage:
    @pytest.fixture(params=["flux", "sd3", "z_image"])
    def case(self, request):
        kinds = {
            "flux": lambda: flux("FluxImg2ImgPipeline"),
            "sd3": lambda: sd3("StableDiffusion3Img2ImgPipeline"),
            "z_image": lambda: z_image("ZImageImg2ImgPipeline"),
        }
        pipe, call = kinds[request.param]()
        image = {"image": noise(1, 3, 8, 8).sigmoid(), "strength": 0.4, "num_inference_steps": 10}
        return Case(request.param, (pipe, call | image))

    def test_enters_in_the_middle_of_the_schedule(self, case):
        where = places(range(6, 10), case.family.calls)
        ran = Executions(case.transformer, case.blocks)
        with case.attach(case.config(), verify=False):
            cached = case.run()
        calls = ran.take()
        assert calls == planned(case.config(), len(case.blocks), where)
        computed = {step for (step, _), blocks in zip(where, calls, strict=True) if len(blocks) == len(case.blocks)}
        assert computed == {6, 8}  # its first step, and those that the schedule of the whole run refreshes
        assert torch.equal(cached, case.by_hand(case.config(), where))

    def test_a_second_picture_begins_with_its_own_residual(self, case):
        other = noise(1, 3, 8, 8, seed=5).sigmoid()
        first, second = case.cached(case.config()), case.cached(case.config(), image=other)
        assert far(first, second) > 1e-3
        with case.attach(case.config()):
            for changes, expected in (({}, first), ({"image": other}, second), ({}, first)):
                assert torch.equal(case.run(**changes), expected)


SHIFTING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
SCHEDULERS = {
    "flux": {"UniPCMultistepScheduler": SHIFTING, "DPMSolverMultistepScheduler": SHIFTING},
    "sd3": {"FlowMatchHeunDiscreteScheduler": {}, "DEISMultistepScheduler": SHIFTING},
    "wan": {"FlowMatchHeunDiscreteScheduler": {}},
    "dit": {"HeunDiscreteScheduler": NOISE, "KDPM2DiscreteScheduler": NOISE, "DDPMScheduler": NOISE},
    "pixart": {"HeunDiscreteScheduler": NOISE, "DPMSolverSinglestepScheduler": NOISE},
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds])
def test_schedulers_that_evaluate_twice_or_look_back(name, kind):
    """The steps of one that evaluates twice are its evaluations: it lists them all, and counts by them."""
    case = Case(name)
    case.pipe.scheduler = scheduler = getattr(diffusers, kind)(**SCHEDULERS[name][kind])
    ran = Executions(case.transformer, case.blocks)
    with case.attach(case.config(), verify=False):
        cached = case.run()
    evaluations = len(scheduler.timesteps)
    assert evaluations == (2 * STEPS - 1 if scheduler.order == 2 and "Single" not in kind else STEPS)
    where = places(range(evaluations), case.family.calls)
    assert ran.take() == planned(case.config(), len(case.blocks), where)
    assert torch.equal(cached, case.by_hand(case.config(), where))


class TestControlNet:
    @pytest.fixture(params=["flux", "sd3"])
    def case(self, request):
        return Case(request.param, controlled({"flux": flux, "sd3": sd3}[request.param]))

    def test_runs_what_the_schedule_says(self, case, guided, changes):
        ran = Executions(case.transformer, case.blocks)
        with case.attach(case.config(1, 3), verify=False):
            cached = case.run(**changes)
        assert ran.take() == planned(case.config(1, 3), len(case.blocks), case.places(guided))
        assert torch.equal(cached, case.by_hand(case.config(1, 3), case.places(guided), **changes))

    @pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
    def test_its_residuals_count_once(self, case, inner):
        """What a computed call gave is what a reused one on the same arguments gives, and not so without control."""
        seen = []
        hook = case.transformer.register_forward_pre_hook(lambda _m, _a, given: seen.append(given), with_kwargs=True)
        case.run()
        hook.remove()
        given = seen[3]
        bare = {key: None if key.startswith(("controlnet", "block_controlnet")) else x for key, x in given.items()}
        plain = case.transformer(**given)[0]
        assert far(case.transformer(**bare)[0], plain) > 0.01 * float(plain.norm())
        with case.attach(case.config(1, 3, 0) if inner else case.config(step_start=0)) as cache:
            for step in (0, 1):
                with timestep_scope(step):
                    output = case.transformer(**given)[0]
            assert cache.stats.reused_calls == 1
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)

    def test_another_control_image_gives_another_output(self, case):
        first = case.cached(case.config())
        with case.attach(case.config()):
            assert torch.equal(case.run(), first)
            other = case.run(control_image=noise(1, 3, 8, 8, seed=5).sigmoid())
            assert far(other, first) > 1e-3
            assert torch.equal(case.run(), first)


@pytest.mark.parametrize("layer", range(5))
def test_skip_layer_guidance_is_right_wherever_the_layer_is(layer):
    """SD3 calls once more at steps 1 to 5, a layer left out. Of blocks 1 to 3, 0 and 4 are outside and 2 is inside;
    without 1 or 3 that call has no residual, and is computed.
    """
    case = Case("sd3")
    given = {"skip_guidance_layers": [layer], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.75}
    where = [(step, branch) for step in range(STEPS) for branch in ((0, 1) if 1 <= step <= 5 else (0,))]
    assert far(case.run(**given), case.run()) > 1e-3
    ran = Executions(case.transformer, case.blocks)
    with case.attach(case.config(1, 3), verify=False):
        cached = case.run(**given)
    plan = planned(case.config(1, 3), 5, where)
    for number, (_, branch) in enumerate(where):
        if branch == 1:
            blocks = range(5) if layer in (1, 3) else plan[number]
            plan[number] = [block for block in blocks if block != layer]
    assert ran.take() == plan
    assert torch.equal(cached, case.by_hand(case.config(1, 3), where, **given))


class TestTwoExperts:
    """Wan with a transformer for the noisy steps and one for the rest."""

    @pytest.fixture
    def case(self):
        return Case("wan", wan(2))

    def test_each_computes_its_first_step(self, case, guided, changes):
        pipe, calls = case.pipe, case.family.calls if guided else 1
        experts = [pipe.transformer, pipe.transformer_2]
        ran = [Executions(expert, expert.blocks) for expert in experts]
        with case.attach(case.config(), verify=False) as cache:
            cached = case.run(**changes)
            stats = cache.stats
        boundary = sum(t >= 500 for t in pipe.scheduler.timesteps)
        assert boundary == 6  # which the schedule would not compute
        where = [places(range(boundary), calls), places(range(boundary, STEPS), calls)]
        took = [executions.take() for executions in ran]
        assert took == [planned(case.config(), 4, places) for places in where]
        assert stats.blocks_run == sum(map(len, took[0] + took[1]))
        hands = [ByHand(case.family, *one) for one in zip(experts, [case.config()] * 2, where, strict=True)]
        with hands[0], hands[1]:
            assert torch.equal(case.run(**changes), cached)

    def test_a_second_video_begins_with_its_own_residuals(self, case):
        """Also where the second transformer takes over, past the last refresh."""
        other = {"latents": noise(1, 4, 2, 2, 2, seed=5)}
        first, second = case.cached(case.config()), case.cached(case.config(), **other)
        assert far(first, second) > 1e-3
        with case.attach(case.config()):
            for changes, expected in (({}, first), (other, second), ({}, first)):
                assert torch.equal(case.run(**changes), expected)

    def test_nothing_stays_behind(self, case):
        plain, before = case.run(), modules(case.pipe)
        assert not torch.equal(case.cached(case.config()), plain)
        assert modules(case.pipe) == before
        assert torch.equal(case.run(), plain)
