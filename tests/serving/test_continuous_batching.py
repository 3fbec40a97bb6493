"""The example server that batches by step: whose turn it is, and that all get their own picture or are told why not."""

import random
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("diffusers")

from dithooks import CachePlan, DitCacheConfig, Mask, PlanTiers, TargetMissed, dit_cache, handle_of
from dithooks.blocks.block_lists import fingerprint
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import load_pipeline
from dithooks.errors import InvalidSetting
from dithooks.recording.record import recordable
from examples.continuous_batching import DeadlineExceeded, EmojiSteps, Overloaded, StepServer, choose, main

STEPS = 6
MASKS = {"slow": (1, 1, 0, 1, 0, 1), "fast": (1, 0, 0, 0, 1, 0)}
PLANS = {name: DitCacheConfig(policy=Mask(mask)) for name, mask in MASKS.items()}
WAIT = 60  # seconds: whoever waits so long has been forgotten


@dataclass(eq=False)
class Waits:
    """A request by hand: ``costs`` of its steps to come."""

    name: str
    costs: list[int]
    passed_over: int = 0
    worst: int = 0

    @property
    def computes(self):
        return bool(self.costs[0])


def names(chosen):
    return "".join(each.name for each in chosen)


def waiting(**costs):
    return [Waits(name, [cost]) for name, cost in costs.items()]


# -- whose step it is ----------------------------------------------------------------------------------------------


def test_a_full_batch_is_computed_the_oldest_first():
    assert names(choose(waiting(a=1, b=0, c=1, d=1), 2, 4)) == "ac"


def test_reused_steps_are_made_while_no_batch_is_full_and_all_at_once():
    assert names(choose(waiting(a=1, b=0, c=0, d=0), 2, 4)) == "bcd"


def test_what_computes_goes_on_when_there_is_nothing_to_reuse():
    assert names(choose(waiting(a=1), 2, 4)) == "a"
    assert choose([], 2, 4) == []


def test_who_was_passed_over_too_often_comes_first():
    active = waiting(a=1, b=1, c=1, d=0, e=1)
    active[4].passed_over = 3
    assert names(choose(active, 2, 4)) == "ab"
    active[4].passed_over = 4
    assert names(choose(active, 2, 4)) == "ea"
    active[3].passed_over = 5
    assert names(choose(active, 2, 4)) == "d"


@pytest.mark.parametrize("seed", range(20))
def test_nobody_waits_for_ever(seed):
    """Among many that come and go, with plans at random: not longer than is promised, and every step is made once."""
    rng = random.Random(seed)
    most, batch, patience = rng.randrange(1, 30), rng.randrange(1, 9), rng.randrange(1, 6)
    active, worst, made, asked = [], 0, 0, 0
    for _ in range(600):
        while len(active) < most and rng.random() < 0.7:
            costs = [int(rng.random() < 0.5) for _ in range(rng.randrange(1, 20))]
            asked += len(costs)
            active.append(Waits("x", costs))
        chosen = choose(active, batch, patience)
        assert bool(chosen) == bool(active)
        assert len({each.computes for each in chosen}) <= 1
        assert sum(each.computes for each in chosen) <= batch
        for each in active:
            worst = max(worst, each.passed_over)
            each.passed_over += 1
        for each in chosen:
            each.passed_over = 0
            each.costs.pop(0)
            made += 1
        active = [each for each in active if each.costs]
    assert made + sum(len(each.costs) for each in active) == asked
    assert worst <= patience + most / batch + 1


# -- the pictures --------------------------------------------------------------------------------------------------


class Watched(EmojiSteps):
    """Does what it was told to before the n-th call; notes the steps of each."""

    def __init__(self, pipe, deeds):
        super().__init__(pipe, "latent")
        self.deeds, self.calls = deeds, []

    def step(self, drawings, steps):
        self.calls.append(list(steps))
        self.deeds.get(len(self.calls), lambda: None)()
        super().step(drawings, steps)


@pytest.fixture(scope="module")
def whole():
    """The pipeline that ships."""
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def pipe():
    """With few of its blocks, where it matters not what is drawn."""
    loaded = load_pipeline()
    del loaded.transformer.transformer_blocks[1:], loaded.transformer.single_transformer_blocks[2:]
    return loaded


def tiers(pipe):
    """The same schedules as a file of tiers, with promises that are made up."""
    chains, made = recordable(pipe.transformer, None), {}
    count = len(chains[0].block_refs)
    target = PlanTarget("Emoji", fingerprint(chains), count, "float32", STEPS, None, (64, 48))
    for name, mask in MASKS.items():
        weights = tuple(None if computed else (1.0,) for computed in mask)
        found = Provenance("2026-11-30", {}, "CPU", 1, 2.0, "by hand", 6 / sum(mask), 0.01, psnr=10.0 * sum(mask))
        made[name] = CachePlan((TransformerPlan("", 0, count, count, mask, weights, None),), target, found)
    return PlanTiers(made)


def alone(pipe, prompt, seed, tier):
    with dit_cache(pipe, PLANS[tier]):
        noise = torch.Generator().manual_seed(seed)
        return pipe(prompt, num_inference_steps=STEPS, generator=noise, output_type="latent").images


def test_each_picture_is_that_of_its_own_run_alone(whole):
    """Requests of two tiers join while others are drawn, and two are cancelled: at a step, and in the queue."""
    asked = {}

    def ask(prompt, seed, tier):
        asked[prompt, seed, tier] = server.submit(prompt, seed, tier=tier, steps=STEPS)

    def cancel(*which):
        assert asked[which].cancel()

    first, second = [("penguin", 1, "slow"), ("rocket", 2, "fast")], [("taxi", 3, "slow")]
    gone, unseen = ("watermelon", 5, "slow"), ("rainbow", 6, "fast")
    deeds = {
        2: lambda: [ask(*which) for which in (*second, gone, unseen)],
        3: lambda: cancel(*unseen),
        9: lambda: cancel(*gone),
        7: lambda: ask("rocket", 7, "slow"),
    }
    server = StepServer(Watched(whole, deeds), tiers(whole), "slow", batch=2, max_active=4)
    with server:
        with server._changed:  # both are there when the first tick begins
            for which in first:
                ask(*which)
        pictures = {}
        while len(pictures) < len(asked):
            for which, future in list(asked.items()):
                try:
                    pictures[which] = future.result(WAIT)
                except CancelledError:
                    pictures[which] = None
        assert server.cache.stats.bytes_held == 0
    assert {which for which, picture in pictures.items() if picture is None} == {gone, unseen}
    for which, picture in pictures.items():
        if picture is not None:
            reference = alone(whole, *which)
            assert (picture - reference).norm() <= 1e-6 * reference.norm(), which
    counts = server.counts
    assert (counts.drawn, counts.cancelled, counts.failed) == (4, 2, 0)
    assert any(len(set(steps)) > 1 for steps in server.drawer.calls), "all were in step"
    drawn = sum(sum(MASKS[tier]) for (_, _, tier), picture in pictures.items() if picture is not None)
    assert drawn < counts.computed < drawn + sum(MASKS["slow"])  # some steps of the one that was cancelled
    assert counts.steps == sum(map(len, server.drawer.calls))


def test_blocks_run_on_the_rows_that_plans_compute(pipe):
    """Of each request two rows a step; the first calls, by which the cache learns, are over."""
    passed = []
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    with StepServer(EmojiSteps(pipe, "latent"), tiers(pipe), "slow", batch=2, max_active=4) as server:
        for future in [server.submit("taxi", seed, steps=STEPS) for seed in range(2)]:
            future.result(WAIT)
        hooks = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: passed.append((args[0] if args else kwargs["hidden_states"]).shape[0]),
                with_kwargs=True,
            )
            for block in blocks
        ]
        before = server.counts.computed
        asked = ("slow", "fast", "fastest at ≥ 20 dB", "fastest at ≥ 40 dB")
        for future in [server.submit("taxi", seed, tier=tier, steps=STEPS) for seed, tier in enumerate(asked)]:
            future.result(WAIT)
        for hook in hooks:
            hook.remove()
    wanted = 2 * sum(sum(mask) for mask in MASKS.values())
    assert server.counts.computed - before == wanted
    assert sum(passed) == 2 * wanted * len(blocks)


def test_the_model_is_as_it_was_when_the_server_is_closed(pipe):
    before, threads = list(pipe.transformer.transformer_blocks), threading.active_count()
    server = StepServer(EmojiSteps(pipe), tiers(pipe), "slow")
    assert server.submit("sun", steps=STEPS).result(WAIT).size == (32, 32)
    assert handle_of(pipe.transformer) is server.cache
    server.close()
    assert list(pipe.transformer.transformer_blocks) == before
    assert handle_of(pipe.transformer) is None
    assert threading.active_count() == threads
    with pytest.raises(Overloaded, match="closing"):
        server.submit("sun")


def test_what_cannot_be_drawn_is_refused_before_it_is_queued(pipe):
    with StepServer(EmojiSteps(pipe), tiers(pipe), "slow") as server:
        with pytest.raises(ValueError, match="no tier 'best': give one of 'slow', 'fast'"):
            server.submit("sun", tier="best")
        with pytest.raises(TargetMissed, match="no tier promises ≥ 41 dB"):
            server.submit("sun", tier="fastest at ≥ 41 dB")
        with pytest.raises(InvalidSetting):
            server.submit("zyzzyva")
    assert server.counts.steps == 0


def test_the_demonstration(capsys, tmp_path):
    main(["--requests", "2", "--rate", "50", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["penguin", "rocket", "1"]
    assert "cancelled" in printed[1]
    assert [path.name for path in tmp_path.iterdir()] == ["00.png"]


# -- more than can be done -----------------------------------------------------------------------------------------


@dataclass
class Held:
    """Steps without a model, which wait to be let go."""

    rows = 1
    transformer = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    reached: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fails: frozenset = frozenset()
    pause: float = 0.0

    def begin(self, prompt, seed, steps, guidance):
        return [prompt, 0]

    def step(self, drawings, steps):
        self.reached.release()
        assert self.go.acquire(timeout=WAIT)
        time.sleep(self.pause)
        for each in drawings:
            each[1] += 1
        if self.fails & {prompt for prompt, _ in drawings}:
            raise OSError("a fault")

    def finish(self, drawing):
        return tuple(drawing)

    def release(self):
        self.go.release(1000)


def test_what_the_queue_does_not_hold_is_turned_away():
    drawer = Held()
    with StepServer(drawer, batch=1, max_active=1, max_waiting=2) as server:
        first = server.submit("a", steps=3)
        assert drawer.reached.acquire(timeout=WAIT)
        others = [server.submit(name, steps=3) for name in "bc"]
        with pytest.raises(Overloaded, match="2 requests wait already") as turned_away:
            server.submit("d")
        assert turned_away.value.retry_after == pytest.approx(0.1 * (3 + 3) / 2)  # no step was timed yet
        others[0].cancel()
        others[0] = server.submit("e", steps=3)  # in the place of the one that was cancelled
        drawer.release()
        assert [each.result(WAIT) for each in (first, *others)] == [("a", 3), ("e", 3), ("c", 3)]
    assert (server.counts.drawn, server.counts.shed, server.counts.cancelled) == (3, 1, 1)


def test_a_request_is_given_up_at_its_deadline_wherever_it_is():
    drawer = Held(pause=0.001)
    with StepServer(drawer, batch=1, max_active=1) as server:
        patient = server.submit("a", steps=2)
        assert drawer.reached.acquire(timeout=WAIT)
        queued = server.submit("b", steps=2, deadline=0.0)
        drawer.go.release(2)
        with pytest.raises(DeadlineExceeded, match="step 0 of 2"):
            queued.result(WAIT)
        assert patient.result(WAIT) == ("a", 2)
        hasty = server.submit("c", steps=1000, deadline=0.2)
        drawer.release()
        with pytest.raises(DeadlineExceeded, match=r"step \d+ of 1000"):
            hasty.result(WAIT)
    assert server.counts.expired == 2


def test_a_step_that_fails_costs_those_who_were_in_it():
    drawer = Held(fails=frozenset("b"))
    drawer.release()
    with StepServer(drawer, batch=1, max_active=3) as server:
        asked = {name: server.submit(name, steps=3) for name in "abc"}
        assert asked["a"].result(WAIT) == ("a", 3)
        assert asked["c"].result(WAIT) == ("c", 3)
        with pytest.raises(OSError, match="a fault"):
            asked["b"].result(WAIT)
    assert (server.counts.drawn, server.counts.failed) == (2, 1)


def test_closed_without_draining_all_are_cancelled_and_closed_with_it_all_are_drawn():
    for drain in (False, True):
        drawer = Held()
        server = StepServer(drawer, batch=1, max_active=1)
        asked = [server.submit(name, steps=2) for name in "ab"]
        assert drawer.reached.acquire(timeout=WAIT)
        drawer.release()
        server.close(drain=drain)
        assert all(each.done() for each in asked)
        assert not [*server._active, *server._waiting]
        if drain:
            assert [each.result(0) for each in asked] == [("a", 2), ("b", 2)]
        else:
            assert asked[1].cancelled()


def test_a_fault_of_the_server_itself_leaves_nobody_waiting(monkeypatch):
    monkeypatch.setattr("examples.continuous_batching.choose", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    server = StepServer(Held())
    with pytest.raises(ZeroDivisionError):
        server.submit("a").result(WAIT)
    with pytest.raises(Overloaded, match="closing"):
        server.submit("b")
    server.close()
