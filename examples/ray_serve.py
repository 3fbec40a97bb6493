"""Pictures over HTTP with Ray Serve: requests in batches, one cache, and a state of its own for every pipeline call.

    python examples/ray_serve.py --port 8000 --plan 2x --batch 4

``POST /generate`` gives a PNG, ``GET /stats`` what was drawn and what the cache did; docs/howto/ray_serve.md says what
is guaranteed. :class:`Painter` is a pipeline with its cache, and knows nothing of Ray; :class:`Worker` is a replica,
which makes batches; :class:`Front` speaks HTTP, by uvicorn in the process that was started: Ray Serve's own proxy hands
a request on as soon as its head is there, and so half a request takes up a place.
"""

import argparse
import asyncio
import copy
import importlib
import inspect
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from io import BytesIO
from operator import itemgetter
from typing import Any, Literal

import ray
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from dithooks import CachePlan, CallRecord, __version__, dit_cache
from dithooks.demo import load_plan

EXPECTED = {"mask", "reuse"}  # how the calls of a plan are settled if nothing is amiss
IN_A_ROW = 3  # requests that failed for no fault of theirs: then the replica is taken for broken
GRACE = 5  # seconds for those that are being drawn when the service ends, and for an answer to be read
log = logging.getLogger("ray.serve")


class Options(BaseModel):
    """What is served, and how: arguments of the command line."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, lt=2**16, description="port to listen on")
    load: str = Field("dithooks.demo:load_pipeline", description="module:function that returns the pipeline")
    plan: str = Field("2x", description="a file that a search wrote, one of the demo's (1.5x, 2x, 3x), or none")
    warm_up: str = Field("cat face", description="what the first picture is of, which nobody waits for")
    other_steps: Literal["resample", "refuse"] = Field("resample", description="requests for other steps than planned")
    batch: int = Field(4, ge=1, description="requests in one pipeline call, at most")
    wait: float = Field(0.05, ge=0, description="seconds that a request waits for others to fill the batch")
    concurrent: int = Field(1, ge=1, description="pipeline calls at once in a replica, in threads")
    replicas: int = Field(1, ge=1, description="processes with a pipeline each")
    cpus: float = Field(1, ge=0, description="CPU cores of a replica")
    gpus: float = Field(0, ge=0, description="GPUs of a replica, such as 1 or 0.5")
    queue: int = Field(64, ge=1, description="requests that may wait for a replica: further ones get 503")
    timeout: float = Field(120, gt=0, description="seconds that a request may wait and be drawn: then it gets 504")
    max_steps: int = Field(100, ge=1, description="steps that a request may ask for")
    max_guidance: float = Field(30, ge=0, description="guidance scale that a request may ask for")
    max_body: int = Field(2**16, ge=1, description="bytes of a request: a longer one gets 413")
    read_time: float = Field(5, gt=0, description="seconds in which a request has to arrive, or its connection is cut")
    connections: int = Field(1000, ge=1, description="connections at once: at more, requests get 503")


class Ask(BaseModel):
    """A request. What it leaves out is not passed on, so that the pipeline's own defaults hold."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)  # a misspelt field is an error, not a default
    prompt: str = Field(min_length=1, max_length=2000)
    seed: int = Field(ge=0, lt=2**63)

    @classmethod
    def within(cls, options: Options) -> type["Ask"]:
        """Also with what is bounded by options: whatever costs time or memory has a bound."""
        steps = int | None, Field(None, ge=1, le=options.max_steps)
        guidance = float | None, Field(None, ge=0, le=options.max_guidance)
        return create_model("Ask", __base__=cls, num_inference_steps=steps, guidance_scale=guidance)


class Abandoned(Exception):
    """Nobody waits any more for what is being drawn."""


class Painter:
    """A pipeline with a cache attached, that several threads may draw with at once; ``plan=None``: without a cache.

    Raises:
        ValueError: the plan was made for another model.
    """

    def __init__(self, pipe: Any, plan: CachePlan | None, warm_up: str) -> None:
        self.pipe, self.plan, self.call = pipe, plan, threading.local()
        self.steps = 28 if plan is None else plan.made.steps  # of a request that does not say
        self.stops = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
        self.handle = None if plan is None else dit_cache(pipe, plan, on_decision=self._settled)
        try:  # the first call learns how the blocks are wired and tests the residual: no request waits for that
            self.draw([warm_up], [0], num_inference_steps=self.steps)
        except BaseException:
            self.close()
            raise
        if self.handle is not None:
            self.handle.reset()

    def draw(
        self, prompts: list[str], seeds: list[int], wanted: Callable[[], bool] = lambda: True, **settings: Any
    ) -> tuple[list[bytes], dict[str, str]]:
        """One pipeline call: PNG files, and headers that tell what the cache did in it.

        A pipeline keeps its scheduler's place, its guidance and the like in itself: each call has a shallow copy, which
        shares the models, and a scheduler of its own. By that the cache tells its steps, and its request from others.

        Raises:
            Abandoned: after a step the pictures were not wanted any more.
        """

        def go_on(*_: Any) -> dict[str, Any]:
            if not wanted():
                raise Abandoned
            return {}

        pipe = copy.copy(self.pipe)
        pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]  # one each, and on the CPU: as if drawn alone
        if self.stops:
            settings = {"callback_on_step_end": go_on, **settings}
        request = nullcontext() if self.handle is None else self.handle.request(scheduler=pipe.scheduler)
        settled = self.call.settled = {}
        begin = time.perf_counter()
        with request:
            images = pipe(prompts, generator=noise, **settings).images
        seconds = time.perf_counter() - begin
        if len(images) != len(prompts):
            raise RuntimeError(f"the pipeline gave {len(images)} pictures for {len(prompts)} prompts")
        files = [BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, "PNG")
        told = self._told(list(settled.values()), settings["num_inference_steps"])
        return [file.getvalue() for file in files], {"X-Seconds": f"{seconds:.3f}", **told}

    def close(self) -> None:
        """Take the cache off: the pipeline is as it was."""
        if self.handle is not None:
            self.handle.remove()

    def _settled(self, each: CallRecord) -> None:
        """Called in the thread that draws; a call that is settled anew counts as it was settled last."""
        self.call.settled[each.range, each.run, each.step, each.branch] = each

    def _told(self, settled: list[CallRecord], steps: int) -> dict[str, str]:
        """What the cache did. dit_cache warns, too, but once, and in the replica's log, where no client sees it."""
        if self.plan is None or self.handle is None:
            return {"X-Cache": "off"}
        ranges = {each.range: each for each in self.handle.ranges}
        total = sum(ranges[each.range].total for each in settled)
        left_out = sum(ranges[each.range].blocks for each in settled if each.reuse)
        said = "as planned" if steps == self.plan.made.steps else f"resampled from {self.plan.made.steps} steps"
        amiss = Counter(each.reason for each in settled if each.reason not in EXPECTED)
        said = "; ".join([said if left_out else "nothing reused", *(f"{k}: {n} calls" for k, n in amiss.items())])
        return {"X-Cache": said, "X-Blocks-Run": str(total - left_out), "X-Blocks-Total": str(total)}


@dataclass(eq=False)
class Waiting:
    """A request that waits for a pipeline call."""

    prompt: str
    seed: int
    settings: dict[str, Any]
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)


@serve.deployment
class Worker:
    """A replica: one pipeline, and the requests that wait for it.

    ``@serve.batch`` closes a batch when its time is up even if the pipeline is busy: of requests that come one by one
    meanwhile, each is then drawn alone. Here a batch is made when a pipeline call is free for it, of requests that
    agree in all that the call is given.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = Options(**options)
        module, _, function = self.options.load.partition(":")
        pipe = getattr(importlib.import_module(module), function)()
        if self.options.gpus and pipe.device.type == "cpu":
            pipe.to("cuda")
        pipe.set_progress_bar_config(disable=True)
        plan = None if self.options.plan == "none" else load_plan(self.options.plan)
        self.painter = Painter(pipe, plan, self.options.warm_up)
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.waiting: list[Waiting] = []
        self.came = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.errors = self.in_a_row = self.broken_off = 0
        self.sizes: Counter[int] = Counter()

    async def draw(self, prompt: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
        """A picture, or an error, in plain values. Cancelled before its turn, it is not drawn; later, broken off."""
        settings = {"num_inference_steps": self.painter.steps, **settings}
        steps, plan = settings["num_inference_steps"], self.painter.plan
        if plan is not None and steps != plan.made.steps and self.options.other_steps == "refuse":
            return self._error(400, f"num_inference_steps={steps}: the plan served here is for {plan.made.steps}")
        self.waiting.append(one := Waiting(prompt, seed, settings))
        self.came.set()
        if sum(not task.done() for task in self.tasks) < self.options.concurrent:  # done callbacks come later
            self.tasks.add(task := asyncio.create_task(self._work()))
            task.add_done_callback(self.tasks.discard)
        return await one.answer

    async def _work(self) -> None:
        """Draw until nobody waits."""
        while batch := await self._batch():
            try:
                await self._answer(batch)
            except Exception as error:  # a fault in here: whatever it is, nobody waits for ever
                log.exception("a batch could not be answered")
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)

    async def _batch(self) -> list[Waiting]:
        """The request that waits longest and those that agree with it, once they are enough or its time is up."""
        while waiting := [each for each in self.waiting if not each.answer.cancelled()]:
            first, self.waiting = waiting[0], waiting
            batch = [each for each in waiting if each.settings == first.settings][: self.options.batch]
            left = first.since + self.options.wait - time.monotonic()
            if len(batch) == self.options.batch or left <= 0:
                self.waiting = [each for each in waiting if each not in batch]
                return batch
            self.came.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.came.wait(), left)
        return []

    async def _answer(self, batch: list[Waiting]) -> None:
        """Draw a batch in a thread, so that the replica stays responsive, and answer each of it."""
        prompts, seeds = [each.prompt for each in batch], [each.seed for each in batch]

        def wanted() -> bool:
            return not all(each.answer.cancelled() for each in batch)

        if not wanted():
            return
        try:
            files, told = await asyncio.to_thread(self.painter.draw, prompts, seeds, wanted, **batch[0].settings)
        except Abandoned:
            self.broken_off += 1
            return
        except Exception as error:
            if len(batch) > 1:  # drawn alone, each shows whose fault it was; and what is too much at once may fit
                for each in batch:
                    await self._answer([each])
                return
            self.errors += 1
            asked_wrongly = isinstance(error, ValueError)  # by which pipelines refuse what they are asked for
            if not asked_wrongly:
                self.in_a_row += 1
                log.exception("a request could not be drawn")
            answers = [
                self._error(400, str(error)) if asked_wrongly else self._error(500, f"{type(error).__name__}: {error}")
            ]
        else:
            self.in_a_row = 0
            self.sizes[len(batch)] += 1
            told |= {"X-Batch": f"{self.replica}-{self.sizes.total()}", "X-Batch-Size": str(len(batch))}
            heads = [{**told, "X-Batch-Place": str(place)} for place in range(len(batch))]
            numbers = self.numbers()
            answers = [{"png": p, "headers": h, "numbers": numbers} for p, h in zip(files, heads, strict=True)]
        for each, answer in zip(batch, answers, strict=True):
            if not each.answer.done():  # cancelled while it was drawn
                each.answer.set_result(answer)

    def _error(self, status: int, text: str) -> dict[str, Any]:
        return {"status": status, "error": text, "numbers": self.numbers()}

    def numbers(self) -> dict[str, Any]:
        """Since the replica started; they go along with every answer."""
        plan, handle = self.painter.plan, self.painter.handle
        return {
            "replica": self.replica,
            "pid": os.getpid(),
            "at": time.time(),
            "batch_sizes": {str(size): count for size, count in sorted(self.sizes.items())},
            "errors": self.errors,
            "broken_off": self.broken_off,
            "cache": {} if handle is None else {k: v for k, v in handle.stats.to_dict().items() if k != "runs"},
            "plan": plan and {"fingerprint": plan.made.fingerprint, "steps": plan.made.steps, "speedup": plan.speedup},
            "device": str(self.painter.pipe.device),
            "threads": torch.get_num_threads(),
            "versions": {"dithooks": __version__, "torch": torch.__version__},
        }

    def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica that raises."""
        if self.in_a_row >= IN_A_ROW:
            raise RuntimeError(f"the last {self.in_a_row} requests failed for no fault of theirs")

    def __del__(self) -> None:
        if hasattr(self, "painter"):  # else the constructor did not come so far
            self.painter.close()


AT = itemgetter("at")


class Front:
    """HTTP. It sees every request and draws none, so that it answers while all replicas are busy."""

    def __init__(self, options: Options, worker: DeploymentHandle) -> None:
        self.options, self.worker = options, worker
        ends = ("underway", "served", "refused", "failed", "turned_away", "cancelled", "timed_out")
        self.requests = dict.fromkeys(ends, 0)
        self.heard: dict[str, dict[str, Any]] = {}  # the last of each replica
        self.api = FastAPI(title="dithooks")
        self.api.add_middleware(RequestBodyLimitMiddleware, max_body_size=options.max_body)
        self.api.add_exception_handler(RequestValidationError, unfit)
        bounded = Ask.within(options)

        @self.api.post("/generate", response_class=Response)
        async def generate(ask: bounded, request: Request) -> Response:
            """A picture as PNG; its headers tell what the cache did."""
            return await self.generate(ask, request)

        self.api.get("/stats")(self.stats)
        self.api.get("/-/healthz")(self.healthz)

    async def generate(self, ask: Ask, request: Request) -> Response:
        """The answer to a request, which is dropped when its client hangs up or its time is over."""
        settings, end = ask.model_dump(exclude={"prompt", "seed"}, exclude_none=True), "failed"
        answered = asyncio.create_task(self.drawn(ask.prompt, ask.seed, settings))
        left = asyncio.create_task(hung_up(request))
        self.requests["underway"] += 1
        try:
            await asyncio.wait((answered, left), timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                end = "cancelled"
                return Response(status_code=499)  # nobody reads it
            if not answered.done():
                end = "timed_out"
                raise HTTPException(504, f"not drawn within {self.options.timeout:g} s")
            answer = answered.result()
            numbers = answer["numbers"]
            self.heard[numbers["replica"]] = max(numbers, self.heard.get(numbers["replica"], numbers), key=AT)
            if "error" in answer:
                end = "refused" if answer["status"] < 500 else "failed"
                raise HTTPException(answer["status"], answer["error"])
            end = "served"
            return Response(answer["png"], media_type="image/png", headers=answer["headers"])
        except asyncio.CancelledError:
            end = "cancelled"
            raise
        except BackPressureError:
            end = "turned_away"
            raise HTTPException(503, "too many requests wait: try again", {"Retry-After": "1"}) from None
        except (RayActorError, DeploymentUnavailableError):  # not sent again from here: what kills one would kill all
            text = "the replica was lost: send it again, the same seed gives the same picture"
            raise HTTPException(503, text, {"Retry-After": "5"}) from None
        finally:
            answered.cancel(), left.cancel()  # of no effect on what is done
            self.requests["underway"] -= 1
            self.requests[end] += 1

    async def drawn(self, *ask: Any) -> dict[str, Any]:
        """A replica's answer. Cancelled, it is taken out of the queue, or the replica is told."""
        response = self.worker.draw.remote(*ask)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def stats(self) -> dict[str, Any]:
        """All requests; sums over the replicas; and each replica as it was at its last answer."""
        status = await asyncio.to_thread(serve.status)
        states = status.applications["default"].deployments["Worker"].replica_states
        heard, sizes = sorted(self.heard.values(), key=AT), Counter[str]()
        for each in heard:
            sizes.update(each["batch_sizes"])
        counted = ("calls", "reused_calls", "blocks_run", "blocks_total")
        return {
            "requests": self.requests,
            "batches": sizes.total(),
            "batch_sizes": sizes,
            "cache": {name: sum(each["cache"].get(name, 0) for each in heard) for name in counted},
            "replica_states": dict(states),
            "replicas": heard,
        }

    async def healthz(self) -> str:
        """That requests are taken."""
        return "success"


async def hung_up(request: Request) -> None:
    """Wait until the client of a request, which has arrived as a whole, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unfit(request: Request, error: RequestValidationError) -> Response:
    """Which fields are wrong, and nothing of what they hold: that may be long, or more than JSON can say."""

    def name(part: str | int) -> str | int:
        return part if isinstance(part, int) else part[:80].encode("ascii", "backslashreplace").decode()

    told = [{"loc": [name(part) for part in each["loc"]], "msg": each["msg"]} for each in error.errors()[:10]]
    return JSONResponse({"detail": told}, 422)


def timed(read: float, life: float) -> type[H11Protocol]:
    """uvicorn's HTTP, but with an end to every connection: uvicorn waits for the rest of a request for ever."""

    class Timed(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.ends = [self.loop.call_later(read, self.cut), self.loop.call_later(life, transport.abort)]

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for each in self.ends:
                each.cancel()

        def cut(self) -> None:
            if self.cycle is None or self.cycle.more_body:  # no head, or not all of the body
                self.transport.abort()

    return Timed


def application(options: Options) -> serve.Application:
    """What Ray Serve runs: the replicas, and the queue in front of them."""
    return Worker.options(
        num_replicas=options.replicas,
        max_ongoing_requests=2 * options.batch * options.concurrent,  # as many are drawn, and as many wait in it
        max_queued_requests=options.queue,
        max_constructor_retry_count=1,  # a plan that does not fit will not the next time either
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    ).bind(options.model_dump())


def started(options: Options) -> DeploymentHandle:
    """The replicas, once all of them are ready.

    Raises:
        SystemExit: one could not be made; with why, which Ray itself says in a log of its own only.
    """
    try:
        return serve.run(application(options), route_prefix=None)
    except RuntimeError:
        why = serve.status().applications["default"].deployments["Worker"].message.rstrip()
        log.error("the pipeline could not be served: %s", why)
        raise SystemExit(1) from None


def http_server(options: Options, worker: DeploymentHandle) -> uvicorn.Server:
    """What speaks HTTP, within its bounds."""
    config = uvicorn.Config(
        Front(options, worker).api,
        http=timed(options.read_time, options.read_time + options.timeout + GRACE),
        ws="none",
        headers=[("Connection", "close")],  # one request each, so that its end is the connection's
        limit_concurrency=options.connections,
        access_log=False,  # a line for every request would be for its senders to fill the disk with
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(config)


def main() -> None:
    """Serve until interrupted, or told to end."""
    parser = argparse.ArgumentParser(description="Serve a diffusion pipeline with a cache.")
    for name, each in Options.model_fields.items():
        text = f"{each.description} (default: {each.default})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=each.default, help=text)
    try:
        options = Options(**vars(parser.parse_args()))
    except ValidationError as error:
        parser.error("; ".join(f"--{each['loc'][0]}: {each['msg']}".replace("_", "-") for each in error.errors()))
    place = options.host, options.port
    try:  # before Ray, and not shared with anyone: two services on one port would each get some of the requests
        listening = socket.create_server(place, family=socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    except OSError as error:
        parser.error(f"cannot listen on port {options.port} of {options.host}: {error.strerror}; see --port and --host")
    if "RAY_ADDRESS" in os.environ:
        log.warning("RAY_ADDRESS is ignored: this service starts a Ray of its own, and ends it")
    try:
        with listening, suppress(KeyboardInterrupt):
            ray.init(address="local", include_dashboard=False)
            for each in (signal.SIGINT, signal.SIGTERM):  # Ray has just set its own
                signal.signal(each, signal.default_int_handler)
            serve.start(proxy_location="Disabled")  # no HTTP of Serve's own
            worker = started(options)
            http_server(options, worker).run(sockets=[listening])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
