"""What goes wrong where a cache is kept by patched classes and replaced forwards, and does not here."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from pipelines import qwen_image
from toys import Net, Pipe, latents, prompt
from traces import attributes

from dithooks import DitCacheConfig, dit_cache
from dithooks.compat import cache_dit
from dithooks.compat.cache_dit import BlockAdapter, DBCacheConfig
from dithooks.handle import handles_of

CONFIG = DBCacheConfig(
    Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0
)  # all that may be, is reused


class Run:
    """The same inputs for every pipeline."""

    def __init__(self):
        self.x, self.prompts = latents(), [prompt(tokens=6), 3 * prompt(tokens=6)]

    def __call__(self, pipe, steps=8, **given):
        return pipe(self.x, steps, self.prompts, **given)


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def pipe():
    return Pipe(Net("two_lists"))


@pytest.fixture
def plain(pipe, run):
    return run(pipe)


@pytest.fixture
def cached(pipe, run, plain):
    """With ``CONFIG``."""
    cache_dit.enable_cache(pipe, CONFIG)
    output = run(pipe)
    cache_dit.disable_cache(pipe)
    assert not torch.equal(output, plain)
    return output


class TestTwoPipelinesOfOneClass:
    @pytest.mark.parametrize("on", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("off", [(0, 1), (1, 0)])
    def test_each_is_enabled_and_disabled_by_itself(self, run, on, off):
        pipes = [Pipe(Net("two_lists")) for _ in range(2)]
        plain, cached, enabled = [run(pipe) for pipe in pipes], [], set()
        for pipe in pipes:
            cache_dit.enable_cache(pipe, CONFIG)
            cached.append(run(pipe))
            cache_dit.disable_cache(pipe)
        for number in (*on, *off):
            if number in enabled:
                cache_dit.disable_cache(pipes[number])
            else:
                cache_dit.enable_cache(pipes[number], CONFIG)
            enabled ^= {number}
            for each in (0, 1):
                assert torch.equal(run(pipes[each]), (cached if each in enabled else plain)[each])

    def test_one_transformer_in_both(self, run, pipe, plain, cached):
        """As ``from_pipe`` makes them: they share the scheduler, too."""
        other = Pipe(pipe.transformer)
        other.scheduler = pipe.scheduler
        cache_dit.enable_cache(pipe, CONFIG)
        for each in (other, pipe, other):
            assert torch.equal(run(each), cached)
        cache_dit.enable_cache(other, CONFIG, max_cached_steps=1)  # the transformer's settings: the latest count
        assert [torch.equal(run(each), cached) for each in (pipe, other)] == [False, False]
        cache_dit.disable_cache(pipe)
        for each in (other, pipe):
            assert torch.equal(run(each), plain)

    def test_one_transformer_in_both_with_a_scheduler_each(self, run, pipe, plain, cached):
        """The cache is kept for the one that was enabled; the other never meets a residual that is not its own."""
        other = Pipe(pipe.transformer)
        cache_dit.enable_cache(pipe, CONFIG)
        for _ in range(2):
            assert torch.equal(run(pipe), cached)
            assert any(torch.equal(run(other), allowed) for allowed in (plain, cached))


class TestInTurn:
    def test_again_with_other_settings_which_count(self, run, pipe, cached):
        cache_dit.enable_cache(pipe, CONFIG)
        run(pipe)
        cache_dit.enable_cache(pipe, CONFIG, max_warmup_steps=5)
        run(pipe)
        lists = cache_dit.summary(pipe, logging=False)
        assert [stats.cached_steps for stats in lists] == [[5, 6, 7]] * 2
        cache_dit.enable_cache(pipe, CONFIG)
        assert torch.equal(run(pipe), cached)
        assert len(handles_of(pipe)) == 1

    def test_again_with_other_lists(self, run, pipe, plain):
        cache_dit.enable_cache(pipe, CONFIG)
        adapter = BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.singles)
        cache_dit.enable_cache(adapter, CONFIG)
        run(pipe)
        assert [stats.blocks for stats in cache_dit.summary(pipe, logging=False)] == ["transformer.singles"]
        cache_dit.disable_cache(pipe)
        assert torch.equal(run(pipe), plain)

    def test_on_and_off_and_on(self, run, pipe, plain, cached):
        before = attributes(pipe.transformer)
        for _ in range(3):
            cache_dit.enable_cache(pipe, CONFIG)
            assert torch.equal(run(pipe), cached)
            cache_dit.disable_cache(pipe)
            assert torch.equal(run(pipe), plain)
            cache_dit.disable_cache(pipe)
        assert attributes(pipe.transformer) == before

    def test_another_number_of_steps(self, run, pipe, cached):
        cache_dit.enable_cache(pipe, CONFIG)
        shorter = run(pipe, 5)
        assert torch.equal(run(pipe), cached)
        assert torch.equal(run(pipe, 5), shorter)
        cache_dit.disable_cache(pipe)
        cache_dit.enable_cache(pipe, CONFIG)
        assert torch.equal(run(pipe, 5), shorter)

    @pytest.mark.parametrize("stop", [1, 4, 7])
    def test_a_run_that_is_broken_off(self, run, pipe, cached, stop):
        def fail(step):
            if step == stop:
                raise KeyboardInterrupt

        cache_dit.enable_cache(pipe, CONFIG)
        with contextlib.suppress(KeyboardInterrupt):
            run(pipe, at=fail)
        assert torch.equal(run(pipe), cached)

    def test_an_error_in_the_middle_of_a_call(self, run, pipe, plain, cached):
        cache_dit.enable_cache(pipe, CONFIG)
        hook = pipe.transformer.singles[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(pipe)
        hook.remove()
        assert torch.equal(run(pipe), cached)
        cache_dit.disable_cache(pipe)
        assert torch.equal(run(pipe), plain)


class TestWhatBecomesOfIt:
    def test_a_copy_is_not_cached_and_the_original_still_is(self, run, pipe, plain, cached):
        cache_dit.enable_cache(pipe, CONFIG)
        run(pipe)
        twin = copy.deepcopy(pipe)
        assert handles_of(twin) == []
        assert torch.equal(run(twin), plain)
        assert torch.equal(run(pipe), cached)
        cache_dit.enable_cache(twin, CONFIG)
        cache_dit.disable_cache(pipe)
        assert torch.equal(run(twin), cached)
        assert torch.equal(run(pipe), plain)

    @pytest.mark.parametrize("adapted", [False, True])
    def test_a_pipeline_that_is_gone_has_taken_all_along(self, run, adapted):
        pipe = Pipe(Net("two_lists"))
        cache_dit.enable_cache(BlockAdapter(pipe=pipe, auto=True) if adapted else pipe, CONFIG)
        run(pipe)
        gone = [weakref.ref(part) for part in (pipe.transformer, *pipe.transformer.blocks, *handles_of(pipe))]
        del pipe
        gc.collect()
        assert [part() for part in gone] == [None] * len(gone)

    def test_weights_are_saved_and_loaded_as_without(self, pipe, run, cached):
        keys = list(pipe.transformer.state_dict())
        cache_dit.enable_cache(pipe, CONFIG)
        run(pipe)
        assert list(pipe.transformer.state_dict()) == keys
        pipe.transformer.load_state_dict(pipe.transformer.state_dict())
        assert torch.equal(run(pipe), cached)


class TestBesideDitCache:
    def test_of_the_same_blocks_is_an_error_and_changes_nothing(self, run, pipe):
        with dit_cache(pipe, DitCacheConfig(2, 2, 1, 3)) as cache:
            output = run(pipe)
            before = attributes(pipe.transformer)
            with pytest.raises(ValueError, match=r"transformer\.blocks\.1 is cached already"):
                cache_dit.enable_cache(pipe, CONFIG)
            assert attributes(pipe.transformer) == before
            assert torch.equal(run(pipe), output)
            assert handles_of(pipe) == [cache]
            cache_dit.disable_cache(pipe)  # which is not its own
            assert cache.active

    def test_of_other_blocks_stays(self, run, pipe):
        config = DitCacheConfig(2, 2, 1, 3)
        with dit_cache(pipe, config, blocks="transformer.blocks") as cache:
            alone = run(pipe)
            adapter = BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.singles)
            cache_dit.enable_cache(adapter, CONFIG)
            assert not torch.equal(run(pipe), alone)
            cache_dit.disable_cache(pipe)
            assert handles_of(pipe) == [cache]
            assert torch.equal(run(pipe), alone)


@pytest.mark.parametrize("wrong", [{"Fn_compute_blocks": 5}, {"Fn_compute_blocks": 3, "Bn_compute_blocks": 2}])
@pytest.mark.parametrize("named", [["blocks"], ["blocks", "singles"], ["singles", "blocks"]])
def test_what_cannot_be_enabled_leaves_the_model_as_it_was(run, pipe, plain, named, wrong):
    before = attributes(pipe.transformer)
    lists = [getattr(pipe.transformer, name) for name in named]
    adapter = BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=lists)
    message = f"leave none to be cached: transformer.{named[0]} has 5 blocks"
    with pytest.raises(ValueError, match=message):
        cache_dit.enable_cache(adapter, CONFIG, **wrong)
    assert attributes(pipe.transformer) == before
    assert torch.equal(run(pipe), plain)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
class TestAccelerate:
    """Its hooks, on before or after the cache, and off in either order."""

    @pytest.fixture
    def pipe(self):
        pytest.importorskip("accelerate")
        return self.built()

    @pytest.fixture
    def run(self):
        call = qwen_image()[1]
        return lambda pipe: pipe(**call, num_inference_steps=6, generator=torch.Generator().manual_seed(0))[0]

    def built(self):
        pipe, _ = qwen_image()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def offload(self, pipe, how):
        import accelerate

        if how == "layers":
            accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
            assert pipe.transformer.transformer_blocks[1].attn.to_q.weight.is_meta
        elif how == "model":
            accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
        else:
            pipe.enable_model_cpu_offload(device="cpu")

    @pytest.mark.parametrize("how", ["layers", "model", "pipeline"])
    @pytest.mark.parametrize("first", ["offload", "cache"])
    def test_with_the_cache_as_without_it(self, run, pipe, plain, cached, how, first):
        if first == "offload":
            self.offload(pipe, how)
        cache_dit.enable_cache(pipe, CONFIG)
        if first == "cache":
            self.offload(pipe, how)
        assert torch.equal(run(pipe), cached)
        cache_dit.disable_cache(pipe)
        assert torch.equal(run(pipe), plain)

    @pytest.mark.parametrize("how", ["layers", "model", "pipeline"])
    def test_its_hooks_are_as_before(self, pipe, how):
        self.offload(pipe, how)
        before = attributes(pipe.transformer)
        cache_dit.enable_cache(pipe, CONFIG)
        assert attributes(pipe.transformer) != before
        cache_dit.disable_cache(pipe)
        assert attributes(pipe.transformer) == before

    def test_offloading_ends_before_the_cache_does(self, run, pipe, plain, cached):
        from accelerate.hooks import remove_hook_from_module

        cache_dit.enable_cache(pipe, CONFIG)
        self.offload(pipe, "layers")
        run(pipe)
        remove_hook_from_module(pipe.transformer, recurse=True)
        assert torch.equal(run(pipe), cached)
        cache_dit.disable_cache(pipe)
        assert torch.equal(run(pipe), plain)
