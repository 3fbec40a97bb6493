"""The pipeline that is measured: a caption in, a picture out, guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from dithooks.demo.emoji import SIZE
from dithooks.demo.text import CaptionEncoder

from . import GUIDANCE, STEPS
from .model import MARGIN, places, to_pictures


class UNetPipeline(DiffusionPipeline):
    """Text to picture with a small UNet, on pixels, sampled as SDXL is.

    Args:
        unet: predicts v.
        text_encoder: captions to embeddings.
        scheduler: Euler, from pure noise.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CaptionEncoder, scheduler: EulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        crops_coords_top_left: tuple[int, int] = (MARGIN, MARGIN),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for every prompt.

        Args:
            prompt: one caption or several, such as ``"cat face"``.
            num_inference_steps: sampling steps.
            guidance_scale: 1 or less asks the model for the captions alone, without guidance.
            crops_coords_top_left: where the picture lies in a larger one, in 0…4 by 0…4; (2, 2) is its middle.
            generator: where the noise comes from; a list gives every picture its own.
            latents: noise to start from instead, (pictures, 3, 32, 32), of variance one.
            output_type: ``"pil"``, ``"np"`` or ``"pt"`` (pictures in 0…1), ``"latent"`` (the same in −1…1).
            return_dict: ``False`` returns a tuple.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": …})`` after every step;
                may return replacements.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only ``latents`` is on offer.

        Raises:
            ValueError: an empty prompt list, a word that no caption has, latents of another shape, or a callback input
                not on offer.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt is an empty list: give at least one caption")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback inputs {sorted(unknown)} are not on offer: only {self._callback_tensor_inputs}")
        device, dtype = self._execution_device, self.unet.dtype
        guided = guidance_scale > 1
        asked = [""] * len(prompts) + prompts if guided else prompts
        tokens, pooled = self.text_encoder(self.text_encoder.tokenize(asked).to(device))
        corners = torch.tensor([crops_coords_top_left], device=device, dtype=dtype).expand(len(asked), 2)
        added = {"text_embeds": pooled.to(dtype), "time_ids": places(corners)}
        shape = (len(prompts), 3, SIZE, SIZE)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {len(prompts)} pictures need {shape}")

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                given = self.scheduler.scale_model_input(latents, timestep).to(dtype)
                predicted = self.unet(
                    torch.cat([given] * 2) if guided else given,
                    timestep,
                    encoder_hidden_states=tokens.to(dtype),
                    added_cond_kwargs=added,
                    return_dict=False,
                )[0].float()
                if guided:
                    away, towards = predicted.chunk(2)
                    predicted = away + guidance_scale * (towards - away)
                latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(to_pictures(latents), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
