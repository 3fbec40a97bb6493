"""cache-dit's three calls and its numbers, on small models: what is asked for holds, is told, and can be taken back."""

import warnings

import pytest
import torch
from toys import Ladder, Net, Pipe, latents, loop, prompt
from traces import attributes

import dithooks
from dithooks import DitCacheConfig, Mask, Taylor, Threshold, dit_cache
from dithooks.compat import cache_dit
from dithooks.compat.cache_dit import (
    BlockAdapter,
    BlockAdapterRegistry,
    DBCacheConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
)

CONFIG = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}  # 1 is met by every change,


def always(**values):  # and here
    return Threshold(1e30, **{"max_warmup_steps": 2} | values)


WIDE = always()


class Sampled:
    """A pipeline of a small model, run with guidance by two calls, always on the same inputs."""

    def __init__(self, kind="swapped", depth=5):
        self.pipe, self.x, self.prompts = Pipe(Net(kind, depth)), latents(), [prompt(tokens=6), 3 * prompt(tokens=6)]
        self.net = self.pipe.transformer
        self.plain = self.run()

    def run(self, steps=8):
        return self.pipe(self.x, steps, self.prompts)

    def by_dit_cache(self, config, steps=8, **options):
        with dit_cache(self.pipe, config, **options):
            return self.run(steps)


@pytest.fixture
def sampled():
    return Sampled()


@pytest.fixture
def two_lists():
    return Sampled("two_lists")


def reused(target):
    return [(stats.cached_steps, stats.cfg_cached_steps) for stats in cache_dit.summary(target, logging=False)]


class TestOnAndOff:
    def test_as_dit_cache_with_the_same_settings_and_then_as_before(self, sampled):
        before = attributes(sampled.net)
        assert cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG)) is sampled.pipe
        cached = sampled.run()
        assert not torch.equal(cached, sampled.plain)
        cache_dit.disable_cache(sampled.pipe)
        assert attributes(sampled.net) == before
        assert torch.equal(sampled.run(), sampled.plain)
        assert torch.equal(cached, sampled.by_dit_cache(DitCacheConfig(cache_block_start=1, policy=WIDE)))

    @pytest.mark.parametrize("on", ["pipe", "net", "adapter"])
    @pytest.mark.parametrize("off", ["pipe", "net", "adapter"])
    def test_whatever_it_is_called_by(self, sampled, on, off):
        names = {
            "pipe": sampled.pipe,
            "net": sampled.net,
            "adapter": BlockAdapter(transformer=sampled.net, blocks=sampled.net.blocks),
        }
        assert cache_dit.enable_cache(names[on], **CONFIG) is names[on]
        assert not torch.equal(sampled.run(), sampled.plain)
        assert reused(names[off]) == [([2, 3, 4, 5, 6, 7],) * 2]
        cache_dit.disable_cache(names[off])
        assert torch.equal(sampled.run(), sampled.plain)

    def test_off_where_nothing_is_on(self, sampled):
        cache_dit.disable_cache(sampled.pipe)
        assert torch.equal(sampled.run(), sampled.plain)

    @pytest.mark.parametrize("none", [cache_dit.NONE, "NONE"])
    def test_the_type_none_is_off(self, sampled, none):
        cache_dit.enable_cache(sampled.pipe, **CONFIG)
        assert cache_dit.enable_cache(sampled.pipe, DBCacheConfig(cache_type=none)) is sampled.pipe
        assert dithooks.handle.handles_of(sampled.pipe) == []

    def test_what_is_given_stays_as_it_is(self, sampled):
        config, modifier = DBCacheConfig(**CONFIG), ParamsModifier(max_warmup_steps=3)
        adapter = BlockAdapter(pipe=sampled.pipe, auto=True, params_modifiers=[modifier])
        given = [config.as_dict(), repr(modifier), repr(adapter)]
        cache_dit.enable_cache(adapter, config)
        sampled.run()
        cache_dit.refresh_context(sampled.net, max_warmup_steps=4)
        assert [config.as_dict(), repr(modifier), repr(adapter)] == given


class TestSettings:
    """Each against ``dit_cache`` with what it should come to."""

    @pytest.mark.parametrize(
        ("values", "policy"),
        [
            ({"warmup_interval": 2, "max_warmup_steps": 4}, always(max_warmup_steps=4, warmup_interval=2)),
            ({"max_cached_steps": 3}, always(max_cached_steps=3)),
            ({"max_continuous_cached_steps": 2}, always(max_continuous_cached_steps=2)),
            ({"residual_diff_threshold": 0.2}, Threshold(0.2, max_warmup_steps=2)),
            (
                {"cfg_diff_compute_separate": False, "residual_diff_threshold": 0.4},
                Threshold(0.4, max_warmup_steps=2, separate_branches=False),
            ),
            ({"force_refresh_step_hint": 4}, always(force_refresh_step=4)),
        ],
        ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
    )
    def test_by_the_threshold(self, sampled, values, policy):
        cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG | values))
        assert torch.equal(sampled.run(), sampled.run())  # a run begins with nothing of the one before
        cached = sampled.run()
        cache_dit.disable_cache(sampled.pipe)
        assert torch.equal(cached, sampled.by_dit_cache(DitCacheConfig(cache_block_start=1, policy=policy)))
        assert not torch.equal(cached, sampled.plain)

    def test_eight_blocks_at_either_end(self):
        sampled, ran = Sampled(depth=18), []
        for number, block in enumerate(sampled.net.blocks):
            block.register_forward_hook(lambda *_, number=number: ran.append(number))
        cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG | {"Fn_compute_blocks": 8}, Bn_compute_blocks=8))
        cached = sampled.run()
        assert ran[-32:] == [*range(8), *range(10, 18)] * 2
        cache_dit.disable_cache(sampled.pipe)
        assert torch.equal(
            cached, sampled.by_dit_cache(DitCacheConfig(cache_block_start=8, compute_last=8, policy=WIDE))
        )

    @pytest.mark.parametrize("policy", ["static", "dynamic"])
    def test_a_mask(self, sampled, policy):
        bits = cache_dit.steps_mask(compute_bins=[3, 1, 1], cache_bins=[1, 2], total_steps=8)
        config = DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=0.2,
            steps_computation_mask=bits,
            steps_computation_policy=policy,
        )
        cache_dit.enable_cache(sampled.pipe, config)
        cached, (steps,) = sampled.run(), reused(sampled.pipe)
        cache_dit.disable_cache(sampled.pipe)
        zeros = [step for step, bit in enumerate(bits) if not bit]
        if policy == "static":
            assert steps == (zeros, zeros)
        else:  # and only where little has changed
            assert set(steps[0]) < set(zeros)
        decide = Threshold(0.2, max_warmup_steps=0) if policy == "dynamic" else None
        mask = Mask(tuple(bits), dynamic=decide)
        assert torch.equal(cached, sampled.by_dit_cache(DitCacheConfig(cache_block_start=1, policy=mask)))

    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("flat", [False, True], ids=["config", "keywords"])
    def test_a_forecast(self, sampled, order, flat):
        given = {"enable_taylorseer": True, "taylorseer_order": order}
        if not flat:
            given = {"calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=order)}
        limits = {"max_warmup_steps": 3, "max_continuous_cached_steps": 1}
        cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG | limits), **given)
        cached = sampled.run()
        cache_dit.disable_cache(sampled.pipe)
        policy = always(max_warmup_steps=3, max_continuous_cached_steps=1)
        as_it_is, wanted = (
            sampled.by_dit_cache(DitCacheConfig(cache_block_start=1, policy=policy, **more))
            for more in ({}, {"predictor": Taylor(order, axis="step")})
        )
        assert torch.equal(cached, wanted)
        assert not torch.equal(cached, as_it_is)

    def test_of_each_list(self, two_lists):
        pipe, net = two_lists.pipe, two_lists.net
        modifiers = [None, ParamsModifier(DBCacheConfig().reset(Fn_compute_blocks=2, max_cached_steps=2))]
        cache_dit.enable_cache(pipe, DBCacheConfig(**CONFIG), params_modifiers=modifiers)
        cached = two_lists.run()
        assert reused(pipe) == [([2, 3, 4, 5, 6, 7],) * 2, ([2, 3],) * 2]
        cache_dit.disable_cache(pipe)
        configs = [
            DitCacheConfig(cache_block_start=1, policy=WIDE),
            DitCacheConfig(cache_block_start=2, policy=always(max_cached_steps=2)),
        ]
        adapter = dithooks.BlockAdapter(pipe, blocks=[net.blocks, net.singles], params=configs)
        with dit_cache(adapter, configs[0]):
            assert torch.equal(cached, two_lists.run())

    def test_of_an_adapter_go_before_those_given_and_those_given_before_a_registered_ones(self, sampled):
        own, given = ParamsModifier(max_cached_steps=1), ParamsModifier(max_cached_steps=2)
        adapter = BlockAdapter(pipe=sampled.pipe, auto=True, params_modifiers=own)
        cache_dit.enable_cache(adapter, DBCacheConfig(**CONFIG), params_modifiers=given)
        sampled.run()
        assert reused(sampled.pipe) == [([2], [2])]
        BlockAdapterRegistry.register("Pipe")(lambda pipe: adapter)
        try:
            cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG), params_modifiers=given)
        finally:
            BlockAdapterRegistry.unregister("Pipe")
        sampled.run()
        assert reused(sampled.pipe) == [([2, 3], [2, 3])]

    def test_a_list_by_the_name_of_its_attribute(self, two_lists):
        adapter = BlockAdapter(pipe=two_lists.pipe, transformer=two_lists.net, blocks_name="singles")
        cache_dit.enable_cache(adapter, DBCacheConfig(**CONFIG))
        two_lists.run()
        assert [stats.blocks for stats in cache_dit.summary(two_lists.pipe, logging=False)] == ["transformer.singles"]

    def test_lists_that_are_found_and_too_short_stay_as_they_are(self, two_lists):
        del two_lists.net.singles[3:]
        cache_dit.enable_cache(two_lists.pipe, DBCacheConfig(**CONFIG | {"Fn_compute_blocks": 3}))
        two_lists.run()
        assert [stats.blocks for stats in cache_dit.summary(two_lists.pipe, logging=False)] == ["transformer.blocks"]


class TestRefresh:
    def test_other_steps_and_other_settings(self, sampled):
        net = sampled.net
        cache_dit.enable_cache(net, DBCacheConfig(**CONFIG, num_inference_steps=8))
        for steps, given, expected in (
            (8, {}, [2, 3, 4, 5, 6, 7]),
            (6, {"num_inference_steps": 6}, [2, 3, 4, 5]),
            (8, {"cache_config": DBCacheConfig(**CONFIG | {"max_warmup_steps": 5}, num_inference_steps=8)}, [5, 6, 7]),
            (8, {"max_cached_steps": 1}, [5]),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if given:
                    cache_dit.refresh_context(net, **given, verbose=True)
                sampled.run(steps)
            assert reused(net) == [(expected, expected)]

    def test_what_is_refreshed_holds_for_lists_of_which_something_else_was_said(self, two_lists):
        modifiers = [ParamsModifier(max_cached_steps=1), ParamsModifier(max_cached_steps=2)]
        cache_dit.enable_cache(two_lists.pipe, DBCacheConfig(**CONFIG), params_modifiers=modifiers)
        cache_dit.refresh_context(two_lists.net, residual_diff_threshold=1.5)
        two_lists.run()
        assert reused(two_lists.net) == [([2], [2]), ([2, 3], [2, 3])]
        cache_dit.refresh_context(two_lists.net, cache_config=DBCacheConfig().reset(max_cached_steps=3))
        two_lists.run()
        assert reused(two_lists.net) == [([2, 3, 4],) * 2] * 2

    def test_a_forecast_comes(self, sampled):
        cache_dit.enable_cache(sampled.net, DBCacheConfig(**CONFIG))
        cache_dit.refresh_context(sampled.net, calibrator_config=TaylorSeerCalibratorConfig())
        forecast = sampled.run()
        cache_dit.disable_cache(sampled.net)
        config = DitCacheConfig(cache_block_start=1, policy=WIDE, predictor=Taylor(1, axis="step"))
        assert torch.equal(forecast, sampled.by_dit_cache(config))

    def test_what_is_wrong_changes_nothing(self, sampled):
        with pytest.raises(ValueError, match="Net is not cached: enable_cache"):
            cache_dit.refresh_context(sampled.net, max_warmup_steps=2)
        cache_dit.enable_cache(sampled.net, DBCacheConfig(**CONFIG))
        cached = sampled.run()
        for given in ({"max_warmup_step": 3}, {"Fn_compute_blocks": 5}, {"cache_config": DitCacheConfig(1, 2)}):
            with pytest.raises((TypeError, ValueError)):
                cache_dit.refresh_context(sampled.net, **given)
        assert torch.equal(sampled.run(), cached)


class TestSummary:
    @pytest.fixture
    def ladder(self):
        """Its first block adds t, so that from a computed step s to a step t the change is |t − s| / s.

        With t = 1, 0.75, 0.5, 0.25 and reuse below 0.4: 0.25 (reused), 0.5, 0.5; a step is computed after each 0.5.
        """
        ladder = Ladder()
        config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=0.4)
        cache_dit.enable_cache(ladder, config)
        loop(ladder, latents())
        return ladder

    def test_numbers(self, ladder):
        (stats,) = cache_dit.summary(ladder, logging=False)
        assert stats.cached_steps == [1]
        assert stats.residual_diffs == pytest.approx({"1": 0.25, "2": 0.5, "3": 0.5})
        assert (stats.accumulated_cached_steps, stats.accumulated_executed_steps) == (1, 4)
        assert stats.accumulated_transformer_executed_steps == 4
        assert (stats.cfg_cached_steps, stats.cfg_residual_diffs, stats.cfg_accumulated_cached_steps) == ([], {}, 0)
        assert stats.cache_options["cache_config"].residual_diff_threshold == 0.4

    def test_table(self, ladder, capsys):
        cache_dit.summary(ladder)
        *_, header, rule, row = capsys.readouterr().out.strip().splitlines()
        assert [cell.strip() for cell in header.strip("|").split("|")] == [
            "Cache Steps", "Diffs Min", "Diffs P25", "Diffs P50", "Diffs P75", "Diffs P95", "Diffs Max",
        ]  # fmt: skip
        assert set(rule) == {"|", "-"}
        assert [float(cell) for cell in row.strip("|").split("|")] == [1, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]

    def test_in_detail_by_list_and_branch(self, two_lists, capsys):
        cache_dit.enable_cache(two_lists.pipe, DBCacheConfig(**CONFIG))
        two_lists.run()
        lists = cache_dit.summary(two_lists.pipe, details=True)
        printed = capsys.readouterr().out
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]
        names = ["transformer.blocks", "transformer.singles"]
        assert [row[:3] for row in rows[2:]] == [[name, branch, "6"] for name in names for branch in "01"]
        for stats, number in zip(lists, (2, 4), strict=True):
            for diffs, row in zip((stats.residual_diffs, stats.cfg_residual_diffs), rows[number:], strict=False):
                assert row[3] == f"{min(diffs.values()):.3f}"
                assert row[8] == f"{max(diffs.values()):.3f}"
                assert f"2: {diffs['2']:.3f}, 3: {diffs['3']:.3f}, " in printed

    def test_of_the_last_run(self, sampled):
        cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG))
        sampled.run()
        sampled.run(5)
        assert reused(sampled.pipe) == [([2, 3, 4], [2, 3, 4])]

    def test_where_nothing_is_enabled(self, sampled, capsys):
        assert cache_dit.summary(sampled.pipe) == [cache_dit.CacheStats()]
        assert "nothing was run with a cache" in capsys.readouterr().out
        assert cache_dit.strify(sampled.pipe) == ""

    def test_silent(self, ladder, capsys):
        cache_dit.summary(ladder, logging=False)
        assert capsys.readouterr().out == ""

    def test_in_short(self, ladder):
        short = "DBCache_F1B0_W1I1M0MC0_R0.4_T0O0_S1"
        stats = cache_dit.summary(ladder, logging=False)
        assert cache_dit.strify(ladder) == cache_dit.strify(stats) == cache_dit.strify(stats[0]) == short
        assert cache_dit.strify({"cache_type": "NONE"}) == ""
        assert cache_dit.strify({"max_warmup_steps": 4, "enable_taylorseer": True}).endswith("_W4I1M0MC0_R0.08_T1O1")


class TestMistakes:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda pipe: cache_dit.enable_cache(pipe, Fn_compute_block=1), "'Fn_compute_block': did you mean 'Fn_c"),
            (lambda pipe: cache_dit.enable_cache(pipe, cache_confg=None), "'cache_confg': did you mean 'cache_config'"),
            (lambda pipe: BlockAdapter(pipe=pipe, forward_patern=1), "'forward_patern': did you mean 'forward_pattern"),
            (lambda pipe: DBCacheConfig(max_warmup_step=3), "'max_warmup_step': did you mean 'max_warmup_steps'"),
            (
                lambda pipe: cache_dit.enable_cache(pipe, DitCacheConfig(1, 2)),
                "cache_config must be a BasicCacheConfig",
            ),
            (lambda pipe: cache_dit.enable_cache(pipe, params_modifiers=[DBCacheConfig()]), "is not a ParamsModifier"),
            (lambda pipe: cache_dit.enable_cache(dithooks.BlockAdapter(pipe)), "goes with dit_cache"),
            (lambda pipe: BlockAdapter(pipe=pipe, auto=True, patch_functor=print), "is not a PatchFunctor"),
            (lambda pipe: BlockAdapter(pipe=pipe, auto=True, has_separate_cfg="yes"), "neither True, False nor None"),
        ],
    )
    def test_of_the_wrong_kind(self, sampled, wrong, message):
        self._refused(sampled, wrong, TypeError, message)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda pipe: cache_dit.enable_cache(pipe, Fn_compute_blocks=5), "leave none to be cached: transformer.bl"),
            (lambda pipe: cache_dit.enable_cache(pipe, Fn_compute_blocks=0), "Fn_compute_blocks=0 is out of range"),
            (
                lambda pipe: cache_dit.enable_cache(pipe, params_modifiers=[ParamsModifier()] * 2),
                "2 params_modifiers for",
            ),
            (lambda pipe: cache_dit.enable_cache(pipe, attention_backend="sage"), "attention_backend: caching is all"),
            (lambda pipe: BlockAdapter(pipe=pipe), "give blocks, or auto=True"),
            (lambda pipe: BlockAdapter(pipe=pipe, blocks_name="layers"), r"has no 'layers'; it has \['blocks'"),
        ],
    )
    def test_of_the_wrong_value(self, sampled, wrong, message):
        self._refused(sampled, wrong, ValueError, message)

    def test_none_of_it_shows_on_what_was_enabled(self, sampled):
        cache_dit.enable_cache(sampled.pipe, DBCacheConfig(**CONFIG))
        cached = sampled.run()
        for given in ({"Fn_compute_blocks": 5}, {"max_warmup_step": 1}, {"residual_diff_threshold": "much"}):
            with pytest.raises((TypeError, ValueError)):
                cache_dit.enable_cache(sampled.pipe, **given)
        assert torch.equal(sampled.run(), cached)

    def _refused(self, sampled, wrong, error, message):
        before = attributes(sampled.net)
        with pytest.raises(error, match=message):
            wrong(sampled.pipe)
        assert attributes(sampled.net) == before


class TestBeliefs:
    """What is said of the runs, in an adapter or a configuration, and turns out otherwise, is remarked upon once."""

    @pytest.mark.parametrize(
        ("fields", "config", "remark"),
        [
            ({"has_separate_cfg": False}, {}, "has_separate_cfg=False, but a step made 2 calls"),
            ({}, {"enable_separate_cfg": False}, "has_separate_cfg=False, but a step made 2 calls"),
            ({}, {"num_inference_steps": 50}, "num_inference_steps=50, but the run had 8"),
            ({"has_separate_cfg": True}, {}, None),
            ({"has_separate_cfg": False}, {"enable_separate_cfg": True, "num_inference_steps": 8}, None),
            ({}, {"cfg_compute_first": True}, None),
        ],
    )
    def test_of_two_calls_a_step(self, two_lists, fields, config, remark):
        adapter = BlockAdapter(pipe=two_lists.pipe, auto=True, **fields)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            cache_dit.enable_cache(adapter, DBCacheConfig(**CONFIG, **config))
            cached = [two_lists.run(), two_lists.run()]
        assert [remark in str(each.message) for each in said] == [True] * (remark is not None)
        cache_dit.disable_cache(two_lists.pipe)
        cache_dit.enable_cache(two_lists.pipe, DBCacheConfig(**CONFIG))
        assert all(torch.equal(two_lists.run(), one) for one in cached)

    def test_of_one_call_a_step(self, sampled):
        sampled.prompts = sampled.prompts[:1]
        cache_dit.enable_cache(BlockAdapter(pipe=sampled.pipe, auto=True, has_separate_cfg=True), **CONFIG)
        with pytest.warns(UserWarning, match="has_separate_cfg=True, but none of 8 steps made more than one") as said:
            [sampled.run() for _ in range(2)]
        assert len(said) == 1


class TestRegistry:
    def test_by_the_beginning_of_the_class_name_of_pipeline_or_transformer(self, two_lists):
        class SingularPipeline(Pipe):
            pass

        class SingularModel(Net):
            pass

        seen = []

        @BlockAdapterRegistry.register("Singular")
        def singular(pipe, **kwargs):
            seen.append(pipe)
            net = pipe.transformer
            pattern = ForwardPattern.Pattern_0
            return BlockAdapter(pipe=pipe, transformer=net, blocks=net.singles, forward_pattern=pattern, **kwargs)

        try:
            pipe, net = SingularPipeline(two_lists.net), SingularModel("two_lists")
            for target in (pipe, net):
                assert cache_dit.enable_cache(target, **CONFIG) is target
            assert seen[0] is pipe
            two_lists.pipe = pipe
            two_lists.run()
            two_lists.pipe = Pipe(net)
            two_lists.run()
            names = [stats.blocks for one in (pipe, net) for stats in cache_dit.summary(one, logging=False)]
            assert names == ["transformer.singles", "singles"]
            for target in (pipe, net):
                cache_dit.disable_cache(target)
                assert dithooks.handle.handles_of(target) == []
        finally:
            BlockAdapterRegistry.unregister("Singular")

    def test_under_its_other_name_and_not_supported(self):
        assert cache_dit.BlockAdapterRegister is BlockAdapterRegistry
        before = dithooks.BlockAdapterRegistry.names()
        BlockAdapterRegistry.register("Nothing", supported=False)(print)
        assert dithooks.BlockAdapterRegistry.names() == before


def test_names_of_the_original():
    assert cache_dit.Pattern_3 is ForwardPattern.Pattern_3
    assert cache_dit.DBCache is cache_dit.CacheType.DBCache
    assert set(cache_dit.__all__) <= set(dir(cache_dit))


def test_settings_by_which_nothing_is_reused_are_said_and_can_be_changed(sampled):
    cache_dit.enable_cache(sampled.pipe, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    with pytest.warns(UserWarning, match=r"nothing will be reused.*because=.residual_diff_threshold=0"):
        sampled.run()
    assert reused(sampled.pipe) == [([], [])]
    cache_dit.refresh_context(sampled.pipe, residual_diff_threshold=1.0, max_warmup_steps=1)
    sampled.run()
    assert reused(sampled.pipe) == [([1, 2, 3, 4, 5, 6, 7],) * 2]
    cache_dit.refresh_context(sampled.pipe, cache_type="NONE")
    assert dithooks.handle.handles_of(sampled.pipe) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_inference_steps": "8"},
        {"num_inference_steps": -1},
        {"num_inference_steps": 8.5},
        {"enable_separate_cfg": "no"},
        {"cfg_compute_first": "x"},
    ],
)
def test_values_that_are_only_compared_are_checked_as_others(sampled, wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        cache_dit.enable_cache(sampled.pipe, Fn_compute_blocks=1, **wrong)
    assert dithooks.handle.handles_of(sampled.pipe) == []


def test_what_there_is_to_say_of_settings_is_said_once():
    net = Net("two_lists")
    half = TaylorSeerCalibratorConfig(enable_encoder_calibrator=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache_dit.enable_cache(net, DBCacheConfig(Fn_compute_blocks=1), half)
    assert len(said) == 1
