"""The pipeline that is measured: a caption in, a clip of eight frames out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from dithooks.demo.text import CaptionEncoder

from . import GUIDANCE, STEPS
from .clips import FRAMES, SIZE
from .model import to_clips


class ClipPipeline(DiffusionPipeline):
    """Text to clip with a small Wan, on pixels, with classifier-free guidance by two calls per step.

    Sampling goes as in diffusers' own ``WanPipeline``: the same solver, the same two calls, each in the cache context
    of the same name, so that whatever caches that pipeline can cache this one.

    Args:
        transformer: predicts the clip x, the scheduler knowing.
        text_encoder: captions to embeddings.
        scheduler: flow matching, UniPC.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text_encoder: CaptionEncoder,
        scheduler: UniPCMultistepScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)
        self._timestep: torch.Tensor | None = None

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep that is being computed: some of diffusers' caches ask for it."""
        return self._timestep

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> WanPipelineOutput | tuple[Any]:
        """Draw one clip for every prompt.

        Args:
            prompt: one caption or several, such as ``"cat face moving left"``.
            num_inference_steps: sampling steps.
            guidance_scale: 1 or less asks the model once per step, without guidance.
            generator: where the noise comes from; a list gives every clip its own.
            latents: noise to start from instead, (clips, 3, 8, 24, 24).
            output_type: ``"pil"`` (a list of frames for every clip), ``"pt"`` (clips, frames, 3, height, width in 0…1)
                or ``"latent"`` (clips, 3, frames, height, width in -1…1).
            return_dict: ``False`` returns a tuple.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": …})`` after every step;
                may return replacements.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only ``latents`` is on offer.

        Raises:
            ValueError: an empty prompt list, a word that no clip's caption has, latents of another shape, an unknown
                output type, or a callback input not on offer.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt is an empty list: give at least one caption")
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is unknown: 'pil', 'pt' and 'latent' are")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback inputs {sorted(unknown)} are not on offer: only {self._callback_tensor_inputs}")
        device, dtype = self._execution_device, self.transformer.dtype
        cond, uncond = self.encode_prompt(prompts), self.encode_prompt([""] * len(prompts))
        shape = (len(prompts), self.transformer.config.in_channels, FRAMES, SIZE, SIZE)
        if latents is None:
            # The state stays in float32 whatever the model computes in, as in WanPipeline.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {len(prompts)} clips need {shape}")
        latents = latents.to(device, torch.float32)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        try:
            with self.progress_bar(total=num_inference_steps) as progress:
                for step, timestep in enumerate(self.scheduler.timesteps):
                    self._timestep = timestep
                    told = {
                        "step_index": step,
                        "sigma": float(self.scheduler.sigmas[step]),
                        "num_inference_steps": num_inference_steps,
                    }
                    shared = {"hidden_states": latents.to(dtype), "timestep": timestep.expand(len(prompts))}
                    with self.transformer.cache_context("cond", **told):
                        clip = self._predict(cond, shared)
                    if guidance_scale > 1:
                        with self.transformer.cache_context("uncond", **told):
                            away = self._predict(uncond, shared)
                        clip = away + guidance_scale * (clip - away)
                    latents = self.scheduler.step(clip, timestep, latents, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                        latents = changed.get("latents", latents)
                    progress.update()
        finally:
            self._timestep = None

        self.maybe_free_model_hooks()
        frames: Any = latents
        if output_type != "latent":
            frames = to_clips(latents)
        if output_type == "pil":
            frames = [to_images(clip) for clip in frames]
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings (batch, length, dim) on the pipeline's device."""
        tokens: torch.Tensor = self.text_encoder(self.text_encoder.tokenize(prompts).to(self._execution_device))[0]
        return tokens.to(self.transformer.dtype)

    def _predict(self, tokens: torch.Tensor, shared: dict[str, torch.Tensor]) -> torch.Tensor:
        """One call of the transformer, of the latents' shape."""
        predicted: torch.Tensor = self.transformer(encoder_hidden_states=tokens, return_dict=False, **shared)[0]
        return predicted


def to_images(clip: torch.Tensor) -> list[Image.Image]:
    """The frames of one clip (frames, 3, height, width) in 0…1, as 8-bit pictures."""
    pixels = clip.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(frame) for frame in pixels.permute(0, 2, 3, 1).numpy()]
