"""The pipeline: labels in, 28×28 pictures of clothes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FashionPipeline(DiffusionPipeline):
    """Class to picture with a small DiT, on pixels, with classifier-free guidance in one batch per step.

    Args:
        transformer: predicts v for pixels in −1…1.
        scheduler: DDIM. It shows no step index, so that the timestep alone tells a cache which step it is.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        *,
        num_inference_steps: int = 28,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture for every label.

        Args:
            class_labels: one class or several, from 0 to 9.
            num_inference_steps: sampling steps.
            guidance_scale: 1 or less asks for the class only, without guidance.
            generator: where the noise comes from; a list gives every picture its own.
            latents: noise to start from instead, (pictures, 1, 28, 28), or of another square, of patches of 4×4.
            output_type: ``"pil"``, ``"np"`` or ``"pt"`` (pictures in 0…1), ``"latent"`` (pixels around −1…1).
            return_dict: ``False`` returns a tuple.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": …})`` after every step;
                may return replacements.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only ``latents`` is on offer.

        Raises:
            ValueError: no labels, a label that is no class, latents of another shape, or a callback input not on offer.
        """
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        config, count = self.transformer.config, len(labels)
        if not labels:
            raise ValueError("class_labels is an empty list: give at least one label")
        if wrong := sorted({label for label in labels if not 0 <= label < config.num_embeds_ada_norm}):
            raise ValueError(f"there are no classes {wrong}: labels go from 0 to {config.num_embeds_ada_norm - 1}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback inputs {sorted(unknown)} are not on offer: only {self._callback_tensor_inputs}")
        device, dtype = self._execution_device, self.transformer.dtype

        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        side = latents.shape[-1]
        if tuple(latents.shape) != (*shape[:2], side, side) or side % config.patch_size:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {count} pictures need {shape}")
        latents = latents.to(device, dtype)
        guided = guidance_scale > 1
        # Behind the classes' embeddings stands the one of no class, which labels were dropped to in training.
        asked = torch.tensor(labels + [config.num_embeds_ada_norm] * count * guided, device=device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                shown = torch.cat([latents, latents]) if guided else latents
                shown = self.scheduler.scale_model_input(shown, timestep)
                predicted = self.transformer(
                    shown, timestep=timestep.expand(len(shown)), class_labels=asked, return_dict=False
                )[0]
                if guided:
                    towards, away = predicted.chunk(2)
                    predicted = away + guidance_scale * (towards - away)
                latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(latents, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
