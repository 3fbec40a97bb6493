"""Group offloading by blocks and by layers, with streams and without, on a simulated device, where weights that are not
there cannot be computed with: no block or layer runs without its weights, what is skipped is not brought, and each
prefetch comes in time. Also diffusers' own on a CPU, from memory and from a disk.
"""

import pytest
import torch
from diffusers.hooks import HookRegistry
from models import flux
from offloading import (
    CONFIGS,
    NEVER,
    STATIC,
    Simulated,
    Way,
    expected,
    kept,
    offloaded,
    run,
    settled,
    step,
    there,
    wan,
)

from dithooks import DitCacheConfig, dit_cache

pytestmark = [pytest.mark.line("Offload"), pytest.mark.on("tiny FLUX")]
EARLY = pytest.mark.parametrize("early", [True, False], ids=["offloaded first", "cached first"])
HOWS = pytest.mark.parametrize("how", CONFIGS)
GROUPS = {
    "by block": ("block_level", 1, False),
    "by 2 blocks": ("block_level", 2, False),
    "by 3 blocks": ("block_level", 3, False),
    "by layer": ("leaf_level", 1, False),
    "by block, stream": ("block_level", 1, True),
    "by layer, stream": ("leaf_level", 1, True),
}
SKIPPED = tuple(  # by STATIC, in the names that groups of blocks and of layers have
    f"{name}{end}"
    for block in ("transformer_blocks-1", "single_transformer_blocks-0", "single_transformer_blocks-1")
    for name, end in ((block.replace("-", "_"), "_"), (block.replace("-", "."), "."))
)
STREAMS = [name for name in GROUPS if name.endswith("stream")]


@pytest.fixture
def device(monkeypatch):
    return Simulated(monkeypatch)


class TestSimulated:
    """Offloaded to a device that is simulated: weights that are not there are on the meta device."""

    @pytest.mark.parametrize("groups", GROUPS)
    @EARLY
    @HOWS
    def test_cached_as_without_offloading(self, device, groups, how, early):
        """A run with the cache gives what it gives without offloading, by the same decisions; then it is plain."""
        want, model = expected(flux, how), flux()
        around = GROUPS[groups][0] == "block_level"
        with offloaded(model, lambda model: device.apply(model, *GROUPS[groups]), CONFIGS[how], early, around) as cache:
            assert torch.equal(run(model), want.cached)
            assert settled(cache) == want.settled
        assert torch.equal(run(model), want.plain)
        assert there(model) == []

    @pytest.mark.on("tiny Wan")
    @pytest.mark.parametrize("groups", ["by layer", "by layer, stream", "by 2 blocks"])
    @EARLY
    def test_blocks_with_parameters_of_their_own(self, device, groups, early):
        """The same where a block itself holds a parameter, which is moved apart from its layers'."""
        want, model = expected(wan, "static"), wan()
        with offloaded(model, lambda model: device.apply(model, *GROUPS[groups]), STATIC, early, True) as cache:
            assert torch.equal(run(model), want.cached)
            assert settled(cache) == want.settled
        assert torch.equal(run(model), want.plain)
        assert there(model) == []

    @pytest.mark.parametrize("span", [(0, 2), (1, 1), (1, 2), (2, 3), (3, 1), (0, 5)])
    @pytest.mark.parametrize("groups", GROUPS)
    def test_whatever_the_range_cuts(self, device, groups, span):
        """Any range of blocks can be skipped, also one that cuts a group or begins or ends a list."""
        config, model = DitCacheConfig(2, 2, *span), flux()
        with dit_cache(model, config):
            cached = run(model)
        device.apply(model, *GROUPS[groups])
        device.watch(model)
        with dit_cache(model, config) as cache:
            step(model, 0)
            device.late.clear()  # the first call is where the order of layers is learnt
            outputs = torch.stack([step(model, k) for k in range(8)])
            assert cache.stats.reused_calls == 3
        assert torch.equal(outputs, cached)
        assert there(model) == []
        if groups in STREAMS:
            assert device.late == []

    @pytest.mark.parametrize(("groups", "most"), [("by block", 3), ("by layer", 3), ("by block, stream", 4)])
    def test_what_is_skipped_is_not_brought(self, device, groups, most):
        """A reused step brings the groups of what runs, once each, and with a stream the one that was on its way."""
        model = flux()
        device.apply(model, *GROUPS[groups])
        run(model)
        plain = device.brought(lambda: step(model, 0))
        with dit_cache(model, STATIC):
            run(model)
            for k in range(8):
                brought = device.brought(lambda k=k: step(model, k))
                if k not in (3, 5, 7):
                    assert brought == plain
                    continue
                assert len(brought) == len(set(brought))
                inner = [name for name in brought if name.startswith(SKIPPED)]
                assert inner == (["transformer_blocks_1_1"] if groups in STREAMS else [])
                assert sorted(brought) == sorted([name for name in plain if not name.startswith(SKIPPED)] + inner)
                assert groups == "by layer" or len(brought) == most

    @pytest.mark.parametrize("groups", ["by block", "by 2 blocks", "by block, stream"])
    def test_hooks_around_the_cache_bring_everything(self, device, groups):
        """Put on blocks after the cache, its hooks are reached at every step: all groups are brought, and each once."""
        model, plain = flux(), flux()
        device.apply(plain, *GROUPS[groups])
        run(plain)
        everything = device.brought(lambda: step(plain, 0))
        with offloaded(model, lambda model: device.apply(model, *GROUPS[groups]), STATIC, False, around=True) as cache:
            run(model)
            assert [device.brought(lambda k=k: step(model, k)) for k in range(8)] == [everything] * 8
            assert cache.stats.reused_calls == 6

    @pytest.mark.parametrize("groups", GROUPS)
    @EARLY
    @pytest.mark.filterwarnings("ignore:.*a run of 8 steps reused nothing")
    def test_all_computed_moves_the_same(self, device, groups, early):
        """With a cache that computes every step, outputs and all that is moved, in order, are the plain run's."""
        want, model, plain = expected(flux, "static").plain, flux(), flux()
        device.apply(plain, *GROUPS[groups])
        run(plain)
        device.log.clear()
        run(plain)
        moved = list(device.log)
        around = GROUPS[groups][0] == "block_level"
        with offloaded(model, lambda model: device.apply(model, *GROUPS[groups]), NEVER, early, around):
            assert torch.equal(run(model), want)
            device.log.clear()
            assert torch.equal(run(model), want)
            assert device.log == moved

    @pytest.mark.parametrize("groups", GROUPS)
    def test_its_hooks_are_as_before(self, device, groups):
        """After runs and remove(), every hook and every replaced forward is the very object that it was before."""
        model = flux()
        device.apply(model, *GROUPS[groups])
        run(model)  # with streams, a first run takes hooks off by itself
        before = kept(model)
        with dit_cache(model, STATIC) as cache:
            run(model)
            assert cache.stats.reused_calls == 3
        assert kept(model) == before
        layer = model.transformer_blocks[1] if "block" in groups else model.transformer_blocks[1].attn.to_q
        assert layer._diffusers_hook.get_hook("group_offloading") is not None

    @pytest.mark.parametrize("groups", ["by block", "by block, stream", "by layer, stream"])
    def test_after_other_hooks_are_gone(self, device, groups):
        """Blocks that once had hooks of diffusers' keep a registry, through which later ones go past the stand-ins."""
        want, model = expected(flux, "static"), flux()
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            HookRegistry.check_if_exists_or_initialize(block)
        with dit_cache(model, STATIC) as cache:
            device.apply(model, *GROUPS[groups])
            assert there(model) == []
            assert torch.equal(run(model), want.cached)
            assert cache.stats.reused_calls == 3
        assert torch.equal(run(model), want.plain)
        assert there(model) == []

    @pytest.mark.parametrize("groups", ["by 2 blocks", "by 3 blocks", "by block, stream"])
    def test_two_ranges(self, device, groups):
        """With a range for each list, each settled by itself, the groups that both have a part in are brought."""
        config = DitCacheConfig(
            2,
            2,
            overrides={
                "transformer_blocks": {"cache_block_start": 1},
                "single_transformer_blocks": {"cache_num_blocks": 1, "cache_step_start": 3},
            },
        )
        model = flux()
        with dit_cache(model, config):
            cached = run(model)
        device.apply(model, *GROUPS[groups])
        with dit_cache(model, config) as cache:
            assert torch.equal(run(model), cached)
            assert cache.stats.reused_calls == 5
        assert there(model) == []


OWN = {
    "by block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "by 2 blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "by layer": {"offload_type": "leaf_level"},
    "by block, disk": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "by layer, disk": {"offload_type": "leaf_level"},
}


class TestOnTheHost:
    """diffusers' own groups, from the host's memory to the host's."""

    @pytest.fixture
    def groups(self, request, tmp_path):
        options, disk = OWN[request.param], request.param.endswith("disk")
        folder = {"offload_to_disk_path": str(tmp_path)} if disk else {}
        return Way(
            lambda model: model.enable_group_offload("cpu", **options, **folder),
            exact=not disk,
            around=options["offload_type"] == "block_level",
        )

    @pytest.mark.parametrize("groups", OWN, indirect=True)
    @EARLY
    @HOWS
    def test_cached_as_without_offloading(self, groups, how, early):
        """A run with the cache gives what it gives without offloading, by the same decisions; then it is plain."""
        want, model = expected(flux, how), flux()
        with offloaded(model, groups.offload, CONFIGS[how], early, groups.around) as cache:
            cached = run(model)
            assert settled(cache) == want.settled
        plain = run(model)
        groups.same(cached, want.cached)
        groups.same(plain, want.plain)
        assert all(torch.equal(cached[k], plain[k]) == (k not in want.reused) for k in range(8))

    @pytest.mark.parametrize("groups", ["by block", "by 2 blocks", "by layer"], indirect=True)
    @EARLY
    def test_offloading_ends_first(self, groups, early):
        """Its hooks can be taken off while the cache is attached: the run stays cached, and is plain after remove()."""
        want, model = expected(flux, "static"), flux()
        with offloaded(model, groups.offload, STATIC, early) as cache:
            run(model)
            HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading")
            assert torch.equal(run(model), want.cached)
            assert cache.stats.reused_calls == 6
        assert torch.equal(run(model), want.plain)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="streams take an accelerator; simulated above")
@pytest.mark.on("an accelerator")
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@EARLY
def test_with_streams_of_an_accelerator(level, early):
    """diffusers' own groups with real streams: a run with the cache gives what it gives without offloading."""
    device = torch.accelerator.current_accelerator()
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model = flux().to(device)
    with dit_cache(model, STATIC):
        cached = run(model)
    for options in ({}, {"record_stream": True}, {"low_cpu_mem_usage": True}):
        model = flux()

        def offload(model, options=options):
            model.enable_group_offload(device, offload_type=level, use_stream=True, **blocks, **options)

        with offloaded(model, offload, STATIC, early, level == "block_level") as cache:
            torch.testing.assert_close(run(model), cached)
            assert cache.stats.reused_calls == 3
