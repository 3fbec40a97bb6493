"""A server that makes steps of many requests in one call: ``python -m bench.checks.rows --arrivals 2000``.

Requests arrive at random, with one of three plans, and of several numbers of steps; they wait at random, end, or are
cancelled, and the rows of a batch are in another order each time. Guidance is off, in one batch, or by two calls.
What each is drawn as is compared with its own run alone, and the rows that pass each block with what the plans say.
The models are tiny and random, with the shapes of FLUX, Wan and SD3, and of QwenImage with prompts of several lengths,
which are padded to the longest of the batch.

With ``--out FOLDER`` the figures are written to ``rows.json`` and ``rows.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dithooks import CacheHandle, DitCacheConfig, Fitted, Linear, Mask, Row, dit_cache, timestep_scope
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text
from dithooks.tiny import build

MODELS = {
    "FLUX": "FluxTransformer2DModel",
    "Wan": "WanTransformer3DModel",
    "SD3": "SD3Transformer2DModel",
    "QwenImage": "QwenImageTransformer2DModel",
}
GUIDANCE = ("off", "one batch", "two calls")
SHARED = ("img_ids", "txt_ids")  # positions, which are the same for all
ALLOWED = 1e-6  # relative L2 distance of latents: kernels round otherwise in a batch of another size
STEPS = (12, 20, 28)
SCALE = 2.0  # of guidance
MOST = 16  # requests in one batch


def plans(steps: int) -> list[DitCacheConfig]:
    """Three plans for a number of steps: the last residual, the line through two, and weights of three."""
    masks = [tuple(int(step % n == 0 or step < 3) for step in range(steps)) for n in (2, 3, 4)]
    weights = tuple(None if bit else (1.5, -0.75, 0.25) for bit in masks[2])
    corrections = tuple((1.125, -0.125) if step % 4 == 3 else None for step in range(steps))
    return [
        DitCacheConfig(policy=Mask(masks[0])),
        DitCacheConfig(policy=Mask(masks[1]), predictor=Linear()),
        DitCacheConfig(policy=Mask(masks[2]), predictor=Fitted(weights, corrections=corrections)),
    ]


@dataclass(frozen=True, eq=False)
class Picture:
    """What a request asks for: a seed and a prompt, of a plan, with so many steps."""

    number: int
    plan: int
    steps: int
    given: tuple[dict[str, Any], ...]  # of the model, with the prompt and, guided, without

    @property
    def config(self) -> DitCacheConfig:
        """The plan."""
        return plans_of(self.steps)[self.plan]

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each step."""
        return [1 - step / self.steps for step in range(self.steps)]


_PLANS = {steps: plans(steps) for steps in STEPS}


def plans_of(steps: int) -> list[DitCacheConfig]:
    """The plans for a number of steps, the same objects each time."""
    return _PLANS[steps]


class Drawer:
    """A tiny model, and pictures by it.

    Args:
        name: of the model.
        guidance: off, in one batch, or by two calls.
        seed: of the pictures.
        count: number of different pictures.
        steps: their numbers of steps.
    """

    def __init__(self, name: str, guidance: str, seed: int = 0, count: int = 12, steps: Sequence[int] = STEPS) -> None:
        self.tiny, self.guidance, self.is_ragged = build(MODELS[name]), guidance, name == "QwenImage"
        self.model = self.tiny.model
        self.main = next(iter(self.tiny.inputs()))
        rng = random.Random(seed)
        self.pictures = [
            Picture(number, number % 3, rng.choice(steps), tuple(self._given(rng) for _ in range(self._calls)))
            for number in range(count)
        ]
        self.blocks = [ref for _, ref in sorted(_blocks(self.model).items())]

    @property
    def _calls(self) -> int:
        return 1 if self.guidance == "off" else 2

    def _given(self, rng: random.Random) -> dict[str, Any]:
        """What one call is given, of one row."""
        own, fixed = self.tiny.inputs(seed=rng.randrange(10**6)), self.tiny.inputs()
        rows = own[self.main].shape[0]
        given = {}
        for name, value in own.items():
            if name in SHARED:
                given[name] = fixed[name]
            elif isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
                given[name] = value[:1]
            else:
                given[name] = value
        if self.is_ragged:
            length = rng.randrange(3, given["encoder_hidden_states"].shape[1] + 1)
            given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :length]
            given["encoder_hidden_states_mask"] = given["encoder_hidden_states_mask"][:, :length]
        return given

    def call(self, rows: Sequence[tuple[Picture, int, int, Tensor]]) -> Tensor:
        """The model's output for some rows: picture, which of its calls, step and latents."""
        named = [dict(picture.given[which]) for picture, which, _, _ in rows]
        whole = dict(named[0])
        for name, value in named[0].items():
            if name == self.main:
                whole[name] = torch.cat([x for *_, x in rows])
            elif name == "timestep":
                scale = 1 if value.is_floating_point() else 1000
                times = [scale * (1 - step / picture.steps) for picture, _, step, _ in rows]
                whole[name] = torch.tensor(times, dtype=torch.float64).to(value.dtype)
            elif name == "img_shapes":
                whole[name] = [given[name][0] for given in named]
            elif isinstance(value, Tensor) and name not in SHARED and value.dim():
                width = max(given[name].shape[1] for given in named) if value.dim() > 1 else 0
                whole[name] = torch.cat([_padded(given[name], width) for given in named])
        return self.model(**whole, return_dict=False)[0]

    def stepped(self, picture: Picture, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The latents after a step."""
        output = outputs[0] if len(outputs) == 1 else outputs[1] + SCALE * (outputs[0] - outputs[1])
        return x - output.reshape(x.shape) / picture.steps

    @torch.no_grad()
    def alone(self, picture: Picture) -> Tensor:
        """A picture, by its own run alone with the cache."""
        x = picture.given[0][self.main]
        with dit_cache(self.model, picture.config):
            for step, sigma in enumerate(picture.sigmas):
                outputs = []
                for which in range(self._calls):
                    with timestep_scope(step, branch=which, sigma=sigma, steps=picture.steps):
                        outputs.append(self.call([(picture, which, step, x)]))
                x = self.stepped(picture, x, outputs)
        return x


@dataclass
class Served:
    """A request in the server."""

    picture: Picture
    x: Tensor
    step: int = 0


@dataclass
class Tally:
    """What a run of the server has come to."""

    arrivals: int = 0
    drawn: int = 0
    cancelled: int = 0
    calls: int = 0
    rows: int = 0
    wrong: int = 0  # pictures that are not those of their own run alone
    miscounted: int = 0  # calls of which other rows passed the blocks than the plans say
    worst: float = 0.0
    seconds: float = 0.0
    run: int = 0  # block executions, by row
    due: int = 0  # without a cache
    notes: list[str] = field(default_factory=list)

    @property
    def row(self) -> dict[str, Any]:
        """The figures."""
        figures = {name: value for name, value in vars(self).items() if name != "notes"}
        return figures | {"worst": float(f"{self.worst:.3g}"), "seconds": round(self.seconds, 1)}


class Server:
    """A loop that admits, steps and retires requests, several in each call.

    Args:
        drawer: of the pictures.
        seed: of arrivals, orders and cancellations.
        rate: of arrivals, requests a tick.
    """

    def __init__(self, drawer: Drawer, seed: int = 0, rate: float = 0.8) -> None:
        self.drawer, self.rng, self.rate = drawer, random.Random(seed), rate
        self.tally = Tally()
        self._references: dict[int, Tensor] = {}
        self._passed: list[int] = []
        self._active: dict[int, Served] = {}

    @torch.no_grad()
    def run(self, arrivals: int) -> Tally:
        """Serve so many requests."""
        drawer, tally, started = self.drawer, self.tally, time.perf_counter()
        for picture in drawer.pictures:
            self._references[picture.number] = drawer.alone(picture)
        hooks = [block.register_forward_pre_hook(self._count, with_kwargs=True) for block in drawer.blocks]
        try:
            with dit_cache(drawer.model, plans_of(STEPS[0])[0]) as cache:
                self._warm_up(cache)
                while tally.arrivals < arrivals or self._active:
                    self._admit(cache, arrivals)
                    self._tick(cache)
                    self._cancel(cache)
                if cache.stats.bytes_held:
                    tally.notes.append(f"{cache.stats.bytes_held} bytes held at the end")
        finally:
            for hook in hooks:
                hook.remove()
        tally.seconds = time.perf_counter() - started
        return tally

    def _warm_up(self, cache: CacheHandle) -> None:
        """Let the cache see its first batches, for which it calls the model more than once."""
        rows = [(self.drawer.pictures[n], 0, 0, self.drawer.pictures[n].given[0][self.drawer.main]) for n in (0, 1, 2)]
        for some in (rows[:1], rows):
            requests = [cache.request(steps=STEPS[0]) for _ in some]
            with cache.rows([(request, 0) for request in requests]):
                self.drawer.call(some)
            for request in requests:
                request.close()

    def _admit(self, cache: CacheHandle, arrivals: int) -> None:
        while self.tally.arrivals < arrivals and len(self._active) < MOST and self.rng.random() < self.rate:
            picture, name = self.rng.choice(self.drawer.pictures), self.tally.arrivals
            cache.request(name, plan=picture.config, steps=picture.steps, sigmas=picture.sigmas)
            self._active[name] = Served(picture, picture.given[0][self.drawer.main])
            self.tally.arrivals += 1

    def _tick(self, cache: CacheHandle) -> None:
        """Make one step of some of the requests."""
        names = [name for name in self._active if self.rng.random() < 0.9]
        self.rng.shuffle(names)
        if not names:
            return
        outputs: dict[int, list[Tensor]] = {name: [] for name in names}
        for whiches in self._calls():
            rows = [(name, which) for name in names for which in whiches]
            if len(whiches) > 1 and self.rng.random() < 0.5:  # all with the prompt first, then all without
                rows.sort(key=lambda row: row[1])
            served = [(self._active[name], which) for name, which in rows]
            self._passed = []
            with cache.rows(self._entries(rows)):
                output = self.drawer.call([(each.picture, which, each.step, each.x) for each, which in served])
            self._check_counts([each for each, _ in served])
            for (name, _), own in zip(rows, output.split(1), strict=True):
                outputs[name].append(own)
        for name in names:
            each = self._active[name]
            each.x = self.drawer.stepped(each.picture, each.x, outputs[name])
            each.step += 1
            if each.step == each.picture.steps:
                self._retire(name)

    def _calls(self) -> Iterator[tuple[int, ...]]:
        if self.drawer.guidance == "one batch":
            yield (0, 1)
            return
        yield (0,)
        if self.drawer.guidance == "two calls":
            yield (1,)

    def _entries(self, rows: Sequence[tuple[int, int]]) -> list[Any]:
        """Rows in one of the forms that the cache takes."""
        if self.rng.random() < 0.5:
            return [(name, self._active[name].step) for name, _ in rows]
        return [Row(name, self._active[name].step) for name, _ in rows]

    def _check_counts(self, served: Sequence[Served]) -> None:
        """Compare the rows that have passed the blocks with what the plans say."""
        policies = [each.picture.config.when for each in served]
        steps = [policy.steps[each.step] for policy, each in zip(policies, served, strict=True)]
        wanted, tally = sum(steps), self.tally
        tally.calls += 1
        tally.rows += len(served)
        tally.run += sum(self._passed)
        tally.due += len(served) * len(self.drawer.blocks)
        if self._passed != [wanted] * (len(self.drawer.blocks) if wanted else 0):
            tally.miscounted += 1
            tally.notes.append(f"{len(served)} rows, {wanted} to compute: {self._passed[:4]} passed the first blocks")

    def _retire(self, name: int) -> None:
        each = self._active.pop(name)
        reference = self._references[each.picture.number]
        off = float((each.x - reference).norm() / reference.norm())
        self.tally.drawn += 1
        self.tally.worst = max(self.tally.worst, off)
        if not off <= ALLOWED:
            self.tally.wrong += 1
            self.tally.notes.append(f"request {name}, plan {each.picture.plan}: {off:.3g} off")

    def _cancel(self, cache: CacheHandle) -> None:
        for name in [name for name in self._active if self.rng.random() < 0.005]:
            del self._active[name]
            cache.forget(name)
            self.tally.cancelled += 1

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        self._passed.append(first.shape[0])


def _blocks(model: nn.Module) -> dict[tuple[str, int], nn.Module]:
    lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    return {(name, n): block for name, each in lists.items() if "blocks" in name for n, block in enumerate(each)}


def _padded(value: Tensor, width: int) -> Tensor:
    if value.dim() < 2 or value.shape[1] == width:
        return value
    return torch.cat([value, value.new_zeros((1, width - value.shape[1], *value.shape[2:]))], 1)


def page(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        "# Rows of many requests in one call",
        "",
        f"By `{figures['command']}`, on {figures['machine']}; {packages}; {figures['date']}.",
        "",
        f"Requests of three plans and {', '.join(map(str, STEPS))} steps arrive at random; rows join, leave and change "
        "their order at every step. Wrong: pictures whose latents differ from their own run alone, with the cache, by "
        f"more than {ALLOWED:g} (relative L2). Miscounted: calls of which other rows passed the blocks than the plans "
        "say. Fewer blocks: executions by row without a cache, over those that ran.",
        "",
        "| model | guidance | arrivals | drawn | cancelled | calls | rows | wrong | miscounted | farthest off | "
        "fewer blocks | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["runs"]:
        lines.append(
            f"| {row['model']} | {row['guidance']} | {row['arrivals']} | {row['drawn']} | {row['cancelled']} | "
            f"{row['calls']} | {row['rows']} | {row['wrong']} | {row['miscounted']} | {row['worst']:.2g} | "
            f"{row['due'] / max(row['run'], 1):.2f} × | {row['seconds']:.0f} |"
        )
    total = sum(row["arrivals"] for row in figures["runs"])
    wrong = sum(row["wrong"] + row["miscounted"] for row in figures["runs"])
    return "\n".join([*lines, "", f"Result: {total} arrivals, {wrong} wrong or miscounted."])


def main() -> int:
    """Serve, and print or write what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrivals", type=int, default=2000, help="of all models and ways of guidance together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    pairs = [(name, guidance) for name in MODELS for guidance in GUIDANCE]
    runs = []
    for number, (name, guidance) in enumerate(pairs):
        arrivals = args.arrivals // len(pairs) + (number < args.arrivals % len(pairs))
        print(f"{name}, guidance {guidance} …", file=sys.stderr, flush=True)
        tally = Server(Drawer(name, guidance, args.seed), args.seed + number).run(arrivals)
        for note in tally.notes[:5]:
            print(f"  {note}", file=sys.stderr)
        runs.append({"model": name, "guidance": guidance, **tally.row})
    figures = {
        "command": f"python -m bench.checks.rows --arrivals {args.arrivals}",
        "machine": machine(),
        "versions": versions("diffusers"),
        "date": datetime.date.today().isoformat(),
        "runs": runs,
    }
    text = page(figures)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "rows.json", json.dumps(figures, indent=1) + "\n")
        write_text(args.out / "rows.md", text + "\n")
    return 1 if any(row["wrong"] or row["miscounted"] for row in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
