"""What each cache keeps, in bytes, at the sizes that models are used at.

Run as ``python -m bench.memory``. diffusers' own transformer classes run on the meta device, where tensors have shapes
and no contents, at the width, depth and number of tokens of FLUX.1-dev (1024 × 1024), Wan 2.1 14B (480p, 81 frames, two
calls a step) and HunyuanVideo (720p, 129 frames). Nothing is asked of a library: all tensors of the process are looked
up, and what lies in storages that were not there before the cache was attached counts, each storage once.

- kept: after a computed step, when its output is gone; the most of several steps.
- meanwhile: in the middle of a computed step, before the middle block of the longest list, over what the same call
  without a cache has there.

Caches run with steps computed at most, so that those which decide by what they see never have to look at contents that
are not there: what they keep does not depend on it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.costs_peers import LISTS, METHODS, Method, Missing, Remove, Steps, by_cache_dit, quiet
from dithooks.environment.machine import versions
from dithooks.storage.replacement import write_text

SMALL = 64  # bytes; numbers of the loop's own are no more
RUN, COMPUTED = 9, 3  # steps of the run, and computed ones that are made: at its end caches may let go


@dataclass(frozen=True)
class Geometry:
    """A model at a size, and what its transformer is called with.

    Args:
        name: of the model and the size.
        make: the transformer.
        given: arguments of a call, without the timestep, for the branch of that number.
        branches: calls at each step.
    """

    name: str
    make: Callable[[], nn.Module]
    given: Callable[[int], dict[str, Any]]
    branches: int = 1
    dtype: torch.dtype = torch.bfloat16


def tensors() -> list[Tensor]:
    """Every tensor of the process that the collector knows of."""
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


@contextmanager
def since() -> Iterator[Callable[[], dict[int, int]]]:
    """Gives the storages that are there now and were not at the beginning, by identity, with their sizes in bytes.

    Those that were are kept meanwhile, so that no new one gets the place of one that is gone. What was there is put out
    of the collector's sight, as looking through it again takes long.
    """
    gc.collect()
    before = tensors()
    known = {each.untyped_storage()._cdata for each in before}

    def new() -> dict[int, int]:
        found = {}
        for each in tensors():
            storage = each.untyped_storage()
            if storage._cdata not in known and storage.nbytes() > SMALL:
                found[storage._cdata] = storage.nbytes()
        return found

    gc.freeze()
    try:
        yield new
    finally:
        gc.unfreeze()
        del before


@dataclass
class Held:
    """What a run held: bytes and storages that were kept after a step, and bytes in the middle of one.

    ``alone`` says that it made the first step only: the next would have had to look at contents.
    """

    kept: int = 0
    storages: int = 0
    meanwhile: int = 0
    alone: bool = False


def held(method: Method | None, model: nn.Module, geometry: Geometry) -> Held:
    """Run with a cache, or without, and look.

    Raises:
        Missing: the library is not installed.
    """
    if method is not None and method.prepare is not None:
        method.prepare(model)
    loop = Steps(RUN, geometry.branches, geometry.dtype)
    calls = [geometry.given(branch) for branch in range(geometry.branches)]
    device = next(model.parameters()).device
    times = [torch.full((1,), 1000.0 - 100 * step, device=device, dtype=geometry.dtype) for step in range(RUN)]
    middle, found, seen = in_the_middle(model), Held(), set[int]()
    made = 1 if method is None else (COMPUTED - 1) * method.every + 1
    with since() as new:

        def look(*_: Any) -> None:
            if loop.step in (0, made - 1):  # of both the last counts: at the first, more may be looked at than is kept
                gc.collect()
                here = sum(new().values())
                found.meanwhile = here if loop.step not in seen else max(found.meanwhile, here)
                seen.add(loop.step)

        remove: Remove | None = None if method is None else method.attach(model, "computed", loop)
        hook = middle.register_forward_pre_hook(look)
        for step in range(made):
            try:
                for branch, given in enumerate(calls):
                    with model.cache_context(("cond", "uncond")[branch]):
                        model(**given, timestep=times[step], return_dict=False)
            except RuntimeError as error:
                if step == 0 or "meta tensors" not in str(error):
                    raise
                found.alone = True
                break
            loop.moved(torch.zeros(1))
            gc.collect()
            now = new()
            if sum(now.values()) >= found.kept:
                found.kept, found.storages = sum(now.values()), len(now)
        hook.remove()
        if remove is not None:
            remove()
    return found


def in_the_middle(model: nn.Module) -> nn.Module:
    """A layer that the middle block of the longest list calls first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest: Any = max(lists, key=lambda each: sum(1 for block in each for _ in block.parameters()))
    block = longest[len(longest) // 2]
    block = getattr(block, "block", block)
    return block.norm1 if hasattr(block, "norm1") else block.norm


# -- geometries ---------------------------------------------------------------------------------------------------


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _of(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with torch.device("meta"):
            return make().to(torch.bfloat16).eval().requires_grad_(False)

    return made


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel()


def _hunyuan() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel()


def _flux_given(_: int) -> dict[str, Any]:
    return {
        "hidden_states": _meta(1, 4096, 64),
        "encoder_hidden_states": _meta(1, 512, 4096),
        "pooled_projections": _meta(1, 768),
        "img_ids": _meta(4096, 3),
        "txt_ids": _meta(512, 3),
        "guidance": _meta(1),
    }


_WAN_LATENTS = _meta(1, 16, 21, 60, 104)  # one for both calls of a step, as guidance has it


def _wan_given(_: int) -> dict[str, Any]:
    return {"hidden_states": _WAN_LATENTS, "encoder_hidden_states": _meta(1, 512, 4096)}


def _hunyuan_given(_: int) -> dict[str, Any]:
    return {
        "hidden_states": _meta(1, 16, 33, 90, 160),
        "encoder_hidden_states": _meta(1, 256, 4096),
        "encoder_attention_mask": _meta(1, 256, dtype=torch.bool),
        "pooled_projections": _meta(1, 768),
        "guidance": _meta(1),
    }


GEOMETRIES = (
    Geometry("FLUX.1-dev, 1024×1024", _of(_flux), _flux_given),
    Geometry("Wan 2.1 14B, 480p, 81 frames", _of(_wan), _wan_given, branches=2),
    Geometry("HunyuanVideo, 720p, 129 frames", _of(_hunyuan), _hunyuan_given),
)
SIZED = (
    *(each for each in METHODS if "warm-up" not in each.name and "Threshold" not in each.name),
    Method("cache-dit, F8B0, static mask", "cache-dit", by_cache_dit(mask=True, front=8), every=2),
)


# -- output -------------------------------------------------------------------------------------------------------


def size(number: float) -> str:
    """In MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if abs(number) >= 2**30 else f"{number / 2**20:.1f} MiB"


def table(results: dict[str, Any]) -> str:
    """Markdown: a table for each geometry, the least first."""
    lines = ["# What a cache keeps", "", results["about"]]
    for name in dict.fromkeys(row["geometry"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["geometry"] == name]
        rows.sort(key=lambda row: row.get("kept", float("inf")))
        lines += ["", f"## {name}", "", "| | kept | storages | meanwhile | |", "|---" * 5 + "|"]
        for row in rows:
            if "error" in row:
                lines.append(f"| {row['name']} | — | — | — | {row['error'].replace('|', '/')} |")
                continue
            cells = (size(row["kept"]), str(row["storages"]), size(row["meanwhile"]), row["note"])
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(method: Method, geometry: Geometry, base: nn.Module, plain: Held) -> dict[str, Any]:
    """A row."""
    found: dict[str, Any] = {"name": method.name, "library": method.library, "geometry": geometry.name}
    model = copy.deepcopy(base)
    try:
        # Only FLUX calls its blocks by keyword; of the others one list is taken as it is.
        fitted = method if "Flux" in type(model).__name__ else Method(method.name, method.library, method.attach)
        seen = held(fitted, model, geometry)
    except Missing as error:
        return {**found, "error": str(error)}
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return {**found, "error": f"fails: {type(error).__name__}: {first[:160]}"}
    note = "after the first step: from the second on it looks at contents" if seen.alone else ""
    if method.library == "msmodelslim":
        lists = [name for name in LISTS if isinstance(getattr(model, name, None), nn.ModuleList)]
        note = "one residual for all calls of a step" if geometry.branches > 1 else ""
        note = "of the single-stream blocks only: it takes one list" if len(lists) > 1 else note
    return {
        **found,
        "kept": seen.kept,
        "storages": seen.storages,
        "meanwhile": seen.meanwhile - plain.meanwhile,
        "note": note,
    }


def main(arguments: list[str] | None = None) -> None:
    """Count what each cache keeps, on the meta device at the sizes that models are used at; a few minutes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first geometry only")
    parser.add_argument("--only", default="", help="methods whose name has this")
    parser.add_argument("--geometry", default="", help="sizes whose name has this")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in SIZED if options.only in each.name]
    with torch.no_grad(), quiet():
        wanted = [each for each in GEOMETRIES if options.geometry in each.name]
        measure_all(options.out, chosen, wanted[:1] if options.quick else wanted)


def measure_all(out: Path, methods: Sequence[Method], geometries: Sequence[Geometry]) -> dict[str, Any]:
    """All rows, written again after each."""
    begun, rows, results = time.perf_counter(), list[dict[str, Any]](), dict[str, Any]()
    known = versions("torch", "cache-dit", "diffusers", "msmodelslim")
    for geometry in geometries:
        base = geometry.make()
        plain = held(None, base, geometry)
        for method in methods:
            rows.append(measure(method, geometry, base, plain))
            print(f"{time.perf_counter() - begun:5.0f} s  {rows[-1]}", flush=True)
            about = f"On the meta device, bfloat16; {', '.join(f'{n} {v}' for n, v in known.items())}"
            results = {"about": about, "rows": rows}
            write_text(out / "memory.json", json.dumps(results, indent=1) + "\n")
            write_text(out / "memory.md", table(results))
    return results


if __name__ == "__main__":
    main()
