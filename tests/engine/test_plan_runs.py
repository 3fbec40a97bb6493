"""Plans: what runs with them do, and on which model."""

import dataclasses
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from config.test_cache_plan import FOUND, LEVELS, MADE, PIECE, PLAN, listening, made_for, plan_for
from config.test_codec import kinds
from config.test_overrides import Pair
from diffusers import FlowMatchHeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from predictors.test_predictors import SIGMAS, Curve, Sampler
from toys import Ladder, Net, Pipe

from dithooks import BlockAdapter, CachePlan, DitCacheConfig, Fitted, Interval, Mask, Reuse, dit_cache, timestep_scope
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import load_pipeline
from dithooks.policies.history import Schedule
from dithooks.policies.mask import resample


class TestByHand:
    def test_arrays_and_tensors(self):
        piece = TransformerPlan(
            "transformer",
            np.int64(1),
            np.int32(2),
            np.int64(4),
            np.array([1, 1, 0, 0]),
            [None, None, np.array([1.5, -0.5]), [np.float32(0.25)]],
            torch.tensor(LEVELS),
        )
        assert piece == PIECE
        assert kinds(piece) == kinds(PIECE)
        assert dataclasses.replace(MADE, size=torch.Size([6, 4]), dtype="torch.float32") == MADE
        assert dataclasses.replace(FOUND, psnr=np.float64("inf")).psnr == math.inf
        assert dataclasses.replace(PLAN, pieces=[PIECE]) == PLAN

    def test_parts(self):
        assert PIECE.policy == Mask((1, 1, 0, 0), LEVELS)
        assert PIECE.predictor == Fitted((None, None, (1.5, -0.5), (0.25,)), LEVELS)
        assert PLAN.config == DitCacheConfig(
            cache_block_start=1,
            cache_num_blocks=2,
            fingerprint="0123456789abcdef",
            policy=PIECE.policy,
            predictor=PIECE.predictor,
        )

    @pytest.mark.parametrize(
        ("sigmas", "axis"),
        [((1.0, 0.5, 0.5, 0.2), "sigma"), (LEVELS, "timestep"), ((0.0, 1.0, 2.0, 3.0), "step"), (None, "sigma")],
    )
    def test_a_mask_is_resampled_by_noise_levels_that_fall_only(self, sigmas, axis):
        piece = dataclasses.replace(PIECE, sigmas=sigmas, axis=axis)
        assert piece.policy == Mask((1, 1, 0, 0))
        assert piece.predictor.sigmas == sigmas

    def test_counts(self):
        """Of 4 blocks at 4 steps, 2 steps leave 2 out."""
        assert PIECE.executions == (16, 4)
        assert (PIECE.saved, PLAN.speedup) == (0.25, 16 / 12)

    def test_counts_of_two(self):
        """The first of two experts is called at steps 0 and 1, the other at 2 and 3; 8 + 20 executions, 3 + 5 saved."""
        one = TransformerPlan("a", 0, 3, 4, (1, 0, 1, 1), (None, (1.0,), None, None), LEVELS, called=(0, 2))
        two = TransformerPlan("b", 0, 5, 10, (1, 1, 1, 0), (None, None, None, (1.0,)), LEVELS, called=(2, 4))
        plan = CachePlan((one, two), dataclasses.replace(MADE, blocks=14), FOUND)
        assert (one.saved, two.saved) == (3 / 8, 5 / 20)
        assert plan.speedup == 28 / 20
        assert "a: 0 … 2 of 4  ●○··  1 of 4 steps reused\n  b: 0 … 4 of 10  ··●○" in str(plan)
        assert plan.config == DitCacheConfig(
            cache_num_blocks=3,
            fingerprint=MADE.fingerprint,
            policy=one.policy,
            predictor=one.predictor,
            overrides={
                "b": {
                    "cache_block_start": 0,
                    "cache_num_blocks": 5,
                    "payload": "residual",
                    "policy": two.policy,
                    "predictor": two.predictor,
                }
            },
        )

    def test_in_words(self):
        found = dataclasses.replace(
            FOUND, measured_speedup=1.3, psnr=math.inf, relative_l1=0.0012, ssim=0.99876, samples=1, reached=False
        )
        assert str(CachePlan((PIECE,), MADE, found)).splitlines() == [
            "CachePlan for Net, 4 blocks in float32, 4 steps of Counter, latents 6×4",
            "  transformer: 1 … 2 of 4  ●●○○  2 of 4 steps reused",
            "  1.33× fewer blocks run; predicted: 1.90× as fast, error 0.01",
            "  measured: 1.30× as fast, PSNR inf dB, relative L1 0.0012, SSIM 0.9988",
            "  found by hand for a target of 2×, which was not reached, from 1 sample on CPU, 2025-01-31",
        ]
        assert "measured" not in str(PLAN)

    def test_remarks(self):
        assert (
            PLAN.mismatch_warnings("float32", "Counter")
            == PLAN.mismatch_warnings("torch.float32", None)
            == PLAN.mismatch_warnings(None, None)
            == []
        )
        (dtype,) = PLAN.mismatch_warnings("torch.bfloat16", "Counter")
        assert "weights in float32, and the model's are in bfloat16" in dtype
        (scheduler,) = PLAN.mismatch_warnings(None, "Heun")
        assert "made with Counter, and the scheduler here is Heun" in scheduler
        made_without = dataclasses.replace(PLAN, made=dataclasses.replace(MADE, scheduler=None))
        assert made_without.mismatch_warnings("float32", "Heun") == []


@settings(max_examples=300)
@given(st.data())
def test_a_mask_is_the_same_at_its_own_noise_levels(data):
    """However close they lie, and whether they come back as doubles or as a scheduler's float32."""
    levels = st.floats(0, 1e3) | st.floats(0.5, 0.5 + 1e-14) | st.floats(0, 1e-300)
    sigmas = sorted(data.draw(st.lists(levels, min_size=1, max_size=40, unique=True)), reverse=True)
    mask = (1, *(data.draw(st.integers(0, 1)) for _ in sigmas[1:]))
    policy = Mask(mask, sigmas)
    for here in (tuple(sigmas), tuple(np.float32(sigmas).tolist())):
        assert resample(mask, len(mask), sigmas, here) == mask
        assert policy.for_run(Schedule(len(mask), sigmas=here)).steps == mask


# --- runs on models -------------------------------------------------------------------------------------------------

BITS = (1, 1, 0, 1, 0)
WEIGHTS = (None, None, (1.75, -0.5), None, (0.5, 0.25))
# Blocks of rates 1 … 4 of which 1 and 2 are cached: Δ = 5·e·t.
CURVE = TransformerPlan("transformer", 1, 2, 4, BITS, WEIGHTS, tuple(SIGMAS[:5]))


class At(Sampler):
    """The same sampler, at noise levels of one's own, from whatever step on."""

    def __init__(self, sigmas=SIGMAS, begin=0):
        super().__init__(Curve(1))
        self.sigmas, self.begin = list(sigmas), begin

    def __call__(self, steps=5):
        self.scheduler.set_timesteps(steps, self.sigmas)
        self.scheduler.begin_index = self.begin or None
        outs = {}
        for step in range(self.begin, steps):
            x = torch.tensor([[0.1, 0.2, 0.3]]) * (step + 1)
            outs[step] = self.transformer(x, self.scheduler.sigmas[step], encoder_hidden_states=self.prompts[0])
            self.scheduler.step()
        return outs

    def expected(self, step, **weights):
        """By hand: x, the outer blocks at this step's σ, and weights times the residuals at those of others."""
        e, t = self.prompts[0], self.sigmas
        around = torch.tensor([[0.1, 0.2, 0.3]]) * (step + 1) + 5 * e * t[step]
        return around + sum(5 * e * t[int(name[2:])] * weight for name, weight in weights.items())


class TestRuns:
    def test_coefficients_are_used(self):
        pipe = At()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dit_cache(pipe, plan_for(pipe, CURVE, scheduler="Uneven")) as cache:
                got = pipe()
                assert (cache.stats.blocks_run, cache.stats.blocks_total) == (16, 20)
        torch.testing.assert_close(got[2], pipe.expected(2, at1=1.75, at0=-0.5))
        torch.testing.assert_close(got[4], pipe.expected(4, at3=0.5, at1=0.25))

    def test_one_coefficient_is_held_against_its_noise_level_too(self):
        """Nothing else asks for σ then."""
        piece = dataclasses.replace(CURVE, coefficients=(None, None, (1.75,), None, (0.5,)))
        pipe = At()
        with dit_cache(pipe, plan_for(pipe, piece, scheduler=None)):
            torch.testing.assert_close(pipe()[2], pipe.expected(2, at1=1.75))
        config = DitCacheConfig(
            cache_block_start=1, cache_num_blocks=2, policy=Interval(2, 2), predictor=piece.predictor
        )
        with dit_cache(pipe, config):  # steps 0, 1, 2, 4 are computed
            pipe.sigmas[3] = 0.6
            with pytest.warns(UserWarning, match="fitted at other noise levels .*: the last residual is taken"):
                torch.testing.assert_close(pipe()[3], pipe.expected(3, at2=1))

    def test_as_a_configuration_it_does_the_same(self):
        pipe = At()
        plan = plan_for(pipe, CURVE, scheduler=None)
        with dit_cache(pipe, plan) as cache:
            got, config = pipe(), cache.config
        assert isinstance(config, DitCacheConfig)
        assert config == plan.config
        with dit_cache(pipe, config):
            again = pipe()
        assert all(torch.equal(got[step], again[step]) for step in got)

    @pytest.mark.parametrize("off", [0.0009, -0.0009])
    def test_noise_levels_may_differ_by_rounding(self, off):
        pipe = At([sigma + off for sigma in SIGMAS])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dit_cache(pipe, plan_for(pipe, CURVE, scheduler=None)):
                torch.testing.assert_close(pipe()[2], pipe.expected(2, at1=1.75, at0=-0.5))

    def test_other_noise_levels_take_the_line_and_say_so_once(self):
        """1, 0.93, 0.81, … against 0.9, 0.85, 0.78, …: on a line, so exact."""
        pipe = At([0.9, 0.85, 0.78, 0.7, 0.5])
        plain = pipe()
        with listening() as said, dit_cache(pipe, plan_for(pipe, CURVE, scheduler=None)) as cache:
            got = [pipe(), pipe()]
            assert cache.stats.reused_calls >= 2
        (message,) = said
        assert "fitted at other noise levels (step 0 at 1, and in this run at 0.9): the line through" in message
        for outs in got:
            for step in plain:
                torch.testing.assert_close(outs[step], plain[step])

    @pytest.mark.parametrize("steps", [2, 3, 4, 7, 12])
    def test_another_number_of_steps_takes_the_line_and_says_so_once(self, steps):
        pipe = At(np.linspace(1, 0.1, steps).tolist())
        plain = pipe(steps)
        with listening() as said, dit_cache(pipe, plan_for(pipe, CURVE, scheduler=None)) as cache:
            got = [pipe(steps), pipe(steps)]
            stats, told = cache.stats, cache.decisions
        fitted = [message for message in said if "coefficients" in message]
        assert len(fitted) == 1
        assert f"fitted for 5 steps, and this run has {steps}: the line through the last two" in fitted[0]
        wanted = Mask(BITS, SIGMAS[:5]).for_run(Schedule(steps, sigmas=tuple(pipe.sigmas))).steps
        assert sum(wanted) == int(3 * steps / 5 + 0.5)
        assert tuple(int(not each.reuse) for each in told) == wanted * 2
        assert stats.reused_calls == 2 * (steps - sum(wanted))
        for outs in got:
            for step in [step for step in plain if sum(wanted[:step]) > 1]:
                torch.testing.assert_close(outs[step], plain[step])

    @pytest.mark.parametrize(("begin", "computed"), [(1, "1010"), (2, "110"), (3, "10")])
    def test_a_run_that_begins_in_the_middle(self, begin, computed):
        """Step 2 follows step 1 alone, so its two weights do not fit; begun there, there is nothing to reuse."""
        pipe = At(begin=begin)
        with listening() as said, dit_cache(pipe, plan_for(pipe, CURVE, scheduler=None)) as cache:
            got = pipe()
            assert "".join(str(int(not each.reuse)) for each in cache.decisions) == computed
        (message,) = said
        assert "for which Fitted has no coefficients" in message
        if begin == 1:
            torch.testing.assert_close(got[2], pipe.expected(2, at1=1))  # one residual: as it is
            torch.testing.assert_close(got[4], pipe.expected(4, at3=0.5, at1=0.25))  # both are there: as planned
        elif begin == 2:
            r = (SIGMAS[4] - SIGMAS[3]) / (SIGMAS[3] - SIGMAS[2])
            torch.testing.assert_close(got[4], pipe.expected(4, at3=1 + r, at2=-r))
        else:
            torch.testing.assert_close(got[4], pipe.expected(4, at3=1))

    def test_without_a_scheduler_scopes_tell(self):
        pipe = Sampler(Curve(1))
        pipe.scheduler = None
        plan = plan_for(pipe.transformer, dataclasses.replace(CURVE, path=""), scheduler=None)
        e, x = pipe.prompts[0], torch.tensor([[0.1, 0.2, 0.3]]) * 3
        around = x + 5 * e * SIGMAS[2]
        with dit_cache(pipe.transformer, plan), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = pipe.scoped(5)
        torch.testing.assert_close(got[2, 0], around + 5 * e * (1.75 * SIGMAS[1] - 0.5 * SIGMAS[0]))

    @pytest.mark.parametrize("by_step", [False, True])
    def test_where_nothing_tells_noise_levels(self, by_step):
        """The clock has steps then; a plan that was made so fits, one with noise levels does not."""
        model, e, x = Curve(1), torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 0.6, 0.9]])
        times = {"sigmas": range(5), "axis": "step"} if by_step else {}
        plan = plan_for(model, dataclasses.replace(CURVE, path="", **times), scheduler=None)
        with listening() as said, dit_cache(model, plan):
            for step in range(3):
                with timestep_scope(step, steps=5):
                    out = model(x, torch.tensor(SIGMAS[step]), encoder_hidden_states=e)
        b, a = (1.75, -0.5) if by_step else (2, -1)  # the line in the step
        torch.testing.assert_close(out, x + 5 * e * SIGMAS[2] + 5 * e * (b * SIGMAS[1] + a * SIGMAS[0]))
        assert [message for message in said if "Fitted has no coefficients" in message] == said[: 1 - by_step]
        assert len([message for message in said if "coefficients" in message]) == 1 - by_step

    def test_a_plan_in_the_place_of_another_configuration(self):
        pipe = At()
        plan = plan_for(pipe, CURVE, scheduler=None)
        with dit_cache(pipe, DitCacheConfig(0, 2)) as cache:
            pipe()
            cache.update(plan)
            assert cache.config == plan.config
            torch.testing.assert_close(pipe()[2], pipe.expected(2, at1=1.75, at0=-0.5))
            cache.update(DitCacheConfig(0, 2, cache_num_blocks=4))
            assert cache.config.overrides == {}


# --- which model it is for ------------------------------------------------------------------------------------------


class TestWhichModel:
    def test_another_model_is_refused(self):
        plan = plan_for(Pipe(Ladder(4)), dataclasses.replace(PIECE, total=4))
        other = Pipe(Ladder(2))
        blocks = list(other.transformer.blocks)
        with pytest.raises(ValueError, match=r"made for another model, Ladder with 4 blocks .*; here is Ladder with 2"):
            dit_cache(other, plan)
        assert list(other.transformer.blocks) == blocks
        assert not other.transformer._forward_hooks
        with pytest.raises(ValueError, match="here is Net with 5"):
            dit_cache(Pipe(Net()), plan)
        with dit_cache(other, DitCacheConfig(0, 2)) as cache:
            with pytest.raises(ValueError, match="search a plan for this one"):
                cache.update(plan)
            assert cache.config.when == Interval(0, 2)

    def test_numbers_can_be_taken_over(self):
        plan = plan_for(Pipe(Ladder(4)), PIECE)
        with dit_cache(Pipe(Ladder(5)), dataclasses.replace(plan.config, fingerprint=None)) as cache:
            assert "transformer.blocks.1 … transformer.blocks.2 of 5 blocks" in repr(cache)

    def test_a_transformer_alone_or_in_a_pipeline(self):
        net = Ladder(4)
        for made_with in (net, Pipe(net)):
            for target in (net, Pipe(net), BlockAdapter(Pipe(net))):
                for path in ("", "transformer"):
                    plan = plan_for(made_with, dataclasses.replace(PIECE, path=path), scheduler=None)
                    with dit_cache(target, plan) as cache:
                        assert "blocks.2 of 4 blocks" in repr(cache)

    def test_behind_torch_compile(self):
        pair = Pair("single")
        one, two = (dataclasses.replace(PIECE, path=path, total=5) for path in ("transformer_2", "transformer"))
        plan = plan_for(pair, one, dataclasses.replace(two, blocks=3), scheduler=None)
        pair.transformer, pair.transformer_2 = torch.compile(pair.transformer), torch.compile(pair.transformer_2)
        with dit_cache(pair, plan) as cache:
            assert "transformer._orig_mod.blocks.3 of 5" in repr(cache)
            assert "transformer_2._orig_mod.blocks.2 of 5" in repr(cache)

    def test_a_list_named(self):
        net = Net("two_lists")
        plan = plan_for(net, dataclasses.replace(PIECE, path="", total=5), scheduler=None, blocks="blocks")
        with dit_cache(net, plan, blocks="blocks") as cache:
            assert "blocks.1 … blocks.2 of 5 blocks" in repr(cache)
        with pytest.raises(ValueError, match="made for another model"):
            dit_cache(net, plan)

    def test_two_transformers(self):
        """Of the pair, the second is called from step 4 on."""
        pair = Pair()
        one = TransformerPlan("transformer", 1, 8, 10, (1, 0, 1, 0, 1, 1, 1, 1), _ones("10101111"), None, called=(0, 4))
        two = TransformerPlan(
            "transformer_2", 2, 3, 10, (1, 1, 1, 1, 1, 0, 0, 0), _ones("11111000"), None, called=(4, 8)
        )
        plan = plan_for(pair, one, two)
        assert plan.speedup == pytest.approx(80 / (80 - 2 * 8 - 3 * 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dit_cache(pair, plan, verify=False) as cache:
                pair()
                assert cache.config.overrides.keys() == {"transformer_2"}
                told = cache.stats
        assert (told.blocks_total, told.blocks_total / told.blocks_run) == (80, pytest.approx(plan.speedup))
        for name, listed, wanted in (
            ("transformer", "blocks", ["11111", "10000", "11111", "10000", *["00000"] * 4]),
            ("transformer", "singles", ["11111", "00001", "11111", "00001", *["00000"] * 4]),
            ("transformer_2", "blocks", [*["00000"] * 4, "11111", *["11000"] * 3]),
            ("transformer_2", "singles", [*["00000"] * 4, *["11111"] * 4]),
        ):
            assert pair.seen.ran(name, listed) == wanted
        assert pair.seen.untouched()

    @pytest.mark.parametrize("name", ["transformer", "transformer_2"])
    def test_what_it_has_nothing_for_stays_uncached(self, name):
        pair = Pair("single", both=True)
        piece = TransformerPlan(name, 1, 3, 5, (1, 0, 1, 0, 1, 0, 1, 0), _ones("10101010"), None)
        with dit_cache(pair, plan_for(pair, piece), verify=False):
            pair()
        for other in ("transformer", "transformer_2"):
            reused = "10001" if other == name else "11111"
            assert pair.seen.ran(other, "blocks") == ["11111", reused] * 4
        assert pair.seen.untouched()

    def test_a_name_that_is_not_there(self):
        pair = Pair("single")
        piece = dataclasses.replace(PIECE, path="transformer_3", total=5)
        with pytest.raises(
            ValueError, match="plan is for 'transformer_3', which is none of 'transformer', 'transformer_2'"
        ):
            dit_cache(pair, plan_for(pair, piece))

    def test_dtype_and_scheduler_are_remarked_once_it_is_attached(self):
        pipe = Pipe(Ladder(4))
        plan = plan_for(pipe, PIECE, scheduler="Euler", dtype="bfloat16")
        with listening() as said:
            cache = dit_cache(pipe, plan)
        dtype, scheduler = said
        assert cache.active
        assert "weights in bfloat16, and the model's are in float32" in dtype
        assert "made with Euler, and the scheduler here is Counter" in scheduler
        pipe.transformer.to(torch.bfloat16)
        with listening() as said:
            cache.update(plan)
        assert said == [scheduler]
        cache.remove()
        with listening() as said:  # one that is given counts
            dit_cache(pipe, plan, scheduler=type("Other", (), {"timesteps": None})()).remove()
        assert said[0] == scheduler.replace("Counter", "Other")
        assert ["no call" in each for each in said[1:]] == [True]

    def test_nothing_is_said_where_attaching_fails(self):
        pipe = Pipe(Ladder(4))
        plan = plan_for(pipe, PIECE, scheduler="Euler", dtype="bfloat16")
        with (
            listening() as said,
            dit_cache(pipe, DitCacheConfig(0, 2)),
            pytest.raises(ValueError, match="cached already"),
        ):
            dit_cache(pipe, plan)
        assert ["no call" in each for each in said] == [True]  # of the one that was attached

    def test_an_adapter_that_has_a_configuration_of_its_own(self):
        net = Ladder(4)
        plan, adapter = plan_for(Pipe(net), PIECE), BlockAdapter(Pipe(net), params=[DitCacheConfig(0, 2)])
        with pytest.raises(ValueError, match="has a configuration of its own in the adapter: give one of both"):
            dit_cache(adapter, plan)


def _ones(bits):
    return tuple(None if bit == "1" else (1.0,) for bit in bits)


# --- on the shipped pipeline ----------------------------------------------------------------------------------------

STEPS = 5
SAMPLE = """
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
pictures = pipe("red apple", num_inference_steps=steps, generator=generator, output_type="pt").images
"""
FRESH = f"""
import sys, torch
from dithooks import CachePlan, dit_cache
from dithooks.demo import load_pipeline
torch.set_num_threads(int(sys.argv[3]))
pipe, steps = load_pipeline(), {STEPS}
with dit_cache(pipe, CachePlan.load(sys.argv[1])) as cache:
    {SAMPLE.strip().replace(chr(10), chr(10) + "    ")}
    print(cache.stats.blocks_run, cache.stats.blocks_total)
torch.save(pictures, sys.argv[2])
"""


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline()


@pytest.fixture(scope="module")
def plan(shipped):
    shipped.scheduler.set_timesteps(STEPS)
    sigmas = shipped.scheduler.sigmas[:STEPS].tolist()
    weights = (None, None, (1 / 3 + 1, -1 / 3), None, (0.9,))
    piece = TransformerPlan("transformer", 1, 10, 12, BITS, weights, sigmas)
    return CachePlan((piece,), made_for(shipped, STEPS, type(shipped.scheduler).__name__), FOUND)


def draw(pipe, config=None, steps=STEPS):
    def run():
        told = {"pipe": pipe, "steps": steps, "torch": torch}
        exec(SAMPLE, told)
        return told["pictures"]

    if config is None:
        return run(), None
    with dit_cache(pipe, config) as cache:
        return run(), cache.stats


class TestShipped:
    def test_the_same_pictures_in_a_fresh_process(self, shipped, plan, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            here, stats = draw(shipped, plan)
        plan.save(tmp_path / "plan.json")
        arguments = [str(tmp_path / "plan.json"), str(tmp_path / "pictures.pt"), str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning:dithooks", "-c", FRESH, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(stats.blocks_run), str(stats.blocks_total)]
        assert stats.blocks_total / stats.blocks_run == plan.speedup == 60 / 40
        assert torch.equal(torch.load(tmp_path / "pictures.pt"), here)

    def test_the_coefficients_count(self, shipped, plan):
        piece = plan.pieces[0]
        pictures = [draw(shipped, plan)[0]]
        for predictor in (Reuse(), dataclasses.replace(piece.predictor, sigmas=None)):
            pictures.append(draw(shipped, dataclasses.replace(plan.config, predictor=predictor))[0])
        assert torch.equal(pictures[0], pictures[2])
        assert not torch.equal(pictures[0], pictures[1])

    @pytest.mark.parametrize("steps", [3, 8])
    def test_another_number_of_steps(self, shipped, plan, steps):
        plain, _ = draw(shipped, steps=steps)
        with listening() as said:
            pictures, stats = draw(shipped, plan, steps)
        (message,) = said
        assert f"fitted for 5 steps, and this run has {steps}: the line through the last two residuals" in message
        assert pictures.isfinite().all()
        assert stats.reused_calls == 2 * (steps - int(3 * steps / 5 + 0.5))
        assert (pictures - plain).abs().mean() < 0.2

    def test_a_scheduler_of_another_kind(self, shipped, plan):
        """Heun's method has each noise level twice, so σ does not tell its steps: the mask is resampled by share."""
        other = load_pipeline()
        other.scheduler = FlowMatchHeunDiscreteScheduler()
        with listening() as said:
            pictures, stats = draw(other, plan)
        assert "made with FlowMatchEulerDiscreteScheduler, and the scheduler here is FlowMatchHeun" in said[0]
        assert len([message for message in said if "coefficients" in message]) == 1
        assert pictures.isfinite().all()
        assert stats.reused_calls > 0
