"""Rows that are decided by looking, each by its own change: held against runs of their own, by hand."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import Pipe

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Linear,
    Mask,
    Row,
    Threshold,
    dit_cache,
    profile,
    timestep_scope,
)
from dithooks.blocks.registry import chains_of
from dithooks.engine.attachment import prepare
from dithooks.errors import InvalidSetting, WiringError
from dithooks.integrations.dispatch import BlockIntegrations

pytestmark = pytest.mark.core

WIDTH, TOKENS, STEPS, DEPTH = 8, 5, 10, 4
SPEEDS = {"slow": 0.01, "fast": 0.3, "in turns": 0, "middling": 0.07}


class Scaled(torch.nn.Module):
    """Elementwise, so that a row is the same to the last bit in any batch."""

    def __init__(self, seed):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
        self.rows = []  # of each call

    def forward(self, hidden_states, temb):
        self.rows.append(len(hidden_states))
        return hidden_states + torch.sin(hidden_states * self.gain + temb[:, None])


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Scaled(seed) for seed in range(DEPTH))

    def forward(self, hidden_states, timestep, prompt=None):
        temb, h = 0.1 * timestep[:, None].expand(-1, WIDTH), 0.5 * hidden_states
        h = h if prompt is None else h + prompt[:, None]
        for block in self.blocks:
            h = block(h, temb)
        return h

    def passed(self, start=0):
        """The rows that have passed each block since the last time this was asked."""
        found = [list(block.rows) for block in self.blocks]
        for block in self.blocks:
            block.rows.clear()
        assert all(each == found[start] for each in found[start:])
        return found


def path(name, part=0):
    """The latents at each step of one sample, which go on as they like, whatever the model says of them."""
    draw = torch.Generator().manual_seed(list(SPEEDS).index(name) + 100 * part)
    x, made = torch.randn(1, TOKENS, WIDTH, generator=draw), []
    for step in range(STEPS):
        speed = 0.01 if step % 5 == 3 else SPEEDS[name] or (0.4 if step % 3 == 2 else 0.02)
        made.append(x)
        x = x + speed * torch.randn(x.shape, generator=draw)
    return made


def time(step, rows=1):
    return torch.full((rows,), 1 - step / STEPS)


def change(now, before):
    return float((now - before).abs().mean() / before.abs().mean())


def by_threshold(xs, limit, warm_up, start=0, prompt=None):
    """What each step is decided and returns, of one sample alone, with Threshold: by the blocks before the range."""
    blocks, made, told, delta, reference = Small().blocks, [], [], None, None
    for step, x in enumerate(xs):
        temb, h = 0.1 * time(step)[:, None].expand(-1, WIDTH), 0.5 * x
        h = h if prompt is None else h + prompt[:, None]
        h_in = h
        for block in blocks[:start]:
            h = block(h, temb)
        looked = h - h_in if start else h
        reuse = step >= warm_up and change(looked, reference) < limit
        h_in = h
        if reuse:
            h = h_in + delta
        else:
            for block in blocks[start:]:
                h = block(h, temb)
            delta, reference = h - h_in, looked
        made.append(h)
        told.append(reuse)
    return made, told


def by_rate(xs, limit, warm_up, prompt=None):
    """The same with EasyCache: by how the range's output followed its input at the last two computed steps."""
    blocks, made, told, computed, sum_of, before = Small().blocks, [], [], [], 0.0, None
    for step, x in enumerate(xs):
        temb, h_in = 0.1 * time(step)[:, None].expand(-1, WIDTH), 0.5 * x
        h_in = h_in if prompt is None else h_in + prompt[:, None]
        reuse = False
        if step >= warm_up:
            (x_s, y_s), (x_r, y_r) = computed[-1], computed[-2]
            rate = (y_s - y_r).abs().mean() / (x_s - x_r).abs().mean()
            expected = float(rate * (h_in - before).abs().mean() / y_s.abs().mean())
            reuse = sum_of + expected < limit
        before = h_in
        if reuse:
            sum_of += expected
            h = h_in + computed[-1][1] - computed[-1][0]
        else:
            h, sum_of = h_in, 0.0
            for block in blocks:
                h = block(h, temb)
            computed.append((h_in, h))
        made.append(h)
        told.append(reuse)
    return made, told


WAYS = {
    "threshold": (Threshold(0.15, max_warmup_steps=2), 0, lambda xs, **more: by_threshold(xs, 0.15, 2, **more)),
    "blocks before": (
        Threshold(0.15, max_warmup_steps=2),
        1,
        lambda xs, **more: by_threshold(xs, 0.15, 2, 1, **more),
    ),
    "rate": (EasyCache(0.2, max_warmup_steps=2), 0, lambda xs, **more: by_rate(xs, 0.2, 2, **more)),
    "where the mask has 0": (
        Mask((1, 1, *[0] * (STEPS - 2)), dynamic=Threshold(0.15, max_warmup_steps=0)),
        0,
        lambda xs, **more: by_threshold(xs, 0.15, 2, **more),
    ),
}
ways = pytest.mark.parametrize("way", WAYS)


def expected_of(way, part=0, prompt=None):
    """Of each sample: what each step returns, and whether it is reused. Samples have to differ, to show anything."""
    more = {} if prompt is None else {"prompt": prompt}
    found = {name: WAYS[way][2](path(name, part), **more) for name in SPEEDS}
    told = [told for _, told in found.values()]
    assert any(len(set(each)) > 1 for each in zip(*told, strict=True))
    assert all(any(each) for each in told)
    return found


def config_of(way, **more):
    policy, start, _ = WAYS[way]
    return DitCacheConfig(cache_block_start=start, policy=policy, **more)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@ways
def test_rows_at_different_steps(way):
    """Requests that begin one step after the other."""
    model, expected, start = Small(), expected_of(way), WAYS[way][1]
    with torch.no_grad(), dit_cache(model, config_of(way)) as cache:
        for name in SPEEDS:
            cache.request(name, steps=STEPS)
        for tick in range(STEPS + len(SPEEDS) - 1):
            places = {name: tick - number for number, name in enumerate(SPEEDS) if 0 <= tick - number < STEPS}
            model.passed(start)
            with cache.rows(places.items()):
                found = model(
                    torch.cat([path(name)[step] for name, step in places.items()]),
                    torch.cat([time(step) for step in places.values()]),
                )
            wanted = sum(not expected[name][1][step] for name, step in places.items())
            if tick > 1:  # before, the transformer is called a few times more
                assert model.passed(start)[-1] == ([wanted] if wanted else [])
            for place, (name, step) in enumerate(places.items()):
                close(found[place : place + 1], expected[name][0][step])
        by_run = {}
        for each in cache.decisions:
            by_run.setdefault(each.run, []).append(each.reuse)
        assert sorted(by_run.values()) == sorted(told for _, told in expected.values())
        assert cache.stats.bytes_held == 0


def run_of(cache, sort=True):
    """The decisions of each sample: whether it reused, in order, by branch."""
    found = {}
    for each in cache.decisions:
        found.setdefault((each.run, each.branch), []).append(each.reuse)
    return sorted(found.values()) if sort else [found[key] for key in sorted(found)]


@ways
def test_samples_of_a_batch(way):
    """All at the same step, without a word of requests."""
    model, expected, start = Small(), expected_of(way), WAYS[way][1]
    with torch.no_grad(), dit_cache(model, each_of(way)) as cache:
        for step in range(STEPS):
            model.passed(start)
            with timestep_scope(step, steps=STEPS):
                found = model(torch.cat([path(name)[step] for name in SPEEDS]), time(step, len(SPEEDS)))
            wanted = sum(not told[step] for _, told in expected.values())
            if step:
                assert model.passed(start)[-1] == ([wanted] if wanted else [])
            for place, name in enumerate(SPEEDS):
                close(found[place : place + 1], expected[name][0][step])
        assert run_of(cache) == sorted(told for _, told in expected.values())
        assert cache.stats.calls == STEPS * len(SPEEDS)
        assert cache.stats.bytes_held == 0


def prompts():
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))


@ways
@pytest.mark.parametrize("batched", [False, True])
def test_samples_with_guidance(way, batched):
    """By two calls each sample has two branches; batched, both of its rows decide for themselves."""
    model, (with_it, without) = Small(), prompts()
    expected = {part: expected_of(way, prompt=each[None]) for part, each in enumerate((with_it, without))}
    count = len(SPEEDS)
    given = [with_it.expand(count, -1).clone(), without.expand(count, -1).clone()]
    with torch.no_grad(), dit_cache(model, each_of(way)) as cache:
        for step in range(STEPS):
            x = torch.cat([path(name)[step] for name in SPEEDS])
            with timestep_scope(step, steps=STEPS):
                if batched:
                    found = model(torch.cat([x, x]), time(step, 2 * count), torch.cat(given)).split(count)
                else:
                    found = [model(x, time(step, count), each) for each in given]
            for part in (0, 1):
                for place, name in enumerate(SPEEDS):
                    close(found[part][place : place + 1], expected[part][name][0][step])
        told = [told for part in (0, 1) for _, told in expected[part].values()]
        assert run_of(cache) == sorted(told)


def each_of(way, **more):
    policy, start, _ = WAYS[way]
    return DitCacheConfig(cache_block_start=start, policy=by_each(policy), **more)


def by_each(policy):
    if isinstance(policy, Mask):
        return replace(policy, dynamic=replace(policy.dynamic, reduce="each"))
    return replace(policy, reduce="each")


LOOKING = {
    "threshold": Threshold(0.15, max_warmup_steps=2),
    "rate": EasyCache(0.2, max_warmup_steps=2),
    "budget": Budget(1.6, max_warmup_steps=2),
    "one for both": Threshold(0.15, max_warmup_steps=2, separate_branches=False),
}


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("name", LOOKING)
def test_a_sample_is_what_it_is_alone(name, guidance):
    """Its decisions, their reasons and the numbers by which they were made; of steps that a timestep argument tells."""
    policy, more = LOOKING[name], {"cache_block_start": 1, "predictor": Linear()}
    given = [each[None] for each in prompts()] if guidance else [None]

    def run(config, names):
        outputs, count = [], len(names)
        repeated = [None if each is None else each.expand(count, -1).clone() for each in given]
        with torch.no_grad(), dit_cache(model := Small(), config, calls_per_step=len(given), steps=STEPS) as cache:
            for step in range(STEPS):
                x = torch.cat([path(each)[step] for each in names])
                outputs.append([model(x, time(step, count), each) for each in repeated])
            by_run = {}
            for each in cache.decisions:
                by_run.setdefault(each.run, []).append((each.step, each.branch, each.reuse, each.reason, each.value))
            return outputs, [by_run[key] for key in sorted(by_run)]

    together, told = run(DitCacheConfig(policy=by_each(policy), **more), list(SPEEDS))
    for place, each in enumerate(SPEEDS):
        alone, (own,) = run(DitCacheConfig(policy=policy, **more), [each])
        assert told[place] == own
        for found, wanted in zip(together, alone, strict=True):
            for one, other in zip(found, wanted, strict=True):
                close(one[place : place + 1], other)
    assert len({tuple(entry[2] for entry in each) for each in told}) > 1


def test_the_time_is_the_batchs():
    """Where a timestep argument tells the steps, lines through two residuals are lines in time."""
    times = (1.0, 0.9, 0.5, 0.4, 0.1)
    policy = Mask((1, 1, 0, 0, 0), dynamic=Threshold(1e9, max_warmup_steps=0, reduce="each"))
    model, x = Small(), path("slow")[0]
    with torch.no_grad(), dit_cache(model, DitCacheConfig(policy=policy, predictor=Linear())):
        found = [model(torch.cat([x, x]), torch.full((2,), each)) for each in times]
    plain = Small()
    with torch.no_grad():
        first, second = (plain(x, torch.full((1,), each)) - 0.5 * x for each in times[:2])
        for output, now in zip(found[2:], times[2:], strict=True):
            share = (now - 1.0) / (0.9 - 1.0)
            wanted = 0.5 * x + first + share * (second - first)
            torch.testing.assert_close(output, torch.cat([wanted, wanted]), rtol=1e-4, atol=1e-4)


def test_the_device_is_read_once_for_the_batch(monkeypatch):
    reads, items, plain = [], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or plain(self))
    once = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: items.append(1) or once(self))
    policy = Threshold(1e9, max_warmup_steps=1, reduce="each")
    with torch.no_grad(), dit_cache(model := Small(), DitCacheConfig(policy=policy)):
        for step in range(4):
            reads.clear()
            items.clear()
            with timestep_scope(step, steps=9):
                model(torch.cat([path(name)[step] for name in SPEEDS]), time(step, 4))
            if step > 1:  # at step 1, whether the residuals are finite is read, too
                assert reads == [(4,)]
                assert not items


def test_a_batch_of_another_size_reuses_nothing():
    """Which of its samples are which is not known; nor is it after that."""
    policy, told = Threshold(1e9, max_warmup_steps=1, reduce="each"), []
    with torch.no_grad(), dit_cache(model := Small(), DitCacheConfig(policy=policy)) as cache:
        for step, count in enumerate((3, 3, 2, 2, 3, 3)):
            with timestep_scope(step, steps=9):
                model(torch.cat([path(name)[step] for name in list(SPEEDS)[:count]]), time(step, count))
            told.append([each.reason for each in cache.decisions][-count:])
    assert [set(each) for each in told[:4]] == [{"warm-up"}, {"reuse"}, {"shape"}, {"reuse"}]
    assert not {"reuse"} & set(told[4])


def test_a_run_that_begins_again_or_was_broken_off_reuses_nothing_of_the_one_before():
    policy = Threshold(1e9, max_warmup_steps=1, reduce="each")
    with torch.no_grad(), dit_cache(model := Small(), DitCacheConfig(policy=policy)) as cache:

        def call(step):
            with timestep_scope(step, steps=9):
                model(torch.cat([path(name)[step] for name in SPEEDS]), time(step, 4))
            return {each.reason for each in list(cache.decisions)[-4:]}

        assert [call(step) for step in (0, 1, 0, 1)] == [{"warm-up"}, {"reuse"}] * 2
        block = model.blocks[2]
        handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(0)
        handle.remove()
        assert call(1) == {"warm-up"}
        held = cache.stats.bytes_held
        assert held > 0
        call(0)
        assert cache.stats.bytes_held == held


def test_one_sample():
    model, expected = Small(), by_threshold(path("in turns"), 0.15, 2)
    with torch.no_grad(), dit_cache(model, each_of("threshold")) as cache:
        for step, x in enumerate(path("in turns")):
            with timestep_scope(step, steps=STEPS):
                close(model(x, time(step)), expected[0][step])
        assert [each.reuse for each in cache.decisions] == expected[1]


def test_plans_and_policies_that_look_in_one_batch():
    """Attached with one that looks: a request with a mask is decided by that."""
    mask, model = (1, 1, 0, 0, 1, 0, 0, 1, 0, 0), Small()
    expected = by_threshold(path("in turns"), 0.15, 2, 1)[1]
    with torch.no_grad(), dit_cache(model, config_of("blocks before")) as cache:
        cache.request("masked", plan=DitCacheConfig(cache_block_start=1, policy=Mask(mask)), steps=STEPS)
        cache.request("looks", steps=STEPS)
        assert cache.forecast("looks") == (1.0,) * STEPS
        for step in range(STEPS):
            with cache.rows([("looks", step), ("masked", step)]):
                model(torch.cat([path("in turns")[step]] * 2), time(step, 2))
        assert run_of(cache) == sorted([expected, [not bit for bit in mask]])


def test_rows_of_a_request_that_decide_together():
    """The first row of a step decides for the others of its request."""
    policy = Threshold(0.15, max_warmup_steps=2, separate_branches=False)
    model, expected = Small(), by_threshold(path("in turns"), 0.15, 2)[1]
    with torch.no_grad(), dit_cache(model, DitCacheConfig(policy=policy)) as cache:
        cache.request("x", steps=STEPS)
        for step in range(STEPS):
            with cache.rows([Row("x", step), Row("x", step)]):
                model(torch.cat([path("in turns")[step], path("fast")[step]]), time(step, 2))
        told = [each.reuse for each in cache.decisions]
    assert told[::2] == told[1::2] == expected


def test_what_the_model_adds_between_blocks():
    class Adding(Small):
        def forward(self, hidden_states, timestep, control):
            h, temb = 0.5 * hidden_states, 0.1 * timestep[:, None].expand(-1, WIDTH)
            for block in self.blocks:
                h = block(h, temb) + control
            return h

    model, limit = Adding(), 0.15
    with torch.no_grad(), dit_cache(model, each_of("threshold")) as cache:
        kept, told = {}, []
        for step in range(STEPS):
            controls = {name: 0.1 * path(name, 1)[step] for name in SPEEDS}
            with timestep_scope(step, steps=STEPS, branch=0):  # controls change as much as prompts do
                x = torch.cat([path(name)[step] for name in SPEEDS])
                found = model(x, time(step, 4), torch.cat(list(controls.values())))
            for place, name in enumerate(SPEEDS):
                h_in = 0.5 * path(name)[step]
                reuse = step >= 2 and change(h_in, kept[name][1]) < limit
                if not reuse:
                    delta, h = 0, h_in
                    for block in Small().blocks:
                        out = block(h, 0.1 * time(step)[:, None].expand(-1, WIDTH))
                        delta, h = delta + (out - h), out + controls[name]
                    kept[name] = delta, h_in
                wanted = h_in + kept[name][0] + DEPTH * controls[name]
                torch.testing.assert_close(found[place : place + 1], wanted, rtol=1e-5, atol=1e-5)
                told.append((step, reuse))
        assert sorted((each.step, each.reuse) for each in cache.decisions) == sorted(told)
    assert len({reuse for _, reuse in told}) == 2


@pytest.mark.parametrize("how", ["mean", "max", "each"])
def test_rows_decide_for_themselves_whatever_reduce_says(how):
    model, expected = Small(), expected_of("threshold")
    with torch.no_grad(), dit_cache(model, DitCacheConfig(policy=replace(WAYS["threshold"][0], reduce=how))) as cache:
        for step in range(STEPS):
            with cache.rows([(name, step) for name in SPEEDS]):
                model(torch.cat([path(name)[step] for name in SPEEDS]), time(step, len(SPEEDS)))
        assert run_of(cache) == sorted(told for _, told in expected.values())


@pytest.mark.parametrize("way", ["blocks before", "rate"])
@pytest.mark.parametrize("case", ["inference mode", "untested", "updated", "a request", "in threads"])
def test_samples_wherever_calls_are_cached(way, case):
    model, expected = Small(), expected_of(way)

    def draw():
        with torch.inference_mode() if case == "inference mode" else torch.no_grad():
            for step in range(STEPS):
                with timestep_scope(step, steps=STEPS):
                    found = model(torch.cat([path(name)[step] for name in SPEEDS]), time(step, len(SPEEDS)))
                for place, name in enumerate(SPEEDS):
                    close(found[place : place + 1], expected[name][0][step])

    with dit_cache(model, config_of(way) if case == "updated" else each_of(way), verify=case != "untested") as cache:
        if case == "updated":
            cache.update(each_of(way))
        if case == "a request":
            with cache.request():
                draw()
        elif case == "in threads":
            with ThreadPoolExecutor(2) as pool:
                for each in [pool.submit(draw), pool.submit(draw)]:
                    each.result()
        else:
            draw()
        assert run_of(cache) == sorted([told for _, told in expected.values()] * (1 + (case == "in threads")))


class Writing(Scaled):
    def forward(self, hidden_states, temb):
        return hidden_states.copy_(super().forward(hidden_states, temb))


@pytest.mark.parametrize("way", ["threshold", "rate"])
def test_blocks_that_write_into_what_they_are_given(way):
    """What samples are compared with is a copy."""
    model, expected = Small(), expected_of(way)
    model.blocks = torch.nn.ModuleList(Writing(seed) for seed in range(DEPTH))
    with torch.no_grad(), dit_cache(model, each_of(way)) as cache:
        for step in range(STEPS):
            with timestep_scope(step, steps=STEPS):
                found = model(torch.cat([path(name)[step] for name in SPEEDS]), time(step, len(SPEEDS)))
            for place, name in enumerate(SPEEDS):
                close(found[place : place + 1], expected[name][0][step])
        assert run_of(cache) == sorted(told for _, told in expected.values())


def test_guidance_on_part_of_the_steps():
    """The second branch begins later, ends earlier, and is none of the first one's."""
    model, (with_it, without) = Small(), prompts()
    policy = Threshold(1e9, max_warmup_steps=1, reduce="each")
    given = [each.expand(2, -1).clone() for each in (with_it, without)]
    x, plain = torch.cat([path("slow")[0], path("fast")[0]]), Small()
    with torch.no_grad(), dit_cache(model, DitCacheConfig(policy=policy)) as cache:
        for step in range(6):
            parts = (0, 1) if 2 <= step < 4 else (0,)
            for part in parts:
                with timestep_scope(step, steps=6):
                    found = model(x, time(step, 2), given[part])
                began = 0 if part == 0 else 2  # and what was computed there is reused
                wanted = plain(x, time(began, 2), given[part])
                close(found, wanted)
        assert [each.reuse for each in cache.decisions].count(False) == 4


def test_a_call_that_leaves_the_range_out():
    class Skipping(Small):
        def forward(self, hidden_states, timestep, skips=False):
            return hidden_states if skips else super().forward(hidden_states, timestep)

    model, policy = Skipping(), Threshold(1e9, max_warmup_steps=1, reduce="each")
    with torch.no_grad(), dit_cache(model, DitCacheConfig(policy=policy)) as cache:
        for step, skips in enumerate((False, False, True, False)):
            with timestep_scope(step, steps=9, branch=0):
                model(torch.cat([path("slow")[step], path("fast")[step]]), time(step, 2), skips)
        told = [{each.reason for each in cache.decisions if each.step == step} for step in range(4)]
    assert told[:2] == [{"warm-up"}, {"reuse"}]
    assert "reuse" not in told[2] | told[3]


def test_two_experts():
    """Each decides for its own steps."""
    pipe, limit = Pipe(Small()), 0.15
    pipe.transformer_2 = Small()
    with torch.no_grad(), dit_cache(pipe, each_of("threshold")) as cache:
        for step in range(STEPS):
            expert = pipe.transformer if step < STEPS // 2 else pipe.transformer_2
            with timestep_scope(step, steps=STEPS):
                found = expert(torch.cat([path(name)[step] for name in SPEEDS]), time(step, len(SPEEDS)))
            for place, name in enumerate(SPEEDS):
                half = slice(0, STEPS // 2) if step < STEPS // 2 else slice(STEPS // 2, STEPS)
                xs, h_in = path(name), 0.5 * path(name)[step]
                kept = None
                for earlier in range(half.start, step + 1):
                    now = 0.5 * xs[earlier]
                    if earlier >= half.start + 2 and change(now, kept[1]) < limit:
                        continue
                    kept = Small()(xs[earlier], time(earlier)) - now, now
                close(found[place : place + 1], h_in + kept[0])
        assert cache.stats.bytes_held == 0


class Pair(torch.nn.Module):
    """Both streams, each of its own."""

    def __init__(self, seed):
        super().__init__()
        self.video, self.audio = Scaled(seed), Scaled(100 + seed)

    def forward(self, hidden_states, audio_hidden_states, temb):
        return self.video(hidden_states, temb), self.audio(audio_hidden_states, temb)


class Film(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Pair(seed) for seed in range(DEPTH))

    def forward(self, hidden_states, audio_hidden_states, timestep):
        temb = 0.1 * timestep[:, None].expand(-1, WIDTH)
        for block in self.blocks:
            hidden_states, audio_hidden_states = block(hidden_states, audio_hidden_states, temb)
        return hidden_states, audio_hidden_states


@pytest.mark.parametrize("policy", [Threshold(0.25, max_warmup_steps=2), EasyCache(0.4, max_warmup_steps=2)], ids=str)
def test_of_several_streams_the_one_that_changes_most_counts(policy):
    """For each sample by itself; the timestep argument tells the steps, and both streams are latents."""
    films = [("slow", "slow"), ("slow", "fast"), ("in turns", "slow"), ("middling", "middling")]

    def run(pairs, reduce):
        outputs, model = [], Film()
        config = DitCacheConfig(policy=replace(policy, reduce=reduce))
        with torch.no_grad(), dit_cache(model, config) as cache:
            for step in range(STEPS):
                video = torch.cat([path(each)[step] for each, _ in pairs])
                audio = torch.cat([path(each, 1)[step] for _, each in pairs])
                outputs.append(model(video, audio, time(step, len(pairs))))
            return outputs, run_of(cache, sort=False)

    together, told = run(films, "each")
    assert len({tuple(each) for each in told}) > 2
    for place, film in enumerate(films):
        alone, (own,) = run([film], "mean")
        assert told[place] == own
        for found, wanted in zip(together, alone, strict=True):
            for one, other in zip(found, wanted, strict=True):
                close(one[place : place + 1], other)


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(match, model, *given, kind=InvalidSetting):
    dit_cache(model, each_of("threshold"))
    with torch.no_grad(), timestep_scope(0, steps=4), pytest.raises(kind, match=match) as caught:
        model(*given)
    assert len(str(caught.value)) <= 300


def test_compiled_code():
    model = Small()
    model.compile(backend="eager")
    refused("reduce='each' does not work with compiled code", model, path("slow")[0], time(0))


def test_a_batch_that_is_folded_into_the_tokens():
    class Folded(Small):
        def forward(self, hidden_states, timestep):
            h = hidden_states.flatten(0, 1)[:, None]
            temb = timestep.repeat_interleave(TOKENS)[:, None].expand(-1, WIDTH)
            for block in self.blocks:
                h = block(h, temb)
            return h.reshape(hidden_states.shape)

    refused("with 2 and 1 rows", Folded(), torch.cat(path("slow")[:2]), time(0, 2), kind=WiringError)


def test_samples_that_are_not_independent():
    class Normed(Small):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states - hidden_states.mean(0, keepdim=True), timestep)

    x = torch.cat([path("slow")[0], path("fast")[0]])
    refused("reduce='each' called it with rows .* not independent", Normed(), x, time(0, 2), kind=WiringError)


def test_latents_that_are_no_batch():
    class Listed(Small):
        def forward(self, hidden_states, timestep):
            return super().forward(torch.cat(hidden_states), timestep)

    refused("the latents, and these are list", Listed(), path("slow")[:2], time(0, 2))


def test_a_payload_that_is_no_residual():
    pipe = Pipe(Small())
    with pytest.raises(InvalidSetting, match="payload='output' leaves"):
        dit_cache(pipe, each_of("threshold", payload="output"))
    with dit_cache(pipe, DitCacheConfig(policy=Mask((1, 0)), payload="output")) as cache:
        plan = DitCacheConfig(policy=Threshold(0.1), payload="output")
        with pytest.raises(InvalidSetting, match="payload='output' does not show"):
            cache.request("x", plan=plan)


def test_plans_that_look_at_something_else():
    told = "EasyCache looks at each row, and Threshold, .* looks at something else"
    with dit_cache(Small(), config_of("threshold")) as cache, pytest.raises(InvalidSetting, match=told) as caught:
        cache.request("x", plan=config_of("rate"))
    assert len(str(caught.value)) <= 300


def test_ranks_that_decide_as_one():
    chain, config = chains_of(Small(), None)[0][0], each_of("threshold")
    with pytest.raises(InvalidSetting, match=r"a process_group was given.*reduce='each'") as caught:
        prepare(chain, config, lambda: None, True, BlockIntegrations(), consensus=SimpleNamespace())
    assert len(str(caught.value)) <= 300


def test_a_profile_of_samples():
    with pytest.raises(InvalidSetting, match="a profile predicts one decision for each call"):
        profile(Small(), lambda: None, each_of("threshold"))
