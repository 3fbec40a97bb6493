"""Tiny models, each called in the manner of a family of diffusion transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from by_hand import OneStream, noise
from torch import Tensor, nn

WIDTH, DEPTH = 8, 4


def waves(t: Tensor) -> Tensor:
    """Return sinusoids of timesteps, (...) -> (..., WIDTH)."""
    angles = t.float()[..., None] * torch.logspace(0, 1.5, WIDTH // 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


class Block(nn.Module):
    """h + a function of h and of what is given besides, all of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, *conditions: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h + sum(conditions))))


def blocks(of: type[nn.Module] = Block, depth: int = DEPTH) -> nn.ModuleList:
    """Return a list of blocks."""
    return nn.ModuleList(of() for _ in range(depth))


class SiT(nn.Module):
    """DiT and SiT: ``model(x, t, y)``, and guidance inside by ``forward_with_cfg``."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder, self.blocks = nn.Linear(4, WIDTH), nn.Embedding(11, WIDTH), blocks()
        self.final_layer = nn.Linear(WIDTH, 6)  # noise and variance

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.x_embedder(x), (waves(t) + self.y_embedder(y))[:, None]
        for block in self.blocks:
            h = block(h, c)
        return self.final_layer(h)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[..., :4], out[..., 4:]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], -1)


class ComfyDiT(nn.Module):
    """A model as ComfyUI's nodes call it."""

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.double_blocks = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), blocks()
        self.final_layer = nn.Linear(WIDTH, 4)

    def forward(self, x, timesteps, context=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        c = waves(timesteps)[:, None] + self.txt_in(context).mean(1, keepdim=True)
        h = self.img_in(x)
        for block in self.double_blocks:
            h = block(h, c)
        return self.final_layer(h)


class WanBlock(Block):
    """Keyword arguments but for the stream."""

    def forward(self, x: Tensor, e: Tensor, seq_lens: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, e, context.mean(1, keepdim=True))


class Wan(nn.Module):
    """Lists of tensors, padded inside to ``seq_len``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks, self.head = blocks(WanBlock), nn.Linear(WIDTH, 4)

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        h = [self.patch_embedding(u) for u in x]
        seq_lens = torch.tensor([len(u) for u in h])
        h = torch.stack([torch.cat([u, u.new_zeros(seq_len - len(u), WIDTH)]) for u in h])
        text = torch.stack([torch.cat([u, u.new_zeros(6 - len(u), WIDTH)]) for u in context])
        kwargs = {"e": waves(t)[:, None], "seq_lens": seq_lens, "context": self.text_embedding(text)}
        for block in self.blocks:
            h = block(h, **kwargs)
        return [self.head(u)[:n] for u, n in zip(h, seq_lens.tolist(), strict=True)]


class WanT2V:
    """Wan's pipeline: two calls a step, of one model or of two, one for each part of the noise levels."""

    def __init__(self, boundary: int | None) -> None:
        self.boundary = boundary
        if boundary is None:
            self.model = Wan()
        else:
            self.high_noise_model, self.low_noise_model = Wan(), Wan()
        self.context, self.context_null = [noise(6, 8, seed=60)], [noise(4, 8, seed=61)]

    @property
    def models(self):
        return [self.model] if self.boundary is None else [self.high_noise_model, self.low_noise_model]

    def sample(self, steps, call, seed):
        latents = [noise(7, 4, seed=seed)]
        sigmas = torch.linspace(1, 0, 11)
        arg_c, arg_null = ({"context": c, "seq_len": 8} for c in (self.context, self.context_null))
        for step, t in enumerate(steps(sigmas[:-1] * 2)):
            low = self.boundary is not None and step >= self.boundary
            model = self.models[low]
            timestep = torch.stack([t])
            with call(f"cond {low}", step):
                cond = model(latents, t=timestep, **arg_c)[0]
            with call(f"uncond {low}", step):
                uncond = model(latents, t=timestep, **arg_null)[0]
            guided = uncond + 5.0 * (cond - uncond)
            latents = [latents[0] + (sigmas[step + 1] - sigmas[step]) * guided]
        return latents[0]


class OpenSoraPlan(nn.Module):
    """As diffusers has it, with a mask of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.caption_projection = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.transformer_blocks, self.proj_out = blocks(), nn.Linear(WIDTH, 4)

    def forward(
        self, hidden_states, timestep, encoder_hidden_states=None, encoder_attention_mask=None, return_dict=True
    ):
        shown = encoder_attention_mask[..., None].float()
        text = (self.caption_projection(encoder_hidden_states) * shown).sum(1, keepdim=True) / shown.sum(
            1, keepdim=True
        )
        h = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            h = block(h, waves(timestep)[:, None], text)
        out = self.proj_out(h)
        return SimpleNamespace(sample=out) if return_dict else (out,)


class STDiTBlock(Block):
    """Frames that are masked are modulated by the time 0."""

    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, x_mask: Tensor | None = None, t0: Tensor | None = None
    ) -> Tensor:
        time = t[:, None] if x_mask is None else torch.where(x_mask[..., None], t[:, None], t0[:, None])
        return super().forward(x, time, y)


class STDiT(nn.Module):
    """Open-Sora 1.2: x is (batch, frames, 4), and ``x_mask`` has the frames that are to be denoised."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spatial_blocks, self.final_layer = blocks(STDiTBlock), nn.Linear(WIDTH, 8)

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None):
        t, t0 = waves(timestep / 1000), None
        if x_mask is not None:
            t0 = waves(torch.zeros_like(timestep))
        h, text = self.x_embedder(x), self.y_embedder(y).mean(1, keepdim=True)
        for block in self.spatial_blocks:
            h = block(h, text, t, x_mask, t0)
        return self.final_layer(h)


@dataclass(frozen=True)
class Modality:
    """LTX-2's input of one modality, with its noise level inside."""

    latent: Tensor
    sigma: Tensor
    timesteps: Tensor
    context: Tensor
    enabled: bool = True


@dataclass(frozen=True)
class Perturbation:
    """What a perturbed call leaves out: a kind of attention, in some blocks or, with ``None``, in all."""

    kind: str
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class Perturbations:
    """All perturbations of a call."""

    perturbations: tuple[Perturbation, ...] = ()

    def leave_out(self, kind: str, block: int) -> bool:
        return any(p.kind == kind and (p.blocks is None or block in p.blocks) for p in self.perturbations)


@dataclass(frozen=True)
class TransformerArgs:
    """One modality within the blocks."""

    x: Tensor
    context: Tensor
    timesteps: Tensor


class LTXBlock(nn.Module):
    """Video and audio: self-attention, and each given the other; takes and returns dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.idx, self.video, self.audio, self.across = 0, Block(), Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, video: TransformerArgs, audio: TransformerArgs, perturbations: Perturbations):
        v, a = self.both(video.x, audio.x, video, audio, perturbations)
        return replace(video, x=v), replace(audio, x=a)

    def both(self, v: Tensor, a: Tensor, video: TransformerArgs, audio: TransformerArgs, perturbations: Perturbations):
        if not perturbations.leave_out("self attention", self.idx):
            v = v + 0.5 * (v.mean(1, keepdim=True) - v)
        from_audio = from_video = 0.0
        if not perturbations.leave_out("across", self.idx):
            from_audio, from_video = (self.across(s).mean(1, keepdim=True) for s in (a, v))
        v = self.video(v, video.context, video.timesteps) + from_audio
        return v, self.audio(a, audio.context, audio.timesteps) + from_video


class LTXTensorBlock(LTXBlock):
    """The same with tensors in and out, as diffusers has it."""

    def forward(self, hidden_states: Tensor, audio_hidden_states: Tensor, **conditions):
        return self.both(hidden_states, audio_hidden_states, **conditions)


class TwoTensors(OneStream):
    """The streams of :class:`LTXTensorBlock`."""

    def read(self, args, kwargs):
        return list(args)

    def take(self, output):
        return list(output)

    def build(self, streams, args, kwargs):
        return tuple(streams)


class TwoModalities(OneStream):
    """The streams of :class:`LTXBlock`."""

    def read(self, args, kwargs):
        return [kwargs["video"].x, kwargs["audio"].x]

    def take(self, output):
        return [output[0].x, output[1].x]

    def build(self, streams, args, kwargs):
        return replace(kwargs["video"], x=streams[0]), replace(kwargs["audio"], x=streams[1])


class LTXModel(nn.Module):
    """The velocity model of LTX-2."""

    def __init__(self, of: type[LTXBlock]) -> None:
        super().__init__()
        self.patchify_proj, self.audio_patchify_proj = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH)
        self.transformer_blocks, self.of = blocks(of), of
        self.proj_out, self.audio_proj_out = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 2)
        for index, block in enumerate(self.transformer_blocks):
            block.idx = index

    def forward(self, video: Modality, audio: Modality, perturbations: Perturbations) -> tuple[Tensor, Tensor]:
        v, a = (
            TransformerArgs(embed(m.latent), m.context.mean(1, keepdim=True), waves(m.timesteps))
            for embed, m in ((self.patchify_proj, video), (self.audio_patchify_proj, audio))
        )
        if self.of is LTXBlock:
            for block in self.transformer_blocks:
                v, a = block(video=v, audio=a, perturbations=perturbations)
            return self.proj_out(v.x), self.audio_proj_out(a.x)
        h, audio_h = v.x, a.x
        for block in self.transformer_blocks:
            h, audio_h = block(h, audio_h, video=v, audio=a, perturbations=perturbations)
        return self.proj_out(h), self.audio_proj_out(audio_h)


class X0Model(nn.Module):
    """What the loop calls: velocities of the inner model, made latents without noise."""

    def __init__(self, of: type[LTXBlock]) -> None:
        super().__init__()
        self.velocity_model = LTXModel(of)

    def forward(self, video: Modality, audio: Modality, perturbations: Perturbations) -> tuple[Tensor, Tensor]:
        both = self.velocity_model(video, audio, perturbations)
        return tuple(m.latent - m.timesteps[..., None] * v for m, v in zip((video, audio), both, strict=True))


class SkyReels(nn.Module):
    """Diffusion forcing: x is (batch, frames, 4), and each frame has a timestep of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks, self.head = blocks(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, fps: Tensor | None = None) -> Tensor:
        h, text = self.patch_embedding(x), self.text_embedding(context).mean(1, keepdim=True)
        for block in self.blocks:
            h = block(h, waves(t / 100), text)
        return self.head(h)


class AceStep(nn.Module):
    """Conditions are encoded once, and the blocks run by ``decode``; ``forward`` is for training."""

    def __init__(self) -> None:
        super().__init__()
        self.lyric_embs, self.proj_in = nn.Embedding(20, WIDTH), nn.Linear(4, WIDTH)
        self.transformer_blocks, self.final_layer = blocks(), nn.Linear(WIDTH, 4)

    def encode(self, text: Tensor, lyrics: Tensor) -> Tensor:
        return torch.cat([text, self.lyric_embs(lyrics)], 1)

    def decode(self, hidden_states, attention_mask, encoder_hidden_states, timestep, return_dict=True):
        h = self.proj_in(hidden_states)
        for block in self.transformer_blocks:
            h = block(h, waves(timestep / 100)[:, None], encoder_hidden_states.mean(1, keepdim=True))
        out = self.final_layer(h * attention_mask[..., None])
        return SimpleNamespace(sample=out) if return_dict else (out,)

    def forward(self, hidden_states, attention_mask, text, lyrics, timestep):
        return self.decode(hidden_states, attention_mask, self.encode(text, lyrics), timestep)


class DiffSynthDiT(nn.Module):
    """A model that is never called: :func:`model_fn` runs its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks, self.head = blocks(), nn.Linear(WIDTH, 4)


def model_fn(dit: DiffSynthDiT, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """Run a model of DiffSynth's from outside."""
    text, t = dit.text_embedding(context).mean(1, keepdim=True), waves(timestep / 100)[:, None]
    x = dit.patch_embedding(latents)
    for block in dit.blocks:
        x = block(x, text, t)
    return dit.head(x)


class F5Block(Block):
    """The mask is a keyword."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x * mask[..., None], t[:, None])


class F5(nn.Module):
    """F5-TTS: the call without condition is told by flags."""

    def __init__(self) -> None:
        super().__init__()
        self.text_embed, self.input_embed = nn.Embedding(30, WIDTH), nn.Linear(8 + WIDTH, WIDTH)
        self.transformer_blocks, self.proj_out = blocks(F5Block), nn.Linear(WIDTH, 4)

    def forward(self, x, cond, text, time, mask=None, drop_audio_cond=False, drop_text=False):
        time = time.repeat(len(x)) if time.ndim == 0 else time
        words = self.text_embed(torch.zeros_like(text) if drop_text else text)
        audio = torch.zeros_like(cond) if drop_audio_cond else cond
        h = self.input_embed(torch.cat([x, audio, words], -1))
        for block in self.transformer_blocks:
            h = block(h, waves(time), mask=mask)
        return self.proj_out(h)


class AudioLayer(Block):
    """The conditions are keywords."""

    def forward(self, x: Tensor, rotary: Tensor, global_cond: Tensor | None = None, context: Tensor | None = None):
        return super().forward(x, rotary, global_cond, context)


class ContinuousTransformer(nn.Module):
    """The inner module of stable-audio-tools, which knows no time."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in, self.layers, self.project_out = nn.Linear(4, WIDTH), blocks(AudioLayer), nn.Linear(WIDTH, 4)
        self.register_buffer("positions", torch.linspace(0, 1, 16)[:, None], persistent=False)

    def forward(self, x, prepend_embeds=None, context=None, global_cond=None):
        h = torch.cat([prepend_embeds, self.project_in(x)], 1)
        for layer in self.layers:
            h = layer(h, self.positions[: h.shape[1]], global_cond=global_cond, context=context)
        return self.project_out(h)[:, prepend_embeds.shape[1] :]


class AudioTransformer(nn.Module):
    """Its middle module: both of guidance's halves in one batch, the time as a token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.to_cond_embed, self.transformer = nn.Linear(WIDTH, WIDTH), ContinuousTransformer()

    def forward(self, x, t, cross_attn_cond=None, global_embed=None, cfg_scale=1.0):
        x, t, global_embed = (torch.cat([each, each]) for each in (x, t, global_embed))
        cond = torch.cat([cross_attn_cond, torch.zeros_like(cross_attn_cond)])
        context = self.to_cond_embed(cond).mean(1, keepdim=True)
        time = waves(t)[:, None]
        out = self.transformer(x, prepend_embeds=time, context=context, global_cond=global_embed[:, None] + time)
        cond, uncond = out.chunk(2)
        return uncond + cfg_scale * (cond - uncond)


class AudioWrapper(nn.Module):
    """Its outer module, which the loop calls."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AudioTransformer()

    def forward(self, x, t, **kwargs):
        return self.model(x, t, **kwargs)


class RDT(nn.Module):
    """A robot's: the blocks are given language and pictures in turns, the time is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.final_layer = blocks(RDTBlock), nn.Linear(WIDTH, 4)

    def forward(self, x, freq, t, lang_c, img_c, lang_mask=None, img_mask=None):
        tokens = [waves(t / 100)[:, None].expand(len(x), -1, -1), waves(freq)[:, None]]
        h = torch.cat([*tokens, x], 1)
        for index, block in enumerate(self.blocks):
            c, mask = ((lang_c, lang_mask), (img_c, img_mask))[index % 2]
            h = block(h, c, mask)
        return self.final_layer(h)[:, -3:]


class RDTBlock(Block):
    """Cross-attention to what it is given; its tokens see each other."""

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        c = c if mask is None else c * mask[..., None]
        return super().forward(x, c.mean(1, keepdim=True), x.mean(1, keepdim=True))


class RDTRunner(nn.Module):
    """What a robot's policy holds: the model, and an adaptor of actions."""

    def __init__(self) -> None:
        super().__init__()
        self.state_adaptor, self.model = nn.Linear(8, WIDTH), RDT()


class LogSNR(nn.Module):
    """A model whose time is an argument of a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text, self.layers, self.out = (
            nn.Linear(4, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            blocks(),
            nn.Linear(WIDTH, 4),
        )

    def forward(self, x: Tensor, prompt: Tensor, logsnr: Tensor) -> Tensor:
        h, c = self.embed(x), self.text(prompt).mean(1, keepdim=True)
        for layer in self.layers:
            h = layer(h, waves(logsnr)[:, None], c)
        return self.out(h)


def log_between(a: float, b: float) -> float:
    """Return the geometric mean of two noise levels."""
    return math.exp((math.log(a) + math.log(b)) / 2)
