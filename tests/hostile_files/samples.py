"""Small files of every kind that the library reads, as it writes them, and what reads them."""

import json
from dataclasses import dataclass, replace

import numpy as np

from dithooks import CachePlan, DitCacheConfig, Fitted, Mask, PlanTiers, Recording, Threshold, plan
from dithooks.compat.cache_dit import load_configs
from dithooks.compat.msmodelslim.adaptor_configs import DitCacheConfig as SlimConfig
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import PLANS
from dithooks.policies.conditional import Conditional
from dithooks.recording.recording import Trace
from dithooks.tuning.journal import Journal
from dithooks.tuning.trial_driver import check_measures

CONFIG = DitCacheConfig(
    cache_block_start=1,
    compute_last=1,
    policy=Mask((1, 0, 1, 0), (1.0, 0.75, 0.5, 0.25), dynamic=Threshold(0.1, 0)),
    predictor=Fitted((None, (1.0,), None, (1.5, -0.5))),
    cache_dtype="bfloat16",
    overrides={"blocks": {"policy": Threshold(0.2)}},
)
CACHE_DIT = {"max_warmup_steps": 4, "residual_diff_threshold": 0.12, "enable_taylorseer": True, "taylorseer_order": 1}
YAML = "cache_config:\n" + "".join(f"  {name}: {json.dumps(value)}\n" for name, value in CACHE_DIT.items())
PIECE = TransformerPlan(
    "transformer", 1, 2, 4, (1, 1, 0, 0), (None, None, (1.5, -0.5), (0.25,)), (1.0, 0.75, 0.5, 0.25)
)
HALVES = TransformerPlan(
    "transformer", 0, 4, 4, (1, 1, 0, 1), (None, None, (1.5, -0.5), None), (1.0, 0.75, 0.5, 0.25), payload="output",
    conditional=Conditional(1, (0, 1, 0, 1), in_batch=True),
)  # fmt: skip
FOUND = Provenance(
    "2026-11-30", {"torch": "2.6.0"}, "CPU", 4, 2.0, "by hand", 1.9, 0.01, 1.8, 41.0, 0.1, 0.9, worst=30.0
)
TIERS = PlanTiers(
    {
        name: CachePlan((piece,), PlanTarget("Net", "0123456789abcdef", 8, "float32", 4, "Counter", (6, 4)), found)
        for name, piece, found in (
            ("high", PIECE, FOUND),
            ("fast", HALVES, replace(FOUND, measured_speedup=3.0, lpips=0.1)),
        )
    }
)
PURPOSE = {"fingerprint": "0123456789abcdef", "num_inference_steps": 6, "cost": "time"}
MEASURES = {"seconds": 1.5, "speedup": 2.0, "blocks": 0.5, "failure": "", "psnr": float("inf"), "worst": 40.0,
            "relative_l1": 0.01, "ssim": 0.99}  # fmt: skip


def recording(steps=6, blocks=3):
    """A recording of random residuals."""
    draw = np.random.default_rng(0)
    ranges = np.array([(first, last) for first in range(blocks) for last in range(first, blocks)])
    samples = draw.normal(size=(len(ranges), steps, 40)).cumsum(1)
    trace = Trace(
        "transformer", tuple(f"blocks.{number}" for number in range(blocks)), ranges,
        samples @ samples.transpose(0, 2, 1), draw.uniform(5, 6, (blocks, steps)), np.arange(steps),
        np.linspace(1, 0.1, steps), "sigma", 2.0, np.full(blocks, 1.5), 5.0, 0.25,
        {"hidden_states": np.ones((2, 8), np.float32)}, 2, 2 * steps,
    )  # fmt: skip
    made = PlanTarget("Model", PURPOSE["fingerprint"], blocks, "float32", steps, "Euler", (4, 8, 8))
    sigmas = tuple(np.linspace(1, 0.1, steps).tolist())
    return Recording((trace,), made, sigmas, 1, 1, 60.0, 70.0, sensitivity=(1.0,) * steps)


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, its bytes, what reads it, and what is done with what was read."""

    file: str
    data: bytes
    load: object
    use: object = str


def again(read):
    """What was read can be written and read again, and printed."""
    assert type(read).from_json(read.to_json()) == read
    assert str(read)


def planned(read):
    """What was read can be planned with."""
    for cost in ("time", "blocks"):
        plan(read, 1.6, cost=cost)


def opened(path):
    """The journal that a file is of."""
    journal = Journal.open(path.parent, PURPOSE, check_measures)
    journal.recording()
    return journal


def journal_of(folder):
    """Write a journal."""
    journal = Journal.open(folder, PURPOSE)
    journal.keep_recording(recording(), [np.full((3, 4), 0.5, np.float32), np.zeros((3, 4), np.float32)])
    for key in ("plan a", "plan b"):
        journal.keep_evaluation(key, MEASURES)
    return folder


def kinds(folder):
    """All kinds of files, with samples that are written to a folder first."""
    recording().save(folder / "run.npz")
    journal = journal_of(folder / "journal")
    parts = {name: (journal / name).read_bytes() for name in sorted(path.name for path in journal.iterdir())}
    found = {
        "plan": Kind("plan.json", (PLANS / "2x.json").read_bytes(), CachePlan.load, again),
        "tiers": Kind("plans.json", TIERS.to_json().encode(), PlanTiers.load, again),
        "config": Kind("config.json", CONFIG.to_json().encode(), DitCacheConfig.load, again),
        "msmodelslim": Kind("slim.json", json.dumps(dict(SlimConfig(2, 2, 0, 3))).encode(), SlimConfig.load),
        "cache-dit, JSON": Kind("cache.json", json.dumps({"cache_config": CACHE_DIT}).encode(), load_configs),
        "cache-dit, YAML": Kind("cache.yaml", YAML.encode(), load_configs),
        "recording": Kind("run.npz", (folder / "run.npz").read_bytes(), Recording.load, planned),
    }
    journals = {f"journal, {name}": Kind(f"journal/{name}", data, opened) for name, data in parts.items()}
    return found | journals
