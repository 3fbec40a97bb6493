"""A sampling run is broken off by an exception at every place that runs at all, by running out of memory in every
tensor operation, and by Ctrl-C at lines of the library itself; what comes next has to be what a fresh run gives.
"""

import contextlib
import gc
import os
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from oracle import WIDTH, Oracle, Speaker
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Counter, Net, latents, prompt
from traces import attributes, seamless

import dithooks
from dithooks import DitCacheConfig, Linear, Mask, Threshold, dit_cache, engine, integrations, stats, timestep_scope
from dithooks.compat.msmodelslim.step_index import set_step_index

pytestmark = [pytest.mark.line("Fault campaign"), pytest.mark.on("toy transformers"), pytest.mark.slow]

ERRORS = (RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError)
CLOCKS = ("scheduler", "timestep", "scope", "told")
ALL = bool(os.environ.get("DITHOOKS_ALL"))  # by hand: all combinations, and more examples
STEPS, DEPTH = 4, 4
CONFIGS = {
    "Interval": DitCacheConfig(1, 2, 1, 2),
    "Mask, Linear": DitCacheConfig(
        cache_block_start=1, cache_num_blocks=2, policy=Mask((1, 1, 0, 0)), predictor=Linear()
    ),
    "Threshold, F=1": DitCacheConfig(
        cache_block_start=1, compute_last=1, policy=Threshold(0.55, 1, max_cached_steps=2)
    ),
    "Threshold, F=0": DitCacheConfig(compute_last=1, policy=Threshold(0.45, 1, max_continuous_cached_steps=1)),
}
OURS = [Path(room.__file__).parent for room in (dithooks, engine, integrations, stats)]


class Sites:
    """Every place of a run that runs, one after another; at the one that is armed, an error is raised."""

    def __init__(self):
        self.names, self.armed, self.error, self.where = [], None, None, None

    def __call__(self, name):
        self.names.append((*self.where, name) if self.where else (name,))
        if self.armed is not None and len(self.names) > self.armed:
            self.armed = None
            raise self.error("raised on purpose")

    def arm(self, number, error):
        self.names, self.armed, self.error = [], number, error


class Light(nn.Module):
    """h → h, of few operations, as there are thousands of runs."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, hidden_states, temb):
        return hidden_states + self.proj(hidden_states + temb).sin()


class Parent(Net):
    """Blocks that fail within, and a parent that fails between them."""

    def __init__(self, kind, depth, sites):
        super().__init__("single" if kind == "light" else kind, depth)
        if kind == "light":
            self.blocks = nn.ModuleList(Light() for _ in range(depth))
        self.sites = [sites]  # no module
        for name, module in self.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda *_, name=name: sites(name))

    def _controlled(self, h, control):
        self.sites[0]("between blocks")
        return h


class Loop:
    """A pipeline with two branches, whose steps are told in one of several ways."""

    def __init__(self, kind="light", clock="scheduler", depth=DEPTH, batched=False):
        torch.manual_seed(7)
        self.sites = Sites()
        self.transformer, self.clock, self.batched = Parent(kind, depth, self.sites), clock, batched
        self.scheduler = Counter() if clock == "scheduler" else None
        self.prompts = [{"encoder_hidden_states": prompt(1, 2)} for _ in range(1 if batched else 2)]

    def target(self):
        return self if self.clock == "scheduler" else self.transformer

    def __call__(self, x):
        x, outs = x.clone(), []
        self.timesteps = torch.linspace(1, 0, STEPS + 1)[:-1]
        if self.clock == "scheduler":
            self.scheduler.set_timesteps(STEPS)
        for step in range(STEPS):
            x = self.step(step, x, outs)
        if self.clock == "told":
            set_step_index(None)
        return x, outs

    def step(self, step, x, outs):
        if self.clock == "scope":
            with timestep_scope(step, sigma=float(self.timesteps[step]), steps=STEPS):
                return self.calls(step, x, outs)
        if self.clock == "told":
            set_step_index(step)
        return self.calls(step, x, outs)

    def calls(self, step, x, outs):
        self.sites.where = step, None
        self.sites("the user's callback")
        total = 0
        for branch, given in enumerate(self.prompts):
            self.sites.where = step, branch
            self.sites("before the call")
            out = self.transformer(x, self.timesteps[step], **given)
            self.sites("after the call")
            total = total + out
        self.sites.where = step, None
        self.sites("scheduler.step")
        outs.append(total)
        if self.scheduler is not None:
            self.scheduler.step()
        return x - total / STEPS


def decided(handle, last=None):
    """How the calls of the last run were settled, whichever run it was."""
    found = [(each.step, each.branch, each.reuse, each.reason, each.value) for each in handle.decisions]
    return found if last is None else found[-last:]


class Server:
    """A pipeline that is cached for long, and what a fresh run on it gives."""

    def __init__(self, config, **made):
        self.loop, self.config = Loop(**made), config
        self.x, self.other = latents(1, 2), latents(1, 2)
        self.before = attributes(self.loop.transformer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with dit_cache(self.loop.target(), config) as handle:
                self.loop(self.x)
                self.first = list(self.loop.sites.names)
                self.loop.sites.names.clear()
                self.loop(self.x)
                self.second = list(self.loop.sites.names)
            with dit_cache(self.loop.target(), config) as handle:
                self.expected = self.loop(self.other)
                self.decisions, self.stats = decided(handle), handle.stats
            self.plain = self.loop(self.other)
        reused = {reuse for _, _, reuse, _, _ in self.decisions}
        assert reused == {True, False}, "nothing is shown by a run in which all went one way"
        assert not torch.equal(self.plain[0], self.expected[0])

    def attach(self):
        """The cache, and between its hooks and the model those of somebody else."""
        handle, sites = dit_cache(self.loop.target(), self.config), self.loop.sites
        net = self.loop.transformer
        self.hooks = [
            net.register_forward_pre_hook(lambda *_: sites("a hook before the transformer")),
            net.register_forward_hook(lambda *_: sites("a hook behind the transformer")),
        ]
        return handle

    def names(self, handle):
        """The places of a run, the first of all having passed."""
        self.loop(self.x)
        self.loop.sites.names = []
        self.loop(self.x)
        return list(self.loop.sites.names)

    def fail(self, number, error):
        """A run that is broken off at a place. Returns whether it was."""
        self.loop.sites.arm(number, error)
        try:
            self.loop(self.x)
            return False
        except error:
            return True
        finally:
            self.loop.sites.armed = None

    def check(self, handle, where):
        """The next run is a fresh one, and leaves nothing behind."""
        result = self.loop(self.other)
        assert same(result, self.expected), f"{where}: the next run differs from a fresh one"
        assert decided(handle, len(self.decisions)) == self.decisions, f"{where}: … in what it decides"
        stats, (attached, *_) = handle.stats, handle._attached
        assert stats.bytes_held == self.stats.bytes_held, f"{where}: more is kept than after a fresh run"
        assert stats.calls == stats.computed_calls + stats.reused_calls == sum(stats.reasons.values()), where
        assert stats.blocks_total - stats.blocks_run == stats.reused_calls * attached.log.skippable, where
        flow = attached.cache
        assert flow.state.call is None, f"{where}: a call is left under way"
        assert flow.state.latest is None, f"{where}: a call is left"
        assert flow.state.replay is flow.state.arguments is None, f"{where}: arguments are left"

    def close(self, handle, where="at last"):
        handle.remove()
        for hook in self.hooks:
            hook.remove()
        assert attributes(self.loop.transformer) == self.before, f"{where}: remove() left something"
        assert same(self.loop(self.other), self.plain), f"{where}: the model is not what it was"


def same(ones, others):
    return torch.equal(ones[0], others[0]) and all(map(torch.equal, ones[1], others[1]))


@pytest.fixture(autouse=True)
def _alone():
    """What earlier tests of the process left is not counted: some of it dies only later, in the middle of another."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def ids(value):
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


@pytest.mark.filterwarnings("ignore:.*reused nothing.*")
class TestEveryPlace:
    """Blocks inside and outside of the range, between them, before and behind them, hooks, callbacks, the scheduler."""

    @pytest.mark.parametrize("error", [*ERRORS, None] if ALL else [None], ids=ids)
    @pytest.mark.parametrize("clock", CLOCKS)
    @pytest.mark.parametrize("config", CONFIGS)
    def test_the_next_run_is_a_fresh_one(self, config, clock, error):
        """Every step × branch × place × {computed, reused}, on one handle: the next run equals a fresh one, bit by bit
        and in what it decides; no call, argument or tensor is left, and remove() leaves the model as it was."""
        self.all_places(Server(CONFIGS[config], clock=clock), [error] if error else ERRORS)

    @pytest.mark.parametrize("error", ERRORS, ids=ids)
    def test_every_error_at_every_place(self, error):
        """The same with one error throughout."""
        self.all_places(Server(CONFIGS["Threshold, F=1"]), [error])

    @pytest.mark.parametrize("config", ["Interval", "Mask, Linear"])
    @pytest.mark.parametrize("kind", ["in_place", "swapped", "two_lists", "last_drops_text"])
    def test_other_kinds_of_blocks(self, kind, config):
        """The same with blocks that write into their input, with two streams, and with two lists of blocks."""
        depth = 2 if kind == "two_lists" else DEPTH
        self.all_places(Server(CONFIGS[config], kind=kind, depth=depth), ERRORS, every=1 if ALL else 3)

    def all_places(self, server, errors, every=1):
        handle = server.attach()
        names = server.names(handle)
        assert {"a hook before the transformer", "between blocks", "scheduler.step"} <= {name[-1] for name in names}
        alive = tensors_alive()
        for number, name in list(enumerate(names))[::every]:
            assert server.fail(number, errors[number % len(errors)]), name
            if name[0] <= 1 and server.loop.clock in ("timestep", "told"):
                # Nothing tells that run from this one, but its latents: this one may compute more. The one after it is
                # told from it by its first step.
                server.loop(server.other)
            server.check(handle, name)
        assert not server.fail(len(names), errors[0])
        assert tensors_alive() == alive, "tensors are left"
        server.close(handle)

    @pytest.mark.parametrize("kind", ["light", "two_lists"])
    @pytest.mark.parametrize("config", ["Interval", "Threshold, F=1"])
    def test_in_the_first_run(self, config, kind):
        """While the streams are being learned and the first residual is tested by further calls: every place of the
        first two steps, each on a cache of its own."""
        server = Server(CONFIGS[config], kind=kind, depth=2 if kind == "two_lists" else DEPTH)
        first = [name for name in server.first if name[0] in (0, 1)]
        assert len(first) > sum(name[0] in (0, 1) for name in server.second), "nothing was called once more"
        for number, name in list(enumerate(first))[:: 1 if ALL else 2]:
            handle = server.attach()
            assert server.fail(number, ERRORS[number % 3]), name
            server.check(handle, name)
            server.close(handle, name)


class OutOfMemory(TorchDispatchMode):
    """Fails at the n-th operation on tensors, whoever makes it."""

    def __init__(self, after):
        super().__init__()
        self.after, self.count = after, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.after:
            raise torch.OutOfMemoryError(f"no memory for {operation}")
        return operation(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*reused nothing.*")
class TestOutOfMemory:
    """In any operation at all: the model's, and those that the library makes to keep, to combine and to compare."""

    def operations(self, loop, x):
        with OutOfMemory(0) as mode:
            loop(x)
        return mode.count

    def fail(self, loop, x, after):
        try:
            with OutOfMemory(after):
                loop(x)
        except torch.OutOfMemoryError:
            return True
        return False

    @pytest.mark.parametrize("config", CONFIGS)
    def test_the_next_run_is_a_fresh_one(self, config):
        """Out of memory in every operation of a run: the next equals a fresh one."""
        server = Server(CONFIGS[config])
        handle = server.attach()
        server.loop(server.x)
        plenty, alive, failed = self.operations(server.loop, server.x), tensors_alive(), 0
        for after in range(1, plenty + 1, 1 if ALL else 2):
            failed += self.fail(server.loop, server.x, after)
            server.check(handle, f"operation {after}")
        assert failed > 0.45 * plenty  # all but those of comparing prompts, which take it for a difference
        assert tensors_alive() == alive, "tensors are left"
        server.close(handle)

    @pytest.mark.parametrize("kind", ["in_place", "two_lists"])
    def test_in_the_first_run(self, kind):
        """Out of memory in every third operation of the first run, its tests included, each on a cache of its own: no
        argument of the call has been written into, and the next run equals a fresh one."""
        server = Server(CONFIGS["Interval"], kind=kind, depth=2 if kind == "two_lists" else 3)
        with_cache = server.attach()
        plenty = self.operations(server.loop, server.x)
        server.close(with_cache)
        for after in range(1, plenty // 2, 1 if ALL else 3):
            handle, x = server.attach(), server.x.clone()
            assert self.fail(server.loop, server.x, after)
            assert torch.equal(server.x, x)
            server.check(handle, f"operation {after}")
            server.close(handle, f"operation {after}")


def interrupted(action, after):
    """Do something, and raise KeyboardInterrupt after so many lines of the library. Whether it came to its end.

    Some are left out: there, a tracer interrupts between leaving a block and giving its lock back, or in an instruction
    that does nothing and has no handler, which no signal can.
    """
    count = after

    def trace(frame, event, arg):
        nonlocal count
        if Path(frame.f_code.co_filename).parent not in OURS:
            return None
        if event == "line" and frame.f_lineno not in seamless(frame.f_code):
            count -= 1
            if count == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)


@pytest.mark.filterwarnings("ignore:.*reused nothing.*")
class TestCtrlC:
    """KeyboardInterrupt at a line of the library's own files."""

    @pytest.mark.parametrize("config", CONFIGS)
    def test_the_next_run_is_a_fresh_one(self, config):
        """At every so many lines of a run: the next run equals a fresh one, and nothing is left."""
        server = Server(CONFIGS[config])
        handle = server.attach()
        server.loop(server.x)
        alive, line = tensors_alive(), 1
        while not interrupted(lambda: server.loop(server.x), line):
            server.check(handle, f"line {line}")
            line += 1 if ALL else 67
        assert line > 1000
        assert tensors_alive() == alive, "tensors are left"
        server.close(handle)

    def test_in_the_first_run(self):
        """The same while the streams are learned, on a cache of its own each time."""
        server = Server(CONFIGS["Threshold, F=1"])
        line, done = 1, False
        while not done:
            handle = server.attach()
            done = interrupted(lambda: server.loop(server.x), line)
            server.check(handle, f"line {line}")
            server.close(handle, f"line {line}")
            line += 7 if ALL else 131
        assert line > 1500


class Talk:
    """A loop over a speaking model, whose calls an oracle checks: what an exception is followed by, and by what."""

    def __init__(self, config, clock, labelled=True, prompts=2):
        self.net, self.clock, self.config = Speaker(DEPTH), clock, config
        first, number = config.cache_block_start, config.cache_num_blocks
        last = DEPTH - 1 - config.compute_last if number is None else first + number - 1
        axis = "timestep" if clock == "timestep" else "sigma"
        self.oracle = Oracle(self.net, first, last, config.predictor, config.when, axis)
        self.oracle.counted_steps = clock != "timestep"  # these alone count anew after an exception
        self.transformer, self.scheduler = self.net, Counter() if clock == "scheduler" else None
        self.x, self.places, self.request = torch.zeros(1, 2, WIDTH), [], 0
        self.prompts = [torch.randn(1, 2, WIDTH) for _ in range(prompts)] if labelled else [None] * prompts

    def attach(self):
        return dit_cache(self if self.clock == "scheduler" else self.net, self.config)

    def __call__(self, fail=None, after="nothing", error=RuntimeError):
        """A run; at the n-th place an exception, after which comes the call again, the step again, or what is next."""
        self.request += 1
        self.places, self.times, step, failed = [], torch.linspace(1, 0, STEPS + 1)[:-1], 0, False
        if self.scheduler is not None:
            self.scheduler.set_timesteps(STEPS)

        def at(place):
            nonlocal failed
            self.places.append(place)
            if len(self.places) - 1 == fail and not failed:
                failed = True
                raise error("raised on purpose")

        self.net.now.at = at
        while step < STEPS:
            branch = 0
            while branch < len(self.prompts):
                try:
                    self.one(step, branch)
                except error:
                    if after == "the call again":
                        continue
                    if after == "the step again":
                        branch = 0
                        continue
                branch += 1
            step += 1
            if self.scheduler is not None:
                self.scheduler.step()
        self.net.now.at = None

    def one(self, step, branch):
        t, given = float(self.times[step]), {"timestep": self.times[step]}
        if self.clock == "scope":
            with timestep_scope(step, sigma=t, steps=STEPS):
                self.oracle.call(self.request, branch, step, t, 20.0 + 2 * step, self.x, self.prompts[branch], **given)
        else:
            self.oracle.call(self.request, branch, step, t, 20.0 + 2 * step, self.x, self.prompts[branch], **given)


@pytest.mark.filterwarnings("ignore:.*reused nothing.*", "ignore:.*no coefficients.*", "ignore:.*tells the number.*")
class TestGoingOn:
    """A server that goes on after an exception; what an output is made of is read off it, weight by weight."""

    @pytest.mark.parametrize("after", ["the call again", "the step again", "nothing"])
    @pytest.mark.parametrize("clock", ["scheduler", "timestep", "scope"])
    @pytest.mark.parametrize("config", ["Interval", "Mask, Linear", "Threshold, F=1"])
    def test_nothing_stale_is_used(self, config, clock, after):
        """The call again, the step again, or on with the next branch, after an exception at every place of a run: each
        residual is of the right request and branch, and of its latest computed calls."""
        plain = Talk(CONFIGS[config], clock)
        with plain.attach():
            plain(), plain()
            assert plain.oracle.reused() >= 4
            places = len(plain.places)
        talk = Talk(CONFIGS[config], clock)
        with talk.attach() as handle:
            talk()
            for number in range(0, places, 1 if ALL else 3):
                talk.oracle.forget()
                talk(fail=number, after=after, error=ERRORS[number % 3])
                talk()
                assert talk.oracle.reused() >= 2
            stats = handle.stats
            assert stats.calls == stats.computed_calls + stats.reused_calls == sum(stats.reasons.values())

    @pytest.mark.parametrize("labelled", [True, False])
    @pytest.mark.parametrize("config", ["Interval", "Mask, Linear", "Threshold, F=1"])
    def test_out_of_memory_within_the_library(self, config, labelled):
        """Out of memory in every operation of a call, the library's own among them; then the step is made again. With
        prompts that tell its two branches apart, and without."""
        talk = Talk(CONFIGS[config], "scheduler", labelled)
        with talk.attach():
            talk()
            talk.oracle.forget()
            mode = talk.oracle.around = OutOfMemory(0)
            talk()
            for operation in range(1, mode.count + 1, 1 if ALL else 2):
                talk.oracle.forget()
                talk.oracle.around = OutOfMemory(operation)
                talk(after="the step again", error=torch.OutOfMemoryError)
                assert talk.oracle.around.count > operation


class TestThreads:
    def test_a_fault_in_one_leaves_the_other_alone(self):
        """Two threads share a model; one fails in every run, in the midst of blocks: the other's runs are as alone."""
        server = Server(CONFIGS["Interval"], clock="scope")
        handle, stop, wrong = server.attach(), threading.Event(), []

        def failing():
            loop = Loop(clock="scope")
            loop.transformer = server.loop.transformer
            with torch.no_grad():
                while not stop.is_set():
                    for number in range(7):
                        tripping.number = number
                        with contextlib.suppress(RuntimeError):
                            loop(server.x)
                            broken.append(False)
                        broken.append(True)

        def trip(*_):
            if getattr(tripping, "number", None) is not None:
                tripping.number -= 1
                if tripping.number < 0:
                    tripping.number = None
                    raise RuntimeError("raised on purpose")

        tripping, broken = threading.local(), []
        hook = server.loop.transformer.blocks[3].proj.register_forward_pre_hook(trip)
        thread = threading.Thread(target=failing)
        thread.start()
        for _ in range(20):
            wrong.append(not same(server.loop(server.other), server.expected))
        stop.set()
        thread.join()
        hook.remove()
        assert len(broken) >= 7
        assert all(broken)
        assert not any(wrong)
        server.close(handle)


class TestTracebacks:
    """An exception that somebody keeps holds the frames it went through, the library's among them."""

    @pytest.mark.parametrize("way", ["reset", "remove"])
    @pytest.mark.parametrize("step", range(STEPS))
    def test_residuals_are_freed_all_the_same(self, step, way):
        """After reset() or remove() no residual is left, though the exception is kept."""
        server = Server(CONFIGS["Mask, Linear"])
        handle = server.attach()
        server.loop(server.x)
        within = {0: "blocks.2.proj", 1: "blocks.1.proj"}.get(step, "blocks.3.proj")  # steps 2 and 3 are reused
        kept, hits = None, [n for n, name in enumerate(server.second) if name[0] == step and name[-1] == within]
        server.loop.sites.arm(server.names(handle).index(server.second[hits[-1]]), RuntimeError)
        try:
            server.loop(server.x)
        except RuntimeError as error:
            kept = error
        runs = list(handle._attached[0].cache.decider._runs.values())
        residuals = [weakref.ref(t) for run in runs for b in run.branches.values() for a in b.anchors for t in a.kept]
        assert residuals
        assert handle.stats.bytes_held
        del runs
        getattr(handle, way)()
        gc.collect()
        assert not any(ref() is not None for ref in residuals)
        assert kept.__traceback__ is not None
        server.close(handle)
