"""A loop, played with a cache: each of its calls as it truly was, and what the cache made of it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dithooks
from dithooks import DitCacheConfig, Interval, Mask, dit_cache, timestep_scope

from . import labelled_model as parts
from .drawing import ARGUMENTS, COUNTED, SCHEDULED, Loop, RunPlan, Spec, steps_of

THREAD_SHIFT = 10_000  # labels are exact in float32, also of the second thread
TOKENS = 24  # of each window: latents of different noise are as far apart as those of thousands of numbers


@dataclass
class Played:
    """One call that came to its end.

    Args:
        run: number of the run, another one for each thread.
        step: true step.
        evaluation: number of the model's evaluation in the run.
        spec: which of an evaluation's calls it is.
        order: how many such calls the step had before.
        turn: how many evaluations the step had before.
        source: the number of the call whose residual was added; ``None`` if the blocks ran.
        given: latents, prompt and time that the call was given, as bytes.
    """

    number: int
    run: tuple[int, int]
    step: int
    evaluation: int
    spec: Spec
    order: int
    turn: int
    source: int | None
    given: bytes = b""

    @property
    def branch(self) -> tuple[Spec, int]:
        """Return the true branch."""
        return self.spec, self.order


@dataclass
class Outcome:
    """What came of a loop: its calls by number, the warnings of the whole time, and the error that ended it."""

    loop: Loop
    calls: dict[int, Played] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None


def model_of(loop: Loop) -> nn.Module:
    """Return a model that is given the time in the loop's manner."""
    current = parts.Current()
    if loop.clock == "outer":
        return parts.Outer(current)
    if loop.clock == "dataclass":
        return parts.ModalityModel(current)
    time: str | None = "timestep"
    if loop.clock in ARGUMENTS or loop.clock == "tau":
        time = loop.clock
    elif loop.clock == "dict" or not loop.has_time:
        time = None
    names = [("hidden_states", "encoder_hidden_states"), ("x", "context"), ("x", "y")][loop.number % 3]
    return parts.model_class(names[0], time, names[1])(current)


def cached(loop: Loop, model: nn.Module, schedulers: list[Any]) -> dithooks.CacheHandle:
    """Attach a cache in the loop's manner."""
    kind, values = loop.computed
    policy = Mask(values) if kind == "mask" else Interval(*values)
    config = DitCacheConfig(cache_block_start=0, cache_num_blocks=parts.BLOCKS, policy=policy)
    settings: dict[str, Any] = {}
    if loop.clock == "tau":
        settings["timestep"] = "tau"
    if loop.clock == COUNTED:
        group = loop.runs[0].groups[0]
        settings.update(calls_per_step=len(loop.specs) * len(group), steps=len(loop.runs[0].groups))
    target: Any = model
    if loop.clock in SCHEDULED:
        if loop.pipeline or loop.clock == "two pipelines":
            target = parts.pipeline(model, schedulers[0])
        else:
            settings["scheduler"] = schedulers[0]
    return dit_cache(target, config, **settings)


def play(loop: Loop) -> Outcome:
    """Play a loop and return what came of it."""
    outcome, model = Outcome(loop), model_of(loop)
    kind = parts.SchedulerWithoutIndex if loop.clock == "scheduler without index" else parts.Scheduler
    schedulers = [kind(), kind()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            handle = cached(loop, model, schedulers)
        except (ValueError, TypeError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            return outcome
        try:
            barrier = threading.Barrier(loop.threads) if loop.lockstep and loop.threads > 1 else None
            players = [Player(loop, model, schedulers, handle, outcome, n, barrier) for n in range(loop.threads)]
            if loop.threads == 1:
                players[0].run_all()
            else:
                threads = [threading.Thread(target=player.run_all) for player in players]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            handle.remove()
    outcome.warnings = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    return outcome


class Player:
    """One thread's part in a loop."""

    def __init__(
        self,
        loop: Loop,
        model: nn.Module,
        schedulers: list[Any],
        handle: dithooks.CacheHandle,
        outcome: Outcome,
        thread: int,
        barrier: threading.Barrier | None,
    ) -> None:
        self.loop, self.model, self.schedulers, self.handle = loop, model, schedulers, handle
        self.outcome, self.thread, self.barrier = outcome, thread, barrier
        self.current: parts.Current = next(m.current for m in model.modules() if isinstance(m, parts.LabelledBlock))
        self.generator = torch.Generator().manual_seed(2 * loop.number + thread)
        self.calls = thread * THREAD_SHIFT
        halves = {spec.half for spec in loop.specs}
        self.batch = len(halves) if len(halves) > 1 else 1
        self.windows = 1 + max(spec.window for spec in loop.specs)
        self.first_prompts = self.new_prompts()
        self.first_latents: Tensor | None = None
        self.constants: dict[str, Any] = {}

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise."""
        return torch.randn(*shape, generator=self.generator)

    def new_prompts(self) -> dict[tuple[int, int], Tensor]:
        """Return a prompt for each guidance and half of the batch."""
        prompts = {}
        for spec in self.loop.specs:
            key = (spec.guidance, spec.half if self.loop.own_prompts else 0)
            if key not in prompts:
                equal = self.loop.equal_prompts and prompts
                prompts[key] = next(iter(prompts.values())).clone() if equal else self.noise(1, 3, parts.WIDTH)
        return prompts

    def run_all(self) -> None:
        """Make all runs of the loop; an error of the library ends them."""
        try:
            with torch.no_grad():
                for number, run in enumerate(self.loop.runs):
                    with suppress(parts.Interrupted):
                        OneRun(self, number, run).make()
                    self.current.fails = False
                    if run.stop is not None and self.loop.clock == COUNTED and run.stop[0] != "fails":
                        self.handle.reset()
        except Exception as error:
            self.outcome.error = f"{type(error).__name__}: {error}"
            if self.barrier is not None:
                self.barrier.abort()


class OneRun:
    """One sampling run of a player."""

    def __init__(self, player: Player, number: int, plan: RunPlan) -> None:
        self.player, self.number, self.plan, self.loop = player, number, plan, player.loop
        self.true_steps = steps_of(player.loop, plan)
        self.evaluation, self.step_calls, self.made = -1, Counter[tuple[int, Spec]](), 0
        if plan.prompts == "first":
            self.prompts = player.first_prompts
        elif plan.prompts == "equal":
            self.prompts = {key: prompt.clone() for key, prompt in player.first_prompts.items()}
        else:
            self.prompts = player.new_prompts()
        self.directions = {key: 0.1 * player.noise(1, 3, parts.WIDTH) for key in self.prompts}
        x = player.first_latents
        if x is None or plan.latents == "new":
            x = player.noise(player.batch, TOKENS * player.windows, parts.WIDTH - 1)
        elif plan.latents == "equal":
            x = x.clone()
        if player.first_latents is None:
            player.first_latents = x
        self.x, self.values = x, {}

    # -- the loop ----------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the steps of the run."""
        loop, groups = self.loop, self.plan.groups
        which = self.number % 2 if loop.clock == "two pipelines" else 0
        scheduler = self.player.schedulers[which]
        stepped = copy.deepcopy(scheduler) if loop.clock == "copied scheduler" else scheduler
        values = [value for group in groups for value in group]
        earlier = [2 * values[0] - values[-1] + number for number in range(loop.begin)]  # those that are left out
        scheduler.set_timesteps(earlier + values, loop.begin)
        if stepped is not scheduler:
            stepped.set_timesteps(earlier + values, loop.begin)
        moves = loop.clock in ("scheduler", "copied scheduler", "two pipelines")
        steps: Any = range(len(groups))
        if loop.clock == "steps":
            steps = dithooks.steps(list(steps))
        for step in steps:
            with self.scope("step", loop.begin + step):
                if not self.sampling_step(step, groups[step], stepped if moves else None):
                    break

    def sampling_step(self, step: int, group: tuple[float, ...], stepped: Any) -> bool:
        """Make one sampling step; return whether the loop goes on."""
        self.made = 0
        x, first = self.x, None
        for value in group:
            self.evaluation += 1
            self.values = {}
            with self.scope("evaluation", self.loop.begin + self.evaluation):
                v = self.evaluate(x, step, value)
            if v is None:
                return False
            first = v if first is None else first
            if stepped is not None:
                stepped.step()
            x = self.x - 0.1 * v
        self.x = self.x - 0.05 * (first + v)
        if self.loop.noisy:
            self.x = self.x + 0.05 * self.player.noise(*self.x.shape)
        return True

    def evaluate(self, x: Tensor, step: int, value: float) -> Tensor | None:
        """Evaluate the model, by all calls that this takes; ``None``: the loop is to be left."""
        loop = self.loop
        here = [spec for spec in loop.specs if loop.present(spec, step, len(self.plan.groups))]
        if loop.shuffled:
            here = self.shuffled(here)
        v = torch.zeros_like(x)
        for spec in here:
            if self.plan.stop is not None and self.plan.stop[1:] == (step, self.made):
                how = self.plan.stop[0]
                if how == "breaks":
                    return None
                if how == "raises":
                    raise parts.Interrupted("stopped between two calls")
                self.player.current.fails = True
            self.made += 1
            rows = slice(spec.half, spec.half + 1) if self.player.batch > 1 else slice(None)
            tokens = slice(TOKENS * spec.window, TOKENS * (spec.window + 1)) if self.player.windows > 1 else slice(None)
            v[rows, tokens] += self.call(x[rows, tokens], spec, step, value) / len(here)
        return v

    def shuffled(self, here: list[Spec]) -> list[Spec]:
        """Return calls in another order, where those that nothing but the order tells apart keep theirs."""
        keys = [spec if self.loop.named else (spec.guidance, spec.flag) for spec in here]
        order = torch.randperm(len(here), generator=self.player.generator).tolist()
        mixed, left = [keys[place] for place in order], list(zip(keys, here, strict=True))
        result = []
        for key in mixed:
            place = next(n for n, (other, _) in enumerate(left) if other == key)
            result.append(left.pop(place)[1])
        return result

    @contextmanager
    def scope(self, level: str, number: int, name: int | str | None = None) -> Iterator[None]:
        """Open a scope, where the loop has one at this level."""
        loop = self.loop
        if loop.clock not in ("scope", "scope with number", "scope with name"):
            yield
            return
        at = "call" if loop.named else loop.scope_per
        if level != at:
            yield
            return
        total = (max(self.true_steps) + 1) if loop.tells_steps else None
        with timestep_scope(number, steps=total) if name is None else timestep_scope(number, branch=name, steps=total):
            yield

    # -- one call ----------------------------------------------------------------------------------------------

    def call(self, x: Tensor, spec: Spec, step: int, value: float) -> Tensor:
        """Call the model, and note what its output says."""
        player, loop = self.player, self.loop
        if player.barrier is not None:
            with suppress(threading.BrokenBarrierError):
                player.barrier.wait(10)
        player.calls += 1
        current, model = player.current, player.model
        current.number, current.ran = player.calls, 0
        true_step = self.true_steps[self.evaluation]
        args, kwargs = self.arguments(x, spec, step, value)
        name: int | str | None = None
        if loop.named:
            name = loop.specs.index(spec) if loop.clock == "scope with number" else f"call {loop.specs.index(spec)}"
        with self.scope("call", true_step, name):
            out = model(*args, **kwargs)
        label = out[0, 0, 0].item() / parts.BLOCKS
        source = None if current.ran else round(label)
        order = self.step_calls[true_step, spec]
        self.step_calls[true_step, spec] += 1
        turn = self.evaluation - self.true_steps.index(true_step)
        run = (player.thread, self.number)
        given = b"".join(each.numpy().tobytes() for each in (x, self.prompt(spec, step, len(x)), torch.tensor(value)))
        played = Played(player.calls, run, true_step, self.evaluation, spec, order, turn, source, given)
        player.outcome.calls[player.calls] = played
        return out[..., 1:]

    def arguments(self, x: Tensor, spec: Spec, step: int, value: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call."""
        loop, model = self.loop, self.player.model
        time, prompt = self.time(value, len(x)), self.prompt(spec, step, len(x))
        kwargs = {name: self.extra(name, how, spec) for name, how in loop.extras}
        if spec.flag:
            kwargs["skip_layers"] = [1]
        if loop.clock == "dataclass":
            return (parts.Modality(x, time, prompt),), kwargs
        if loop.clock == "outer":
            return (x, time, prompt), kwargs
        if loop.clock == "dict":
            kwargs["options"] = {"timestep": time, "cond_or_uncond": [spec.guidance]}
        latents, *others = model.forward.__code__.co_varnames[1:4]
        timed = others[0] if others[1] != "control" else None
        prompt_name = others[0] if timed is None else others[1]
        if loop.positional:
            return (x, prompt) if timed is None else (x, time, prompt), kwargs
        if timed is not None:
            kwargs[timed] = time
        return (), {latents: x, prompt_name: prompt, **kwargs}

    def time(self, value: float, batch: int) -> Any:
        """Return a time in the form that the loop gives it."""
        form = self.loop.time_form
        if form == "float":
            return value
        time = torch.tensor(value, dtype=torch.float64)
        return time if form == "scalar" else time.expand(batch) if form == "batch" else time[None]

    def prompt(self, spec: Spec, step: int, batch: int) -> Tensor:
        """Return the prompt of a call."""
        loop = self.loop
        key = (spec.guidance, spec.half if loop.own_prompts else 0)
        prompt = self.prompts[key]
        if spec.guidance in loop.drifting:
            if ("drift", key) not in self.values:
                self.values["drift", key] = prompt + (self.evaluation + 1) * self.directions[key]
            return self.values["drift", key]
        return prompt if loop.prompts == "object" else prompt.clone()

    def extra(self, name: str, how: str, spec: Spec) -> Any:
        """Return another argument: constant, equal in another object, or new at each evaluation or call."""
        constants = self.player.constants
        if how == "constant":
            if name not in constants:
                constants[name] = self.made_argument(name, 0)
            return constants[name]
        number = self.evaluation + 1 if how == "new" else 0
        if how == "each":  # another one for each call, as of a ControlNet
            return self.made_argument(name, 100 * self.loop.specs.index(spec) + self.evaluation + 1)
        if (name, how) not in self.values:
            self.values[name, how] = self.made_argument(name, number)
        return self.values[name, how]

    @staticmethod
    def made_argument(name: str, number: int) -> Any:
        """Return an argument whose value depends on a number."""
        if name == "scale":
            return 1.0 + 0.1 * number
        if name == "options":
            return {"strength": 0.5, "layers": [1, 2]}
        if name == "ids":
            return torch.arange(4)
        if name == "guidance":
            return torch.full((1,), 3.5 + number)
        return torch.full((1, 1, parts.WIDTH), 0.01 * (number + 1))
