"""``dithooks generate``: pictures or a video by any pipeline, with or without a cache."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser
from .run_arguments import (
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    add_model,
    add_payload,
    add_quiet,
    add_target,
    exit_codes,
)

SUMMARY = "draw pictures or a video with any pipeline, as it is or made faster"

USAGE = "MODEL --prompt TEXT [options]"

DESCRIPTION = """Draw pictures or a video with any pipeline of diffusers: as it is, with a plan, or with a speed-up that
is steered to as it runs. One run for each prompt, one after another. Statistics are written beside the results."""

MISSED = "3    done, but the --target was not reached"

EPILOG = f"""what MODEL can be:
  demo                     the small pipeline that ships with dithooks
  path/to/folder           a pipeline that save_pretrained or a download has put there
  owner/name               an id of the Hugging Face Hub: files that are not in its local cache are downloaded

how it is made faster (without any of these, nothing is):
  --plan plan.json           what dithooks search has found for this model; a configuration that config.save wrote, too
  --target 2                 no plan: 2 times fewer blocks run, at the steps that turn out to change least
  --target 2 --policy-free   no plan: the steps that are computed are evenly spread, and nothing is looked at

examples:
  dithooks generate demo --prompt "slice of pizza" --plan 2x --out pizza.png
  dithooks generate black-forest-labs/FLUX.1-dev --prompt "a lighthouse" --plan plan.json --size 1024x1024
  dithooks generate path/to/wan --prompt "a cat walks" --frames 49 --size 832x480 --fps 16 --target 2 --out cat.mp4
  dithooks generate Qwen/Qwen-Image --prompt "a street" --negative-prompt " " --set true_cfg_scale=4 --count 2

The first result is drawn with the seed, the next with the seed and one; of several, the names get numbers: out-1.png,
out-2.png. Files that exist are overwritten.

{exit_codes(DONE, FAILED, REFUSED, MISSED, f"{INTERRUPTED}; what was done by then is written")}"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks generate``."""
    add_model(parser)
    parser.begin_group("what is drawn")
    add = parser.add_argument
    add("--prompt", action="append", default=[], dest="prompts", metavar="TEXT", help="draw this; repeatable")
    add("--negative-prompt", metavar="TEXT", help="what not to draw")
    add("--steps", type=int, metavar="N", help="sampling steps (default: those of the plan, else the pipeline's own)")
    add("--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's own)")
    add("--seed", type=int, default=0, metavar="N", help="of the first result; the next has the next (default: 0)")
    add("--size", metavar="WxH", help="of a picture in pixels, such as 1024x768 (default: the pipeline's own)")
    add("--frames", type=int, metavar="N", help="of a video (default: the pipeline's own)")
    add("--fps", type=float, default=16.0, metavar="F", help="frames a second in the file (default: %(default)g)")
    add("--count", type=int, default=1, metavar="N", help="results for each prompt (default: %(default)s)")
    add("--tiling", action="store_true", help="decode in tiles: takes less memory, and some pipelines need it")
    add("--set", action="append", default=[], dest="others", metavar="NAME=VALUE", help="another argument; repeatable")
    parser.begin_group("how it is cached")
    parser.add_plan(
        "--plan",
        ships=lambda args: args.model == "demo",
        metavar="FILE",
        help="with this plan or configuration; of the demo, also with a plan that ships: 1.5x, 2x, 3x",
    )
    add("--tier", metavar="TIER", help="of a file of tiers: a name, or such as 'fastest at >= 35 dB'")
    add_target(parser, help="with a policy that steers to this speed-up, in blocks that run")
    add("--policy-free", action="store_true", help="with --target: steps chosen before the run, evenly spread")
    add_payload(parser)
    parser.begin_group("where it runs")
    add(
        "--device",
        default="auto",
        metavar="D",
        help="cpu, cuda, cuda:1, npu, xpu, mps; auto is an accelerator, if there is one (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: float32 on the CPU, bfloat16 elsewhere)",
    )
    add("--trust-remote-code", action="store_true", help="run code that the pipeline brings, which else is refused")
    parser.begin_group("output")
    parser.add_output(
        "--out",
        files=_results,
        type=Path,
        metavar="FILE",
        help="the picture or video (default: generated.png; of a video .mp4, or .gif without ffmpeg)",
    )
    parser.add_output(
        "--json",
        metavar="FILE",
        help="the figures; - prints them in place of the text (default: beside the result)",
    )
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Draw each result and write it, with its statistics.

    Raises:
        UsageError: an option cannot be followed, or a file cannot be read or written.
        TargetError: there is no such pipeline.
        DitHooksError: as :func:`dithooks.dit_cache`.
    """
    from dataclasses import fields

    from .generate_options import GenerateOptions
    from .generation import generate

    options = {field.name: getattr(args, field.name) for field in fields(GenerateOptions)}
    options |= {"prompts": tuple(args.prompts), "others": tuple(args.others)}
    return generate(GenerateOptions(**options))


def _results(args: argparse.Namespace) -> list[Path]:
    """A file in the folder of the results, which have numbers or another ending where that becomes known later."""
    return [args.out or Path("generated.png")]
