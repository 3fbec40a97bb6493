"""``dithooks search``: the plan that keeps nearest to the pictures without the cache, for a speed-up."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser
from .option_checks import add_metric
from .run_arguments import (
    DONE,
    FAILED,
    INTERRUPTED,
    MODEL,
    REFUSED,
    add_json,
    add_model,
    add_quiet,
    add_target,
    exit_codes,
)

MISSED = "3    written, but a target was not reached; or not written, as no plan reaches --min-psnr"

SUMMARY = "find the plan for a speed-up that keeps nearest to the pictures without the cache"

USAGE = "MODEL [options]"

DESCRIPTION = """Find, for a speed-up, the plan that keeps nearest to the pictures without the cache: which
blocks are reused at which steps, and with which weights. The plan is a file for dit_cache, and for --plan of dithooks
compare, generate and demo."""

EPILOG = f"""{MODEL}
What its call returns is compared: pictures, videos or latents. With several --steps a dict needs num_inference_steps,
and a function is given the pipeline and the number of steps.

One run is recorded, plans are worked out from it, the best few are run and their weights fitted meanwhile, and the plan
that comes nearest to the recorded run is written. With --target-psnr it is the fastest that comes so near. Several
targets share the recorded run; --max-runs is for each of them. With --journal a search that was interrupted goes on
where it was, and says what it reused.

examples:
  dithooks search demo --target 2.5 --out plan.json
  dithooks search my_model.py:make --target 1.5 --target 2 --out "plan-{{target}}x.json" --record run.npz
  dithooks search my_model.py:make --target 2 --journal search-2x --report search.html

A file for dithooks search my_model.py:make:

  def make():
      pipe = WanPipeline.from_pretrained(..., torch_dtype=torch.bfloat16).to("cuda")
      noise = torch.Generator("cuda").manual_seed(0)
      return pipe, {{"prompt": ["a cat", "a street"], "num_inference_steps": 40, "generator": noise}}

{exit_codes(DONE, FAILED, REFUSED, MISSED, f"{INTERRUPTED}; the best so far is written if there is one")}"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks search``."""
    add = parser.add_argument
    add_model(parser)
    parser.begin_group("what is drawn")
    add("--prompt", action="append", default=[], dest="prompts", metavar="TEXT", help="demo: draw this; repeatable")
    add(
        "--steps",
        action="append",
        type=int,
        metavar="N",
        help="sampling steps, those a factory's run has to take (default of the demo: 28); repeatable: the plan is "
        "searched at the first, also fitted at the others, and serves for those and what is in between",
    )
    add("--guidance", type=float, metavar="G", help="demo: guidance scale (default: 3)")
    add("--seed", type=int, metavar="N", help="demo: of the first prompt; the next has the next (default: 1000)")
    parser.begin_group("what is searched")
    add_target(
        parser,
        dest="speedups",
        action="append",
        help="the speed-up, by --cost (default: 2); repeatable: all plans are then tiers of one file",
    )
    add(
        "--target-psnr",
        type=float,
        metavar="DB",
        help="in place of --target: the fastest plan of this PSNR or better (default: none)",
    )
    add("--min-psnr", type=float, metavar="DB", help="write no plan of a lower PSNR (default: no limit)")
    add(
        "--objective",
        choices=("mean", "worst", "both"),
        default="both",
        help="the PSNR by which plans are chosen: the mean of the pictures, that of the worst, or a mean in which bad "
        "pictures count a little more (default: %(default)s)",
    )
    add("--cost", choices=("time", "blocks"), default="time", help="the measure of the speed-up (default: %(default)s)")
    add(
        "--interval",
        type=int,
        metavar="N",
        help="only plans refreshed every Nth step, residuals reused as they are (default: all plans)",
    )
    add(
        "--mode",
        action="append",
        default=[],
        dest="modes",
        choices=("tail", "conditional"),
        help="also try plans with steps that compute a part: the last blocks alone (tail), or the branch with a "
        "prompt (conditional); repeatable (default: none)",
    )
    parser.begin_group("how long is searched")
    add(
        "--max-evals",
        former="--evals",
        type=int,
        metavar="N",
        help="plans that are run at most (default: 4; 6 where weights are fitted)",
    )
    add(
        "--local-moves",
        type=int,
        metavar="N",
        help="further plans, with one step moved (default: 0; 8 where weights are fitted and --max-evals is left out)",
    )
    add(
        "--max-runs",
        type=float,
        default=4.0,
        metavar="N",
        help="blocks to run at most, in multiples of an uncached run; inf for no limit (default: %(default)g)",
    )
    add(
        "--max-seconds",
        former="--seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="time at most (default: %(default)s)",
    )
    add(
        "--probe",
        action="store_true",
        help="measure, in one run more, how much remains of early and late errors, for plans whose weights are not "
        "fitted; else several guesses are tried",
    )
    parser.begin_group("where it runs")
    add(
        "--executor",
        choices=("ray", "torchrun"),
        help="run plans several at a time: on actors of Ray, or on the ranks that torchrun starts, as in torchrun "
        "--nproc-per-node=2 --no-python dithooks search ... (default: one after another, here)",
    )
    add("--workers", type=int, metavar="N", help="with --executor ray: actors (default: as there is room for)")
    parser.begin_group("what is kept of it")
    parser.add_folder(
        "--journal",
        type=Path,
        metavar="FOLDER",
        help="keep recorded run and plans there, and continue from them",
    )
    parser.add_output("--record", type=Path, metavar="FILE", help="keep the recorded run too, .npz")
    parser.add_input(
        "--recording", type=Path, metavar="FILE", help="read the recorded run from there instead of recording one"
    )
    parser.begin_group("output")
    add_metric(parser)
    parser.add_output(
        "--out",
        files=_plans,
        default="plan.json",
        metavar="FILE",
        help="the plan, or of several targets the tiers (default: %(default)s); a name such as plan-{target}x.json "
        "gives each target a file of its own",
    )
    parser.add_output(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page, .html, of what was found: pictures before and after, steps, the plans that were run",
    )
    add_json(parser, "tables")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Search a plan for each speed-up and write it.

    Raises:
        UsageError: an option cannot be followed, or a file cannot be read or written.
        TargetError: there is no such target.
        DitHooksError: as :func:`dithooks.search`.
    """
    from dataclasses import fields

    from .search_job import SearchOptions, run_search

    options = {field.name: getattr(args, field.name) for field in fields(SearchOptions)}
    options |= {"speedups": tuple(args.speedups or ()), "prompts": tuple(args.prompts), "metrics": tuple(args.metrics)}
    options["steps"] = tuple(args.steps or ())
    return run_search(SearchOptions(**options))


def _plans(args: argparse.Namespace) -> list[str]:
    """The files of the plans: one, or where its name says so, one for each target."""
    goals = [args.target_psnr] if args.target_psnr is not None else args.speedups or [2.0]
    return [args.out.replace("{target}", f"{goal:g}") for goal in goals[: None if "{target}" in args.out else 1]]
