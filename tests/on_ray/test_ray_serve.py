"""The Ray Serve example, as its users meet it: over HTTP, many at once. Every picture has to be the one that the same
pipeline draws by itself, whatever else the service is drawing meanwhile.
"""

import asyncio
import copy
import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError
from ray_serve_help import Halting, call, other_model, pixels, send, until

from dithooks import plan, record
from dithooks.demo import load_pipeline, load_plan

pytest.importorskip("ray.serve")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import ray_serve  # noqa: E402

from bench.checks.serving import EXAMPLE, HALF_OPEN, SLOWER, Service, load, serving  # noqa: E402

pytestmark = pytest.mark.slow
STEPS, CLIENTS, REQUESTS, QUEUE = 8, 20, 200, 24
PROMPTS = ("panda face", "taxi", "red apple", "tropical fish", "fire engine", "sunflower", "rainbow", "slice of pizza")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A plan for eight steps, and its file."""

    def run(pipe):
        noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return pipe(["cat face", "watermelon"], num_inference_steps=STEPS, generator=noise, output_type="latent").images

    with torch.no_grad():
        found = plan(record(quiet(load_pipeline()), run), target_speedup=2.0, cost="blocks")
    assert found.speedup > 1.7
    found.save(path := tmp_path_factory.mktemp("plan") / "8.json")
    return found, path


@pytest.fixture(scope="module")
def painter(short):
    """The same pipeline with the same plan, in this process, where nobody else draws."""
    here = ray_serve.Painter(quiet(load_pipeline()), short[0], "cat face")
    yield here
    here.close()


@pytest.fixture(scope="module")
def service(short):
    """The example as a process, of two replicas."""
    options = {"plan": short[1], "replicas": 2, "cpus": 0.5, "queue": QUEUE}
    with serving(*(f"--{name}={value}" for name, value in options.items())) as running:
        yield running


@pytest.fixture(scope="module")
def port(service):
    return service.port


@pytest.fixture
def one_thread():
    """As many threads as a replica has: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(port, ask):
    return call(port, "POST", "/generate", ask)


def stats(port):
    answer = call(port, "GET", "/stats")
    assert answer.status == 200, answer.body
    return answer.json


def worked(pid):
    """Seconds of processor time."""
    spent = psutil.Process(pid).cpu_times()
    return spent.user + spent.system


def settings_of(ask):
    given = {"num_inference_steps": STEPS, **ask}
    return {name: value for name, value in given.items() if name not in ("prompt", "seed")}


def drawn_again(painter, asks):
    """One call of the pipeline for these requests, which agree: pictures, and headers."""
    (settings,) = {tuple(sorted(settings_of(ask).items())) for ask in asks}
    return painter.draw([ask["prompt"] for ask in asks], [ask["seed"] for ask in asks], **dict(settings))


def mixed(number):
    """Requests of several kinds, each with a seed of its own."""
    made = []
    for seed in range(number):
        ask = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed}
        if seed % 5 == 1:
            ask["guidance_scale"] = 5.0
        if seed % 5 == 2:
            ask["guidance_scale"] = 1.0  # one call per step, where others have two
        if seed % 20 == 3:
            ask["num_inference_steps"] = 11  # not the plan's
        made.append(ask)
    random.Random(0).shuffle(made)
    return made


def test_two_hundred_requests(port, painter, short, one_thread):
    """Each is answered once, with the picture that the same call gives here, bit by bit, and that it gives alone, to
    within a level of 255: a sum over a batch of another size is rounded otherwise. /stats adds up.
    """
    asks, before = mixed(REQUESTS), stats(port)
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda ask: generate(port, ask), asks))
    after = stats(port)
    assert Counter(answer.status for answer in answers) == {200: REQUESTS}, [a.body for a in answers if a.status != 200]
    assert {each["threads"] for each in after["replicas"]} == {torch.get_num_threads()}

    calls = defaultdict(dict)  # by their number, who was in which place
    for number, answer in enumerate(answers):
        assert answer.headers["content-type"] == "image/png"
        place = int(answer.headers["x-batch-place"])
        assert place not in calls[answer.headers["x-batch"]]
        calls[answer.headers["x-batch"]][place] = number
    for places in calls.values():
        numbers = [places[place] for place in range(len(places))]  # none is missing
        assert {int(answers[n].headers["x-batch-size"]) for n in numbers} == {len(numbers)}
        pictures, told = drawn_again(painter, [asks[n] for n in numbers])
        for n, picture in zip(numbers, pictures, strict=True):
            assert np.array_equal(pixels(answers[n].body), pixels(picture)), asks[n]
            assert answers[n].headers["x-cache"] == told["X-Cache"]
            assert answers[n].headers["x-blocks-run"] == told["X-Blocks-Run"]
    sizes = Counter(map(len, calls.values()))
    assert max(sizes) == 4
    assert REQUESTS - sizes[1] > REQUESTS / 2, sizes  # clients at once do share calls

    for ask, answer in zip(asks[::6], answers[::6], strict=True):
        (alone,), _ = drawn_again(painter, [ask])
        assert np.abs(pixels(answer.body) - pixels(alone)).max() <= 1, ask

    planned = [a for ask, a in zip(asks, answers, strict=True) if "num_inference_steps" not in ask]
    assert {answer.headers["x-cache"] for answer in planned} == {"as planned"}
    assert all(
        int(a.headers["x-blocks-total"]) / int(a.headers["x-blocks-run"]) == pytest.approx(short[0].speedup)
        for a in planned
    )
    others = {a.headers["x-cache"] for ask, a in zip(asks, answers, strict=True) if "num_inference_steps" in ask}
    assert others == {f"resampled from {STEPS} steps"}

    assert after["requests"]["served"] - before["requests"]["served"] == REQUESTS
    assert after["requests"]["underway"] == after["requests"]["failed"] == 0
    grown = Counter(after["batch_sizes"]) - Counter(before["batch_sizes"])
    assert grown == {str(size): count for size, count in sizes.items()}
    for name, header in (("blocks_run", "x-blocks-run"), ("blocks_total", "x-blocks-total")):
        firsts = [answers[places[0]] for places in calls.values()]
        assert after["cache"][name] - before["cache"][name] == sum(int(a.headers[header]) for a in firsts)
    for each in after["replicas"]:
        assert set(each["cache"]["reasons"]) == {"mask", "reuse"}
        assert each["cache"]["bytes_held"] == 0  # nothing is left of any request
        assert each["plan"]["fingerprint"] == short[0].made.fingerprint
    assert after["replica_states"] == {"RUNNING": 2}


def test_a_mixed_up_state_would_be_seen(painter, short, one_thread):
    """What the comparison above allows for, 1 of 255, is far from what a wrong seed, prompt or guidance draws, and from
    what comes of a residual that is another request's at a single step.
    """
    first = {"prompt": "panda face", "seed": 1}
    others = [{**first, "seed": 2}, {**first, "prompt": "taxi"}, {**first, "guidance_scale": 5.0}]
    (own,), _ = drawn_again(painter, [first])
    for other in others:
        (picture,), _ = drawn_again(painter, [other])
        assert np.abs(pixels(picture) - pixels(own)).max() > 50

    reused = [step for step, bit in enumerate(short[0].config.when.steps) if not bit]

    def swap(pipe, step, timestep, given):
        """At a reused step, one has the other's place in the batch, and so the other's residual."""
        return {"latents": given["latents"].flip(0)} if step in (reused[1] - 1, reused[1]) else {}

    pair = [first, {"prompt": "taxi", "seed": 2}]
    pictures, _ = drawn_again(painter, pair)
    plain = copy.copy(painter.pipe)
    plain.scheduler = copy.deepcopy(plain.scheduler)
    noise = [torch.Generator().manual_seed(ask["seed"]) for ask in pair]
    with painter.handle.request(scheduler=plain.scheduler):
        images = plain(
            [a["prompt"] for a in pair], num_inference_steps=STEPS, generator=noise, callback_on_step_end=swap
        ).images
    for picture, image in zip(pictures, images, strict=True):
        assert np.abs(pixels(picture) - np.asarray(image).astype(int)).max() > 10


def test_threads_on_one_pipeline(painter, one_thread):
    """Four threads draw with one painter, with different steps and guidance: each as it draws when nobody else does."""
    asks = [{**ask, "num_inference_steps": 5 + n % 3} for n, ask in enumerate(mixed(12))]
    alone = [drawn_again(painter, [ask]) for ask in asks]
    before = painter.pipe.scheduler
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda ask: drawn_again(painter, [ask]), asks))
    for (pictures, told), (expected, counted) in zip(found, alone, strict=True):
        assert pictures == expected
        assert {**told, "X-Seconds": ""} == {**counted, "X-Seconds": ""}
    assert painter.pipe.scheduler is before
    assert before.step_index is None  # no call has stepped it
    assert painter.handle.stats.bytes_held == 0


def test_useless_is_told(painter):
    """A run too short for anything to be reused says so in its answer."""
    _, told = drawn_again(painter, [{"prompt": "taxi", "seed": 0, "num_inference_steps": 1}])
    assert told["X-Cache"] == "nothing reused"
    assert told["X-Blocks-Run"] == told["X-Blocks-Total"]


def test_bad_requests(port):
    """Each is told what is wrong with it; what goes along with it is drawn."""
    asks = [{"prompt": "taxi", "seed": seed} for seed in range(6)] + [{"prompt": "taxi xyzzy", "seed": 1}]
    before = stats(port)["requests"]
    with ThreadPoolExecutor(len(asks)) as clients:
        *good, bad = clients.map(lambda ask: generate(port, ask), asks)
    assert [answer.status for answer in good] == [200] * 6
    assert (bad.status, "never seen 'xyzzy'" in bad.json["detail"]) == (400, True)
    assert stats(port)["requests"]["refused"] == before["refused"] + 1
    for wrong, what in (
        ({"prompt": "taxi"}, "seed"),
        ({"prompt": "", "seed": 0}, "prompt"),
        ({"prompt": "taxi", "seed": -1}, "seed"),
        ({"prompt": "taxi", "seed": 2**63}, "seed"),
        ({"prompt": "taxi", "seed": 0, "steps": 8}, "steps"),
        ({"prompt": "taxi", "seed": 0, "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "taxi", "seed": 0, "num_inference_steps": 101}, "num_inference_steps"),
        ({"prompt": "taxi", "seed": 0, "guidance_scale": "much"}, "guidance_scale"),
    ):
        answer = generate(port, wrong)
        assert (answer.status, answer.json["detail"][0]["loc"]) == (422, ["body", what])


def test_a_client_that_hangs_up(port, painter, one_thread):
    """What is drawn for it is broken off, counted, and does no harm to who comes after."""

    def broken_off():
        return sum(each["broken_off"] for each in stats(port)["replicas"])

    before, broken_before = stats(port)["requests"], broken_off()
    gone = send(port, "POST", "/generate", {"prompt": "rainbow", "seed": 3, "num_inference_steps": 100})
    time.sleep(0.5)  # long enough for it to be drawn, and too short for a hundred steps
    assert stats(port)["requests"]["underway"] == 1
    gone.close()
    until(lambda: stats(port)["requests"]["cancelled"] == before["cancelled"] + 1)

    ask = {"prompt": "rainbow", "seed": 3}

    def drawn_meanwhile():
        """A replica tells of what it broke off in its next answer."""
        answer = generate(port, ask)
        return broken_off() == broken_before + 1 and answer

    answer = until(drawn_meanwhile, 30)
    (picture,), _ = drawn_again(painter, [ask])
    assert np.array_equal(pixels(answer.body), pixels(picture))
    assert stats(port)["requests"]["underway"] == 0


def test_hostile_clients(service):
    """Beside 300 half-open connections that come again when they are cut, requests that are too long, endless or out of
    range, and clients that hang up, a healthy request takes at most twice its time alone, at the median of the rounds
    that went best and worst: this machine may have other work. Hostile ones are refused, and memory stays.
    """
    alone, beside = [], []
    for _ in range(3):
        alone.append(asyncio.run(load(service, "alone", 1, 1.5)))
        beside.append(asyncio.run(load(service, "beside", 1, 3.5, HALF_OPEN)))
    for phase in alone + beside:
        assert not phase.not_served
        assert phase.seconds
    assert [each for phase in beside for each in phase.amiss] == []
    assert sum(phase.hostile for phase in beside) > 30
    quick, slow = (min(p.row()["median_s"] for p in beside), max(p.row()["median_s"] for p in alone))
    assert quick <= SLOWER * slow
    assert max(p.front_mb for p in beside) - alone[0].front_mb < 100
    assert max(p.all_mb for p in beside) - alone[0].all_mb < 200


def test_too_many(port):
    """Those that find the queue full get 503 at once, with Retry-After; all others their picture. /stats answers."""
    before, number = stats(port)["requests"], 100
    with ThreadPoolExecutor(number) as clients:
        underway = [clients.submit(generate, port, {"prompt": "taxi", "seed": seed}) for seed in range(number)]
        until(lambda: stats(port)["requests"]["turned_away"] > before["turned_away"])
        assert not all(each.done() for each in underway)  # it was answered while they wait
        answers = [each.result() for each in underway]
    kinds = Counter(answer.status for answer in answers)
    assert set(kinds) == {200, 503}
    assert kinds[200] >= QUEUE
    assert {a.headers.get("retry-after") for a in answers if a.status == 503} == {"1"}
    after = stats(port)["requests"]
    assert after["served"] - before["served"] == kinds[200]
    assert after["turned_away"] - before["turned_away"] == kinds[503]


def test_the_plan_of_another_model(port, capfd):
    """It is refused, with the reason. That service has a Ray of its own, whatever RAY_ADDRESS says: what runs already
    goes on, with its replicas.
    """
    before = {each["pid"] for each in stats(port)["replicas"]}
    wrong = Service("--load=ray_serve_help:other_model", "--plan=2x", env={"RAY_ADDRESS": "auto"})
    assert wrong.process.wait(300) == 1
    assert wrong.end() == []
    told = capfd.readouterr().err
    assert "the plan was made for another model, FluxTransformer2DModel with 12 blocks" in told
    assert "RAY_ADDRESS is ignored" in told
    assert generate(port, {"prompt": "taxi", "seed": 0}).status == 200
    assert {each["pid"] for each in stats(port)["replicas"]} >= before
    assert stats(port)["replica_states"] == {"RUNNING": 2}


def test_a_port_that_is_taken(port):
    """Said in words, before anything else is started."""
    command = [sys.executable, str(EXAMPLE), "--port", str(port)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2
    assert f"error: cannot listen on port {port} of 127.0.0.1: Address already in use" in ended.stderr
    assert "Ray" not in ended.stderr


def test_a_replica_that_is_lost(port):
    """Who was waiting for it gets 503, all others their picture; the service goes on."""
    until(lambda: len(stats(port)["replicas"]) == 2 or generate(port, {"prompt": "taxi", "seed": 0}).status != 200)
    asks = [{"prompt": "taxi", "seed": seed, "num_inference_steps": 100} for seed in range(16)]  # long under way
    victim = stats(port)["replicas"][0]["pid"]
    before = worked(victim)
    with ThreadPoolExecutor(len(asks)) as clients:
        underway = [clients.submit(generate, port, ask) for ask in asks]
        until(lambda: stats(port)["requests"]["underway"] == len(asks))
        until(lambda: worked(victim) > before + 0.5)  # it draws: what has only been sent to it may go to the other one
        os.kill(victim, 9)
        answers = [each.result() for each in underway]
    lost = [answer for answer in answers if answer.status != 200]
    assert 1 <= len(lost) < len(asks)
    assert all(a.status == 503 and "the replica was lost" in a.json["detail"] for a in lost)
    assert generate(port, {"prompt": "taxi", "seed": 0}).status == 200


def test_nothing_is_left(service):
    """Ctrl-C ends it while a picture is drawn and half a request is there; no process of it runs on."""
    drawing = send(service.port, "POST", "/generate", {"prompt": "taxi", "seed": 0, "num_inference_steps": 100})
    half = send(service.port, "GET", "/stats")
    half.sock.sendall(b"POST /generate HTTP/1.1\r\n")
    until(lambda: stats(service.port)["requests"]["underway"] == 1)
    assert service.end() == []
    assert service.process.returncode == 0
    drawing.close(), half.close()


@pytest.fixture
def worker(monkeypatch):
    """A replica's object without a replica, and without a pipeline."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="here"))
    monkeypatch.setattr(ray_serve.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(ray_serve, "Painter", lambda *given: Halting())
    return lambda **options: ray_serve.Worker.func_or_class(ray_serve.Options(**options).model_dump())


class TestBatches:
    """Which requests go into a call together, and what becomes of the others if one fails."""

    def test_made_when_there_is_a_call_for_them(self, worker):
        """Those that come one by one while the pipeline is busy go together into the next calls, if they agree."""

        async def serving():
            here = worker(wait=0.0)
            first = asyncio.create_task(here.draw("first", 0, {}))
            assert await asyncio.to_thread(here.painter.began.wait, 20)
            tasks = []
            for seed in range(7):
                settings = {"guidance_scale": 2.0} if seed in (1, 5) else {}
                tasks.append(asyncio.create_task(here.draw(f"p{seed}", seed, settings)))
                await asyncio.sleep(0.01)  # each by itself, as they come from clients
            here.painter.go_on.set()
            answers = await asyncio.gather(first, *tasks)
            assert [a["png"] for a in answers[1:]] == [f"p{seed} {seed}".encode() for seed in range(7)]
            return [prompts for prompts, _ in here.painter.drawn]

        assert asyncio.run(serving()) == [("first",), ("p0", "p2", "p3", "p4"), ("p1", "p5"), ("p6",)]

    def test_wait_for_each_other(self, worker):
        """An idle replica waits for a batch to fill, and goes on as soon as it is full."""

        async def serving():
            here = worker(wait=20.0, batch=2)
            here.painter.go_on.set()
            await asyncio.wait_for(asyncio.gather(here.draw("a", 0, {}), here.draw("b", 0, {})), 10)
            return here.painter.drawn

        assert asyncio.run(serving()) == [(("a", "b"), {"num_inference_steps": 8})]

    def test_one_fails(self, worker):
        """The others of its batch are drawn; it alone is answered with the error, and counted."""

        async def serving():
            here = worker(wait=20.0)
            here.painter.go_on.set()
            asks = ("a", "bad", "large", "broken")
            answers = await asyncio.wait_for(asyncio.gather(*(here.draw(each, 1, {}) for each in asks)), 10)
            return answers, here.numbers()

        (a, bad, large, broken), numbers = asyncio.run(serving())
        assert (a["png"], large["png"]) == (b"a 1", b"large 1")
        assert (bad["status"], bad["error"]) == (400, "a word that is not known")
        assert (broken["status"], broken["error"]) == (500, "RuntimeError: out of memory")
        assert (numbers["errors"], numbers["batch_sizes"]) == (2, {"1": 2})

    def test_cancelled_before_its_turn(self, worker):
        """It is not drawn; what is cancelled while it is drawn alone is broken off; the others are drawn."""

        async def serving():
            here = worker(wait=0.0, batch=2)
            tasks = [asyncio.create_task(here.draw("now", 0, {}))]
            assert await asyncio.to_thread(here.painter.began.wait, 20)
            tasks += [asyncio.create_task(here.draw(name, 0, {})) for name in ("never", "later", "last")]
            await asyncio.sleep(0)
            tasks[0].cancel(), tasks[1].cancel()
            here.painter.go_on.set()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError, asyncio.CancelledError, dict, dict]
            return [prompts for prompts, _ in here.painter.drawn]

        assert asyncio.run(serving()) == [("later", "last")]

    def test_broken_off(self, worker):
        """What nobody waits for is not wanted any more; what one of two waits for is."""

        async def serving():
            here = worker(wait=20.0, batch=2)
            tasks = [asyncio.create_task(here.draw(name, 0, {})) for name in ("one", "two")]
            assert await asyncio.to_thread(here.painter.began.wait, 20)
            wanted = [here.painter.wanted()]
            for task in tasks:
                task.cancel()
                await asyncio.sleep(0)
                wanted.append(here.painter.wanted())
            here.painter.go_on.set()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
            await asyncio.gather(*here.tasks)
            return wanted, here.numbers()

        wanted, numbers = asyncio.run(serving())
        assert wanted == [True, True, False]
        assert (numbers["broken_off"], numbers["errors"], numbers["batch_sizes"]) == (1, 0, {})

    def test_health(self, worker):
        """Three failures in a row that no client is to blame for, and Serve is told to replace the replica."""

        async def serving():
            here = worker(wait=0.0)
            here.painter.go_on.set()
            for prompt in ("broken", "broken", "a", "broken", "bad", "broken"):
                await here.draw(prompt, 0, {})
            here.check_health()
            await here.draw("broken", 0, {})
            with pytest.raises(RuntimeError, match="the last 3 requests failed"):
                here.check_health()
            here.__del__()
            assert here.painter.closed

        asyncio.run(serving())


def test_painters(short):
    """Closed, a painter leaves the pipeline as it was, as does one whose first picture fails."""
    pipe = quiet(load_pipeline())
    blocks = list(pipe.transformer.transformer_blocks)

    def as_before():
        return all(a is b for a, b in zip(pipe.transformer.transformer_blocks, blocks, strict=True))

    here = ray_serve.Painter(pipe, short[0], "cat face")
    assert here.handle.stats.calls == 0  # the first picture is not counted
    assert not as_before()
    here.close()
    assert as_before()
    with pytest.raises(ValueError, match="never seen 'xyzzy'"):
        ray_serve.Painter(pipe, short[0], "xyzzy")
    assert as_before()
    with pytest.raises(ValueError, match="the plan was made for another model"):
        ray_serve.Painter(other_model(), load_plan("2x"), "cat face")


def test_a_picture_nobody_wants(painter, one_thread):
    """It is broken off after the step in which that became so; the next picture is right."""
    ask, calls = {"prompt": "rainbow", "seed": 3}, []
    before, _ = drawn_again(painter, [ask])
    answers = iter([True, True, False])
    watch = painter.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ray_serve.Abandoned):
        painter.draw(["rainbow"], [3], lambda: next(answers), num_inference_steps=STEPS)
    watch.remove()
    assert len(calls) == 3 * 2  # with guidance
    assert painter.handle.stats.bytes_held == 0
    assert drawn_again(painter, [ask])[0] == before


def test_other_steps_refused(monkeypatch, short):
    """If so chosen, a request for steps that the plan is not for is an error that names those it is for."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="here"))
    monkeypatch.setattr(ray_serve.serve, "get_replica_context", lambda: context)
    here = ray_serve.Worker.func_or_class(ray_serve.Options(plan=str(short[1]), other_steps="refuse").model_dump())
    answer = asyncio.run(here.draw("taxi", 0, {"num_inference_steps": 20}))
    assert (answer["status"], answer["error"]) == (400, f"num_inference_steps=20: the plan served here is for {STEPS}")
    here.__del__()


def test_options():
    """A misspelt option is an error, as is a number that is none."""
    for wrong in ({"batches": 4}, {"wait": float("nan")}, {"timeout": float("inf")}, {"max_steps": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ray_serve.Options(**wrong)
