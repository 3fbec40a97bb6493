"""What holds for which transformer and list: overrides by name, ranges left open, on models."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from config.test_codec import again
from toys import Net, Pipe, latents, prompt

from dithooks import DitCacheConfig, Interval, Linear, Mask, Reuse, Taylor, Threshold, Uncached, dit_cache


class TestOverridden:
    BASE = DitCacheConfig(
        cache_block_start=1,
        cache_num_blocks=3,
        policy=Threshold(0.1, 4, max_cached_steps=9),
        predictor=Taylor(2),
        cache_dtype="bfloat16",
    )

    @pytest.mark.parametrize(
        ("change", "fields"),
        [
            ({}, {}),
            ({"cache_block_start": 0}, {"cache_block_start": 0}),
            ({"cache_num_blocks": None}, {"cache_num_blocks": None}),
            ({"compute_last": 2}, {"compute_last": 2, "cache_num_blocks": None}),
            ({"compute_last": 0}, {}),
            ({"policy": Interval(1, 2)}, {"policy": Interval(1, 2)}),
            ({"policy": {}}, {}),
            ({"policy": {"max_warmup_steps": 2}}, {"policy": Threshold(0.1, 2, max_cached_steps=9)}),
            ({"policy": {"max_cached_steps": None}}, {"policy": Threshold(0.1, 4)}),
            (
                {"cache_step_start": 1, "cache_step_interval": 5},
                {"policy": None, "cache_step_start": 1, "cache_step_interval": 5},
            ),
            ({"predictor": {"axis": "step"}}, {"predictor": Taylor(2, "step")}),
            ({"predictor": Reuse()}, {"predictor": Reuse()}),
            ({"cache_dtype": None, "cache_device": "cpu"}, {"cache_dtype": None, "cache_device": "cpu"}),
            ({"free_at_end": False}, {"free_at_end": False}),
        ],
    )
    def test_changes_what_it_names_and_nothing_else(self, change, fields):
        config = dataclasses.replace(self.BASE, overrides={"a": change, "b": {"cache_block_start": 7}})
        assert config.overridden("a") == dataclasses.replace(self.BASE, **fields)

    def test_of_two_numbers(self):
        base = DitCacheConfig(2, 3, overrides={"a": {"policy": {"interval": 5}}, "b": {"cache_step_start": 4}})
        assert base.overridden("a") == DitCacheConfig(policy=Interval(2, 5))
        assert base.overridden("b") == DitCacheConfig(4, 3)

    def test_of_blocks_computed_last(self):
        base = DitCacheConfig(2, 3, compute_last=2, overrides={"a": {"cache_num_blocks": 1}})
        assert base.overridden("a") == DitCacheConfig(2, 3, cache_num_blocks=1)


# --- on models ------------------------------------------------------------------------------------------------------


class Seen:
    """Counts the executions of each block, by step, with hooks of its own."""

    def __init__(self, **nets):
        self.step, self.runs, self.nets = 0, Counter(), nets
        for name, net in nets.items():
            for listed in ("blocks", "singles"):
                for index, block in enumerate(getattr(net, listed, ())):
                    block.register_forward_hook(lambda *_, key=(name, listed, index): self.count(key))
        self.blocks = {name: self.all_of(net) for name, net in nets.items()}
        self.hooks = {name: self.hooks_of(net) for name, net in nets.items()}

    def count(self, key):
        self.runs[(*key, self.step)] += 1

    def ran(self, name, listed):
        """By step, which blocks of a list ran: "11011"."""
        depth, steps = len(getattr(self.nets[name], listed)), self.step + 1
        return ["".join("1" if self.runs[name, listed, k, t] else "0" for k in range(depth)) for t in range(steps)]

    @staticmethod
    def all_of(net):
        return [*net.blocks, *getattr(net, "singles", ())]

    @staticmethod
    def hooks_of(net):
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward")) for m in net.modules()]

    def untouched(self):
        return all(
            all(a is b for a, b in zip(self.all_of(net), self.blocks[name], strict=True))
            and self.hooks_of(net) == self.hooks[name]
            for name, net in self.nets.items()
        )


def sample(net, config, steps=6, **more):
    """A bare model: which blocks of each list ran, by step."""
    seen, x, e = Seen(net=net), latents(), prompt()
    with dit_cache(net, config, verify=False, **more) as cache:
        for step in range(steps):
            seen.step = step
            net(x, torch.tensor(1 - step / steps), encoder_hidden_states=e)
        told, stats = cache.decisions, cache.stats
    assert seen.untouched()
    return seen, told, stats


class Pair(Pipe):
    """Two transformers: the second after half of the steps, or both at each."""

    def __init__(self, kind="two_lists", both=False):
        super().__init__(Net(kind))
        self.transformer_2, self.both = Net(kind), both
        self.seen = Seen(transformer=self.transformer, transformer_2=self.transformer_2)

    def __call__(self, steps=8):
        x, e = latents(), prompt()
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            self.seen.step = step
            models = [self.transformer, self.transformer_2]
            for model in models if self.both else [models[2 * step >= steps]]:
                x = x - model(x, timestep=t / 1000, encoder_hidden_states=e) / steps
            self.scheduler.step()
        return x


ALL = "11111"


class TestLists:
    def test_without_overrides_both_lists_are_one_range(self):
        seen, told, _ = sample(Net("two_lists"), DitCacheConfig(0, 2, cache_block_start=3))
        assert {each.range for each in told} == {"Net"}
        assert seen.ran("net", "blocks") == [ALL, "11100"] * 3
        assert seen.ran("net", "singles") == [ALL, "00000"] * 3

    def test_a_list_that_is_named_is_a_range_of_its_own_and_so_is_the_other(self):
        config = DitCacheConfig(0, 2, cache_block_start=3, overrides={"singles": {"cache_block_start": 1}})
        seen, told, stats = sample(Net("two_lists"), config)
        assert {each.range for each in told} == {"blocks", "singles"}
        assert seen.ran("net", "blocks") == [ALL, "11100"] * 3
        assert seen.ran("net", "singles") == [ALL, "10000"] * 3
        assert stats.blocks_run == 6 * 10 - 3 * (2 + 4)

    def test_only_what_is_named_differs(self):
        config = DitCacheConfig(
            1, 2, 1, 2, overrides={"singles": {"policy": {"interval": 3}, "predictor": Linear(), "compute_last": 2}}
        )
        seen, told, _ = sample(Net("two_lists"), config, steps=7)
        assert seen.ran("net", "blocks") == [ALL, ALL, "10011", ALL, "10011", ALL, "10011"]
        assert seen.ran("net", "singles") == [ALL, ALL, "10011", "10011", ALL, "10011", "10011"]
        assert [each.reason for each in told if each.range == "blocks"][:3] == ["warm-up", "refresh", "reuse"]

    def test_both_may_be_named(self):
        config = DitCacheConfig(
            0,
            2,
            overrides={
                "blocks": {"cache_step_start": 2, "cache_num_blocks": 1},
                "singles": {"policy": Mask((1, 0, 0, 0, 1, 0)), "cache_block_start": 4},
            },
        )
        with pytest.warns(UserWarning, match="the number of steps is not known, so the mask is taken as made"):
            seen, _, _ = sample(Net("two_lists"), config)
        assert seen.ran("net", "blocks") == [ALL, ALL, ALL, "01111", ALL, "01111"]
        assert seen.ran("net", "singles") == [ALL, "11110", "11110", "11110", ALL, "11110"]

    def test_a_policy_that_looks_for_one_list(self):
        """What its own first block did counts: block 0 of the list, not of the model."""
        net, changes = Net("two_lists"), {}
        limit = 0.05

        def before(_, args, kwargs):
            net.before = args[0]

        net.singles[0].register_forward_pre_hook(before, with_kwargs=True)

        def after(_, args, output):
            changes[len(changes)] = (output[0] - net.before).double().numpy()

        net.singles[0].register_forward_hook(after)
        policy = Threshold(limit, max_warmup_steps=2)
        config = DitCacheConfig(2, 2, overrides={"singles": {"policy": policy, "cache_block_start": 1}})
        _, told, _ = sample(net, config, steps=12)
        refreshed = 1
        mine = {each.step: each for each in told if each.range == "singles"}
        for step in range(2, 12):
            value = np.abs(changes[step] - changes[refreshed]).mean() / np.abs(changes[refreshed]).mean()
            assert mine[step].value == pytest.approx(value, rel=1e-3)
            assert mine[step].reuse == (value < limit)
            refreshed = refreshed if value < limit else step
        assert {each.reuse for each in mine.values()} == {True, False}
        assert [each.reuse for each in told if each.range == "blocks"] == [False, False, *[False, True] * 5]

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            (DitCacheConfig(0, 2, 7, overrides={"singles": {"cache_block_start": 0}}), "blocks"),
            (DitCacheConfig(0, 2, overrides={"singles": {"cache_block_start": 5}}), "singles"),
            (DitCacheConfig(0, 2, 3, overrides={"singles": {"cache_num_blocks": 3}}), "singles"),
            (DitCacheConfig(0, 2, overrides={"singles": {"compute_last": 5}}), "singles"),
        ],
    )
    def test_a_range_past_the_end_of_its_list(self, config, match):
        net = Net("two_lists")
        seen = Seen(net=net)
        with pytest.raises(ValueError, match=match):
            dit_cache(net, config)
        assert seen.untouched()


class TestTransformers:
    def test_one_of_two_is_overridden(self):
        pipe = Pair()
        config = DitCacheConfig(0, 2, cache_block_start=1, overrides={"transformer_2": {"cache_block_start": 8}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe()
            ranges = Counter(each.range for each in cache.decisions)
        assert ranges == {"transformer": 4, "transformer_2": 4}
        assert pipe.seen.ran("transformer", "blocks")[:4] == [ALL, "10000"] * 2
        assert pipe.seen.ran("transformer", "singles")[:4] == [ALL, "00000"] * 2
        assert pipe.seen.ran("transformer_2", "blocks")[4:] == [ALL] * 4
        assert pipe.seen.ran("transformer_2", "singles")[4:] == [ALL, "11100"] * 2
        assert pipe.seen.untouched()

    @pytest.mark.parametrize("name", ["transformer", "transformer_2"])
    def test_both_at_every_step(self, name):
        pipe = Pair(both=True)
        with dit_cache(pipe, DitCacheConfig(1, 2, overrides={name: {"policy": {"interval": 4}}}), verify=False):
            pipe()
        other = {"transformer": "transformer_2", "transformer_2": "transformer"}[name]
        assert pipe.seen.ran(name, "blocks")[:7] == [ALL, ALL, *["00000"] * 3, ALL, "00000"]
        assert pipe.seen.ran(other, "blocks") == [ALL, ALL, "00000", ALL, "00000", ALL, "00000", ALL]

    def test_the_last_step_of_two_that_are_called_at_every_step(self):
        pipe = Pair(both=True)
        with dit_cache(pipe, DitCacheConfig(0, 2), verify=False) as cache:
            pipe()
            last = [(each.range, each.reuse, each.reason) for each in cache.decisions if each.step == 7]
        assert last == [("transformer", True, "reuse"), ("transformer_2", True, "reuse")]

    def test_the_last_step_of_two_lists(self):
        pipe = Pipe(Net("two_lists"))
        config = DitCacheConfig(0, 2, overrides={"singles": {"cache_block_start": 1}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe(latents(), prompts=[prompt()])
            assert [each.reuse for each in cache.decisions] == [False, True] * 8
            assert cache.stats.bytes_held == 0

    def test_a_list_of_one(self):
        """Both lists of that transformer are ranges of their own; the other transformer stays one."""
        pipe = Pair(both=True)
        config = DitCacheConfig(0, 2, 2, overrides={"transformer_2.singles": {"cache_block_start": 4}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe()
            names = {each.range for each in cache.decisions}
        assert names == {"transformer", "transformer_2.blocks", "transformer_2.singles"}
        assert pipe.seen.ran("transformer", "singles")[1] == "00000"
        assert pipe.seen.ran("transformer_2", "blocks")[1] == "11000"
        assert pipe.seen.ran("transformer_2", "singles")[1] == "11110"

    def test_a_transformer_and_a_list_of_it(self):
        """What is said of the transformer holds for the list, but for what is said of that."""
        pipe = Pair(both=True)
        config = DitCacheConfig(
            0,
            2,
            overrides={
                "transformer_2": {"cache_block_start": 1, "policy": {"interval": 4}},
                "transformer_2.singles": {"cache_block_start": 3},
            },
        )
        with dit_cache(pipe, config, verify=False):
            pipe()
        assert pipe.seen.ran("transformer", "blocks") == [ALL, "00000"] * 4
        assert pipe.seen.ran("transformer_2", "blocks")[:7] == [ALL, *["10000"] * 3, ALL, *["10000"] * 2]
        assert pipe.seen.ran("transformer_2", "singles")[:7] == [ALL, *["11100"] * 3, ALL, *["11100"] * 2]

    def test_a_list_may_change_a_field_of_the_policy_its_transformer_was_given(self):
        overrides = {
            "transformer_2": {"policy": Threshold(0.1)},
            "transformer_2.singles": {"policy": {"residual_diff_threshold": 0.2}},
        }
        dit_cache(Pair(), DitCacheConfig(0, 2, overrides=overrides)).remove()

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("singles", "'singles' could be transformer.singles or transformer_2.singles"),
            ("blocks", "'blocks' could be transformer.blocks or transformer_2.blocks"),
            ("transformer_3", "'transformer_3' is none of transformer, transformer_2, transformer.blocks"),
            ("transformer_", "'transformer_' is none of"),
            ("ormer.blocks", "'ormer.blocks' is none of"),
            ("transformer.blocks.0", "'transformer.blocks.0' is none of"),
            ("vae", "'vae' is none of"),
            ("", "'' is none of"),
        ],
    )
    def test_names_that_are_not_understood(self, name, match):
        pipe = Pair()
        config = DitCacheConfig(0, 2, overrides={"transformer": {"cache_block_start": 1}, name: {}})
        with pytest.raises(ValueError, match=f"overrides: {match}"):
            dit_cache(pipe, config)
        assert pipe.seen.untouched()
        with dit_cache(pipe, DitCacheConfig(0, 2)) as cache:
            former = cache.config
            with pytest.raises(ValueError, match=match):
                cache.update(config)
            assert cache.config is former
            pipe()
            assert cache.stats.reused_calls == 4

    def test_one_thing_by_two_names(self):
        pipe = Pipe(Net("two_lists"))
        overrides = {"blocks": {"cache_block_start": 1}, "transformer.blocks": {"cache_block_start": 3}}
        with pytest.raises(ValueError, match="blocks"):
            dit_cache(pipe, DitCacheConfig(0, 2, overrides=overrides))

    def test_the_end_of_a_path_will_do_where_it_is_clear(self):
        pipe = Pipe(Net("two_lists"))
        ranges = []
        for name in ("singles", "transformer.singles"):
            with dit_cache(pipe, DitCacheConfig(0, 2, overrides={name: {"cache_block_start": 2}})) as cache:
                ranges.append(repr(cache))
        assert ranges[0] == ranges[1]
        assert "transformer.singles.2 … transformer.singles.4 of 5 blocks" in ranges[0]

    def test_an_update_takes_overrides_over(self):
        pipe = Pair(both=True)
        with dit_cache(pipe, DitCacheConfig(0, 2), verify=False) as cache:
            pipe(4)
            cache.update(DitCacheConfig(0, 2, overrides={"transformer_2": {"policy": Interval(0, 4)}}))
            pipe.seen.runs.clear()
            pipe(8)
            assert cache.config.overrides == {"transformer_2": {"policy": Interval(0, 4)}}
            assert again(cache.config) == cache.config
        assert pipe.seen.ran("transformer", "blocks") == [ALL, "00000"] * 4
        assert pipe.seen.ran("transformer_2", "blocks")[:7] == [ALL, *["00000"] * 3, ALL, *["00000"] * 2]

    @pytest.mark.parametrize("change", [{"cache_step_interval": 1}, {"policy": Uncached()}])
    def test_one_of_them_that_never_reuses(self, change):
        """Nothing is attached to it."""
        pipe = Pair(both=True)
        config = DitCacheConfig(0, 2, overrides={"transformer_2": change})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe()
            assert {each.range for each in cache.decisions} == {"transformer"}
            assert [each.range for each in cache.ranges] == ["transformer"]
        assert pipe.seen.ran("transformer_2", "blocks") == [ALL] * 8

    def test_none_of_them_is_cached(self):
        pipe = Pair(both=True)
        with pytest.warns(UserWarning, match=r"every call is computed .*policy=Uncached\(\)\): nothing is attached"):
            cache = dit_cache(pipe, DitCacheConfig(policy=Uncached()))
        assert pipe.seen.untouched()
        cache.remove()


class TestRange:
    @pytest.mark.parametrize(
        ("fields", "reused"),
        [
            ({}, "00000 00000"),
            ({"cache_num_blocks": None}, "00000 00000"),
            ({"cache_block_start": 2}, "11000 00000"),
            ({"cache_block_start": 7}, "11111 11000"),
            ({"compute_last": 1}, "00000 00001"),
            ({"compute_last": 6}, "00001 11111"),
            ({"cache_block_start": 2, "compute_last": 3}, "11000 00111"),
            ({"cache_block_start": 4, "compute_last": 5}, "11110 11111"),
            ({"cache_block_start": 4, "cache_num_blocks": 1}, "11110 11111"),
            ({"cache_block_start": 3, "cache_num_blocks": 4}, "11100 00111"),
        ],
    )
    def test_which_blocks_are_left_out(self, fields, reused):
        seen, _, stats = sample(Net("two_lists"), DitCacheConfig(0, 2, **fields))
        first, second = reused.split()
        assert seen.ran("net", "blocks") == [ALL, first] * 3
        assert seen.ran("net", "singles") == [ALL, second] * 3
        assert stats.blocks_run == 3 * 10 + 3 * reused.count("1")

    @pytest.mark.parametrize("fields", [{"compute_last": 5}, {"compute_last": 9}, {"cache_block_start": 5}])
    def test_nothing_is_left_of_it(self, fields):
        net = Net()
        seen = Seen(net=net)
        with pytest.raises(ValueError, match="5 blocks"):
            dit_cache(net, DitCacheConfig(0, 2, **fields))
        assert seen.untouched()

    def test_to_the_end_is_not_bound_to_a_depth(self):
        config = DitCacheConfig(0, 2, cache_block_start=1, compute_last=1)
        for depth in (3, 5, 8):
            seen, _, _ = sample(Net(depth=depth), config)
            assert seen.ran("net", "blocks")[1] == "1" + "0" * (depth - 2) + "1"
