"""``dithooks search``: the plan that keeps nearest to the pictures without the cache, for a speed-up."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser
from .option_checks import add_metric

SUMMARY = "find the plan for a speed-up that keeps nearest to the pictures without the cache"

DESCRIPTION = """Find, for a speed-up, the plan that keeps nearest to the pictures without the cache: which
blocks are reused at which steps, and with which weights. A plan is a file for dit_cache and dithooks demo."""

EPILOG = """what TARGET can be:
  demo                        the small pipeline that ships with dithooks
  path/to/file.py:factory     your own: a function without arguments that returns a pair of the pipeline (the model,
  package.module:factory      or a BlockAdapter) and how to call it: a dict of keyword arguments, a tuple of
                              positional ones, or a function that does, without arguments or given the pipeline.
                              With several --steps a dict needs num_inference_steps, and a
                              function is given the pipeline and the number of steps.
                              The results of the call are compared: pictures, videos or latents. A dict's or tuple's
                              generators are set back before each run, and so are torch's own; a function has to draw
                              the same each time by itself.

One run is recorded, plans are worked out from it, the best few are run and their weights fitted meanwhile, and the plan
that comes nearest to the recorded run is written. With --target-psnr it is the fastest that comes so near. Several
targets share the recorded run; --max-runs is for each of them.
A file for `dithooks search my_model.py:make`:

  def make():
      pipe = WanPipeline.from_pretrained(..., torch_dtype=torch.bfloat16).to("cuda")
      noise = torch.Generator("cuda").manual_seed(0)
      return pipe, {"prompt": ["a cat", "a street"], "num_inference_steps": 40, "generator": noise}

exit codes: 0 written; 2 cannot be done as asked; 3 written, but a target was not reached, or not written, as no plan
reaches --min-psnr; 130 interrupted, the best so far is written if there is one.
"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks search``."""
    add = parser.add_argument
    add("target", metavar="TARGET", help="what to search a plan for, see below")
    add(
        "--target",
        action="append",
        type=float,
        dest="speedups",
        metavar="X",
        help="speed-up (default: 2); repeatable: all plans are then tiers of one file",
    )
    add("--target-psnr", type=float, metavar="DB", help="the fastest plan of this PSNR or better, in place of --target")
    add("--min-psnr", type=float, metavar="DB", help="write no plan of a lower PSNR (default: no limit)")
    add(
        "--objective",
        choices=("mean", "worst", "both"),
        default="both",
        help="the PSNR by which plans are chosen: the mean of the pictures, that of the worst, or a mean in which bad "
        "pictures count a little more (default: %(default)s)",
    )
    add_metric(parser)
    parser.add_output(
        "--out",
        files=_plans,
        default="plan.json",
        metavar="FILE",
        help="the plan, or of several targets the tiers (default: %(default)s); a name such as plan-{target}x.json "
        "gives each target a file of its own",
    )
    add(
        "--steps",
        action="append",
        type=int,
        metavar="N",
        help="sampling steps: those of the demo (default: 28), those a factory's run has to take; repeatable: the plan "
        "is searched at the first and also fitted at the others, and serves for those and what is in between",
    )
    add("--cost", choices=("time", "blocks"), default="time", help="the measure of the speed-up (default: %(default)s)")
    add("--evals", type=int, metavar="N", help="plans that are run at most (default: 4; 6 where weights are fitted)")
    add(
        "--local-moves",
        type=int,
        metavar="N",
        help="further plans, with one step moved (default: 0; 8 where weights are fitted and --evals is left out)",
    )
    add("--interval", type=int, metavar="K", help="only plans refreshed every K steps, residuals reused as they are")
    add(
        "--probe",
        action="store_true",
        help="measure, in one run more, what remains of early and late errors, for plans whose weights are not fitted "
        "(default: several guesses are tried)",
    )
    add(
        "--max-runs",
        type=float,
        default=4.0,
        metavar="N",
        help="blocks run at most, in uncached runs; inf for no limit (default: %(default)g)",
    )
    add("--seconds", type=float, default=float("inf"), metavar="S", help="time at most (default: %(default)s)")
    add(
        "--executor",
        choices=("ray", "torchrun"),
        help="run plans several at a time: on actors of Ray, or on the ranks that torchrun starts, as in torchrun "
        "--nproc-per-node=2 --no-python dithooks search ...",
    )
    add("--workers", type=int, metavar="N", help="with --executor ray: actors (as many as there is room for)")
    parser.add_folder(
        "--journal", type=Path, metavar="FOLDER", help="keep the results of plans there, and continue from them"
    )
    parser.add_output("--record", type=Path, metavar="FILE", help="keep the recorded run too, .npz")
    parser.add_input(
        "--recording", type=Path, metavar="FILE", help="read the recorded run from there instead of recording one"
    )
    parser.add_output(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page, .html, of what was found: pictures before and after, steps, the plans that were run",
    )
    parser.add_output("--json", metavar="FILE", help="write the numbers too; - writes them instead of the tables")
    add("--quiet", action="store_true", help="show no progress")
    add("--prompt", action="append", default=[], dest="prompts", metavar="CAPTION", help="demo: draw this; repeatable")
    add("--seed", type=int, help="demo: of the first caption; the next has the next (default: 1000)")
    add("--guidance", type=float, help="demo: guidance scale (default: 3)")


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
