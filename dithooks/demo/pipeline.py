"""The pipeline that ships: it draws pictures of emoji, 32×32 pixels, from captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InvalidSetting
from .emoji import SIZE
from .model import PATCH, position_ids, unpatchify
from .text import CaptionEncoder


class EmojiPipeline(DiffusionPipeline):
    """Text to emoji with a small FLUX, on pixels, with classifier-free guidance by two calls per step.

    Args:
        transformer: predicts ε − x for 4×4 patches of pixels.
        text_encoder: captions to embeddings.
        scheduler: flow matching, Euler.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoder: CaptionEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for every prompt and repetition.

        Args:
            prompt: one caption or several, such as ``"slice of pizza"``.
            num_inference_steps: sampling steps.
            guidance_scale: the guidance scale; with 1 or less, the model is called once per step, without guidance.
            num_images_per_prompt: pictures per caption.
            generator: the generator of the noise; a list has one for each picture.
            latents: noise to start from instead, (pictures, 64, 48); as many tokens as fill another square, such as
                144, draw 48×48 pixels, which it was not trained for.
            output_type: ``"pil"``, ``"np"`` or ``"pt"`` (pictures in 0…1), ``"latent"`` (patches in −1…1).
            return_dict: ``False`` returns a tuple.
            callback_on_step_end: a function that is called as ``f(pipe, step, timestep, {"latents": …})`` after each
                step; it may return replacements.
            callback_on_step_end_tensor_inputs: the tensors that the callback gets; only ``latents`` is on offer.

        Raises:
            InvalidSetting: the list of prompts is empty, the demo does not know a word, or a callback input is not on
                offer.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InvalidSetting("prompt is an empty list: give at least one caption")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise InvalidSetting(
                f"callback inputs {sorted(unknown)} are not on offer: only {self._callback_tensor_inputs}"
            )
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        device, dtype = self._execution_device, self.transformer.dtype

        cond, cond_pooled = self.encode_prompt(prompts)
        uncond, uncond_pooled = self.encode_prompt([""] * len(prompts))
        shape = (len(prompts), (SIZE // PATCH) ** 2, 3 * PATCH * PATCH)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        size = PATCH * math.isqrt(latents.shape[1] if latents.ndim == 3 else 0)
        if size == 0 or tuple(latents.shape) != (shape[0], (size // PATCH) ** 2, shape[2]):
            raise InvalidSetting(f"latents have shape {tuple(latents.shape)}; {len(prompts)} pictures need {shape}")
        latents = latents.to(device, dtype)
        img_ids, txt_ids = (ids.to(device) for ids in position_ids(size, size, cond.shape[1]))

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                shared = {
                    "hidden_states": latents,
                    "timestep": (timestep / 1000).expand(len(prompts)).to(dtype),
                    "img_ids": img_ids,
                    "txt_ids": txt_ids,
                }
                velocity = self._predict(cond, cond_pooled, shared)
                if guidance_scale > 1:
                    away = self._predict(uncond, uncond_pooled, shared)
                    velocity = away + guidance_scale * (velocity - away)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(unpatchify(latents, size, size), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (batch, length, dim) and pooled (batch, dim) on the pipeline's device."""
        tokens, pooled = self.text_encoder(self.text_encoder.tokenize(prompts).to(self._execution_device))
        return tokens, pooled

    def _predict(self, tokens: torch.Tensor, pooled: torch.Tensor, shared: dict[str, torch.Tensor]) -> torch.Tensor:
        """One call of the transformer: the velocity ε − x, (batch, 64, 48)."""
        velocity: torch.Tensor = self.transformer(
            encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False, **shared
        )[0]
        return velocity
