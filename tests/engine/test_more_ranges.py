"""Several ranges of the same blocks, each with a schedule of its own: against the same run worked out by hand."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import Ladder, Net, Pipe, Single, latents, prompt

from dithooks import (
    DitCacheConfig,
    InvalidSetting,
    Linear,
    Mask,
    Threshold,
    Uncached,
    WiringError,
    WrongType,
    dit_cache,
    timestep_scope,
)
from dithooks.engine.stand_in import SkipBlock

HEAD, TAIL = (1, 0, 0, 1, 0, 0, 1, 0), (1, 0, 1, 1, 0, 1, 0, 0)  # all four modes of a step are there
STEPS, DEPTH = len(HEAD), 5
SPANS = ((0, 3, HEAD), (3, 5, TAIL))
CONFIG = DitCacheConfig(
    cache_block_start=0,
    cache_num_blocks=3,
    policy=Mask(HEAD),
    more_ranges=(DitCacheConfig(cache_block_start=3, policy=Mask(TAIL)),),
)


def by_hand(net, step, x, t, e, kept):
    """The output of a Net of two streams; each range adds what it did when it last ran."""
    h, temb = net.embed(x), net.time(t.reshape(-1, 1)).expand(x.shape[0], -1)
    blocks = [*net.blocks, *getattr(net, "singles", [])]
    for first, end, bits in SPANS:
        h_in, e_in = h, e
        for index in range(first, end) if bits[step] else ():
            if index < len(net.blocks):
                e, h = blocks[index](h, encoder_hidden_states=e, temb=temb)
            else:
                h, e = blocks[index](h, encoder_hidden_states=e, temb=temb)
        if bits[step]:
            kept[first] = h - h_in, e - e_in
        else:
            h, e = h + kept[first][0], e + kept[first][1]
    return net.proj(h + e.mean(1, keepdim=True) if net.kind == "two_lists" else h)


@torch.no_grad()
def drawn_by_hand(net, x, prompts):
    kept = [{} for _ in prompts]
    for step in range(STEPS):
        t = torch.linspace(1, 0, STEPS + 1)[step]
        outs = [by_hand(net, step, x, t, e, kept[branch]) for branch, e in enumerate(prompts)]
        x = x - sum(outs) / len(outs) / STEPS
    return x


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("kind", ["swapped", "two_lists"])
def test_each_range_follows_its_own_schedule(kind, branches, verify):
    """With two lists, the second range begins in the second one: the ranges count over both."""
    net = Net(kind, DEPTH if kind == "swapped" else 3)
    if kind == "two_lists":
        net.singles = net.singles[:2]
    pipe, x, prompts = Pipe(net), latents(), [prompt() for _ in range(branches)]
    wanted = drawn_by_hand(net, x, prompts)
    before, held = [*net.blocks], sum(len(module._forward_hooks) for module in net.modules())
    with torch.no_grad(), dit_cache(pipe, CONFIG, verify=verify) as cache:
        assert any(isinstance(block, SkipBlock) for block in net.blocks)
        found = pipe(x, STEPS, prompts)
        run = cache.stats
        named = {(each.range, each.first, each.blocks, each.total) for each in cache.ranges}
    torch.testing.assert_close(found, wanted)
    assert named == {("[0:3]", 0, 3, 5), ("[3:5]", 3, 2, 5)} or {each[1:] for each in named} == {(0, 3, 5), (3, 2, 5)}
    assert len({each[0] for each in named}) == 2
    assert (run.blocks_run, run.blocks_total) == (branches * (3 * 3 + 2 * 4), branches * STEPS * DEPTH)
    assert [*net.blocks] == before
    assert sum(len(module._forward_hooks) for module in net.modules()) == held


def test_no_trace_stays():
    net, x = Net("swapped", DEPTH), latents()
    pipe, e = Pipe(net), prompt()
    with torch.no_grad():
        plain = pipe(x, STEPS, [e])
        cache = dit_cache(pipe, CONFIG)
        pipe(x, STEPS, [e])
        cache.remove()
        torch.testing.assert_close(pipe(x, STEPS, [e]), plain, rtol=0, atol=0)
    del cache
    gc.collect()
    assert not any(isinstance(each, SkipBlock) for each in gc.get_objects() if isinstance(each, nn.Module))


@torch.no_grad()
def test_compiled_it_draws_the_same():
    """The transformer compiled as a whole: no mode of a step breaks the graph."""
    torch.manual_seed(0)
    net, x, e = Net("single", DEPTH), latents(), None
    net._count = lambda *_: None
    for block in net.blocks:
        block._forward_hooks.clear()
    pipe = Pipe(net)
    with dit_cache(pipe, CONFIG):
        wanted = pipe(x, STEPS, [e])
    torch._dynamo.reset()
    pipe.transformer = torch.compile(net, backend="eager", fullgraph=True)
    with dit_cache(pipe, CONFIG) as cache:
        found = pipe(x, STEPS, [e])
        assert sum(each.reuse for each in cache.decisions) == HEAD.count(0) + TAIL.count(0)
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


@torch.no_grad()
def test_rows_of_a_batch_have_both_ranges():
    """Two requests a step apart in one batch, by two plans of the same ranges, as each is drawn alone."""
    net = Net("swapped", DEPTH)
    other = replace(
        CONFIG, policy=Mask((1, 1, 0, 0, 1, 0, 0, 0)), more_ranges=(replace(*CONFIG.more_ranges, policy=Mask(HEAD)),)
    )
    x, prompts, sigmas = latents(2), prompt(2), torch.linspace(1, 0, STEPS + 1)
    alone = []
    for row, config in enumerate((CONFIG, other)):
        pipe = Pipe(net)
        with dit_cache(pipe, config):
            alone.append(pipe(x[row : row + 1], STEPS, [prompts[row : row + 1]]))
    with dit_cache(net, CONFIG) as cache:
        requests = [cache.request("a", steps=STEPS), cache.request("b", steps=STEPS, plan=other)]
        assert cache.forecast("a") == pytest.approx([(3 * h + 2 * t) / 5 for h, t in zip(HEAD, TAIL, strict=True)])
        drawn = [x[:1].clone(), x[1:].clone()]
        for tick in range(STEPS + 1):
            rows = [row for row in (0, 1) if 0 <= tick - row < STEPS]
            t = torch.stack([sigmas[tick - row] for row in rows])
            both = torch.cat([drawn[row] for row in rows])
            with cache.rows([(requests[row], tick - row) for row in rows]):
                out = net_at(net, both, t, torch.cat([prompts[row : row + 1] for row in rows]))
            for place, row in enumerate(rows):
                drawn[row] = drawn[row] - out[place : place + 1] / STEPS
    torch.testing.assert_close(torch.cat(drawn), torch.cat(alone))


def net_at(net, x, t, e):
    return net(x, t, encoder_hidden_states=e)


@pytest.mark.filterwarnings("ignore:no call of")
def test_a_plan_of_other_ranges_is_no_plan_of_the_batch():
    whole = DitCacheConfig(policy=Mask(HEAD))
    with dit_cache(Net("swapped", DEPTH), CONFIG) as cache, pytest.raises(InvalidSetting, match="nothing of"):
        cache.request("other", plan=whole, steps=STEPS)


class Backwards(nn.Module):
    """Calls its blocks from the last one on."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(DEPTH))

    def forward(self, hidden_states, timestep):
        for block in reversed(self.blocks):
            hidden_states = block(hidden_states * timestep)
        return hidden_states


def test_blocks_in_another_order_are_refused():
    """One range moves to the blocks that are called first; of two, each would have to move into the other."""
    model, x = Backwards(), torch.ones(1, 4)
    with torch.no_grad(), dit_cache(model, replace(CONFIG, more_ranges=())) as cache:
        for step in range(2):
            with timestep_scope(step, steps=STEPS):
                model(x, 1.0)
        assert [each.reuse for each in cache.decisions] == [False, True]
    blocks = [*model.blocks]
    refused = pytest.raises(WiringError, match="not called in their order")
    with torch.no_grad(), dit_cache(model, CONFIG), refused, timestep_scope(0, steps=STEPS):
        model(x, 1.0)
    assert [*model.blocks] == blocks


def further(**given):
    return DitCacheConfig(policy=Mask(TAIL), **given)


@pytest.mark.parametrize(
    ("first", "more", "error", "match"),
    [
        ({}, (further(cache_block_start=3),), InvalidSetting, "from block 3 on begins before another one ends"),
        ({"cache_num_blocks": 4}, (further(cache_block_start=3),), InvalidSetting, "ends, at block 3: give each"),
        ({"cache_num_blocks": 2}, (further(payload="output"),), InvalidSetting, "exclude each other"),
        ({"payload": "output"}, (further(),), InvalidSetting, "exclude each other"),
        ({"cache_num_blocks": 2}, (further(fingerprint="f"),), InvalidSetting, "has fingerprint of its own"),
        ({"cache_num_blocks": 2}, further(), WrongType, "more_ranges must be a tuple of DitCacheConfig"),
        (
            {"cache_num_blocks": 2},
            ({"block_start": 2},),
            InvalidSetting,
            "has no field block_start: did you mean",
        ),
    ],
)
def test_ranges_that_exclude_each_other(first, more, error, match):
    with pytest.raises(error, match=match):
        DitCacheConfig(policy=Mask(HEAD), more_ranges=more, **first)


def test_it_is_written_and_read_and_may_stand_in_overrides():
    assert DitCacheConfig.from_json(CONFIG.to_json()) == CONFIG
    entry = {"cache_num_blocks": 3, "more_ranges": ({"cache_block_start": 3, "policy": Mask(TAIL)},)}
    config = DitCacheConfig(policy=Mask(HEAD), overrides={"transformer": entry})
    read = DitCacheConfig.from_json(config.to_json()).overridden("transformer")
    assert read.ranges == CONFIG.ranges
    assert "more_ranges" not in DitCacheConfig(policy=Mask(HEAD)).to_json()
    net, x, e = Net("swapped", DEPTH), latents(), prompt()
    wanted = drawn_by_hand(net, x, [e])
    with torch.no_grad(), dit_cache(pipe := Pipe(net), config):
        torch.testing.assert_close(pipe(x, STEPS, [e]), wanted)


@torch.no_grad()
def test_a_line_in_one_range_and_the_last_residual_in_the_other():
    """Blocks that add their rate times t, by hand: the line is exact for them, the last residual one step behind."""
    rates, x = (1.0, 2.0, 3.0, 4.0, 5.0), torch.zeros(1, 4)
    model, times = Ladder(DEPTH), [1 - step / STEPS for step in range(STEPS)]
    head, tail = (1, 1, 0, 0, 0, 0, 0, 0), (1, 0, 1, 0, 1, 0, 1, 0)
    config = replace(
        CONFIG, policy=Mask(head), predictor=Linear(), more_ranges=(replace(*CONFIG.more_ranges, policy=Mask(tail)),)
    )
    with dit_cache(model, config):
        for step, t in enumerate(times):
            with timestep_scope(step, sigma=t, steps=STEPS):
                found = model(x, torch.tensor(t))
            behind = times[step - 1] if not tail[step] else t
            torch.testing.assert_close(found, x + sum(rates[:3]) * t + sum(rates[3:]) * behind)


@pytest.mark.parametrize("uncached", [0, 1])
@torch.no_grad()
def test_blocks_of_a_range_that_is_never_reused_count_as_computed(uncached):
    policies = [Mask(HEAD), Mask(TAIL)]
    policies[uncached] = Uncached()
    config = replace(CONFIG, policy=policies[0], more_ranges=(replace(*CONFIG.more_ranges, policy=policies[1]),))
    with dit_cache(pipe := Pipe(Net("swapped", DEPTH)), config) as cache:
        pipe(latents(), STEPS, [prompt()])
        assert cache.stats.blocks_total == STEPS * DEPTH
        assert cache.stats.blocks_run == (STEPS * DEPTH - [2 * TAIL.count(0), 3 * HEAD.count(0)][uncached])


class Aside(nn.Module):
    """Two more blocks run behind the others, on other tokens: their list is found, and is no part of the trunk."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Single(4) for _ in range(DEPTH))
        self.aside = nn.ModuleList(Single(4) for _ in range(2))

    def forward(self, hidden_states, timestep):
        h, temb = hidden_states, timestep.reshape(1, 1).expand(len(hidden_states), 4)
        for block in self.blocks:
            h = block(h, temb=temb)
        other = h.sin().mean(1, keepdim=True)
        for block in self.aside:
            other = block(other, temb=temb)
        return h + other


@torch.no_grad()
def test_blocks_of_a_list_that_is_no_part_of_the_trunk_do_not_count():
    config = replace(CONFIG, more_ranges=(replace(*CONFIG.more_ranges, cache_num_blocks=2),))
    with dit_cache(pipe := Pipe(Aside()), config) as cache:
        pipe(latents(), STEPS)
        assert {each.total for each in cache.ranges} == {DEPTH}
        assert cache.stats.blocks_total == STEPS * DEPTH
        assert cache.stats.blocks_run == 3 * sum(HEAD) + 2 * sum(TAIL)


@torch.no_grad()
def test_a_policy_that_looks_decides_on_the_second_range_by_what_enters_it():
    """Of the blocks before it some are left out, and show no residual: x + 6t of the last step that computed them."""
    x, model, times = torch.ones(1, 4), Ladder(DEPTH), [1 - step / STEPS for step in range(STEPS)]
    tail = Threshold(0.3, max_warmup_steps=1)
    config = replace(CONFIG, more_ranges=(replace(*CONFIG.more_ranges, policy=tail),))
    with dit_cache(model, config) as cache:
        for step, t in enumerate(times):
            with timestep_scope(step, sigma=t, steps=STEPS):
                model(x, torch.tensor(t))
        seen = [(each.reuse, each.value) for each in cache.decisions if each.range == "blocks[3:5]"]
    entered, wanted = 7.0, [(False, None)]
    for step in range(1, STEPS):
        enters = 1 + 6 * times[max(k for k in range(step + 1) if HEAD[k])]
        change = abs(enters - entered) / entered
        wanted.append((change < 0.3, pytest.approx(change, abs=1e-6)))
        entered = entered if change < 0.3 else enters
    assert seen == wanted
    assert {reuse for reuse, _ in wanted[1:]} == {True, False}


@torch.no_grad()
def test_a_request_may_go_without_any_reuse():
    net, x, e = Net("swapped", DEPTH), latents(), prompt()
    with dit_cache(net, CONFIG) as cache:
        requests = [cache.request("cached", steps=STEPS), cache.request("plain", steps=STEPS, plan=Uncached())]
        assert cache.forecast("plain") == (1.0,) * STEPS
        for step in range(STEPS):
            t = torch.tensor(1 - step / STEPS)
            with cache.rows([(request, step) for request in requests]):
                found = net_at(net, x, t.expand(2), e)
        stats = cache.stats
    torch.testing.assert_close(found[1:], net_at(net, x[1:], t, e[1:]))
    assert stats.blocks_run == 3 * sum(HEAD) + 2 * sum(TAIL) + STEPS * DEPTH


def test_a_mapping_that_holds_itself_is_refused():
    entry = {"cache_block_start": 3, "policy": Mask(TAIL)}
    entry["more_ranges"] = (entry,)
    with pytest.raises(InvalidSetting, match="one of more_ranges has more_ranges of its own"):
        replace(CONFIG, more_ranges=(entry,))


def test_an_override_without_an_end_is_told_so():
    with pytest.raises(InvalidSetting, match=r"ends, with the last block: .*more_ranges=\(\) leaves this range alone"):
        replace(CONFIG, overrides={"transformer_2": {"cache_num_blocks": None}})


@torch.no_grad()
def test_times_of_calls_show_no_speedup_of_one_range_of_several():
    """A call that computes one leaves the other out: by such calls, the last blocks would seem to slow it down."""
    lists = DitCacheConfig(policy=Mask(HEAD), overrides={"singles": {"policy": Mask(TAIL)}})
    for config, number in ((CONFIG, 2), (lists, 2), (replace(CONFIG, more_ranges=()), 1)):
        with dit_cache(pipe := Pipe(Net("two_lists", DEPTH)), config) as cache:
            pipe(latents(), STEPS, [prompt()])
            runs = cache.stats.runs
        known = [(run.estimated_speedup is not None, run.measured_speedup is not None) for run in runs]
        assert known == [(number == 1,) * 2] * number
