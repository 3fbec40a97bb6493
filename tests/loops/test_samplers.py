"""Sampling loops as other projects have them, each written again in a few lines and compared with a cache by hand.

Each loop has one line of its user's at most besides ``with dit_cache(...)``: ``steps(...)`` around what it iterates
over, a ``timestep_scope`` around the model's call, or an argument of ``dit_cache``.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace
from uuid import UUID

import pytest
import torch
from by_hand import check, noise
from sampler_models import (
    F5,
    AceStep,
    AudioWrapper,
    ComfyDiT,
    DiffSynthDiT,
    LogSNR,
    LTXBlock,
    LTXTensorBlock,
    Modality,
    OpenSoraPlan,
    Perturbation,
    Perturbations,
    RDTRunner,
    SiT,
    SkyReels,
    STDiT,
    TwoModalities,
    TwoTensors,
    WanT2V,
    X0Model,
    log_between,
    model_fn,
)

import dithooks
from dithooks import DitCacheConfig, Interval, Mask, dit_cache, timestep_scope

# Computed or reused, with Interval(0, 2) and Interval(1, 2). The former reuses at the step 1, where an argument that is
# new at each step has been seen once only.
LINES = {0: "CRCRCRCRCR", 1: "CCRCRCRCRC"}
LONG_LINES = {0: "CR" * 9 + "C", 1: "C" + "CR" * 9}


def every_other(start: int) -> DitCacheConfig:
    """Return the configuration whose decisions are ``LINES[start]``."""
    return DitCacheConfig(policy=Interval(start, 2))


@pytest.fixture(params=[0, 1], ids=["from 0", "from 1"])
def start(request) -> int:
    """The first step of the interval."""
    return request.param


def steps(items):
    """Return the items by ``dithooks.steps``."""
    return dithooks.steps(items)


def scope_of(number: dict[str, int | str]) -> Callable:
    """Return the user's line ``with timestep_scope(step, branch=...)``."""
    return lambda branch, step: timestep_scope(step, branch=number[branch])


# -- 1, 2: DiT and SiT -------------------------------------------------------------------------------------------------


def ddpm(model: SiT, count: int = 10) -> Callable:
    """DiT's p_sample_loop over respaced timesteps: half of the batch is for guidance, the noise is drawn by step."""
    y = torch.tensor([1, 2, 10, 10])

    def sample(steps, call, seed):
        generator = torch.Generator().manual_seed(seed + 100)
        x = noise(2, 5, 4, seed=seed)
        x = torch.cat([x, x])
        for step, i in enumerate(steps(list(range(count))[::-1])):
            t = torch.tensor([i] * len(x))
            timestep_map = torch.arange(count) / count
            with call("both", step):
                out = model.forward_with_cfg(x, timestep_map[t], y, cfg_scale=3.0)
            eps, _ = out[..., :4], out[..., 4:]
            x = 0.9 * x - 0.3 * eps + 0.05 * (i > 0) * torch.randn(x.shape, generator=generator)
        return x.chunk(2)[0]

    return sample


@pytest.mark.parametrize("line", ["method", "steps"])
def test_dit_sampled_by_forward_with_cfg(line, start):
    """Nothing but this method is called: either the cache is told its name, or the loop tells its steps."""
    model = SiT()
    method = {"method": "forward_with_cfg"} if line == "method" else {}
    check(
        *([model], [model.blocks], ddpm(model)),
        lambda: dit_cache(model, every_other(start), **method),
        {"both": LINES[start]},
        **({"steps": steps} if line == "steps" else {}),
    )


def heun2(model: SiT, count: int = 9, method: str | None = None) -> Callable:
    """SiT's probability flow by odeint's heun2, upwards in t: f(t0), f(t1), f(t1), f(t2), f(t2), …"""
    y, guided = torch.tensor([3, 10]), {"cfg_scale": 2.0} if method else {}

    def sample(steps, call, seed):
        def drift(t, x):
            called = getattr(model, method) if method else model
            return called(x, torch.ones(len(x)) * t, y, **guided)[..., :4]

        x, times = noise(2, 5, 4, seed=seed), torch.linspace(0, 1, count + 1)
        for step, (t0, t1) in enumerate(steps(list(pairwise(times)))):
            with call("predictor", step):
                k1 = drift(t0, x)
            with call("corrector", step):
                k2 = drift(t1, x + (t1 - t0) * k1)
            x = x + (t1 - t0) * (k1 + k2) / 2
        return x

    return sample


def by_time(sample: Callable) -> Callable:
    """Return a second-order loop whose calls are named by the values of t: the first call of each, and the second.

    That is what can be seen where no line is added: t0 is called once, t1 by the corrector from t0 and by the predictor
    to t2, and so on.
    """

    def timed(steps, call, seed):
        def named(branch, step):
            order, _, rest = branch.partition(" ")
            if order == "corrector":
                return call("first" + (rest and f" {rest}"), step + 1)
            return call(("second" if step else "first") + (rest and f" {rest}"), step)

        return sample(steps, named, seed)

    return timed


def after_first(line: str) -> str:
    """Return the letters of a branch that is called from the step 1 on, where it has nothing to reuse."""
    return ".C" + line[2:]


@pytest.mark.parametrize("method", [None, "forward_with_cfg"])
def test_sit_by_heun(method, start):
    """No line, but for the name of the method where it is not the model that is called."""
    model = SiT()
    told = {"method": method} if method else {}
    check(
        *([model], [model.blocks], by_time(heun2(model, method=method))),
        lambda: dit_cache(model, every_other(start), **told),
        {"first": LINES[start], "second": after_first(LINES[start])[:9] + "."},
    )


def test_sit_by_heun_with_steps(start):
    """A step is one of the sampler's then, and has a predictor and a corrector."""
    model = SiT()
    check(
        *([model], [model.blocks], heun2(model)),
        lambda: dit_cache(model, every_other(start)),
        {"predictor": LINES[start][:9], "corrector": LINES[start][:9]},
        steps=steps,
    )


# -- 3: k-diffusion, as ComfyUI calls it -------------------------------------------------------------------------------


class ComfyModel:
    """ComfyUI's guider: x and σ to the denoised x, conditions in one batch or in one call each; all is made anew."""

    def __init__(self, dit: ComfyDiT, batched: bool, sigmas: torch.Tensor) -> None:
        self.dit, self.batched, self.sigmas = dit, batched, sigmas
        self.conds = [noise(1, 3, 8, seed=50), noise(1, 3, 8, seed=51)]
        self.uuids = [UUID(int=1), UUID(int=2)]

    def apply_model(self, x, sigma, context, which):
        options = {
            "wrappers": {"diffusion_model": {None: []}},
            "patches_replace": {},
            "sample_sigmas": self.sigmas,
            "cond_or_uncond": which[:],
            "uuids": [self.uuids[k] for k in which],
            "sigmas": sigma,
        }
        scaled = x / (sigma[:, None, None] ** 2 + 1) ** 0.5
        timestep = (sigma.log() * 0.25).float()  # model_sampling.timestep, of each row
        out = self.dit(scaled, timestep, context=context, control=None, transformer_options=options)
        return x - out * sigma[:, None, None]

    def __call__(self, x, sigma, call, kind, step):
        size = len(x)
        if self.batched:
            with call(kind, step):
                rows = torch.cat([self.conds[1].expand(size, -1, -1), self.conds[0].expand(size, -1, -1)])
                out = self.apply_model(torch.cat([x, x]), torch.cat([sigma, sigma]), rows, [1, 0])
            uncond, cond = out.chunk(2)
        else:
            with call(f"{kind} uncond", step):
                uncond = self.apply_model(x, sigma, torch.cat([self.conds[1].expand(size, -1, -1)]), [1])
            with call(f"{kind} cond", step):
                cond = self.apply_model(x, sigma, torch.cat([self.conds[0].expand(size, -1, -1)]), [0])
        return uncond + 4.0 * (cond - uncond)


SIGMAS = torch.cat([torch.logspace(1, -1, 10), torch.zeros(1)])


def k_diffusion(name: str, dit: ComfyDiT, batched: bool, sigmas: torch.Tensor = SIGMAS) -> Callable:
    """One of the samplers; the calls of a step are the predictor's and, if it has a second, the corrector's."""
    model = ComfyModel(dit, batched, sigmas)

    def sample(steps, call, seed):
        x, before = noise(2, 5, 4, seed=seed) * sigmas[0], None
        ones = x.new_ones(len(x))
        for i in steps(range(len(sigmas) - 1)):
            here, there = sigmas[i], sigmas[i + 1]
            denoised = model(x, here * ones, call, "predictor", i)
            d = (x - denoised) / here
            if name == "dpmpp_2m":
                h = (here.log() - there.log()) if there > 0 else None
                mean = denoised if before is None or h is None else 1.5 * denoised - 0.5 * before
                x, before = (there / here) * x + (1 - there / here) * mean, denoised
            elif name == "euler" or there == 0:
                x = x + d * (there - here)
            elif name == "heun":
                again = x + d * (there - here)
                d_there = (again - model(again, there * ones, call, "corrector", i)) / there
                x = x + (d + d_there) / 2 * (there - here)
            else:
                middle = torch.tensor(log_between(float(here), float(there)))
                again = x + d * (middle - here)
                d_middle = (again - model(again, middle * ones, call, "corrector", i)) / middle
                x = x + d_middle * (there - here)
        return x

    return sample


def halves(sample: Callable) -> Callable:
    """Return dpm2's loop with its calls named by their σ: no two of a kind have the same, so each is a step."""

    def timed(steps, call, seed):
        def named(branch, step):
            kind, _, rest = branch.partition(" ")
            return call(rest or "all", 2 * step + (kind == "corrector"))

        return sample(steps, named, seed)

    return timed


def in_each_call(letters: dict[str, str], batched: bool) -> dict[str, str]:
    """Return the same letters for the condition and for its absence, if each is a call of its own."""
    if batched:
        return letters
    return {f"{branch} {which}".strip(): line for branch, line in letters.items() for which in ("uncond", "cond")}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "two calls"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "dpm2"])
def test_comfyui(name, batched, start):
    """No line: σ of each row is the timestep; the options are new objects at each call, the prompts new tensors."""
    dit = ComfyDiT()
    sample, letters = k_diffusion(name, dit, batched), {"predictor": LINES[start]}
    if name == "heun":
        sample, letters = by_time(sample), {"first": LINES[start], "second": after_first(LINES[start])}
    if name == "dpm2":
        sample, letters = halves(sample), {"all" if batched else "": LONG_LINES[start]}
    check(
        [dit], [dit.double_blocks], sample, lambda: dit_cache(dit, every_other(start)), in_each_call(letters, batched)
    )


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "two calls"])
@pytest.mark.parametrize("name", ["heun", "dpm2"])
def test_comfyui_with_steps(name, batched, start):
    """The sampler's own steps: ``trange=dithooks.steps``, in a manner of speaking."""
    dit = ComfyDiT()
    letters = in_each_call({"predictor": LINES[start], "corrector": LINES[start][:-1]}, batched)
    sample = k_diffusion(name, dit, batched)
    check([dit], [dit.double_blocks], sample, lambda: dit_cache(dit, every_other(start)), letters, steps=steps)


# -- 4: Wan 2.1 and 2.2 ------------------------------------------------------------------------------------------------


def test_wan_2_1_without_a_line(start):
    pipe = WanT2V(None)
    check(
        *(pipe.models, [pipe.model.blocks], pipe.sample),
        lambda: dit_cache(pipe.model, every_other(start)),
        {"cond False": LINES[start], "uncond False": LINES[start]},
    )


@pytest.mark.parametrize("handles", [1, 2])
@pytest.mark.parametrize("line", ["none", "steps"])
def test_wan_2_2(handles, line, start):
    """The second expert takes over at step 5, and has nothing to reuse there."""
    pipe = WanT2V(5)

    def attach():
        if handles == 1:
            return dit_cache(pipe, every_other(start))
        return [dit_cache(model, every_other(start)) for model in pipe.models]

    high = LINES[start][:5] + "....."
    low = "....." + (
        ("CCRCR", "CRCRC")[start] if line == "steps" else LINES[start][:5]
    )  # its own timesteps count from its first call
    letters = {f"{branch} {part}": line for part, line in ((False, high), (True, low)) for branch in ("cond", "uncond")}
    lists = [model.blocks for model in pipe.models]
    check(pipe.models, lists, pipe.sample, attach, letters, **({"steps": steps} if line == "steps" else {}))


# -- 5: Open-Sora-Plan -------------------------------------------------------------------------------------------------


class Euler:
    """A scheduler that counts its steps."""

    def set_timesteps(self, count):
        self.sigmas = torch.linspace(1, 0, count + 1)
        self.timesteps, self.step_index = self.sigmas[:-1] * 1000, None

    def step(self, out, t, x):
        k = self.step_index or 0
        self.step_index = k + 1
        return x + (self.sigmas[k + 1] - self.sigmas[k]) * out


class PNDM:
    """A scheduler that counts what it is given, and whose first timesteps are pairs: t0, t1, t1, t2, t2, t3, t4, …"""

    def set_timesteps(self, count):
        t = torch.linspace(1000, 100, count)
        self.timesteps, self.counter, self.outs = torch.cat([t[:1], t[1:3].repeat_interleave(2), t[3:]]), 0, []

    def step(self, out, t, x):
        self.outs = [*self.outs[-2:], out]
        self.counter += 1
        return x - 0.1 * sum(self.outs) / len(self.outs)


def open_sora_plan(pipe) -> Callable:
    """Its pipeline's loop: a batch of both of guidance's halves."""
    prompt, mask = noise(2, 4, 8, seed=70), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])

    def sample(steps, call, seed):
        pipe.scheduler.set_timesteps(8 if isinstance(pipe.scheduler, PNDM) else 10)
        latents = noise(1, 5, 4, seed=seed)
        for step, t in enumerate(steps(pipe.scheduler.timesteps)):
            both = torch.cat([latents] * 2)
            with call("both", step):
                out = pipe.transformer(
                    both,
                    timestep=t.expand(len(both)) / 1000,
                    encoder_hidden_states=prompt,
                    encoder_attention_mask=mask,
                    return_dict=False,
                )[0]
            uncond, cond = out.chunk(2)
            latents = pipe.scheduler.step(uncond + 4.0 * (cond - uncond), t, latents)
        return latents

    return sample


@pytest.mark.parametrize("target", ["pipeline", "transformer"])
def test_open_sora_plan_by_euler(target, start):
    pipe = SimpleNamespace(transformer=OpenSoraPlan(), scheduler=Euler())
    what = pipe if target == "pipeline" else pipe.transformer
    lists = [pipe.transformer.transformer_blocks]
    check(
        [pipe.transformer],
        lists,
        open_sora_plan(pipe),
        lambda: dit_cache(what, every_other(start)),
        {"both": LINES[start]},
    )


@pytest.mark.parametrize("target", ["pipeline", "transformer"])
def test_open_sora_plan_by_pndm_with_steps(target, start):
    """Each of the ten timesteps is a step, those that come twice, too."""
    pipe = SimpleNamespace(transformer=OpenSoraPlan(), scheduler=PNDM())
    what = pipe if target == "pipeline" else pipe.transformer
    attach, lists = lambda: dit_cache(what, every_other(start)), [pipe.transformer.transformer_blocks]
    check([pipe.transformer], lists, open_sora_plan(pipe), attach, {"both": LINES[start]}, steps=steps)


@pytest.mark.parametrize("target", ["pipeline", "transformer"])
def test_open_sora_plan_by_pndm_without_a_line(target, start):
    """A second call at a timestep is of the same step: t0, t1, t1, t2, t2, t3, … are the steps 0, 1, 1, 2, 2, 3, …"""
    pipe = SimpleNamespace(transformer=OpenSoraPlan(), scheduler=PNDM())
    what = pipe if target == "pipeline" else pipe.transformer
    sample = open_sora_plan(pipe)
    places = [("first", 0), ("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    places += [("first", step) for step in range(3, 8)]

    def by_value(steps, call, seed):
        return sample(steps, lambda _, step: call(*places[step]), seed)

    check(
        *([pipe.transformer], [pipe.transformer.transformer_blocks], by_value),
        lambda: dit_cache(what, every_other(start)),
        {"first": LINES[start][:8], "second": after_first(LINES[start])[:3] + "....."},
    )


# -- 6: Open-Sora 1.2 --------------------------------------------------------------------------------------------------


def rflow(model: STDiT) -> Callable:
    """Its rectified flow with frame masks: frames that are given join where the noise falls to their share."""
    y, shares = noise(4, 3, 8, seed=80), torch.tensor([[0.0, 0.45, 1.0, 1.0], [0.75, 1.0, 1.0, 1.0]])

    def sample(steps, call, seed):
        generator = torch.Generator().manual_seed(seed + 200)
        z, added = noise(2, 4, 4, seed=seed), shares == 1
        timesteps = [torch.tensor([1000.0 * (1 - i / 10)] * 2) for i in range(10)]
        for i, t in enumerate(steps(timesteps)):
            kept = z.clone()
            level = (t / 1000)[:, None, None]
            noised = (1 - level) * kept + level * torch.randn(z.shape, generator=generator)
            upper = shares * 1000 >= t[:, None]
            z = torch.where((upper & ~added)[..., None], noised, kept)
            added = upper
            with call("both", i):
                out = model(torch.cat([z, z]), torch.cat([t, t]), y=y, x_mask=upper.repeat(2, 1), fps=24)
            cond, uncond = out[..., :4].chunk(2)
            following = timesteps[i + 1] if i < 9 else torch.zeros(2)
            z = z + (uncond + 4.0 * (cond - uncond)) * ((t - following) / 1000)[:, None, None]
            z = torch.where(upper[..., None], z, kept)
        return z

    return sample


def test_open_sora_with_frame_masks(start):
    """No line: one call a step, whose mask is a new tensor at each step.

    Frames join at the steps 3 and 6: the mask has other values from there on, so the residual of before is not used.
    """
    model, line = STDiT(), ("CRCCCRCRCR", "CCRCRCCCRC")[start]
    check([model], [model.spatial_blocks], rflow(model), lambda: dit_cache(model, every_other(start)), {"both": line})


# -- 7: LTX-2 ----------------------------------------------------------------------------------------------------------


def ltx(model: X0Model) -> Callable:
    """Its loop with all guidance: four calls a step, given new dataclasses of the same latents and contexts."""
    contexts = {name: (noise(1, 3, 8, seed=90 + k), noise(1, 3, 8, seed=95 + k)) for k, name in enumerate("pn")}
    calls = {
        "cond": ("p", ()),
        "uncond": ("n", ()),
        "perturbed": ("p", (Perturbation("self attention", (2,)),)),
        "isolated": ("p", (Perturbation("across", None),)),
    }

    def sample(steps, call, seed):
        states = [noise(1, 6, 4, seed=seed), noise(1, 5, 2, seed=seed + 10)]
        clean = [torch.ones(1, 6), torch.ones(1, 5)]
        clean[0][:, :2] = 0.2  # the first frame is given
        sigmas = torch.linspace(1, 0, 11)
        for step, _ in enumerate(steps(sigmas[:-1])):
            sigma, out = sigmas[step], {}
            for name, (prompt, perturbed) in calls.items():
                given = [
                    Modality(x, sigma.expand(1), mask * sigma, context)
                    for x, mask, context in zip(states, clean, contexts[prompt], strict=True)
                ]
                with call(name, step):
                    out[name] = model(*given, Perturbations(perturbed))
            weights = {"uncond": 2.0, "perturbed": 1.0, "isolated": 2.0}
            for k in range(2):
                cond = out["cond"][k]
                denoised = cond + sum(w * (cond - out[name][k]) for name, w in weights.items())
                states[k] = states[k] + (states[k] - denoised) / sigma * (sigmas[step + 1] - sigma) * 0.5
        return torch.cat([state.flatten() for state in states])

    return sample


LTX_CALLS = ("cond", "uncond", "perturbed", "isolated")


@pytest.mark.parametrize("line", ["none", "steps"])
@pytest.mark.parametrize("target", ["outer", "inner"])
@pytest.mark.parametrize("of", [LTXBlock, LTXTensorBlock], ids=["dataclasses", "tensors"])
def test_ltx_2_with_all_guidance(of, target, line, start):
    """The noise level is in the dataclasses; what tells the calls apart is the contexts and the perturbations."""
    model = X0Model(of)
    what = model if target == "outer" else model.velocity_model
    check(
        *([model], [model.velocity_model.transformer_blocks], ltx(model)),
        lambda: dit_cache(what, every_other(start)),
        dict.fromkeys(LTX_CALLS, LINES[start]),
        streams=TwoModalities() if of is LTXBlock else TwoTensors(),
        **({"steps": steps} if line == "steps" else {}),
    )


# -- 8: SkyReels -------------------------------------------------------------------------------------------------------


def diffusion_forcing(pipe, lag: int) -> Callable:
    """Its loop: frames follow each other by ``lag`` rows of the matrix of timesteps, each by a scheduler's copy."""
    prompt, negative = noise(1, 3, 8, seed=110), noise(1, 3, 8, seed=111)
    frames, count = 4, 10 - 3 * lag

    def sample(steps, call, seed):
        pipe.scheduler.set_timesteps(count)
        ladder = torch.cat([pipe.scheduler.timesteps, torch.zeros(1)])
        at = (torch.arange(10)[:, None] - lag * torch.arange(frames)).clamp(0, count)
        following = (torch.arange(1, 11)[:, None] - lag * torch.arange(frames)).clamp(0, count)
        schedulers = [deepcopy(pipe.scheduler) for _ in range(frames)]
        latents = noise(1, frames, 4, seed=seed)
        for i, row in enumerate(steps(ladder[at])):
            timestep = row[None].clone()
            given = latents.clone()
            with call("cond", i):
                cond = pipe.transformer(x=given, t=timestep, context=prompt, fps=None)
            with call("uncond", i):
                uncond = pipe.transformer(x=given, t=timestep, context=negative, fps=None)
            guided = uncond + 5.0 * (cond - uncond)
            for k in range(frames):
                if at[i, k] != following[i, k]:
                    latents[:, k] = schedulers[k].step(guided[:, k], row[k], latents[:, k])
        return latents

    return sample


@pytest.mark.parametrize("lag", [0, 1, 2], ids=["all frames alike", "one apart", "two apart"])
@pytest.mark.parametrize("target", ["pipeline", "transformer"])
def test_skyreels_diffusion_forcing(target, lag, start):
    """No line: the pipeline's own scheduler never steps, which is said; each row of timesteps is new."""
    pipe = SimpleNamespace(transformer=SkyReels(), scheduler=Euler())
    what = pipe if target == "pipeline" else pipe.transformer
    check(
        *([pipe.transformer], [pipe.transformer.blocks], diffusion_forcing(pipe, lag)),
        lambda: dit_cache(what, every_other(start)),
        {"cond": LINES[start], "uncond": LINES[start]},
        said="step_index stayed at 0" if target == "pipeline" else None,
    )


# -- 9: context windows ------------------------------------------------------------------------------------------------

WINDOWS = {"window 0": 0, "window 1": 2, "window 2": 4}


def context_windows(model: SkyReels) -> Callable:
    """FreeNoise: windows that overlap, the same at each step, the mean where they do; one prompt for all."""
    prompt = noise(1, 3, 8, seed=120)

    def sample(steps, call, seed):
        frames = noise(1, 4, 4, seed=seed)
        latents = torch.cat([frames, frames[:, torch.tensor([2, 0, 3, 1])]], 1)  # the noise again, shuffled
        sigmas = torch.linspace(1, 0, 11)
        for step, t in enumerate(steps(sigmas[:-1] * 100)):
            total, hits = torch.zeros_like(latents), torch.zeros(1, 8, 1)
            for name, start in WINDOWS.items():
                part = slice(start, start + 4)
                with call(name, step):
                    total[:, part] += model(latents[:, part].clone(), t.expand(1, 4), prompt)
                hits[:, part] += 1
            latents = latents + 2 * (sigmas[step + 1] - sigmas[step]) * total / hits
        return latents

    return sample


@pytest.mark.parametrize("line", ["none", "steps", "scope", "calls per step"])
def test_context_windows(line, start):
    model = SkyReels()
    told = {"calls_per_step": 3, "steps": 10} if line == "calls per step" else {}
    names = {name: name for name in WINDOWS}
    lines = {"steps": {"steps": steps}, "scope": {"scope": scope_of(names)}}
    check(
        *([model], [model.blocks], context_windows(model)),
        lambda: dit_cache(model, every_other(start), **told),
        dict.fromkeys(WINDOWS, LINES[start]),
        **lines.get(line, {}),
    )


# -- 10: ACE-Step ------------------------------------------------------------------------------------------------------


def ace_step(model: AceStep) -> Callable:
    """Its loop: conditions are encoded before it, and guidance is on in the middle of it only."""
    text, lyrics = noise(1, 2, 8, seed=130), torch.tensor([[1, 5, 9]])
    mask = torch.tensor([[1.0] * 5 + [0.0]])

    def sample(steps, call, seed):
        latents, sigmas, momentum = noise(1, 6, 4, seed=seed), torch.linspace(1, 0, 11), 0.0
        cond = model.encode(text, lyrics)
        null = model.encode(torch.zeros_like(text), torch.zeros_like(lyrics))
        for i, t in enumerate(steps(sigmas[:-1] * 1000)):
            timestep = t.expand(1)
            with call("cond", i):
                out = model.decode(latents, mask, encoder_hidden_states=cond, timestep=timestep).sample
            if 2 <= i < 7:
                with call("uncond", i):
                    away = model.decode(latents, mask, encoder_hidden_states=null, timestep=timestep).sample
                momentum = (out - away) - 0.5 * momentum
                out = out + 6.0 * momentum
            latents = latents + (sigmas[i + 1] - sigmas[i]) * out
        return latents

    return sample


@pytest.mark.parametrize("line", ["method", "steps"])
def test_ace_step_with_a_guidance_interval(line, start):
    """Without a prompt it is called from step 2 to 6: there is nothing to reuse at the first of these."""
    model = AceStep()
    method = {"method": "decode"} if line == "method" else {}
    check(
        *([model], [model.transformer_blocks], ace_step(model)),
        lambda: dit_cache(model, every_other(start), **method),
        {"cond": LINES[start], "uncond": ("..CRCRC...", "..CCRCR...")[start]},
        **({"steps": steps} if line == "steps" else {}),
    )


# -- 11: DiffSynth -----------------------------------------------------------------------------------------------------


class DiffSynthPipe:
    """Its pipeline: a function outside runs the model's parts; what iterates over the steps is an argument."""

    def __init__(self) -> None:
        self.dit, self.model_fn = DiffSynthDiT(), model_fn
        self.posi, self.nega = {"context": noise(1, 3, 8, seed=140)}, {"context": noise(1, 3, 8, seed=141)}

    def __call__(self, call, seed, progress_bar_cmd=iter):
        latents, sigmas = noise(1, 5, 4, seed=seed), torch.linspace(1, 0, 11)
        for progress_id, timestep in enumerate(progress_bar_cmd(sigmas[:-1] * 1000)):
            timestep = timestep.unsqueeze(0)
            with call("posi", progress_id):
                posi = self.model_fn(self.dit, latents, timestep, **self.posi)
            with call("nega", progress_id):
                nega = self.model_fn(self.dit, latents, timestep, **self.nega)
            latents = latents + (sigmas[progress_id + 1] - sigmas[progress_id]) * (nega + 5.0 * (posi - nega))
        return latents


@pytest.mark.parametrize("target", ["pipeline", "model"])
def test_diffsynth_with_its_own_argument_for_steps(target, start):
    pipe = DiffSynthPipe()
    what = pipe if target == "pipeline" else pipe.dit
    check(
        *([pipe.dit], [pipe.dit.blocks], lambda steps, call, seed: pipe(call, seed, progress_bar_cmd=steps)),
        lambda: dit_cache(what, every_other(start)),
        {"posi": LINES[start], "nega": LINES[start]},
        steps=steps,
    )


# -- 12: F5-TTS --------------------------------------------------------------------------------------------------------


def f5(model: F5) -> Callable:
    """Its odeint by Euler, upwards in a time that is a tensor without dimensions; flags tell the null call."""
    text, mask = torch.tensor([[3, 7, 7, 2, 0, 0]]), torch.tensor([[True] * 5 + [False]])
    cond = noise(1, 6, 4, seed=150)

    def sample(steps, call, seed):
        y = noise(1, 6, 4, seed=seed)
        t = torch.linspace(0, 1, 11)
        t = t - (torch.cos(torch.pi / 2 * t) - 1 + t)  # sway sampling

        def fn(step, t, x):
            with call("cond", step):
                out = model(x=x, cond=cond, text=text, time=t, mask=mask, drop_audio_cond=False, drop_text=False)
            with call("null", step):
                null = model(x=x, cond=cond, text=text, time=t, mask=mask, drop_audio_cond=True, drop_text=True)
            return out + (out - null) * 2.0

        for step, (t0, t1) in enumerate(steps(list(pairwise(t)))):
            y = y + (t1 - t0) * fn(step, t0, y)
        return y

    return sample


def test_f5_without_a_line(start):
    model = F5()
    check(
        *([model], [model.transformer_blocks], f5(model)),
        lambda: dit_cache(model, every_other(start)),
        {"cond": LINES[start], "null": LINES[start]},
    )


# -- 13: stable-audio-tools --------------------------------------------------------------------------------------------


def stable_audio(model: AudioWrapper) -> Callable:
    """Its rectified flow by Euler: guidance within the model, a new tensor of t for each call."""
    extra = {"cross_attn_cond": noise(2, 3, 8, seed=160), "global_embed": noise(2, 8, seed=161), "cfg_scale": 6.0}

    def sample(steps, call, seed):
        x, t = noise(2, 5, 4, seed=seed), torch.linspace(1, 0, 11)
        for i, (now, following) in enumerate(steps(list(pairwise(t)))):
            with call("both", i):
                out = model(x, now * torch.ones(len(x)), **extra)
            x = x + (following - now) * out
        return x

    return sample


@pytest.mark.parametrize("target", ["wrapper", "middle"])
def test_stable_audio_whose_inner_module_knows_no_time(target, start):
    """The inner module is given the time as a token, and in a condition: that these are new has to be seen twice."""
    model, line = AudioWrapper(), ("CCCRCRCRCR", "CCCCRCRCRC")[start]
    what = model if target == "wrapper" else model.model
    lists = [model.model.transformer.layers]
    check([model], lists, stable_audio(model), lambda: dit_cache(what, every_other(start)), {"both": line})


# -- 14: RDT -----------------------------------------------------------------------------------------------------------


def rdt(runner: RDTRunner, count: int = 5) -> Callable:
    """A robot's policy: few steps, and at each run other pictures of the same scene; a solver of second order."""
    lang, lang_mask = noise(1, 4, 8, seed=170), torch.tensor([[True, True, True, False]])
    freq = torch.tensor([25])

    def sample(steps, call, seed):
        pictures, state = noise(1, 6, 8, seed=180 + seed), noise(1, 1, 8, seed=190 + seed)
        action, mask, before = noise(1, 2, 4, seed=seed), torch.ones(1, 2, 4), None
        timesteps = torch.linspace(999, 0, count + 1)[:-1].long()
        states = runner.state_adaptor(state)
        for step, t in enumerate(steps(timesteps)):
            trajectory = torch.cat([states, runner.state_adaptor(torch.cat([action, mask], 2))], 1)
            with call("only", step):
                out = runner.model(trajectory, freq, t.unsqueeze(-1), lang, pictures, lang_mask=lang_mask)[:, -2:]
            action = 0.8 * action + 0.3 * (out if before is None else 1.5 * out - 0.5 * before)
            before = out
        return action

    return sample


@pytest.mark.parametrize("target", ["runner", "model"])
@pytest.mark.parametrize("line", ["none", "steps", "count"])
def test_rdt_in_few_steps(target, line):
    """A mask wants the number of steps, which either the loop gives or an argument; an interval does without."""
    runner = RDTRunner()
    what = runner if target == "runner" else runner.model
    config = DitCacheConfig(policy=Interval(1, 2) if line == "none" else Mask((1, 0, 1, 0, 0)))
    told = {"calls_per_step": 1, "steps": 5} if line == "count" else {}
    check(
        *([runner], [runner.model.blocks], rdt(runner), lambda: dit_cache(what, config, **told)),
        {"only": "CCRCR" if line == "none" else "CRCRR"},
        **({"steps": steps} if line == "steps" else {}),
    )


# -- a name of its own for the time ------------------------------------------------------------------------------------


def by_logsnr(model: LogSNR) -> Callable:
    """A loop in log-SNR, upwards; the prompt is copied at each step."""
    prompts = {"cond": noise(1, 3, 8, seed=200), "uncond": noise(1, 3, 8, seed=201)}

    def sample(steps, call, seed):
        x, out = noise(1, 5, 4, seed=seed), {}
        for i, level in enumerate(steps(torch.linspace(-3, 3, 10))):
            for name, prompt in prompts.items():
                with call(name, i):
                    out[name] = model(x, prompt.clone(), logsnr=level.expand(1))
            x = 0.95 * x + 0.2 * (out["uncond"] + 3.0 * (out["cond"] - out["uncond"]))
        return x

    return sample


def test_time_under_a_name_that_the_user_gives(start):
    model = LogSNR()
    check(
        *([model], [model.layers], by_logsnr(model)),
        lambda: dit_cache(model, every_other(start), timestep="logsnr"),
        {"cond": LINES[start], "uncond": LINES[start]},
    )
