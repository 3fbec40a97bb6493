"""Run by two processes (see sharded_ranks): diffusers' context parallel, in which each has some of the tokens."""

import logging
import warnings

import torch
from diffusers import ContextParallelConfig
from sharded_groups import failed, world
from sharded_ranks import Collectives, main, settled

from dithooks import DitCacheConfig, Mask, Threshold, dit_cache
from dithooks.tiny import build

STEPS = 8
MASK = DitCacheConfig(cache_block_start=1, policy=Mask((1, 1, 0, 1, 0, 0, 1, 0)))
NAMES = {
    "flux": "FluxTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "qwen": "QwenImageTransformer2DModel",
}
HALVES = {"ulysses_degree": 2}
PIECES = {"ulysses_degree": 2, "ulysses_anything": True}  # of as many tokens as there are: 8 and 7, of the text 3 and 2
RING = {"ring_degree": 2}

# Asked for the accelerator, of which there is none: one, as far as diffusers counts them.
torch.accelerator.device_count = lambda: 1
logging.getLogger("diffusers").setLevel(logging.ERROR)


def model_of(name):
    return build(NAMES[name]).model


def inputs_of(name, uneven=False):
    given = build(NAMES[name]).inputs()
    if uneven:  # FLUX: 15 tokens of the picture, 5 of the text
        given["hidden_states"], given["img_ids"] = given["hidden_states"][:, :15], given["img_ids"][:15]
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :5]
        given["txt_ids"] = given["txt_ids"][:5]
    return given


def stepped(name, model, uneven=False):
    """A run; every output, and how many collectives each step took."""
    given = inputs_of(name, uneven)
    outputs, collectives = [], []
    x, whole = given["hidden_states"], not given["timestep"].is_floating_point()
    for k in range(STEPS):
        t = torch.full_like(given["timestep"], 900 - 100 * k if whole else 1 - k / STEPS)
        with Collectives() as counted:
            y = model(**{**given, "hidden_states": x, "timestep": t}, return_dict=False)[0]
        x = x - y / STEPS
        outputs.append(y.flatten().tolist())
        collectives.append(counted.total)
    return {"outputs": outputs, "collectives": collectives}


def cached(name, how, config, order="after", group=None):
    """A run with the cache; put on after the tokens are split, or before."""
    model = model_of(name)
    if how and order == "after":
        model.enable_parallelism(config=ContextParallelConfig(**how))
    with dit_cache(model, config, process_group=group) as cache:
        if how and order == "before":
            model.enable_parallelism(config=ContextParallelConfig(**how))
        found = stepped(name, model)
        stats = cache.stats
    return {**found, "decisions": settled(cache), "reused": stats.reused_calls}


def plain(name, how, uneven=False):
    model = model_of(name)
    if how:
        model.enable_parallelism(config=ContextParallelConfig(**how))
    return stepped(name, model, uneven)


def static(rank):
    """A mask, and the same in one process."""
    found = {}
    for name in NAMES:
        found[name] = {
            "plain": plain(name, HALVES),
            "one process": cached(name, None, MASK),
            "after": cached(name, HALVES, MASK, "after"),
            "before": cached(name, HALVES, MASK, "before"),
        }
    return found


def together(rank):
    """A threshold, by all tokens."""
    found = {}
    for name, threshold in {"flux": 0.6, "wan": 0.36, "qwen": 1.0}.items():
        config = DitCacheConfig(cache_block_start=1, policy=Threshold(threshold, max_warmup_steps=2))
        found[name] = {
            "plain": plain(name, HALVES),
            "one process": cached(name, None, config),
            "after": cached(name, HALVES, config, "after", world()),
            "before": cached(name, HALVES, config, "before", world()),
        }
    return found


def apart(rank):
    """A threshold, and no group: what is said when the cache is put on, or at the first call after the split."""
    config, said = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1)), {}
    for order in ("after", "before"):
        model = model_of("flux")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if order == "after":
                model.enable_parallelism(config=ContextParallelConfig(**HALVES))
            with dit_cache(model, config, verify=False):
                if order == "before":
                    model.enable_parallelism(config=ContextParallelConfig(**HALVES))
                    model(**inputs_of("flux"), return_dict=False)
                    model(**inputs_of("flux"), return_dict=False)
        said[order] = [str(each.message) for each in caught if "split over ranks" in str(each.message)]
    return said


def at_the_split(rank):
    """Ranges that begin where the tokens are split: for Wan and Qwen-Image, in block 0."""
    mask = DitCacheConfig(cache_block_start=0, policy=MASK.policy)
    looking = DitCacheConfig(cache_block_start=0, policy=Threshold(0.25, max_warmup_steps=2))
    return {
        f"{name}, {how}": {
            "one process": cached(name, None, config),
            "after": cached(name, HALVES, config, "after", world()),
            "before": cached(name, HALVES, config, "before", world()),
        }
        for name in ("wan", "qwen")
        for how, config in {"mask": mask, "threshold": looking}.items()
    }


def alone(rank):
    """Ways to split that gloo or attention on CPUs may not know: the model by itself, without a cache."""
    return {"ring": failed(lambda: plain("flux", RING)), "uneven": failed(lambda: plain("flux", PIECES, True))}


if __name__ == "__main__":
    main(static, together, apart, at_the_split, alone)
