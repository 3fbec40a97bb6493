"""Do the nodes hold in a real ComfyUI? ``COMFYUI_HOME=path/to/ComfyUI python -m bench.checks.comfyui``.

Draws with tiny random models of ComfyUI's own classes for FLUX and Wan, by its own samplers, on the CPU, under
inference mode, as its server does. What is drawn with the cache is compared with an oracle that has nothing of this
library: it leaves blocks out by ComfyUI's own ``patches_replace``. The nodes are loaded by ComfyUI's own loader of
custom nodes, and one workflow runs through its executor.

Where COMFYUI_HOME names no checkout, it says so and ends with exit code 0. Packages that ComfyUI imports at its start
and does not need here (torchvision, torchaudio, …) may be missing: something empty stands in for them. ``--out`` writes
``comfyui.json`` and ``comfyui.md`` there. Exit codes: 0 all holds, or no checkout; 1 something does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib
import importlib.machinery
import inspect
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from dithooks import DitCacheConfig, Mask
from dithooks.environment.machine import machine, versions
from dithooks.integrations.comfyui import node_declarations as declared
from dithooks.integrations.comfyui.__main__ import FILE
from dithooks.integrations.comfyui.__main__ import main as write_entry
from dithooks.integrations.comfyui.cached_run import CachedRun
from dithooks.integrations.comfyui.plan_folder import register_folder
from dithooks.storage.replacement import write_text

DISPENSABLE = ("torchvision", "torchaudio", "kornia", "av", "spandrel", "torchsde", "alembic", "sqlalchemy")
MODELS = {"FLUX": (1, 16, 8, 12), "Wan": (1, 16, 3, 8, 8)}  # the shape of their latents
BITS = tuple(int(c) for c in "11101001010010101001")  # 10 of 20 steps computed
CLOSE = 1e-5  # relative


def main() -> int:
    """Run the checks and print, or write, what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.comfyui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    home = Path(os.environ.get("COMFYUI_HOME", ""))
    if not os.environ.get("COMFYUI_HOME") or not (home / "comfy" / "samplers.py").is_file():
        print("COMFYUI_HOME names no checkout of ComfyUI: nothing was checked.")
        return 0
    missing = start(home)
    rows = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODELS:
            model = Tiny(name)
            for check in CHECKS:
                rows += [{"model": name, "check": what, **row} for what, row in check(model)]
        rows += [{"model": "", "check": what, **row} for what, row in nodes_by_the_loader(home)]
    figures = {
        "machine": machine(),
        "versions": {"ComfyUI": importlib.import_module("comfyui_version").__version__, **versions()},
        "date": datetime.date.today().isoformat(),
        "stand_ins": missing,
        "rows": rows,
    }
    text = page(figures)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "comfyui.json", json.dumps(figures, indent=1) + "\n")
        write_text(args.out / "comfyui.md", text + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


def start(home: Path) -> list[str]:
    """Import ComfyUI for the CPU; return what something empty stands in for."""
    missing = []
    for name in DISPENSABLE:
        try:
            importlib.import_module(name)
        except Exception:
            missing.append(name)
            for module in [each for each in sys.modules if each.partition(".")[0] == name]:
                del sys.modules[module]
            sys.meta_path.insert(0, Empty(name))
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, str(home))
    importlib.import_module("comfy.options").enable_args_parsing()
    paths = importlib.import_module("folder_paths")
    paths.models_dir = tempfile.mkdtemp()
    logging.disable(logging.INFO)
    for name in ("comfy.sample", "comfy.samplers", "comfy.supported_models", "comfy.model_patcher", "comfy.controlnet"):
        importlib.import_module(name)
    return missing


class Empty(importlib.machinery.PathFinder):
    """Finds an empty module wherever one below a name is imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # type: ignore[override]
        """Return the spec of such a module."""
        if name.partition(".")[0] != self.name:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        """Return an object that has every name."""
        return MagicMock(name=spec.name, __spec__=spec, __path__=[], __name__=spec.name, __version__="0")

    def exec_module(self, module: Any) -> None:
        """Do nothing."""


class Tiny:
    """A tiny random model of ComfyUI's, and a sampler's run with it."""

    def __init__(self, name: str) -> None:
        supported = sys.modules["comfy.supported_models"]
        if name == "FLUX":
            fields = sys.modules["comfy.ldm.flux.model"].FluxParams.__annotations__
            later = {"txt_ids_dims": []} if "txt_ids_dims" in fields else {}
            config = supported.Flux(
                {
                    **later,
                    **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24},
                    **{"context_in_dim": 32, "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2},
                    **{"depth_single_blocks": 3, "axes_dim": [4, 10, 10], "theta": 10_000, "patch_size": 2},
                    **{"qkv_bias": True, "guidance_embed": True},
                }
            )
            self.blocks = [("double_block", 0), ("double_block", 1), *(("single_block", each) for each in range(3))]
        else:
            config = supported.WAN21_T2V(
                {
                    **{"image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16},
                    **{"dim": 48, "ffn_dim": 96, "freq_dim": 32, "text_dim": 32, "out_dim": 16},
                    **{"num_heads": 2, "num_layers": 4},
                }
            )
            self.blocks = [("double_block", each) for each in range(4)]
        config.set_inference_dtype(torch.float32, None)
        self.shape = MODELS[name]
        self.model = config.get_model({}, "", device=torch.device("cpu")).eval()
        generator = torch.Generator().manual_seed(0)
        for each in self.model.parameters():
            noise = torch.randn(each.shape, generator=generator)
            each.copy_(0.5 * noise / each.shape[-1] ** 0.5 if each.dim() > 1 else 1 + 0.1 * noise)
        patcher = sys.modules["comfy.model_patcher"].ModelPatcher
        self.patcher = patcher(self.model, torch.device("cpu"), torch.device("cpu"))
        self.draw(self.patcher, steps=2)  # loads it
        self.before = self.state()

    def draw(
        self, patcher: Any, sampler: str = "euler", steps: int = 20, lengths: tuple[int, int] = (7, 7), **given: Any
    ) -> torch.Tensor:
        """Return what a KSampler draws; prompts of two lengths cannot be one batch."""
        shape = given.pop("shape", self.shape)
        conds = given.pop("conds", None) or [
            conditioning(seed, each) for seed, each in zip((1, 2), lengths, strict=True)
        ]
        latent = given.pop("latent", torch.zeros(shape))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        return sys.modules["comfy.sample"].sample(
            *(patcher, noise, steps, 3.0, sampler, "simple", *conds, latent), disable_pbar=True, seed=3, **given
        )

    def state(self) -> Any:
        """What the modules of the model are and hold."""
        return {
            name: (id(each), type(each), sorted(vars(each)), len(each._forward_hooks), len(each._forward_pre_hooks))
            for name, each in self.model.named_modules()
        }

    def cached(self, patcher: Any = None, bits: tuple[int, ...] = BITS) -> tuple[Any, CachedRun]:
        """Return a clone that is cached from the second block on, and its run."""
        run = CachedRun(DitCacheConfig(cache_block_start=1, policy=Mask(bits)), "mask")
        return run.put_on(patcher or self.patcher), run

    def compare(self, draw: Callable[[Any], torch.Tensor], bits: tuple[int, ...] = BITS, patcher: Any = None) -> Any:
        """Draw with the cache, by the oracle, and without; return how far they are apart, and the report."""
        patcher = patcher or self.patcher
        clone, run = self.cached(patcher, bits)
        drawn = draw(clone)
        left = self.state() != self.before
        oracle = Oracle(self.blocks[1:], bits)
        right, plain = draw(oracle.put_on(patcher)), draw(patcher)
        told = run.report.lines[-1].partition(" (")[0] if run.report.lines else ""
        off = apart(drawn, right)
        return {
            "off": off,
            "uncached": apart(plain, right),
            "told": told,
            "left": left,
            "holds": off <= CLOSE and not left and apart(plain, right) > 1e-4 and bool(drawn.isfinite().all()),
        }


def conditioning(seed: int, length: int, **given: Any) -> Any:
    """A prompt's conditioning, as a text encoder's node returns it."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 24, generator=generator)
    return [[torch.randn(1, length, 32, generator=generator), {"pooled_output": pooled, "guidance": 3.5, **given}]]


def apart(drawn: torch.Tensor, right: torch.Tensor) -> float:
    """Relative L2."""
    return float((drawn - right).norm() / right.norm())


class Oracle:
    """A cache by hand, of ComfyUI's own means: each block of a range is replaced by a function around it.

    The work of a range is what its blocks add to the stream one by one, so that what a ControlNet adds between them is
    not among it. A call is told by its conditionings, and how often they were called at the step.
    """

    def __init__(self, blocks: list[tuple[str, int]], bits: tuple[int, ...]) -> None:
        self.blocks, self.bits = blocks, bits
        self.work: dict[Any, torch.Tensor] = {}
        self.counts: dict[Any, int] = {}
        self.step, self.run = -1, None
        self.seen: dict[Any, int] = {}

    def put_on(self, patcher: Any) -> Any:
        """Return a clone with the functions."""
        clone = patcher.clone()
        for place, (kind, number) in enumerate(self.blocks):
            clone.set_model_patch_replace(self._around(place), "dit", kind, number)
        return clone

    def _around(self, place: int) -> Callable[..., Any]:
        def around(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            if place == 0:
                self._begin(args["transformer_options"])
            text = args.get("txt") if self.blocks[place][0] == "double_block" else None
            joined = text is not None and self.blocks[-1][0] == "single_block"
            before = torch.cat([text, args["img"]], 1) if joined else args["img"].clone()
            if self.reuses:
                if place == 0:
                    after = before + self.work[self.key]
                    split = text.shape[1] if joined else 0
                    return {
                        **args,
                        "img": after[:, split:].clone(),
                        "txt": after[:, :split].clone() if joined else text,
                    }
                return args
            out = extra["original_block"](args)
            after = torch.cat([out["txt"], out["img"]], 1) if joined else out["img"]
            self.sum = after - before if self.sum is None else self.sum + (after - before)
            if place == len(self.blocks) - 1:
                self.work[self.key] = self.sum
            return {**args, **out}

        return around

    def _begin(self, options: dict[str, Any]) -> None:
        sigmas, sigma = options["sample_sigmas"], options["sigmas"][0]
        if self.run is not sigmas:  # another run
            self.run, self.step = sigmas, -1
            self.work, self.seen = {}, {}
        step = int((sigmas[:-1] - sigma).abs().argmin())
        if step != self.step:
            self.step, self.counts = step, {}
        window = getattr(options.get("context_window"), "index_list", ())
        conds = (*options["uuids"], *window, "skip" in str(options.get("patches_replace")))
        count = self.counts[conds] = self.counts.get(conds, 0) + 1
        self.key = (conds, count)
        was_there = self.seen.get(self.key) == step - 1
        self.seen[self.key] = step
        self.reuses = not self.bits[step] and self.key in self.work and was_there
        self.sum: torch.Tensor | None = None


def samplers_and_conds(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """20 steps, batched and split."""
    for sampler in ("euler", "heun", "dpmpp_2m", "euler_ancestral", "res_multistep"):
        for name, lengths in (("one batch", (7, 7)), ("a call each", (7, 5))):
            yield f"{sampler}, {name}", tiny.compare(lambda p, s=sampler, n=lengths: tiny.draw(p, s, lengths=n))


def memory_runs_short(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """What fits into a call changes from step to step."""
    own, calls = tiny.model.memory_required, [0]

    def required(*args: Any, **kwargs: Any) -> float:
        calls[0] += 1
        return 0.0 if calls[0] < 14 or calls[0] > 40 else 1e30

    def draw(patcher: Any) -> torch.Tensor:
        calls[0] = 0
        tiny.model.memory_required = required
        try:
            return tiny.draw(patcher)
        finally:
            del tiny.model.memory_required
            assert tiny.model.memory_required == own

    yield "one batch, then a call each, then one batch", tiny.compare(draw)


def several_samplers(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """In one workflow."""
    plain = tiny.draw(tiny.patcher)
    clone, _ = tiny.cached()
    first = tiny.draw(clone)
    uncached = apart(tiny.draw(tiny.patcher), plain)
    again = apart(tiny.draw(clone), first)
    left = tiny.state() != tiny.before
    yield (
        "two samplers on one model, one cached and one not, in turns",
        {"off": max(uncached, again), "told": "", "left": left, "holds": uncached == again == 0.0 and not left},
    )

    def two_stages(patcher: Any) -> torch.Tensor:
        half = tiny.draw(patcher, last_step=10)
        return tiny.draw(patcher, latent=half, start_step=10, disable_noise=True)

    yield "KSampler (Advanced): steps 0 to 10, then 10 to 20", tiny.compare(two_stages, BITS[:10])

    def larger(patcher: Any) -> torch.Tensor:
        small = tiny.draw(patcher)
        size = (*small.shape[:-2], 12, 12)
        latent = torch.nn.functional.interpolate(small.flatten(0, -3)[None], size[-2:])[0].reshape(size)
        return tiny.draw(patcher, shape=size, latent=latent, denoise=0.5)

    yield "hires fix: another size, denoise 0.5", tiny.compare(larger)


def cancelled(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """By an exception in the middle of a run."""
    clone, _ = tiny.cached()
    right = tiny.draw(clone)

    def cancel(step: int, *_: Any) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        tiny.draw(clone, callback=cancel)
    left = tiny.state() != tiny.before
    off = apart(tiny.draw(clone), right)
    yield (
        "cancelled at step 8, then drawn again",
        {"off": off, "told": "", "left": left, "holds": not left and off == 0},
    )


def other_nodes(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """At work on the same model."""
    lora = tiny.patcher.clone()
    key = next(name for name in lora.model.state_dict() if name.endswith("weight") and "blocks.1" in name)
    lora.add_patches({key: (0.05 * torch.ones_like(lora.model.state_dict()[key]),)}, 1.0)
    row = tiny.compare(tiny.draw, patcher=lora)
    unpatched = tiny.draw(tiny.patcher)
    row["holds"] = row["holds"] and apart(tiny.draw(lora), unpatched) > 1e-4
    yield "a patch of weights, as a LoRA's", row

    conds = [conditioning(seed, 7, control=control(tiny)) for seed in (1, 2)]
    for each in conds[1]:
        each[1]["control"] = conds[0][0][1]["control"]
    if tiny.blocks[-1][0] == "single_block":  # ComfyUI's Wan takes none
        row = tiny.compare(lambda p: tiny.draw(p, conds=conds))
        row["holds"] = row["holds"] and apart(tiny.draw(tiny.patcher, conds=conds), unpatched) > 1e-3
        yield "a ControlNet's residuals", row
    yield from parts_of_the_picture(tiny)
    yield from hooked_conds(tiny)
    yield from compiled(tiny)
    slg = importlib.import_module("comfy_extras.nodes_slg").SkipLayerGuidanceDiT
    layers = ("", "1") if tiny.blocks[-1][0] == "single_block" else ("2", "")
    skipping = slg.execute(tiny.patcher, 2.0, 0.0, 1.0, *layers).args[0]
    yield "SkipLayerGuidanceDiT, a call each", tiny.compare(lambda p: tiny.draw(p, lengths=(7, 5)), patcher=skipping)
    easy = importlib.import_module("comfy_extras.nodes_easycache").EasyCacheNode
    both = easy.execute(tiny.cached()[0], 0.2, 0.15, 0.95, False).args[0]
    try:
        tiny.draw(both)
        told = ""
    except ValueError as error:
        told = f"refused: {error}"
    yield (
        "EasyCache's node on the same model",
        {"off": 0.0, "told": told, "left": tiny.state() != tiny.before, "holds": bool(told)},
    )


def parts_of_the_picture(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts for regions, and windows over the frames of a video."""
    left, right = (conditioning(seed, 7, area=(8, 6, 0, x), strength=1.0) for seed, x in ((1, 0), (4, 6)))
    if len(tiny.shape) == 4:
        whole = conditioning(5, 7)
        yield (
            "two regions with prompts of their own",
            tiny.compare(lambda p: tiny.draw(p, conds=[left + right + whole, conditioning(2, 7)])),
        )
        return
    node = importlib.import_module("comfy_extras.nodes_context_windows").WanContextWindowsManualNode
    shape = (*tiny.shape[:2], 7, *tiny.shape[3:])
    later = {"freenoise": False} if "freenoise" in inspect.signature(node.execute).parameters else {}
    for schedule in ("standard_static", "batched"):
        windows = node.execute(tiny.patcher, 13, 5, schedule, 1, False, "pyramid", **later).args[0]
        yield f"context windows, {schedule}", tiny.compare(lambda p: tiny.draw(p, shape=shape), patcher=windows)


def hooked_conds(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """One conditioning with a LoRA of its own, whose strength changes half way."""
    hooks = importlib.import_module("comfy.hooks")
    key = next(each for each in tiny.model.state_dict() if each.endswith("weight") and "blocks.1" in each)
    change = 0.05 * torch.ones_like(tiny.model.state_dict()[key])

    def draw(patcher: Any) -> torch.Tensor:
        group = hooks.create_hook_lora({f"{key.removesuffix('.weight')}.diff": change}, 1.0, 0.0)
        frames = hooks.HookKeyframeGroup()
        frames.add(hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(hooks.HookKeyframe(strength=0.3, start_percent=0.5))
        group.set_keyframes_on_hooks(frames)
        return tiny.draw(patcher, conds=[conditioning(1, 7, hooks=group), conditioning(2, 7)])

    clone, run = tiny.cached()
    drawn, plain, unhooked = draw(clone), draw(tiny.patcher), tiny.draw(tiny.patcher)
    left, off = tiny.state() != tiny.before, apart(drawn, plain)
    told, effect = run.report.lines[-1].partition(" (")[0], apart(plain, unhooked)
    yield (
        "a hook's LoRA on one conditioning, with keyframes",
        {"off": None, "uncached": off, "told": told, "left": left, "holds": off < 0.2 and effect > 1e-3 and not left},
    )


def compiled(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """By ComfyUI's own wrapper, which has another module in place of the model while it is called."""
    wrap = importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper
    other = Tiny("FLUX" if tiny.blocks[-1][0] == "single_block" else "Wan")
    right = other.draw(other.cached()[0])
    clone, run = other.cached()
    wrap(clone, "eager")
    off = max(apart(other.draw(clone), right) for _ in range(2))
    marks = {name for name, each in other.model.named_modules() if hasattr(each, "_is_torch_compile")}
    told = run.report.lines[-1].partition(" (")[0]
    left = {k: v for k, v in other.state().items() if k not in marks} != {
        k: v for k, v in other.before.items() if k not in marks
    }
    yield (
        "TorchCompileModel, of the whole model",
        {"off": off, "told": told, "left": left, "holds": off < CLOSE and not left},
    )


def control(tiny: Tiny) -> Any:
    """A ControlNet without a net: it adds the same to some of the blocks."""
    base = sys.modules["comfy.controlnet"].ControlBase

    class Constant(base):  # type: ignore[misc, valid-type]
        def get_control(self, x: Any, t: Any, cond: Any, batched: int, options: Any) -> dict[str, list[Any]]:
            tokens = x.shape[-1] * x.shape[-2] // 4
            added = 0.1 * torch.sin(torch.arange(tokens * 48.0)).reshape(1, tokens, 48) * float(t[0])
            return {"input": [None, added], "output": [added, added * 2]}

        def copy(self) -> Any:
            return self

    return Constant()


def plans(tiny: Tiny) -> Iterator[tuple[str, dict[str, Any]]]:
    """Made and used by the nodes."""
    register_folder()
    plain = tiny.draw(tiny.patcher)
    (model,) = declared.record_and_plan(tiny.patcher, 2.0, type(tiny.model).__name__)
    recorded, planned = tiny.draw(model), tiny.draw(model)
    lines = declared.report(model, None)[1].splitlines()
    off, error = apart(recorded, plain), apart(planned, plain)
    left = tiny.state() != tiny.before
    yield (
        "Record and plan: the recorded run",
        {"off": off, "told": lines[0], "left": left, "holds": off == 0 and not left},
    )
    (model,) = declared.apply_plan(tiny.patcher, f"{type(tiny.model).__name__}.json")
    off = apart(tiny.draw(model), planned)
    holds = off == 0 and 0 < error < 0.2
    yield (
        "Apply plan: the same as the run after the recorded one",
        {"off": off, "told": lines[1], "left": left, "holds": holds},
    )
    for target in (1.5, 2.0, 3.0):
        (model,) = declared.budget(tiny.patcher, target, 0, "line through the last two", False)
        error = apart(tiny.draw(model), plain)
        told = str(declared.report(model, None)[1])
        fewer, left = float(told.partition("×")[0].rpartition(" ")[2]), tiny.state() != tiny.before
        yield (
            f"Budget ×{target:g}",
            {
                "off": None,
                "uncached": error,
                "told": told.partition(" (")[0],
                "left": left,
                "holds": abs(fewer / target - 1) < 0.06 and error < 0.2,
            },
        )


CHECKS = (samplers_and_conds, memory_runs_short, several_samplers, cancelled, other_nodes, plans)


def nodes_by_the_loader(home: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Load the entry as ComfyUI does at its start, and run a workflow."""
    with tempfile.TemporaryDirectory() as folder:
        assert write_entry([folder]) == 0
        nodes = importlib.import_module("nodes")
        loaded = asyncio.run(nodes.load_custom_node(str(Path(folder, FILE))))
    own = {name: cls for name, cls in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Dithooks")}
    titles = [nodes.NODE_DISPLAY_NAME_MAPPINGS[name] for name in own]
    told = ", ".join(title.removeprefix("dithooks: ") for title in titles)
    yield (
        "the entry in custom_nodes is loaded",
        {"off": None, "told": told, "left": False, "holds": loaded and len(own) == 4},
    )
    tiny = Tiny("FLUX")

    class Loader:
        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT"), "load", ""

        @classmethod
        def INPUT_TYPES(cls) -> Any:
            return {"required": {}}

        def load(self) -> Any:
            return tiny.patcher, conditioning(1, 7), conditioning(2, 7), {"samples": torch.zeros(tiny.shape)}

    nodes.NODE_CLASS_MAPPINGS["TinyLoader"] = Loader

    def sampler(model: list[Any]) -> dict[str, Any]:
        names = ("positive", "negative", "latent_image")
        links = {name: ["1", number] for number, name in enumerate(names, 1)}
        settings = {"seed": 1, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return {"class_type": "KSampler", "inputs": {"model": model, **links, **settings}}

    prompt = {
        "1": {"class_type": "TinyLoader", "inputs": {}},
        "2": {
            "class_type": "DithooksBudget",
            "inputs": {
                **{"model": ["1", 0], "target_speedup": 2.0, "first_blocks": 0, "keep_on_host": False},
                "forecast": "line through the last two",
            },
        },
        "3": sampler(["2", 0]),
        "4": sampler(["1", 0]),
        "5": {"class_type": "DithooksReport", "inputs": {"model": ["2", 0], "after": ["3", 0]}},
        "6": {"class_type": "DithooksReport", "inputs": {"model": ["2", 0], "after": ["4", 0]}},
    }
    execution = importlib.import_module("execution")
    server = MagicMock(client_id=None, last_node_id=None)
    valid = asyncio.run(execution.validate_prompt("id", prompt, None))
    runner = execution.PromptExecutor(server)
    runner.execute(prompt, "id", {}, ["5", "6"])
    shown = [each["text"] for each in (runner.history_result["outputs"].get("5"),) if each]
    left = tiny.state() != tiny.before
    yield (
        "a workflow runs through the executor, with two samplers",
        {
            "off": None,
            "told": str(shown[0][0]) if shown else str(runner.status_messages[-1:]),
            "left": left,
            "holds": valid[0] and bool(shown) and "2.0×" in shown[0][0] and not left,
        },
    )


def page(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        "# The nodes in a real ComfyUI",
        "",
        f"By `python -m bench.checks.comfyui`, on {figures['machine']}; {packages}; {figures['date']}. Something empty "
        f"stood in for {', '.join(figures['stand_ins']) or 'nothing'}.",
        "",
        "Tiny random models of ComfyUI's classes, its own samplers, inference mode. Off: relative L2 from an oracle "
        "that replaces blocks by ComfyUI's `patches_replace`, or from the run that has to be the same; uncached: from "
        "the same run without a cache. Left: whether any module was another, or had a hook or an attribute more, "
        "after it.",
        "",
        "| model | workflow | off | uncached | what the node said | left | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        numbers = ["" if row.get(name) is None else f"{row[name]:.2g}" for name in ("off", "uncached")]
        left, holds = ("yes" if row["left"] else "no"), ("yes" if row["holds"] else "**no**")
        lines.append(f"| {row['model']} | {row['check']} | {' | '.join(numbers)} | {row['told']} | {left} | {holds} |")
    wrong = sum(not row["holds"] for row in figures["rows"])
    return "\n".join([*lines, "", f"Result: {len(figures['rows'])} checks, {wrong} of which do not hold."])


if __name__ == "__main__":
    sys.exit(main())
