"""A small stand-in of what ComfyUI's custom nodes see: patchers, wrappers, a guider, two samplers, and two models."""

import sys
import uuid
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
from torch import nn


class WrappersMP:
    SAMPLER_SAMPLE = "around the sampler"
    APPLY_MODEL = "around the model"


class Executor:
    """What a wrapper is given first: calling it goes on to the next wrapper, and at last to the function."""

    def __init__(self, function, owner, wrappers):
        self.function, self.class_obj, self.wrappers = function, owner, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.function(*args, **kwargs)
        first, *others = self.wrappers
        return first(Executor(self.function, self.class_obj, others), *args, **kwargs)


class Patcher:
    """A model, and what is to be done to it while it draws. Clones share the model, and nothing else."""

    def __init__(self, model):
        self.model, self.wrappers, self.attachments, self.options = model, {}, {}, {}

    def clone(self):
        other = Patcher(self.model)
        other.wrappers = {kind: {key: [*own] for key, own in keyed.items()} for kind, keyed in self.wrappers.items()}
        other.attachments, other.options = dict(self.attachments), dict(self.options)
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def get_attachment(self, key):
        return self.attachments.get(key)

    def around(self, kind):
        return [wrapper for own in self.wrappers.get(kind, {}).values() for wrapper in own]


class BaseModel(nn.Module):
    """Holds the transformer; predicts what is left when the noise is gone."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model, self.current_patcher = diffusion_model, None

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        around = transformer_options["wrappers"] if transformer_options else []
        return Executor(self._apply_model, self, around)(
            x, t, c_concat, c_crossattn, control, transformer_options or {}, **kwargs
        )

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        out = self.diffusion_model(x, t, context=c_crossattn, control=control, transformer_options=transformer_options)
        return x - out * t.view(-1, *[1] * (x.dim() - 1))


class Guider:
    """Draws with a prompt and without: in one batch or in a call each, as ``fits`` says for each evaluation.

    ``calls`` has the conditionings of each call of the model, by name.
    """

    def __init__(self, patcher, prompts, fits=lambda evaluation: True):
        self.model_patcher, self.inner_model, self.fits = patcher, patcher.model, fits
        self.conds = [(number, uuid.uuid4(), prompt) for number, prompt in enumerate(prompts)]
        self.evaluations, self.calls, self.options = 0, [], {}

    def sample(self, noise, sigmas, loop, callback=None):
        wrappers = self.model_patcher.around(WrappersMP.APPLY_MODEL)
        self.options = {"wrappers": wrappers, "sample_sigmas": sigmas, **self.model_patcher.options}
        executor = Executor(loop, loop, self.model_patcher.around(WrappersMP.SAMPLER_SAMPLE))
        options = {"model_options": {"transformer_options": self.options}, "seed": 0}
        return executor(self, sigmas, options, callback, noise, None, None, True)

    def __call__(self, x, sigma):
        together = self.fits(self.evaluations)
        self.evaluations += 1
        batches = [self.conds[::-1]] if together else [[each] for each in self.conds[::-1]]
        out = [None, None]
        for batch in batches:
            self.calls.append(tuple(number for number, _, _ in batch))
            told = {"cond_or_uncond": [n for n, _, _ in batch], "uuids": [u for _, u, _ in batch], "sigmas": sigma}
            context = torch.cat([prompt for _, _, prompt in batch])
            drawn = self.inner_model.apply_model(
                torch.cat([x] * len(batch)),
                torch.cat([sigma] * len(batch)),
                c_crossattn=context,
                transformer_options={**self.options, **told},
            )
            for (number, _, _), each in zip(batch, drawn.chunk(len(batch)), strict=True):
                out[number] = each
        return out[1] + 3.0 * (out[0] - out[1])


def euler(model, sigmas, extra_args, callback, x, *_):
    for number, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = (x - model(x, sigma.repeat(len(x)))) / sigma
        if callback is not None:
            callback(number)
        x = x + slope * (following - sigma)
    return x


def heun(model, sigmas, extra_args, callback, x, *_):
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, sigma.repeat(len(x)))) / sigma
        then = x + slope * (following - sigma)
        if following > 0:
            second = (then - model(then, following.repeat(len(x)))) / following
            then = x + (slope + second) / 2 * (following - sigma)
        x = then
    return x


class DoubleBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, img, txt, vec, transformer_options):
        new = img + torch.tanh(self.image(img + vec + txt.mean(1, keepdim=True)))
        return new, txt + torch.tanh(self.text(txt + vec + img.mean(1, keepdim=True)))


class SingleBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x, vec, transformer_options):
        return x + torch.tanh(self.proj(x + vec + x.mean(1, keepdim=True)))


class Flux(nn.Module):
    """Two lists of blocks: of two streams, and of both in one."""

    def __init__(self, width=6):
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock(width) for _ in range(3))
        self.head = nn.Linear(width, width)

    def forward(self, x, timestep, context, control=None, transformer_options=None):
        vec, img, txt = timestep.view(-1, 1, 1), x, context
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, transformer_options=transformer_options)
        both = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            both = block(both, vec=vec, transformer_options=transformer_options)
        return self.head(both[:, txt.shape[1] :])

    def by_hand(self, x, timestep, context, kept):
        """The same from the second block on with what is kept, or without; return it and the work of those blocks."""
        vec, options = timestep.view(-1, 1, 1), {}
        img, txt = self.double_blocks[0](img=x, txt=context, vec=vec, transformer_options=options)
        before = torch.cat([txt, img], 1)
        if kept is None:
            img, txt = self.double_blocks[1](img=img, txt=txt, vec=vec, transformer_options=options)
            both = torch.cat([txt, img], 1)
            for block in self.single_blocks:
                both = block(both, vec=vec, transformer_options=options)
            kept = both - before
        return self.head((before + kept)[:, context.shape[1] :]), kept


class WanBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.own, self.cross = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, e, context, transformer_options):
        x = x + torch.tanh(self.own(x + e + x.mean(1, keepdim=True)))
        return x + torch.tanh(self.cross(context.mean(1, keepdim=True)))


class Wan(nn.Module):
    """One list of blocks, which look at the prompt."""

    def __init__(self, width=6):
        super().__init__()
        self.blocks = nn.ModuleList(WanBlock(width) for _ in range(4))
        self.head = nn.Linear(width, width)

    def forward(self, x, timestep, context, control=None, transformer_options=None):
        for block in self.blocks:
            x = block(x, e=timestep.view(-1, 1, 1), context=context, transformer_options=transformer_options)
        return self.head(x)

    def by_hand(self, x, timestep, context, kept):
        e = timestep.view(-1, 1, 1)
        before = after = self.blocks[0](x, e=e, context=context, transformer_options={})
        for block in self.blocks[1:] if kept is None else ():
            after = block(after, e=e, context=context, transformer_options={})
        kept = after - before if kept is None else kept
        return self.head(before + kept), kept


def install(monkeypatch, folder, with_v3=False):
    """Let the modules that the nodes import be these."""
    paths = ModuleType("folder_paths")
    kinds = {}
    paths.models_dir = str(folder)
    paths.add_model_folder_path = lambda kind, path: kinds.setdefault(kind, []).append(path)
    paths.get_folder_paths = lambda kind: kinds[kind]
    paths.get_filename_list = lambda kind: sorted(each.name for each in (folder / kind).glob("*"))
    paths.get_full_path = lambda kind, name: str(folder / kind / name) if (folder / kind / name).is_file() else None
    extension = ModuleType("comfy.patcher_extension")
    extension.WrappersMP = WrappersMP
    modules = {"folder_paths": paths, "comfy": ModuleType("comfy"), "comfy.patcher_extension": extension}
    if with_v3:
        modules |= {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": v3_interface()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def v3_interface():
    """The classes of the V3 schema, as far as nodes use them: each remembers what it was made of."""

    def typed(kind):
        return SimpleNamespace(
            Input=lambda name, **given: SimpleNamespace(kind=kind, name=name, **given),
            Output=lambda **given: SimpleNamespace(kind=kind, **given),
        )

    api = ModuleType("comfy_api.latest")
    kinds = {name: typed(name) for name in ("Model", "Latent", "String", "Float", "Int", "Boolean", "Combo")}
    api.ComfyExtension = type("ComfyExtension", (), {})
    api.io = SimpleNamespace(
        **kinds,
        ComfyNode=type("ComfyNode", (), {}),
        Schema=SimpleNamespace,
        NodeOutput=lambda *args, ui=None: SimpleNamespace(args=args, ui=ui),
    )
    return api
