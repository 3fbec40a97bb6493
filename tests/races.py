"""Caches that are put on, changed and taken off while others call the model, Ctrl-C comes, or the process is forked.

A block adds its share of the timestep, so the output of a call tells the step that its residual is of: no two steps of
any two runs have the same timestep. A call may give its own step's, or that of the step before in its own run.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from itertools import count

import torch
from torch import nn

from dithooks import DitCacheConfig, detach, dit_cache, handle_of, timestep_scope

STEPS = 6
CONFIG, OTHER = DitCacheConfig(0, 2, 0, 4), DitCacheConfig(0, 3, 1, 2)
KINDS = ("called", "forward", "looped", "compiled")
RUNS = count(1)


class Adding(nn.Module):
    """A block that adds its share of the timestep."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x, timestep):
        return x + self.share * timestep


class Sum(nn.Module):
    """Four such blocks: 15 timesteps are added to what comes in."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(map(Adding, (1.0, 2.0, 4.0, 8.0)))

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x, timestep)
        return x


def possible(now, before):
    """By hand: what may be added at a timestep, all of it now's, or the cached blocks' share the step before's."""
    cached = (15.0, 6.0)  # all four blocks, or those of shares 2 and 4
    return [15 * now, *(15 * now + share * (then - now) for share in cached for then in before)]


def model_of(kind):
    model = Sum()
    if kind == "compiled":
        model.compile(backend="eager")
    return model


def run_of(model, kind, tally):
    """Make a run step by step, and judge each output."""
    number = next(RUNS)
    x, before = torch.full((1, 2), float(number % 7), dtype=torch.float64), []
    for step in range(STEPS):
        now = 10.0 * number + STEPS - step
        timestep = torch.tensor(now, dtype=torch.float64)
        try:
            with torch.no_grad(), timestep_scope(step):
                if kind == "looped":
                    out = x
                    for block in model.blocks:
                        out = block(out, timestep)
                else:
                    out = model.forward(x, timestep) if kind == "forward" else model(x, timestep)
        except Exception as error:
            tally[f"dead: {type(error).__name__}: {str(error)[:160]}"] += 1
        else:
            added = float((out - x)[0, 0])
            near = [abs(added - each) < 1e-6 for each in possible(now, before[-2:])]
            tally["calls"] += 1
            tally["reused"] += any(near) and not near[0]
            if not any(near):
                tally["wrong"] += 1
                tally[f"wrong: {added} at {now}"] += 1
        before.append(now)
        yield


@contextmanager
def callers(model, kind, tally, threads=4):
    """Threads that call a model all the time, one of them by asyncio tasks that take turns."""
    over = []

    def plain():
        while not over:
            for _ in run_of(model, kind, tally):
                pass

    def tasks():
        async def one():
            while not over:
                for _ in run_of(model, kind, tally):
                    await asyncio.sleep(0)

        async def all_of_them():
            await asyncio.gather(one(), one(), one())

        asyncio.run(all_of_them())

    working = [threading.Thread(target=plain, daemon=True) for _ in range(threads - 1)]
    working.append(threading.Thread(target=tasks, daemon=True))
    for thread in working:
        thread.start()
    try:
        yield
    finally:
        over.append(True)
        for thread in working:
            thread.join(60)
        tally["stuck"] += sum(thread.is_alive() for thread in working)


@contextmanager
def hasty(interval=1e-5):
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def left_on(model):
    """Count what a cache has on a model: hooks, and stand-ins, which are of another class than they say."""
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
    return hooks + sum(type(block) is not Adding for block in model.blocks)


def race(kind, pairs, seed=0):
    """Attach, update or reset, and remove so often beside four calling threads; return what has come of it."""
    model, tally, chance = model_of(kind), Counter(), random.Random(seed)
    sample(Sum())  # what is imported at the first attaching takes long where threads take turns
    with callers(model, kind, tally), hasty():
        for _ in range(pairs):
            cache = dit_cache(model, chance.choice((CONFIG, OTHER)), verify=chance.random() < 0.5)
            time.sleep(chance.choice((0, 0, 0.002, 0.01)))
            if chance.random() < 0.5:
                cache.update(chance.choice((CONFIG, OTHER)))
                time.sleep(chance.choice((0, 0.002)))
            else:
                cache.reset()
            cache.remove()
            tally["pairs"] += 1
            tally["left"] += left_on(model) > 0
    return tally


def race_of_changes(pairs):
    """Let update() and remove() of one handle begin at once, in two threads."""
    tally = Counter()
    with hasty():
        for _ in range(pairs):
            model = Sum()
            cache, barrier = dit_cache(model, CONFIG), threading.Barrier(2)

            def update(cache=cache, barrier=barrier):
                barrier.wait()
                try:
                    cache.update(OTHER)
                except Exception as error:
                    tally[f"{type(error).__name__}: {error}"] += 1

            thread = threading.Thread(target=update)
            thread.start()
            barrier.wait()
            cache.remove()
            thread.join()
            tally["pairs"] += 1
            tally["left"] += left_on(model) > 0
    return tally


def sample(model):
    """Attach, make a short run, and remove."""
    with torch.no_grad(), dit_cache(model, CONFIG):
        for step in range(3):
            model(torch.zeros(1, 2), torch.tensor(3.0 - step))


def signalled(rounds, seed=0):
    """Send so many real SIGINTs at random moments of :func:`sample`; count those that hit, and what was left."""
    model, tally, chance = Sum(), Counter(), random.Random(seed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sample(model)
        began = time.perf_counter()
        for _ in range(10):
            sample(model)
        length = (time.perf_counter() - began) / 10
        while tally["Ctrl-C"] < rounds:
            wait = threading.Timer(chance.uniform(0.0, length), os.kill, (os.getpid(), signal.SIGINT))
            hit = False
            try:
                wait.start()
                sample(model)
            except KeyboardInterrupt:
                hit = True
            try:
                wait.join()
                time.sleep(0)
            except KeyboardInterrupt:
                tally["too late"] += 1
            if hit:
                tally["Ctrl-C"] += 1
                tally["left"] += left_on(model) > 0
                if left_on(model):
                    detach(model)
    finally:
        signal.signal(signal.SIGINT, before)
    return tally


def child_of(model, seconds):
    """Fork; in the child call the model, take its cache off, and end. Return how it ended, as a word."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends one that hangs
            signal.alarm(seconds)
            tally = Counter()
            for _ in range(2):
                for _ in run_of(model, "called", tally):
                    pass
            while handle_of(model) is not None:
                detach(model)
            for _ in run_of(model, "called", tally):
                pass
            fine = tally["calls"] == 3 * STEPS and not tally["wrong"] and left_on(model) == 0
            code = 0 if fine else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "hung" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
    return {0: "fine", 1: "error", 2: "wrong"}.get(os.WEXITSTATUS(status), "other")


def forks(number, seconds=20):
    """Fork so often while four threads call the model and another one attaches and removes a cache."""
    model, tally, over = Sum(), Counter(), []

    def change():
        while not over:
            with dit_cache(model, CONFIG) as cache:
                time.sleep(0.003)
                cache.update(OTHER)
                time.sleep(0.003)

    changing = threading.Thread(target=change, daemon=True)
    with callers(model, "called", calls := Counter()), hasty(1e-4):
        changing.start()
        for _ in range(number):
            time.sleep(0.01)
            tally[child_of(model, seconds)] += 1
        over.append(True)
        changing.join(60)
    tally["left"] = left_on(model)
    tally["dead or wrong calls in the parent"] = sum(v for k, v in calls.items() if k.startswith(("dead", "wrong")))
    return tally
