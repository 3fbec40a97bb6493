"""A transformer compiled whole, or block by block, before and after the cache is attached, with policies that know
their steps beforehand: equal to eager code, two graphs, none more in later runs, no graph break, every call in
compiled code.
"""

import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
from compilers import STEPS, Counted, breaks, flux, fresh, inputs, sample
from config.test_cache_plan import plan_for
from torch._dynamo.utils import counters
from toys import Net, Pipe, Single, latents, prompt

from dithooks import DitCacheConfig, Interval, Linear, Mask, Taylor, dit_cache, timestep_scope
from dithooks.config.cache_plan import TransformerPlan
from dithooks.demo import load_pipeline
from dithooks.tiny import build

pytestmark = [pytest.mark.line("torch.compile"), pytest.mark.on("tiny FLUX"), pytest.mark.slow]

KNOWN = {
    "interval, reuse": DitCacheConfig(2, 2, 0, 5),
    "interval, linear": DitCacheConfig(2, 2, 0, 4, predictor=Linear()),
    "mask, Taylor": DitCacheConfig(cache_block_start=1, policy=Mask((1, 1, 1, 0, 1, 0, 0, 1)), predictor=Taylor(2)),
    "plan": TransformerPlan(
        "",
        *(1, 3, 5),
        (1, 1, 0, 1, 0, 0, 1, 0),
        (None, None, (1.5, -0.5), None, (1.25, -0.25), (0.5,), None, (1.0, 0.5, -0.5)),
        tuple(1 - step / STEPS for step in range(STEPS)),
        "timestep",
    ),
}
WAYS = pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh():
        yield


def compiled(model, whole, backend, **more):
    """Compiled in place, as one graph or one a block."""
    if whole:
        model.compile(backend=backend, fullgraph=True, **more)
    elif model._repeated_blocks:
        model.compile_repeated_blocks(backend=backend, fullgraph=True, **more)
    else:
        for block in model.transformer_blocks:
            block.compile(backend=backend, fullgraph=True, **more)
    return backend


def settled(model, given, expected, backend, runs=2):
    """Further runs: what it was, with nothing compiled any more. Returns how often compiled code was entered."""
    graphs, entered = backend.graphs, backend.runs
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(runs):
            torch.testing.assert_close(sample(model, *given), expected, rtol=0, atol=0)
    assert backend.graphs == graphs
    assert not breaks()
    return (backend.runs - entered) / runs


@pytest.mark.parametrize(
    ("name", "whole", "early"),
    [
        pytest.param(
            name, whole, early, id=f"{name}, {'whole' if whole else 'blocks'}, {'after' if early else 'before'}"
        )
        for number, name in enumerate(KNOWN)
        for whole in (True, False)
        for early in (number % 2 == whole,)
    ],
)
@pytest.mark.filterwarnings("ignore:.*predictor.*")
def test_static_policies(name, whole, early):
    """Three runs of eight steps with each policy and predictor, then one without: as eager ones, none recompiled."""
    model, given = flux(), [inputs()]
    config = plan_for(model, KNOWN[name], scheduler=None) if name == "plan" else KNOWN[name]
    plain = sample(model, *given)
    with dit_cache(model, config) as cache:
        expected, told = sample(model, *given), cache.stats
    assert (plain[1:] - plain[:-1]).abs().amax((1, 2, 3)).min() > 1e-3
    assert (plain - expected).abs().amax((1, 2, 3)).count_nonzero() == told.reused_calls > 2
    backend, before = Counted(), 0
    if early:
        compiled(model, whole, backend)
        torch.testing.assert_close(sample(model, *given), plain, rtol=0, atol=0)
        before = backend.graphs
    with dit_cache(model, config) as cache:
        if not early:
            compiled(model, whole, backend)
        torch.testing.assert_close(sample(model, *given), expected, rtol=0, atol=0)
        entered = settled(model, given, expected, backend)
        assert cache.stats.reused_calls == 3 * told.reused_calls
        blocks, ends = cache.stats.blocks_run // 3, 2 * (STEPS - told.reused_calls)
        assert entered == (STEPS if whole else blocks + ends)  # hooks of the two ends are compiled on their own
    # Whole: one that computes, one that reuses. By blocks: those before, between and after, by class, and two of hooks.
    assert backend.graphs - before <= 2 if whole else backend.graphs <= 7
    after = backend.graphs
    torch.testing.assert_close(sample(model, *given), plain, rtol=0, atol=0)
    assert backend.graphs - after == (whole and not early)


@WAYS
@pytest.mark.on("toy net")
def test_fifty_steps_and_two_calls_a_step(whole):
    """Three runs of fifty steps, each guided by two calls: nothing is compiled after the first ten steps."""
    net, backend = Net("two_lists", 3), Counted()
    for block in [*net.blocks, *net.singles]:
        block._forward_hooks.clear()  # they count, which would be compiled
    pipe, x, prompts = Pipe(net), latents(), [prompt(), prompt()]
    config = DitCacheConfig(3, 3, 1, 4, predictor=Linear())
    plain = pipe(x, 50, prompts)
    with dit_cache(pipe, config):
        expected = pipe(x, 50, prompts)
    assert (plain - expected).abs().max() > 1e-6
    for block in [*net.blocks, *net.singles]:
        whole or block.compile(backend=backend, fullgraph=True)
    if whole:
        net.compile(backend=backend, fullgraph=True)

    def at(step):
        torch._dynamo.config.error_on_recompile = step > 10

    with torch._dynamo.config.patch(error_on_recompile=False), dit_cache(pipe, config) as cache:
        for run in range(3):
            torch.testing.assert_close(pipe(x, 50, prompts, at=at if run == 0 else None), expected, rtol=0, atol=0)
        assert cache.stats.reused_calls == 3 * 2 * 31
    assert not breaks()
    assert backend.graphs == 2 if whole else backend.graphs <= 5
    assert backend.runs == 3 * 100 if whole else backend.runs > 3 * 38 * 6 + 3 * 62 * 2


SHAPES = [(16, 5, 1), (24, 7, 1), (12, 11, 2)]  # tokens of the image, of the text, and batch


@pytest.mark.parametrize(("whole", "most"), [(True, 4), (False, 16)], ids=["whole", "blocks"])
def test_dynamic_shapes(whole, most):
    """Three runs with other token counts, text lengths and batches: as eager ones, with a bounded number of graphs."""
    model, eager, backend, config = flux(), flux(), Counted(), DitCacheConfig(2, 2, 0, 5)
    compiled(model, whole, backend, dynamic=True)
    for image, text, batch in SHAPES:
        given = inputs(image, text, batch, seed=image + text)
        with dit_cache(eager, config):
            expected = sample(eager, given)
        with dit_cache(model, config) as cache:
            torch.testing.assert_close(sample(model, given), expected, rtol=0, atol=0)
            assert cache.stats.reused_calls == 3
    assert not breaks()
    # A batch of one is a case of its own to the compiler.
    assert 2 < backend.graphs <= most
    with dit_cache(model, config) as cache, torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(sample(model, given), expected, rtol=0, atol=0)
        assert cache.stats.reused_calls == 3


def test_shapes_that_change_in_a_run():
    """Another text length in the middle of a compiled run: that step is computed, nothing of another shape is added."""
    model, backend = flux(), Counted()
    compiled(model, True, backend, dynamic=True)
    one, other = inputs(text=5), inputs(text=8)
    plain = sample(flux(), one, other)
    with dit_cache(model, DitCacheConfig(0, 8, 0, 5)) as cache:
        for step in range(4):
            got = model(**(one, one, other, other)[step], timestep=torch.tensor([1 - step / 8]), return_dict=False)[0]
            if step in (0, 2):
                torch.testing.assert_close(got, plain[2 * step + step // 2], rtol=0, atol=0)
        assert [each.reuse for each in cache.decisions] == [False, True, False, True]
    assert backend.runs == 4


@pytest.mark.on("tiny SD3")
def test_each_block_of_another_transformer():
    """SD3 by blocks: as eager code, at most two graphs for the cache, all calls compiled."""
    (model, make), backend = build("SD3Transformer2DModel"), Counted()
    given = {key: value for key, value in make().items() if key != "timestep"}
    config = DitCacheConfig(2, 2, 0, 3, predictor=Linear())
    times = [torch.full((len(given["hidden_states"]),), 1000 - 100 * step) for step in range(6)]

    def run():
        return torch.stack([model(**given, timestep=time, return_dict=False)[0] for time in times])

    with dit_cache(model, config):
        expected = run()
    compiled(model, False, backend)
    plain = run()
    graphs = backend.graphs
    assert (plain - expected).abs().amax((1, 2)).max() > 1e-4
    with dit_cache(model, config) as cache:
        for _ in range(2):
            torch.testing.assert_close(run(), expected, rtol=0, atol=0)
        assert cache.stats.reused_calls == 4
    assert backend.graphs - graphs <= 2
    assert backend.runs > 3 * 6
    assert not breaks()


class Adding(torch.nn.Module):
    """Adds a tensor of its own after each block: in place, or not."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.blocks = in_place, torch.nn.ModuleList(Single() for _ in range(4))

    def forward(self, hidden_states, timestep, control):
        h, temb = hidden_states * timestep, timestep.expand(2, 8)
        for number, block in enumerate(self.blocks):
            h = block(h, temb)
            if self.in_place:
                h += control[number]
            else:
                h = h + control[number]
        return h


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("graph", ["whole", "whole, in inference mode", "blocks"])
def test_what_is_added_between_blocks(in_place, graph):
    """As in eager code: that of the step. The model is asked beforehand, so that there are two graphs all the same."""
    x, base = torch.randn(2, 3, 8), [torch.randn(2, 3, 8) for _ in range(4)]

    def run(model):
        outputs = []
        for step in range(STEPS):
            control = [each * (1 - step / STEPS) for each in base]
            with timestep_scope(step, branch=0, steps=STEPS):
                outputs.append(model(x, torch.tensor(0.5), control).clone())
        return torch.stack(outputs)

    model, backend, config = Adding(in_place), Counted(), DitCacheConfig(2, 2, 0, 4)
    with torch.inference_mode() if "inference" in graph else nullcontext():
        with dit_cache(model, config) as cache:
            expected = run(model)
            assert cache.stats.reused_calls == 3
        with dit_cache(model, config):
            if graph == "blocks":
                for block in model.blocks:
                    block.compile(backend=backend, fullgraph=True)
            else:
                model.compile(backend=backend, fullgraph=True)
            for _ in range(2):
                torch.testing.assert_close(run(model), expected)
    assert not breaks()
    assert backend.graphs <= (2 if "whole" in graph else 7)


def test_inference_mode():
    """Runs under inference_mode and under no_grad in turn, with one cache: equal, and compiled once for each."""
    model, given, backend = flux(), inputs(), Counted()
    with dit_cache(model, KNOWN["interval, reuse"]):
        expected = sample(model, given)
    compiled(model, True, backend)
    with dit_cache(model, KNOWN["interval, reuse"]) as cache:
        for turn in range(4):
            with torch.inference_mode() if turn % 2 == 0 else nullcontext():
                torch.testing.assert_close(sample(model, given), expected, rtol=0, atol=0)
            if turn == 1:
                graphs = backend.graphs
        assert cache.stats.reused_calls == 4 * 3
    assert backend.graphs == graphs <= 4
    assert not breaks()


@pytest.mark.on("shipped pipeline in bfloat16")
def test_a_pipeline_in_half_precision():
    """The shipped pipeline's transformer in bfloat16, compiled: the very latents of eager code, with steps reused."""
    pipe, backend = load_pipeline().to(torch.bfloat16), Counted()
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "red apple", "num_inference_steps": 12, "output_type": "latent"}

    def draw():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    config = DitCacheConfig(4, 2, 0, 12, predictor=Linear())
    plain = draw()
    with dit_cache(pipe, config) as cache:
        expected, reused = draw(), cache.stats.reused_calls
    assert not torch.equal(plain, expected)
    compiled(pipe.transformer, True, backend)
    with dit_cache(pipe, config) as cache:
        for _ in range(2):
            assert torch.equal(draw(), expected)
        assert cache.stats.reused_calls == 2 * reused >= 8
    assert backend.graphs == 2
    assert backend.runs == 2 * 12 * 2
    assert not breaks()


@pytest.mark.skipif(
    not shutil.which("g++") or sys.platform == "win32", reason="inductor needs a C++ compiler: none here"
)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.on("toy net, by inductor")
def test_by_inductor(mode):
    """Real generated code, by default and with "reduce-overhead" (no CUDA graphs on a CPU): as eager code."""
    net = Net("two_lists", 2)
    for block in [*net.blocks, *net.singles]:
        block._forward_hooks.clear()
    pipe, x, e = Pipe(net), latents(), prompt()
    config = DitCacheConfig(policy=Interval(2, 2), predictor=Linear())
    with dit_cache(pipe, config):
        expected = pipe(x, 8, [e])
    plain = pipe(x, 8, [e])
    assert (plain - expected).abs().max() > 1e-4
    net.compile(mode=mode, fullgraph=True)
    with dit_cache(pipe, config) as cache:
        for _ in range(2):
            torch.testing.assert_close(pipe(x, 8, [e]), expected, rtol=1e-5, atol=1e-6)
        assert cache.stats.reused_calls == 6
    torch.testing.assert_close(pipe(x, 8, [e]), plain, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 3
    assert counters["aot_autograd"]  # that part of the way was gone
    assert not breaks()
