"""The distilled pipeline: a caption in, a picture out, one call a step and no guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from dithooks.demo.emoji import SIZE
from dithooks.demo.model import PATCH, position_ids, unpatchify
from dithooks.demo.text import CaptionEncoder

from . import STEPS


class FewStepPipeline(DiffusionPipeline):
    """Text to emoji in few steps of equal length, whose length the transformer is told where FLUX takes the guidance.

    Args:
        transformer: predicts the velocity that leads to the step's end, for 4×4 patches of pixels.
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
        num_inference_steps: int = STEPS[0],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for every prompt.

        Args:
            prompt: one caption or several, such as ``"slice of pizza"``.
            num_inference_steps: 8, 6 or 4 is what it was trained for.
            generator: where the noise comes from; a list gives every picture its own.
            latents: noise to start from instead, (pictures, 64, 48).
            output_type: ``"pil"``, ``"np"`` or ``"pt"`` (pictures in 0…1), ``"latent"`` (patches in −1…1).
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
        device, dtype = self._execution_device, self.transformer.dtype
        tokens, pooled = self.text_encoder(self.text_encoder.tokenize(prompts).to(device))
        shape = (len(prompts), (SIZE // PATCH) ** 2, 3 * PATCH * PATCH)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {len(prompts)} pictures need {shape}")
        latents = latents.to(device, dtype)
        img_ids, txt_ids = (ids.to(device) for ids in position_ids(SIZE, SIZE, tokens.shape[1]))

        grid = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=grid, device=device)
        length = torch.full((len(prompts),), 1 / num_inference_steps, device=device, dtype=dtype)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                velocity = self.transformer(
                    hidden_states=latents,
                    encoder_hidden_states=tokens,
                    pooled_projections=pooled,
                    timestep=(timestep / 1000).expand(len(prompts)).to(dtype),
                    guidance=length,
                    img_ids=img_ids,
                    txt_ids=txt_ids,
                    return_dict=False,
                )[0]
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(unpatchify(latents, SIZE, SIZE), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
