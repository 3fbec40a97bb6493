"""Names of cache-dit that are not here, as what they stand for is another library's work, and what to take instead."""

from __future__ import annotations

from typing import Any

from ...errors import NotProvided

# What to take instead, and the names.
REMEDIES = {
    "quantise before, by quantize_ of torchao or quantization_config of diffusers, and enable the cache then": (
        *("QuantizeBackend", "QuantizeConfig", "load", "load_quantize_config", "quantize"),
        *("svdq_extension_is_available",),
    ),
    "split the model before, by enable_parallelism of diffusers or PyTorch's FSDP; all ranks then decide as one": (
        *("ParallelismBackend", "ParallelismConfig", "load_parallelism_config"),
    ),
    "call transformer.set_attention_backend of diffusers": ("load_attn_backend_config", "set_attn_backend"),
    "call pipe.enable_group_offload of diffusers, and enable the cache then": (
        *("LayerwiseOffloadHandle", "LayerwiseOffloadHandleGroup", "get_layerwise_offload_handles"),
        *("layerwise_cpu_offload", "layerwise_offload", "remove_layerwise_offload"),
    ),
    "take torch.profiler": (
        *("ProfilerContext", "create_profiler_context", "profile_function"),
        *("get_profiler_output_dir", "set_profiler_output_dir"),
    ),
    "take TaylorSeerCalibratorConfig, or, which draws better than all three, the plan that dithooks.search finds": (
        *("DMDCalibratorConfig", "FoCaCalibratorConfig"),
    ),
    "blocks are cached here, not pruned: take DBCacheConfig": ("DBPruneConfig", "block_range"),
    "any model is looked at as it is: `dithooks inspect --all` tries the classes of diffusers, and writes the table": (
        *("supported_matrix",),
    ),
    "take dithooks.Taylor, or derive from dithooks.Predictor": (
        *("Calibrator", "CalibratorBase", "DMDCalibrator", "FoCaCalibrator", "TaylorSeerCalibrator"),
    ),
    "blocks run as they are, within hooks: name those that are meant in BlockAdapter(transformer=, blocks=)": (
        *("CachedAdapter", "CachedBlocks", "CachedBlocks_Pattern_0_1_2", "CachedBlocks_Pattern_3_4_5"),
        *("CachedContext", "CachedContextManager", "ContextManager", "PrunedBlocks", "PrunedContext"),
        *("PrunedContextManager", "UnifiedBlocks"),
    ),
    "no pipeline is needed: give the transformer itself": ("FakeDiffusionPipeline",),
    "compare pictures with `dithooks compare`, or with scikit-image and lpips": (
        *("compute_fid", "compute_psnr", "compute_ssim"),
    ),
    "read and draw with the commands of `dithooks`": ("entrypoint",),
    "write CacheType.DBCache or CacheType.NONE": ("cache_type",),
    "it has nothing to do with the cache: leave it out": (
        *("ENV", "disable_print", "maybe_empty_cache", "parse_extra_modules"),
    ),
}


class AbsentName(type):
    """The class of a name that is not here: it can be imported, and derived from; its use says what to take instead.

    Example:
        >>> ABSENT_NAMES["set_attn_backend"]("flash")
        Traceback (most recent call last):
        dithooks.errors.NotProvided: set_attn_backend of cache-dit is not here: call transformer.set_attention_backend
        of diffusers
    """

    message: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotProvided(cls.message)

    def __getattr__(cls, name: str) -> Any:
        raise NotProvided(cls.message)


ABSENT_NAMES = {
    name: AbsentName(name, (), {"message": f"{name} of cache-dit is not here: {remedy}"})
    for remedy, names in REMEDIES.items()
    for name in names
}
