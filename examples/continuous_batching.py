"""A server that batches by step: in each call of the transformer, one step of many requests, each by its own plan.

    pip install "dithooks[demo]"
    python examples/continuous_batching.py --requests 12 --rate 4 --out drawn

A request joins when it comes and leaves when it is done, at any step of the others. At every tick :func:`choose` puts
together those whose next step is computed, or those whose next step is reused, which costs next to nothing:
``cache.forecast`` tells which is which. So the blocks run on full batches although each request reuses other steps.
A picture is the one that its request alone would have been drawn as.

:class:`StepServer` is the whole of it: a queue with an end, which turns requests away when it is full; deadlines; and
``future.cancel()`` at any step. :class:`EmojiSteps` is what is particular to the pipeline: write your own for another.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dithooks import CacheHandle, PlanTiers, Row, dit_cache
from dithooks.demo import load_pipeline, load_plan
from dithooks.demo.model import unpatchify
from dithooks.demo.pipeline import position_ids

SIZE = 32  # pixels, each way


class Overloaded(RuntimeError):
    """The queue is full, or the server is closing: nothing was taken. ``retry_after``: seconds to wait."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class DeadlineExceeded(TimeoutError):
    """A request was given up, as its picture would come too late."""


# -- what is particular to the pipeline ------------------------------------------------------------------------------


@dataclass(eq=False)
class Drawing:
    """A picture on its way.

    Args:
        prompts: embeddings of the prompt and of none, (2, length, width), and pooled, (2, width).
        latents: of one picture, with a first dimension of 1.
        scheduler: of its own, as schedulers count their steps.
        guidance: scale of classifier-free guidance.
    """

    prompts: tuple[Tensor, Tensor]
    latents: Tensor
    scheduler: Any
    guidance: float


class EmojiSteps:
    """The pipeline that ships, one step of any drawings at a time; for another pipeline, write these three methods.

    Args:
        pipe: the pipeline.
        output_type: of pictures: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
    """

    rows = 2  # of a drawing in a call: with the prompt, and without

    def __init__(self, pipe: Any, output_type: str = "pil") -> None:
        self.pipe, self.output_type = pipe, output_type

    def begin(self, prompt: str, seed: int, steps: int, guidance: float) -> Drawing:
        """Return what a picture starts from; a prompt that cannot be read is refused here."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(seed))
        return Drawing(self.pipe.encode_prompt([prompt, ""]), latents, scheduler, guidance)

    def step(self, drawings: Sequence[Drawing], steps: Sequence[int]) -> None:
        """Make one step of each, in one call: rows 2n and 2n + 1 are the n-th drawing's, with and without prompt."""
        embeds, pooled = (torch.cat(parts) for parts in zip(*(each.prompts for each in drawings), strict=True))
        img_ids, txt_ids = position_ids(SIZE, SIZE, embeds.shape[1])
        times = torch.stack([each.scheduler.timesteps[step] for each, step in zip(drawings, steps, strict=True)])
        velocity = self.pipe.transformer(  # what the pipeline holds: a plan may leave the whole call out
            hidden_states=torch.cat([each.latents for each in drawings]).repeat_interleave(2, 0),
            timestep=(times / 1000).repeat_interleave(2),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        rows = iter(velocity.split(1))
        for each, timestep in zip(drawings, times, strict=True):
            given, away = next(rows), next(rows)
            guided = away + each.guidance * (given - away)
            each.latents = each.scheduler.step(guided, timestep, each.latents, return_dict=False)[0]

    def finish(self, drawing: Drawing) -> Any:
        """Return the picture."""
        if self.output_type == "latent":
            return drawing.latents
        pixels = unpatchify(drawing.latents, SIZE, SIZE)
        return self.pipe.image_processor.postprocess(pixels, output_type=self.output_type)[0]


# -- which requests make a step together -----------------------------------------------------------------------------


class Turn(Protocol):
    """A request that waits for its next step, as :func:`choose` sees it."""

    passed_over: int  # ticks since it was last chosen

    @property
    def computes(self) -> bool:
        """Whether its next step runs all blocks."""
        ...


AnyTurn = TypeVar("AnyTurn", bound=Turn)


def choose(active: Sequence[AnyTurn], batch: int, patience: int) -> list[AnyTurn]:
    """Choose the requests that make a step together.

    Computed steps wait until they fill a batch, for as long as there are reused ones to make: these bring their
    requests to steps that are computed. Whoever was passed over ``patience`` times comes first, with others of its
    kind; so nobody is passed over more than ``patience`` + len(active) / batch + 1 times.

    Args:
        active: in the order in which they came, the oldest first.
        batch: at most so many of them compute; any number reuses.
        patience: ticks.
    """
    if not active:
        return []
    computed, reused = ([each for each in active if each.computes is kind] for kind in (True, False))
    longest = max(active, key=lambda each: each.passed_over)
    fills = len(computed) >= batch or not reused
    if not (longest.computes if longest.passed_over >= patience else fills):
        return reused
    computed.sort(key=lambda each: -each.passed_over if each.passed_over >= patience else 0)  # else the oldest first
    return computed[:batch]


# -- the server ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Active:
    """A request, in the queue or being drawn."""

    number: int
    drawing: Drawing
    tier: str | None
    steps: int
    due: float  # on the clock of time.monotonic
    future: Future[Any] = field(default_factory=Future)
    step_index: int = 0
    costs: tuple[float, ...] = ()  # of each step, as a share of all blocks
    passed_over: int = 0
    is_answered: bool = False

    @property
    def computes(self) -> bool:
        """Whether its next step runs all blocks."""
        return not self.costs or self.costs[self.step_index] >= 1.0


@dataclass
class Counts:
    """What a server has done."""

    ticks: int = 0
    steps: int = 0  # of all requests
    computing_ticks: int = 0
    computed: int = 0  # steps of which all blocks ran
    drawn: int = 0
    shed: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0


class StepServer:
    """Draws pictures for many callers at once, a step of several in each call of the transformer, in a thread.

    Args:
        drawer: the pipeline's steps.
        plans: tiers of the same blocks, as those of one search are. Left out, there is no cache.
        tier: of requests that ask for none: a name, or a promise.
        batch: requests whose blocks run in one call.
        max_active: requests that are being drawn; more than a batch, so that those that compute are enough to fill it.
        max_waiting: requests in the queue.
        patience: ticks after which a request comes first: :func:`choose`.

    Example:
        with StepServer(EmojiSteps(load_pipeline()), PlanTiers.load("plans.json"), "2x") as server:
            picture = server.submit("penguin", seed=1, tier="fastest at ≥ 35 dB").result()
    """

    def __init__(
        self,
        drawer: EmojiSteps,
        plans: PlanTiers | None = None,
        tier: str | None = None,
        *,
        batch: int = 8,
        max_active: int = 16,
        max_waiting: int = 64,
        patience: int = 4,
    ) -> None:
        self.drawer, self.plans, self.counts = drawer, plans, Counts()
        self.batch, self.max_active, self.max_waiting, self.patience = batch, max_active, max_waiting, patience
        self.cache: CacheHandle | None = None
        self._waiting: deque[Active] = deque()
        self._active: list[Active] = []  # the worker's alone
        self._numbers = itertools.count()
        self._changed, self._is_closing = threading.Condition(), False
        self._seconds = 0.0  # spent on all steps
        if plans is not None:
            self.cache = dit_cache(drawer.pipe, plans, tier=tier)
        self._worker = threading.Thread(target=self._work, name="steps", daemon=True)
        self._worker.start()

    # -- callers ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str,
        seed: int = 0,
        *,
        tier: str | None = None,
        steps: int = 28,
        guidance: float = 3.0,
        deadline: float | None = None,
    ) -> Future[Any]:
        """Ask for a picture. ``cancel()`` of the future that is returned ends it at whatever step it is.

        Args:
            prompt: of the picture.
            seed: of its noise.
            tier: by which plan: a name, or ``"fastest at ≥ 35 dB"``; left out, the server's.
            steps: of its run.
            guidance: scale of classifier-free guidance.
            deadline: seconds from now after which nobody wants it any more.

        Raises:
            Overloaded: the queue is full; try again after ``retry_after`` seconds.
            ValueError: there is no such tier, or the prompt cannot be read.
            TargetMissed: no tier promises what is asked for.
        """
        if tier is not None:
            if self.plans is None:
                raise ValueError(f"there is no tier {tier!r}, nor any other: this server has no plans")
            self.plans.select(tier)
        self._refuse_if_full()  # before anything is spent on it
        due = time.monotonic() + (float("inf") if deadline is None else deadline)
        with torch.no_grad():
            drawing = self.drawer.begin(prompt, seed, steps, guidance)
        asked = Active(next(self._numbers), drawing, tier, steps, due)
        with self._changed:
            self._refuse_if_full()
            self._waiting.append(asked)
            self._changed.notify()
        return asked.future

    def close(self, drain: bool = True) -> None:
        """Take no more requests, draw those that are here (or, without ``drain``, cancel them), and end."""
        with self._changed:
            self._is_closing = True
            for each in () if drain else (*self._waiting, *self._active):
                each.future.cancel()
            self._changed.notify()
        self._worker.join()
        if self.cache is not None:
            self.cache.remove()

    def __enter__(self) -> StepServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _refuse_if_full(self) -> None:
        with self._changed:
            if self._is_closing:
                raise Overloaded("this server is closing", 60.0)
            waiting = sum(not each.future.cancelled() for each in self._waiting)
            if waiting >= self.max_waiting:
                self.counts.shed += 1
                pace = self._seconds / self.counts.steps if self.counts.steps else 0.1
                wait = max(0.1, pace * sum(each.steps for each in self._waiting) / 2)  # until half of them is drawn
                raise Overloaded(f"{waiting} requests wait already: try again in {wait:.1f} s", wait)

    # -- the worker ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        """Tick until the server closes; whatever happens, no future stays without an answer."""
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._active or self._is_closing):
                        self._changed.wait()
                    if not (self._waiting or self._active):
                        return
                self._drop_ended()
                self._admit()
                self._tick()
        except BaseException as error:
            with self._changed:
                self._is_closing = True
                left = [*self._active, *self._waiting]
                self._waiting.clear()
            for each in left:
                self._fail(each, error)
            raise

    def _drop_ended(self) -> None:
        """Let go of requests that were cancelled, or whose time is over, in the queue as well."""
        now, ended, staying = time.monotonic(), list[Active](), deque[Active]()
        with self._changed:
            for each in self._waiting:
                (ended if each.future.cancelled() or each.due <= now else staying).append(each)
            self._waiting = staying
        for each in [each for each in self._active if each.future.cancelled() or each.due <= now]:
            self._leave(each)
            ended.append(each)
        for each in ended:  # outside the lock: what callers have asked to be done with an answer is done here
            late = DeadlineExceeded(f"given up at step {each.step_index} of {each.steps}, as its time is over")
            self.counts.expired += self._answer(each, error=late)

    def _admit(self) -> None:
        """Take requests from the queue as long as there is a place."""
        while len(self._active) < self.max_active:
            with self._changed:
                if not self._waiting:
                    return
                asked = self._waiting.popleft()
                self._active.append(asked)
            if self.cache is None:
                continue
            try:
                scheduler = asked.drawing.scheduler
                self.cache.request(asked.number, scheduler=scheduler, tier=asked.tier, steps=asked.steps)
                asked.costs = self.cache.forecast(asked.number)
            except Exception as error:
                self._fail(asked, error)
                self._leave(asked)

    def _tick(self) -> None:
        """Make one step of some requests."""
        chosen = choose(self._active, self.batch, self.patience)
        if not chosen:
            return
        for each in self._active:
            each.passed_over += 1
        started, counts = time.perf_counter(), self.counts
        try:
            with self._rows(chosen):
                self.drawer.step([each.drawing for each in chosen], [each.step_index for each in chosen])
        except Exception as error:  # theirs alone: others go on
            for each in chosen:
                self._fail(each, error)
                self._leave(each)
            return
        computed = sum(each.computes for each in chosen)
        counts.ticks += 1
        counts.steps += len(chosen)
        counts.computed += computed
        counts.computing_ticks += computed > 0
        for each in chosen:
            each.step_index += 1
            each.passed_over = 0
            if each.step_index == each.steps:
                self._finish(each)
        self._seconds += time.perf_counter() - started

    def _finish(self, asked: Active) -> None:
        """Answer a request with its picture."""
        self._leave(asked)
        try:
            picture = self.drawer.finish(asked.drawing)
        except Exception as error:
            self._fail(asked, error)
        else:
            self.counts.drawn += self._answer(asked, picture)

    def _rows(self, chosen: Sequence[Active]) -> Any:
        if self.cache is None:
            return nullcontext()
        return self.cache.rows(
            [Row(each.number, each.step_index, branch) for each in chosen for branch in range(self.drawer.rows)]
        )

    def _leave(self, asked: Active) -> None:
        """Free what is kept for a request."""
        with self._changed:
            self._active.remove(asked)
        if self.cache is not None:
            self.cache.forget(asked.number)

    def _fail(self, asked: Active, error: BaseException) -> None:
        self.counts.failed += self._answer(asked, error=error)

    def _answer(self, asked: Active, picture: Any = None, error: BaseException | None = None) -> bool:
        """Answer a request, once; return whether somebody still waits for it."""
        if asked.is_answered:
            return False
        asked.is_answered = True
        if not asked.future.set_running_or_notify_cancel():
            self.counts.cancelled += 1
            return False
        if error is None:
            asked.future.set_result(picture)
        else:
            asked.future.set_exception(error)
        return True


# -- a demonstration -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve some requests of three tiers that come at random, cancel one, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=12, help="how many (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4.0, help="that come in a second (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="requests in one call (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for the pictures")
    options = parser.parse_args(arguments)
    prompts = ("penguin", "rocket", "rainbow", "slice of pizza", "cat face", "watermelon", "taxi", "red heart")
    plans = PlanTiers({name: load_plan(name) for name in ("1.5x", "2x", "3x")})
    asked, spent = list[tuple[str, str, Future[Any]]](), dict[Future[Any], float]()
    rng, started = random.Random(0), time.perf_counter()
    with StepServer(EmojiSteps(load_pipeline()), plans, "2x", batch=options.batch) as server:
        for number in range(options.requests):
            time.sleep(rng.expovariate(options.rate))
            prompt, tier = prompts[number % len(prompts)], rng.choice(list(plans.plans))
            begun = time.perf_counter()
            try:
                future = server.submit(prompt, number, tier=tier, deadline=60.0)
            except Overloaded as error:
                print(f"{prompt}: {error}")
                continue
            future.add_done_callback(lambda done, begun=begun: spent.update({done: time.perf_counter() - begun}))
            asked.append((prompt, tier, future))
        if asked:
            asked[-1][2].cancel()
    for number, (prompt, tier, future) in enumerate(asked):
        if future.cancelled():
            print(f"{prompt:<16} {tier:>4}  cancelled")
            continue
        print(f"{prompt:<16} {tier:>4}  {spent[future]:.2f} s")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            future.result().save(options.out / f"{number:02d}.png")
    counts, seconds = server.counts, time.perf_counter() - started
    print(
        f"{counts.drawn} pictures in {seconds:.1f} s; {counts.computed} of {counts.steps} steps were computed, "
        f"{counts.computed / max(1, counts.computing_ticks):.1f} of them in a call"
    )


if __name__ == "__main__":
    main()
