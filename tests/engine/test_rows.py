"""Rows of one batch that are at different steps of different requests, held against each request by hand, alone."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import Double, Pipe

from dithooks import DitCacheConfig, Fitted, Interval, Linear, Mask, Row, Threshold, dit_cache, timestep_scope
from dithooks.engine import part_decider
from dithooks.engine.batch_parts import is_repeated
from dithooks.errors import InvalidSetting, RunMismatch, WiringError, WrongType
from dithooks.predictors.fitted import BranchWeights

pytestmark = pytest.mark.core

WIDTH, TOKENS, STEPS = 8, 5, 6
MASKS = {"a": (1, 1, 0, 1, 0, 0), "b": (1, 0, 0, 1, 0, 1), "c": (1, 0, 1, 0, 1, 0)}
PLANS = {name: DitCacheConfig(policy=Mask(mask)) for name, mask in MASKS.items()}


class Scaled(torch.nn.Module):
    """Elementwise, so that a row is the same to the last bit in any batch."""

    def __init__(self, seed):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
        self.rows = []  # of each call

    def forward(self, hidden_states, temb, positions=None):
        self.rows.append(len(hidden_states))
        added = torch.sin(hidden_states * self.gain + temb[:, None])
        return hidden_states + (added if positions is None else added * positions)


class Small(torch.nn.Module):
    """A transformer of elementwise blocks, with an addition of the batch's size after each, if it is given one."""

    def __init__(self, depth=4):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Scaled(seed) for seed in range(depth))
        self.calls = []  # sizes of its batches

    def forward(self, hidden_states, timestep, control=None, positions=None):
        self.calls.append(len(hidden_states))
        temb = timestep[:, None].expand(-1, WIDTH)
        h = 0.5 * hidden_states
        for block in self.blocks:
            h = block(h, temb) if positions is None else block(h, temb, positions=positions)
            if control is not None:
                h = h + control
        return torch.tanh(h)

    def passed(self):
        """The rows that have passed each block since the last time this was asked."""
        found = [list(block.rows) for block in self.blocks]
        for block in self.blocks:
            block.rows.clear()
        assert all(each == found[0] for each in found)
        return found[0]


def latents(seed, rows=1):
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def time(step, rows=1):
    return torch.full((rows,), 1 - step / STEPS)


def by_hand(model, x, mask, weights=None, control=None, corrections=None):
    """The latents after each step of one request, from the blocks themselves; Δ̂ as the weights say, else the last Δ."""
    kept, outputs, after, model = [], [], [], Small(len(model.blocks))  # of the same weights, without a cache
    for step, bit in enumerate(mask):
        h = h_in = 0.5 * x
        temb, added = time(step)[:, None].expand(-1, WIDTH), 0
        if bit:
            for block in model.blocks:
                h = block(h, temb)
                if control is not None:
                    h = h + control
                    added += 1
            kept.insert(0, h - h_in)
        else:
            chosen = (1.0,) if weights is None else weights[step]
            h = h_in + sum(w * delta for w, delta in zip(chosen, kept, strict=False))
        output = torch.tanh(h)
        if corrections is not None:
            chosen = corrections[step]
            own = output
            if chosen is not None:
                output = sum(w * each for w, each in zip(chosen, [own, *outputs], strict=False))
            if bit:
                outputs.insert(0, own)
        x = x - output / STEPS
        after.append(x)
    return after


class Loop:
    """A server's loop: each request is at its own step, and rows of a call are in any order."""

    def __init__(self, model, cache, **given):
        self.model, self.cache, self.given, self.x, self.step = model, cache, given, {}, {}

    def add(self, name, seed, **settings):
        self.x[name], self.step[name] = latents(seed), 0
        if settings:
            self.cache.request(name, **{"steps": STEPS, **settings})

    def tick(self, *names, entries=None, **given):
        entries = entries or [(name, self.step[name]) for name in names]
        with torch.no_grad(), self.cache.rows(entries):
            times = torch.cat([time(self.step[name]) for name in names])
            output = self.model(torch.cat([self.x[name] for name in names]), times, **given)
        for name, own in zip(names, output.split(1), strict=True):
            self.x[name] = self.x[name] - own / STEPS
            self.step[name] += 1
        return output


def joining(model, cache, masks, extra=None, settle=True):
    """Requests that begin one step after the other; checks each to the last bit, and the rows of every call."""
    loop, expected = Loop(model, cache), {}
    for number, (name, mask) in enumerate(masks.items()):
        loop.add(name, number, **({"plan": PLANS[name]} if extra is None else extra(name)))
        expected[name] = by_hand(model, latents(number), mask)
    if settle:
        warm_up(model, cache)
    for tick in range(STEPS + len(masks) - 1):
        names = [name for number, name in enumerate(masks) if 0 <= tick - number < STEPS]
        names = names[::-1] if tick % 2 else names
        wanted = sum(masks[name][loop.step[name]] for name in names)
        model.passed()
        loop.tick(*names)
        assert model.passed() == ([wanted] if wanted else [])
        for name in names:
            assert torch.equal(loop.x[name], expected[name][loop.step[name] - 1])


def warm_up(model, cache, rows=3):
    """The first batches, for which the transformer is called more than once."""
    for count in (1, rows):
        requests = [cache.request(steps=STEPS) for _ in range(count)]
        with torch.no_grad(), cache.rows([(request, 0) for request in requests]):
            model(latents(99, count), time(0, count))
        for request in requests:
            request.close()


def test_requests_that_join_and_leave_are_what_they_are_alone_to_the_last_bit():
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        joining(model, cache, MASKS)
        assert cache.stats.bytes_held == 0


def test_so_they_are_from_the_first_batch_on():
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        loop = Loop(model, cache)
        for number, name in enumerate("ab"):
            loop.add(name, number, plan=PLANS[name])
        expected = [by_hand(model, latents(number), MASKS[name]) for number, name in enumerate("ab")]
        for step in range(STEPS):
            loop.tick("a", "b")
            assert torch.equal(loop.x["a"], expected[0][step])
            assert torch.equal(loop.x["b"], expected[1][step])


def test_names_without_a_plan_take_the_caches_own():
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        joining(model, cache, dict.fromkeys(("x", "y"), MASKS["a"]), extra=lambda name: {})


def test_what_a_scheduler_has_is_taken_as_it_is():
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        loop = Loop(model, cache)
        loop.add("x", 0, steps=STEPS)
        expected = by_hand(model, latents(0), MASKS["a"])
        for step in range(STEPS):
            loop.tick("x", entries=[SimpleNamespace(request_id="x", step_index=step)])
            assert torch.equal(loop.x["x"], expected[step])


@pytest.mark.parametrize("named", [False, True])
def test_several_rows_of_one_request(named):
    """With the prompt and without, say: told apart by their order, or by name in any order."""
    model = Small()
    expected = [by_hand(model, latents(seed), MASKS["b"]) for seed in (0, 1)]
    with dit_cache(model, PLANS["b"]) as cache, torch.no_grad():
        request = cache.request(steps=STEPS)
        xs = [latents(0), latents(1)]
        for step in range(STEPS):
            order = [1, 0] if named and step % 2 else [0, 1]
            rows = [Row(request, step, branch="ab"[each] if named else None) for each in order]
            with cache.rows(rows):
                output = model(torch.cat([xs[each] for each in order]), time(step, 2))
            for each, own in zip(order, output.split(1), strict=True):
                xs[each] = xs[each] - own / STEPS
            assert torch.equal(xs[0], expected[0][step])
            assert torch.equal(xs[1], expected[1][step])


def test_guidance_by_two_calls_of_several_requests():
    model = Small()
    expected = {
        (name, part): by_hand(model, latents(10 * n + part), MASKS[name])
        for n, name in enumerate("ab")
        for part in (0, 1)
    }
    with dit_cache(model, PLANS["a"]) as cache, torch.no_grad():
        for name in "ab":
            cache.request(name, plan=PLANS[name], steps=STEPS)
        xs = {(name, part): latents(10 * n + part) for n, name in enumerate("ab") for part in (0, 1)}
        for step in range(STEPS):
            for part in (0, 1):
                with cache.rows([(name, step) for name in "ab"]):
                    output = model(torch.cat([xs[name, part] for name in "ab"]), time(step, 2))
                for name, own in zip("ab", output.split(1), strict=True):
                    xs[name, part] = xs[name, part] - own / STEPS
                    assert torch.equal(xs[name, part], expected[name, part][step])


def test_halves_of_a_guided_batch_have_the_same_weights_as_rows():
    """The two rows of a request with guidance are what the halves of its own batch are; a third is another's."""
    model = Small()
    branches = [
        BranchWeights(
            (None, None, (1.5, -0.5), None, (2.0, 0.5), (1.25,)), (None, None, None, (1.5, -0.75), None, None)
        ),
        BranchWeights((None, None, (0.5, 0.25), None, (1.0, 1.5), (0.5,)), (None, None, None, (0.5, 0.25), None, None)),
    ]
    own = Fitted(branches[0].coefficients, corrections=branches[0].corrections, branches=branches, in_batch=True)
    plan = DitCacheConfig(policy=Mask((1, 1, 0, 1, 0, 0)), predictor=own)
    drawn = {}
    for kind in ("alone", "among others", "of one branch"):
        x, given = latents(0), plan
        if kind == "of one branch":
            given = DitCacheConfig(policy=plan.policy, predictor=Fitted(own.coefficients, corrections=own.corrections))
        with dit_cache(model, given) as cache, torch.no_grad():
            cache.request("guided", plan=given, steps=STEPS)
            cache.request("other", plan=PLANS["c"], steps=STEPS)
            for step in range(STEPS):
                many = kind == "among others"
                rows = [("guided", step)] * 2 + [("other", step)]
                with cache.rows(rows) if many else timestep_scope(step, steps=STEPS):
                    output = model(torch.cat([x, x, latents(1)] if many else [x, x]), time(step, 2 + many))
                x = x - (3 * output[:1] - 2 * output[1:2]) / STEPS
        drawn[kind] = x
    torch.testing.assert_close(drawn["alone"], drawn["among others"], rtol=1e-6, atol=1e-6)
    assert (drawn["alone"] - drawn["of one branch"]).abs().max() > 0.01


GUIDED = Fitted(
    (None, None, (1.5, -0.5), None, (2.0, 0.5), (1.25,)),
    corrections=(None, None, None, (0.75, 0.125), None, None),
    branches=(
        BranchWeights(
            (None, None, (2.0, -1.0), None, (0.5, 0.5), (0.75,)), (None, None, None, (1.5, -0.75), None, None)
        ),
        BranchWeights((None, None, (0.5, 0.25), None, (1.0, 1.5), (0.5,)), (None, None, None, (0.5, 0.25), None, None)),
    ),
    in_batch=True,
)


def drawn_by_rows(pictures, calls, plan=GUIDED, payload="residual"):
    """The latents after each step of the rows of one request, in calls with so many rows each."""
    model, xs, after = Small(), [latents(each) for each in pictures], []
    config = DitCacheConfig(policy=Mask(MASKS["a"]), predictor=plan, payload=payload)
    with dit_cache(model, config) as cache, torch.no_grad():
        cache.request("pictures", steps=STEPS)
        for step in range(STEPS):
            outputs, first = [], 0
            for count in calls:
                with cache.rows([("pictures", step)] * count):
                    outputs += model(torch.cat(xs[first : first + count]), time(step, count)).split(1)
                first += count
            xs = [x - own / STEPS for x, own in zip(xs, outputs, strict=True)]
            after.append(xs)
    return model, after


@pytest.mark.parametrize("calls", [[2], [1, 1]])
def test_two_pictures_of_one_request_are_no_halves_of_a_guided_batch(calls):
    """In one call, or in two, they have the weights and corrections for all."""
    model, after = drawn_by_rows([0, 1], calls)
    for number in (0, 1):
        wanted = by_hand(model, latents(number), MASKS["a"], GUIDED.coefficients, corrections=GUIDED.corrections)
        for found, each in zip(after, wanted, strict=True):
            torch.testing.assert_close(found[number], each, rtol=1e-6, atol=1e-6)


def test_rows_of_two_calls_are_no_parts_though_their_latents_are_the_same():
    """Which of them is which part is not known: they have the weights for all, as calls without rows have."""
    model, after = drawn_by_rows([0, 0], [1, 1])
    wanted = by_hand(model, latents(0), MASKS["a"], GUIDED.coefficients, corrections=GUIDED.corrections)
    for found, each in zip(after, wanted, strict=True):
        for own in found:
            torch.testing.assert_close(own, each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("payload", ["residual", "output"])
def test_a_guided_batch_of_two_pictures_has_the_weights_of_each_half_as_rows(payload):
    """Four rows of one request, of which the last two have the latents of the first two."""

    def guided(model, call):
        pair, after = torch.cat([latents(0), latents(1)]), []
        for step in range(STEPS):
            output = call(step, torch.cat([pair, pair]))
            pair = pair - (3 * output[:2] - 2 * output[2:]) / STEPS
            after.append(pair)
        return after

    model = Small()
    config = DitCacheConfig(policy=Mask(MASKS["a"]), predictor=GUIDED, payload=payload)
    with torch.no_grad():
        outputs, deltas = [], []

        def by_blocks(step, x):
            """Each half by the weights of its branch, from the blocks themselves."""
            temb, h = time(step, 4)[:, None].expand(-1, WIDTH), 0.5 * x
            for block in model.blocks:
                h = block(h, temb)
            kept = deltas if payload == "residual" else outputs
            halves = []
            for half, own in zip((slice(0, 2), slice(2, 4)), GUIDED.branches, strict=True):
                if (weights := own.coefficients[step]) is not None:
                    made = sum(w * each[half] for w, each in zip(weights, kept, strict=False))
                    halves.append(torch.tanh(0.5 * x[half] + made) if payload == "residual" else made)
                else:
                    (first, *more), made = own.corrections[step] or (1.0,), torch.tanh(h)[half]
                    halves.append(first * made + sum(w * each[half] for w, each in zip(more, outputs, strict=False)))
            if GUIDED.coefficients[step] is None:
                deltas.insert(0, h - 0.5 * x)
                outputs.insert(0, torch.tanh(h))
            return torch.cat(halves)

        wanted = guided(model, by_blocks)
        pipe = Pipe(model)
        with dit_cache(pipe, config) as cache:
            cache.request("guided", steps=STEPS)

            def by_rows(step, x):
                with cache.rows([("guided", step)] * 4):
                    return pipe.transformer(x, time(step, 4))

            found = guided(model, by_rows)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rows_of_a_request_are_compared_once_in_its_run(monkeypatch):
    """And not at all where no weights differ."""
    compared = []
    monkeypatch.setattr(part_decider, "is_repeated", lambda *given: compared.append(given) or is_repeated(*given))
    drawn_by_rows([0, 0], [2])
    ((batch, parts),) = compared
    assert (len(batch), parts) == (2, 2)
    compared.clear()
    alike = BranchWeights(GUIDED.coefficients, GUIDED.corrections)
    drawn_by_rows([0, 0], [2], replace(GUIDED, branches=(alike, alike)))
    assert compared == []


def test_latents_that_are_compared_are_not_held_after_the_call():
    model = Small()
    with dit_cache(model, DitCacheConfig(policy=Mask(MASKS["a"]), predictor=GUIDED)) as cache, torch.no_grad():
        for step in range(STEPS - 1):
            batch = torch.cat([latents(0), latents(0)])
            with cache.rows([("guided", step)] * 2):
                model(batch, time(step, 2))
            held = weakref.ref(batch)
            del batch
            gc.collect()
            assert held() is None


def test_weights_and_corrections_are_each_rows_own():
    model = Small()
    weights = {
        "p": (None, None, (1.5, -0.5), None, (0.75, 0.5), (1.25, -0.25)),
        "q": (None, (1.0,), (0.5,), None, (1.5, -0.25), None),
    }
    corrections = {"p": (None, (1.25, -0.25), (0.875, 0.25, 0.0625), (1.5, -0.75, 0.125), None, (0.5, 0.25)), "q": None}
    masks = {name: tuple(int(each is None) for each in weights[name]) for name in weights}
    plans = {
        name: DitCacheConfig(policy=Mask(masks[name]), predictor=Fitted(weights[name], corrections=corrections[name]))
        for name in weights
    }
    expected = {
        name: by_hand(model, latents(n), masks[name], weights[name], corrections=corrections[name])
        for n, name in enumerate(weights)
    }
    with dit_cache(model, PLANS["a"]) as cache:
        loop = Loop(model, cache)
        for number, name in enumerate(weights):
            loop.add(name, number, plan=plans[name])
        loop.tick("p")
        for _ in range(STEPS - 1):
            loop.tick("q", "p")
            for name in weights:
                torch.testing.assert_close(loop.x[name], expected[name][loop.step[name] - 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [2, TOKENS, 6, WIDTH])
def test_a_batch_that_has_the_size_of_something_else(rows):
    """Of tokens, of channels, of the parts of a time: positions of TOKENS×1 are nobody's row."""

    class Parted(Small):
        def forward(self, hidden_states, timestep, ids):
            parts = timestep[:, None, None].expand(-1, 6, WIDTH)
            h = 0.5 * hidden_states
            for block in self.blocks:
                h = block(h, parts.mean(1), positions=1 + ids)
            return h

    model, ids = Parted(), torch.arange(TOKENS, dtype=torch.float32)[:, None]
    plan = DitCacheConfig(policy=Mask((1, 0, 1, 0)))
    xs = latents(3, rows)
    with torch.no_grad(), dit_cache(model, plan) as cache:
        for row in range(rows):
            cache.request(row, steps=4)
        for tick in range(5):  # every other request is a step behind
            members = [row for row in range(rows) if 0 <= tick - row % 2 < 4]
            with cache.rows([Row(row, tick - row % 2) for row in members]):
                found = model(xs[members], torch.cat([time(tick - row % 2) for row in members]), ids)
            for place, row in enumerate(members):
                step = tick - row % 2
                h = 0.5 * xs[row : row + 1]
                temb = time(step - step % 2)[:, None].expand(-1, WIDTH)  # of the step that was computed
                for block in model.blocks:
                    h = Scaled.forward(block, h, temb, positions=1 + ids)
                torch.testing.assert_close(found[place : place + 1], h)


def test_the_rows_of_a_batch_of_that_size_are_still_gathered():
    model, counted = Small(), []
    plan = DitCacheConfig(policy=Mask((1, 0, 1, 0)))
    with torch.no_grad(), dit_cache(model, plan) as cache:
        for row in range(TOKENS):
            cache.request(row, steps=4)
        for tick in range(5):
            members = [row for row in range(TOKENS) if 0 <= tick - row % 2 < 4]
            model.passed()
            with cache.rows([Row(row, tick - row % 2) for row in members]):
                model(latents(3, TOKENS)[members], torch.cat([time(tick - row % 2) for row in members]))
            counted.append(model.passed())
    assert counted[1][-1:] == [2]  # of five rows, those that begin; before, the survey's calls
    assert counted[2:] == [[3], [2], []]


def test_in_inference_mode():
    model = Small()
    with torch.inference_mode(), dit_cache(model, PLANS["a"]) as cache:
        joining(model, cache, MASKS)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_model_adds_between_blocks_is_each_calls_own(in_place):
    class Adding(Small):
        def forward(self, hidden_states, timestep, control):
            temb, h = timestep[:, None].expand(-1, WIDTH), 0.5 * hidden_states
            for block in self.blocks:
                h = block(h, temb)
                h = h.add_(control) if in_place else h + control
            return h

    model, plan = Adding(), DitCacheConfig(policy=Mask((1, 0, 1, 0)))
    controls = {(row, step): latents(50 + 10 * row + step) for row in range(3) for step in range(4)}

    def alone(row):
        outputs = []
        for step in range(4):
            h = 0.5 * latents(row)
            temb = time(step - step % 2)[:, None].expand(-1, WIDTH)
            if step % 2 == 0:
                delta, g = 0, h
                for block in model.blocks:
                    out = Scaled.forward(block, g, temb)
                    delta = delta + (out - g)
                    g = out + controls[row, step]
                outputs.append(g)
            else:
                outputs.append(h + delta + len(model.blocks) * controls[row, step])
        return outputs

    expected = [alone(row) for row in range(3)]
    with torch.no_grad(), dit_cache(model, plan) as cache:
        for row in range(3):
            cache.request(row, steps=4)
        for tick in range(6):
            members = [row for row in range(3) if 0 <= tick - row < 4]
            with cache.rows([Row(row, tick - row) for row in members]):
                found = model(
                    torch.cat([latents(row) for row in members]),
                    torch.cat([time(tick - row) for row in members]),
                    torch.cat([controls[row, tick - row] for row in members]),
                )
            for place, row in enumerate(members):
                torch.testing.assert_close(found[place : place + 1], expected[row][tick - row], rtol=1e-5, atol=1e-5)


class Captioned(torch.nn.Module):
    """Two streams, of pictures and of prompts that are padded to the longest of the batch and masked."""

    def __init__(self, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Masked() for _ in range(depth))

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_mask):
        temb = timestep[:, None].expand(-1, WIDTH)
        h, e = hidden_states, encoder_hidden_states
        for block in self.blocks:
            e, h = block(h, e, temb, encoder_mask)
        return h


class Masked(Double):
    def __init__(self):
        super().__init__(WIDTH)
        self.rows = []

    def forward(self, hidden_states, encoder_hidden_states, temb, mask):
        self.rows.append(len(hidden_states))
        own = mask[..., None].to(hidden_states.dtype)
        mean = ((encoder_hidden_states * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)).expand_as(hidden_states)
        moved = temb[:, None].expand_as(hidden_states)
        h = hidden_states + torch.tanh(self.image(torch.cat([hidden_states, mean, moved], -1)))
        back = h.mean(1, keepdim=True).expand_as(encoder_hidden_states)
        e = encoder_hidden_states + torch.tanh(self.text(torch.cat([encoder_hidden_states, back], -1)))
        return e, h


def padded(values, side="right"):
    width = max(value.shape[1] for value in values)
    spare = [value.new_zeros((1, width - value.shape[1], *value.shape[2:])) for value in values]
    pairs = zip(values, spare, strict=True)
    return torch.cat([torch.cat(pair if side == "right" else pair[::-1], 1) for pair in pairs])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("predictor", ["last", "line"])
def test_prompts_whose_width_changes_as_requests_come_and_go(side, predictor):
    """Padded on the right, residuals are trimmed or padded; on the left they fit nothing, and the rows are computed."""
    model, lengths = Captioned(), (4, 2, 6)
    prompts = [
        latents(70 + n)[:, :1].expand(-1, length, -1).contiguous() + torch.arange(length)[:, None]
        for n, length in enumerate(lengths)
    ]
    masks = [torch.ones(1, length, dtype=torch.long) for length in lengths]
    more = {"predictor": Linear()} if predictor == "line" else {}
    plan = DitCacheConfig(policy=Mask((1, 1, 0, 1, 0, 0)), **more)
    expected = []
    for row in range(3):
        with torch.no_grad(), dit_cache(model, plan) as cache:
            expected.append([])
            request = cache.request(steps=STEPS)
            for step in range(STEPS):
                with cache.rows([Row(request, step, sigma=1 - step / STEPS)]):
                    expected[row].append(model(latents(row) * (step + 1), time(step), prompts[row], masks[row]))
    with torch.no_grad(), dit_cache(model, plan) as cache:
        for row in range(3):
            cache.request(row, sigmas=[1 - step / STEPS for step in range(STEPS)])
        far = []
        for tick in range(STEPS + 2):
            members = [row for row in range(3) if 0 <= tick - row < STEPS]
            with cache.rows([(row, tick - row) for row in members]):
                found = model(
                    torch.cat([latents(row) * (tick - row + 1) for row in members]),
                    torch.cat([time(tick - row) for row in members]),
                    padded([prompts[row] for row in members], side),
                    padded([masks[row] for row in members], side),
                )
            far += [
                float((found[place] - expected[row][tick - row][0]).norm() / expected[row][tick - row].norm())
                for place, row in enumerate(members)
            ]
        reused = cache.stats.reused_calls
    if side == "right":
        assert max(far) < 1e-6
        assert reused == 9
    else:
        assert reused < 9


def test_without_a_mask_another_width_is_computed():
    class Bare(Captioned):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            own = torch.ones(encoder_hidden_states.shape[:2])
            return super().forward(hidden_states, timestep, encoder_hidden_states, own)

    model = Bare()
    with torch.no_grad(), dit_cache(model, DitCacheConfig(policy=Mask((1, 0, 0)))) as cache:
        cache.request("x", steps=3)
        for step, width in enumerate((3, 3, 5)):
            with cache.rows([("x", step)]):
                model(latents(0), time(step), torch.ones(1, width, WIDTH))
        assert [(each.step, each.reason) for each in cache.decisions] == [(0, "mask"), (1, "reuse"), (2, "shape")]


def test_an_exception_ends_what_was_kept_for_its_requests_only():
    model = Small()
    with torch.no_grad(), dit_cache(model, PLANS["c"]) as cache:
        loop = Loop(model, cache)
        for number, name in enumerate("xyz"):
            loop.add(name, number, steps=STEPS)
        loop.tick("x", "y", "z")
        with pytest.raises(KeyboardInterrupt), cache.rows([("x", 1), ("y", 1)]):
            raise KeyboardInterrupt
        loop.tick("x", "y", "z")
        assert [each.reason for each in cache.decisions][-3:] == ["no anchor", "no anchor", "reuse"]


def test_a_step_that_is_left_out_or_made_again_is_computed():
    model = Small()
    with torch.no_grad(), dit_cache(model, PLANS["b"]) as cache:
        cache.request("x", steps=STEPS)
        for step in (0, 2, 1):
            with cache.rows([("x", step)]):
                model(latents(0), time(step))
        assert not any(each.reuse for each in cache.decisions)


def test_a_request_that_is_over_or_forgotten_holds_nothing():
    model = Small()
    with torch.no_grad(), dit_cache(model, PLANS["a"]) as cache:
        loop = Loop(model, cache)
        for number, name in enumerate("xyz"):
            loop.add(name, number, steps=STEPS)
        loop.tick("x", "y", "z")
        loop.tick("x", "y", "z")
        one = cache.stats.bytes_held // 3
        assert cache.stats.bytes_held == 3 * one > 0
        cache.forget("x")
        cache.forget("x")
        gc.collect()
        assert cache.stats.bytes_held == 2 * one
        for _ in range(STEPS - 2):
            loop.tick("y")
        assert cache.stats.bytes_held == one
        loop.tick("z")  # and the name of "y" is free again
        cache.request("y", steps=STEPS)
        with pytest.raises(InvalidSetting, match="'z'"):
            cache.request("z")


def test_a_name_is_kept_until_the_last_call_of_the_last_step():
    """Calls with the prompt of two requests, and then those without: the first one's plan still holds."""
    model, plan = Small(), DitCacheConfig(policy=Mask((1, 1, 0)))
    with torch.no_grad(), dit_cache(model, PLANS["b"]) as cache:
        for name in "xy":
            cache.request(name, plan=plan, steps=3)
        for step in range(3):
            for _ in range(2):
                for name in "xy":
                    with cache.rows([(name, step)]):
                        model(latents(0), time(step))
        assert [each.reuse for each in cache.decisions][-4:] == [True] * 4
        cache.rows([("z", 0)])
        cache.request("x")


def test_a_mixed_batch_holds_what_two_blocks_are_given_at_most():
    """And not the streams of all blocks, until it is over."""
    model, held = Small(8), []
    with torch.no_grad(), dit_cache(model, PLANS["c"]) as cache:
        loop = Loop(model, cache)
        for number, name in enumerate("xy"):
            loop.add(name, number, steps=STEPS)
        warm_up(model, cache)
        loop.tick("x")
        streams = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, output: streams.append(weakref.ref(args[0])))
        model.blocks[7].register_forward_hook(lambda *_: held.append(sum(each() is not None for each in streams)))
        loop.tick("x", "y")
    assert len(streams) == 8
    assert held[0] <= 3


def test_a_model_that_is_not_to_be_tested():
    model = Small()
    cache = dit_cache(model, PLANS["a"], verify=False)
    joining(model, cache, MASKS)
    cache.remove()


def test_a_removed_cache_keeps_no_request():
    model = Small()
    cache = dit_cache(model, PLANS["a"])
    request = cache.request("x", steps=STEPS)
    with torch.no_grad(), cache.rows([("x", 0)]):
        model(latents(0), time(0))
    gone = weakref.ref(request)
    cache.remove()
    del request
    gc.collect()
    assert gone() is None
    with pytest.raises(RunMismatch, match="removed"):
        cache.rows([("x", 0)])


def test_what_the_coming_steps_cost():
    model = Small()
    plan = DitCacheConfig(cache_block_start=1, policy=Mask(MASKS["b"]))
    with torch.no_grad(), dit_cache(model, plan) as cache:
        cache.request("x", steps=STEPS)
        assert cache.forecast("x") == (1.0, 0.25, 0.25, 1.0, 0.25, 1.0)
        for step in (0, 1):
            with cache.rows([("x", step)]):
                model(latents(0), time(step))
        assert cache.forecast("x") == (0.25, 1.0, 0.25, 1.0)
        other = cache.request("y", plan=DitCacheConfig(cache_block_start=1, policy=Interval(1, 3)), steps=8)
        forecast = cache.forecast(other)
        for step in range(8):
            with cache.rows([("y", step)]):
                model(latents(0), time(step))
        assert forecast == tuple(0.25 if each.reuse else 1.0 for each in cache.decisions[-8:])
        assert {0.25, 1.0} == set(forecast)
        assert cache.forecast(other) == ()
        with pytest.raises(InvalidSetting, match="steps=28"):
            cache.forecast(cache.request())
        with pytest.raises(InvalidSetting, match="no request 'z'"):
            cache.forecast("z")


def test_two_ranges_of_one_model():
    class Twofold(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.ModuleList(Scaled(seed) for seed in range(2))
            self.second = torch.nn.ModuleList(Scaled(seed) for seed in range(2, 4))

        def forward(self, hidden_states, timestep):
            h, temb = hidden_states, timestep[:, None].expand(-1, WIDTH)
            for block in self.first:
                h = block(h, temb)
            for block in self.second:
                h = block(h, temb)
            return h

    model = Twofold()
    config = DitCacheConfig(policy=Mask((1, 0, 1, 0)), overrides={"second": {"policy": Mask((1, 1, 0, 0))}})
    masks = {"first": (1, 0, 1, 0), "second": (1, 1, 0, 0)}
    with torch.no_grad(), dit_cache(model, config) as cache:
        kept = {}
        for row in range(2):
            cache.request(row, steps=4)
        for tick in range(5):
            members = [row for row in range(2) if 0 <= tick - row < 4]
            with cache.rows([(row, tick - row) for row in members]):
                found = model(torch.cat([latents(r) for r in members]), torch.cat([time(tick - r) for r in members]))
            for place, row in enumerate(members):
                step, h = tick - row, latents(row)
                for name, mask in masks.items():
                    h_in = h
                    if mask[step]:
                        for block in getattr(model, name):
                            h = Scaled.forward(block, h, time(step)[:, None].expand(-1, WIDTH))
                        kept[name, row] = h - h_in
                    else:
                        h = h_in + kept[name, row]
                torch.testing.assert_close(found[place], h[0])


def test_two_experts_each_with_steps_of_its_own():
    """Rows at early steps go to the one, rows at later steps to the other, whose first step is computed."""
    pipe, mask = Pipe(Small()), (1, 0, 1, 0, 0, 1)
    pipe.transformer_2 = Small(3)
    experts = (pipe.transformer, pipe.transformer_2)
    with torch.no_grad(), dit_cache(pipe, DitCacheConfig(policy=Mask(mask))) as cache:
        kept, xs = {}, [latents(row) for row in range(3)]
        for row in range(3):
            cache.request(row, steps=STEPS)
        for tick in range(STEPS + 2):
            for number, expert in enumerate(experts):
                members = [row for row in range(3) if 3 * number <= tick - row < 3 * number + 3]
                if not members:
                    continue
                with cache.rows([(row, tick - row) for row in members]):
                    found = expert(torch.cat([xs[r] for r in members]), torch.cat([time(tick - r) for r in members]))
                for place, row in enumerate(members):
                    step, h = tick - row, 0.5 * xs[row]
                    if mask[step] or step == 3:
                        for block in Small((4, 3)[number]).blocks:
                            h = block(h, time(step)[:, None].expand(-1, WIDTH))
                        kept[row] = h - 0.5 * xs[row]
                    else:
                        h = h + kept[row]
                    assert torch.equal(found[place : place + 1], torch.tanh(h))
                    xs[row] = xs[row] - torch.tanh(h) / STEPS
        assert cache.stats.bytes_held == 0


def test_the_output_of_a_transformer_row_by_row():
    """The call is made with the rows to be computed, and left out if there are none."""
    pipe = Pipe(model := Small())
    configs = {name: DitCacheConfig(policy=Mask(mask), payload="output") for name, mask in MASKS.items()}

    def alone(seed, mask):
        x, after = latents(seed), []
        for step, bit in enumerate(mask):
            if bit:
                output = model(x, time(step))
            x = x - output / STEPS
            after.append(x)
        return after

    with torch.no_grad():
        expected = {name: alone(n, mask) for n, (name, mask) in enumerate(MASKS.items())}
        with dit_cache(pipe, configs["a"]) as cache:
            loop = Loop(pipe.transformer, cache)
            for number, name in enumerate(MASKS):
                loop.add(name, number, plan=configs[name])
            for tick in range(STEPS + 2):
                names = [name for number, name in enumerate(MASKS) if 0 <= tick - number < STEPS]
                wanted = sum(MASKS[name][loop.step[name]] for name in names)
                model.calls.clear()
                loop.tick(*names)
                if tick > 2:  # before, a call is tried with a few rows
                    assert model.calls == ([wanted] if wanted else [])
                for name in names:
                    assert torch.equal(loop.x[name], expected[name][loop.step[name] - 1])
            assert cache.stats.bytes_held == 0


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(match, entries=(("x", 0), ("y", 0)), model=None, config=None, kind=InvalidSetting, call=None, rows=2):
    model = model or Small()
    cache = dit_cache(model, config or PLANS["a"])
    with torch.no_grad(), pytest.raises(kind, match=match) as caught, cache.rows(entries):
        (call or model)(latents(0, rows), time(0, rows))
    assert len(str(caught.value)) <= 300
    return str(caught.value)


def test_another_number_of_rows():
    refused(r"names 2 rows, and the latents are \[3, 5, 8\]", rows=3)
    refused("there are none", entries=[])


def test_entries_that_are_no_rows():
    refused("is no row", entries=["x", "y"], kind=WrongType)
    refused("step=-1", entries=[("x", -1), ("y", 0)])
    refused("cannot be looked up", entries=[([], 0), ("y", 0)], kind=WrongType)
    with dit_cache(Small(), PLANS["a"]) as cache:
        cache.request("x", steps=3)
        with pytest.raises(InvalidSetting, match="step=3 is not one of the 3"):
            cache.rows([("x", 3)])


def test_a_policy_that_looks():
    """Where the cache was attached with one that does not, nothing is there to see."""
    told = "Threshold looks at each row, and Mask, .* does not look"
    with dit_cache(Small(), PLANS["a"]) as cache, pytest.raises(InvalidSetting, match=told) as caught:
        cache.request("x", plan=DitCacheConfig(policy=Threshold(0.1)))
    assert len(str(caught.value)) <= 300


def test_a_plan_of_other_blocks():
    with dit_cache(Small(), PLANS["a"]) as cache:
        with pytest.raises(InvalidSetting, match=r"caches other blocks of blocks than blocks.0 … blocks.3"):
            cache.request("x", plan=DitCacheConfig(cache_block_start=1, policy=Mask("fast")))
        with pytest.raises(WrongType, match="must be a DitCacheConfig, a CachePlan, a policy"):
            cache.request("x", plan=3.0)


def test_a_plan_of_another_model():
    with dit_cache(Small(), PLANS["a"]) as cache, pytest.raises(InvalidSetting, match="made for another model"):
        cache.request("x", plan=DitCacheConfig(policy=Mask("fast"), fingerprint="0123456789abcdef"))


def test_two_ranges_that_would_correct_one_output():
    class Twofold(Small):
        def __init__(self):
            super().__init__()
            self.others = torch.nn.ModuleList(Scaled(seed) for seed in range(2))

        def forward(self, hidden_states, timestep):
            h, temb = hidden_states, timestep[:, None].expand(-1, WIDTH)
            for block in (*self.blocks, *self.others):
                h = block(h, temb)
            return h

    apart = {"others": {"cache_step_interval": 3, "cache_step_start": 1}}
    fitted = Fitted((None, (1.0,)), corrections=((0.5,), None))
    plan = DitCacheConfig(policy=Mask((1, 0)), predictor=fitted, overrides=apart)
    cache = dit_cache(Twofold(), DitCacheConfig(policy=Mask((1, 0)), overrides=apart))
    with pytest.raises(InvalidSetting, match="correct"):
        cache.request("x", plan=plan)


def test_compiled_code():
    model = Small()
    model.compile(backend="eager")
    refused("does not work with compiled code", model=model)


def test_rows_that_are_mixed_by_a_block():
    class Normed(Small):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states - hidden_states.mean(0, keepdim=True), timestep)

    refused("its rows are not independent", model=Normed(), kind=WiringError)


def test_an_output_without_rows():
    class Mean(Small):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, timestep).flatten(0, 1)

    refused("does not hold 2 rows", model=Mean(), kind=WiringError)


def test_a_batch_that_is_folded_into_the_tokens():
    class Folded(Small):
        def forward(self, hidden_states, timestep):
            h = hidden_states.flatten(0, 1)[:, None]
            temb = timestep.repeat_interleave(TOKENS)[:, None].expand(-1, WIDTH)
            for block in self.blocks:
                h = block(h, temb)
            return h.reshape(hidden_states.shape)

    text = refused("with 2 and 1 rows", model=Folded(), kind=WiringError)
    assert "blocks.0: hidden_states is [10, 1, 8] and [5, 1, 8]" in text


def test_blocks_that_run_without_their_transformer():
    model = Small()

    def function(h, t):
        for block in model.blocks:
            h = block(h, t[:, None].expand(-1, WIDTH))
        return h

    refused("has to see the transformer's call", model=model, call=function)


def test_a_request_that_is_in_use():
    model = Small()
    with torch.no_grad(), dit_cache(model, PLANS["a"]) as cache:
        request, planned = cache.request(), cache.request(plan=PLANS["b"], steps=STEPS)
        with request, pytest.raises(RunMismatch, match="entered already"), cache.rows([(request, 0)]):
            pass
        with cache.rows([(request, 0)]), pytest.raises(RunMismatch, match="entered already"), request:
            pass
        with pytest.raises(RunMismatch, match="plan of its own"), planned:
            pass
        request.close()
        with pytest.raises(RunMismatch, match="was closed"), cache.rows([(planned, 0), (request, 0)]):
            pass
        with cache.rows([(planned, 0)]):  # given back
            model(latents(0), time(0))


def test_a_batch_without_rows_is_one_run_as_ever():
    model = Small()
    with torch.no_grad(), dit_cache(model, PLANS["a"]) as cache:
        warm_up(model, cache)
        before = cache.stats.calls
        for step in range(STEPS):
            model(latents(0, 2), time(step, 2))
        assert cache.stats.calls - before == STEPS
