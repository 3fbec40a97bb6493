"""The limits that docs/own_sampler.md states: what is computed once more, and what begins a run."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from by_hand import noise
from sampler_models import blocks, waves
from torch import nn

import dithooks
from dithooks import DitCacheConfig, Interval, dit_cache, timestep_scope

TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
NOISE, PROMPT = noise(1, 5, 8, seed=300), noise(1, 1, 8, seed=301)


class Model(nn.Module):
    """Blocks of one width, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks()

    def forward(self, x, timestep, prompt):
        for block in self.blocks:
            x = block(x, waves(torch.tensor([timestep]))[:, None], prompt)
        return x


@torch.no_grad()
def letters(loop, policy=None, model=None) -> list[str]:
    """Return C or R for each call that a loop makes of a cached model: a string for each run."""
    model, runs = model or Model(), dict[int, str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dit_cache(model, DitCacheConfig(policy=policy or Interval(0, 2))) as cache:
            loop(model, cache)
    for call in cache.decisions:
        runs[call.run] = runs.get(call.run, "") + "CR"[call.reuse]
    return list(runs.values())


@pytest.mark.parametrize(("change", "line"), [(0.02, "CRCRCR"), (0.04, "CCCRCR")])
def test_an_argument_that_changes_by_more_than_three_percent_is_computed_at_the_second_step(change, line):
    def loop(model, cache):
        for step, time in enumerate(TIMES):
            model(NOISE, time, PROMPT * (1 - change) ** step)

    assert letters(loop) == [line]


@pytest.mark.parametrize(
    ("mended", "latents"),
    [("reset", NOISE + 0.5 * noise(1, 5, 8, seed=302)), ("steps", NOISE), (None, noise(1, 5, 8, seed=303))],
    ids=["reset", "steps", "other noise"],
)
def test_a_run_that_was_broken_off_at_its_first_step(mended, latents):
    """The next one is as it would be alone, if the user or the loop says that it is another, or its latents show it."""
    results, model = [], Model()
    steps = dithooks.steps if mended == "steps" else iter

    def loop(model, cache, early):
        for time in steps(TIMES[:early]):
            model(NOISE, time, PROMPT)
        if mended == "reset":
            cache.reset()
        x = latents
        for time in steps(TIMES):
            x = x + 0.1 * model(x, time, PROMPT)
        results.append(x)

    assert letters(lambda *given: loop(*given, early=0), model=model) == ["CRCRCR"]
    assert "".join(letters(lambda *given: loop(*given, early=1), model=model)).endswith("CRCRCR")
    assert torch.equal(*results)


def test_of_more_than_sixteen_calls_at_a_first_step_the_first_sixteen_are_kept():
    prompts = [noise(1, 1, 8, seed=400 + k) for k in range(18)]

    def loop(model, cache):
        for time in TIMES[:4]:
            for prompt in prompts:
                model(NOISE, time, prompt)

    assert letters(loop) == ["C" * 18 + "R" * 16 + "CC" + "C" * 18 + "R" * 18]


@pytest.mark.parametrize("named", [False, True])
def test_more_than_sixty_four_calls_at_a_step_have_to_be_named(named):
    """Without names each step is two runs, of 64 calls and of 6."""
    tiles = [noise(1, 5, 8, seed=500 + k) for k in range(70)]

    def loop(model, cache):
        for step, time in enumerate(TIMES[:3]):
            for k, tile in enumerate(tiles):
                if named:
                    with timestep_scope(step, branch=f"tile {k}"):
                        model(tile, time, PROMPT)
                else:
                    model(tile, time, PROMPT)

    wanted = {"C": 140, "R": 70} if named else {"C": 210}
    assert Counter("".join(letters(loop, Interval(1, 2)))) == wanted


@pytest.mark.parametrize(
    ("told", "lines"),
    [(False, ["CRC", "CRC", "CRC", "CRC", "CR"]), (True, ["CCC" + "RRR" + "CCC" + "RRR" + "C" + "R"])],
)
def test_timesteps_that_turn_back_within_a_run(told, lines):
    """As heunpp2 does: three evaluations, of a step and the next two, as long as there are these."""

    def loop(model, cache):
        for i in dithooks.steps(range(6)) if told else range(6):
            for ahead in range(3 if i < 4 else 1):
                model(NOISE + 0.3 * ahead, TIMES[i + ahead], PROMPT)

    assert letters(loop) == lines


@pytest.mark.parametrize(("numbered", "lines"), [(False, ["C", "C", "C"]), (True, ["CRC"])])
def test_numbers_of_steps_that_are_left_out_begin_runs(numbered, lines):
    def loop(model, cache):
        for number, step in enumerate(range(0, 6, 2)):
            with timestep_scope(number if numbered else step):
                model(NOISE, TIMES[step], PROMPT)

    assert letters(loop) == lines
