"""Draw a file of prompts with Ray, on several actors; interrupted, it goes on where it was.

Without arguments but the files, the small pipeline that ships with dithooks draws, on two actors:

    pip install "dithooks[demo,ray]"
    printf '{"prompt": "slice of pizza"}\\n{"prompt": "cat face"}\\n' > prompts.jsonl
    python examples/ray_generate.py prompts.jsonl drawn --plan 2x

Started again, it draws what is missing. Two actors to a GPU, eight prompts in a call, with a pipeline of your own:

    python examples/ray_generate.py prompts.parquet drawn --load my_model.py:make --plan plan.json \\
        --actors 8 --gpus 0.5 --batch 8 --options '{"num_inference_steps": 28, "height": 1024, "width": 1024}'

where make() returns the pipeline on its GPU, which Ray has chosen: pipe.to("cuda"). On a cluster add --address auto,
and give files that every node has. The pictures:

    from dithooks.ray import decoded, read

    for row in read("drawn").to_pylist():
        if row["status"] == "ok":
            decoded(row["picture"], row["format"]).save(f"{row['id']}.png")

Exit codes: 0, every row has its picture; 3, all is done, but rows failed (--retry-failed draws them again);
1, it cannot be done as asked; 130, interrupted.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import ray
import torch

from dithooks.demo import PLANS, load_pipeline
from dithooks.ray import decoded, generate, read

DONE, IMPOSSIBLE, FAILED, INTERRUPTED = 0, 1, 3, 130


def load_demo():
    """The shipped pipeline, on the GPU that Ray has given this actor, if any."""
    pipe = load_pipeline()
    return pipe.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else pipe


def arguments(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="Exit code 3: all is done, but rows failed."
    )
    parser.add_argument("prompts", help="parquet, JSON lines or CSV, with a column prompt")
    parser.add_argument("out", help="folder of the output; that of an interrupted job goes on")
    parser.add_argument("--load", metavar="WHERE:FUNCTION", help="of the function that returns the pipeline")
    parser.add_argument("--plan", help="a file that plan.save or `dithooks search` wrote, or 1.5x, 2x, 3x of the demo")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="of the pipeline's call")
    parser.add_argument("--actors", type=int, nargs="+", default=[2], metavar="N", help="how many, or least and most")
    parser.add_argument("--cpus", type=float, default=1, help="that each actor takes (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="that each actor takes; parts are possible (default: 0)")
    parser.add_argument("--batch", type=int, default=1, help="prompts in one call of the pipeline (default: 1)")
    parser.add_argument("--rows-per-file", type=int, help="as many are lost at most where a process is ended")
    parser.add_argument("--seed", type=int, default=0, help="of rows that have none of their own (default: 0)")
    parser.add_argument("--retry-failed", action="store_true", help="draw again what has failed before")
    parser.add_argument("--pictures", metavar="FOLDER", help="write the pictures there as files, too")
    parser.add_argument("--address", help="of a Ray cluster; auto: the one that runs here")
    parser.add_argument("--quiet", action="store_true", help="without progress")
    return parser.parse_args(args)


def write_pictures(out, folder):
    """Every picture as a file that is called by its row's id."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for row in read(out, ["id", "status", "picture", "format"]).to_pylist():
        if row["status"] == "ok" and row["format"] == "png":
            decoded(row["picture"], row["format"]).save(Path(folder, f"{row['id']}.png"))


def main(args=None):
    asked = arguments(args)
    shipped = PLANS / f"{asked.plan}.json"
    if asked.address:
        ray.init(address=asked.address, logging_level=logging.WARNING)
    try:
        report = generate(
            asked.prompts,
            asked.out,
            asked.load or load_demo,
            shipped if shipped.is_file() else asked.plan,
            options=asked.options,
            actors=asked.actors[0] if len(asked.actors) == 1 else tuple(asked.actors),
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            batch_size=asked.batch,
            rows_per_file=asked.rows_per_file,
            seed=asked.seed,
            retry_failed=asked.retry_failed,
            verbose=not asked.quiet,
        )
    except KeyboardInterrupt:
        print(f"interrupted: what is drawn is in {asked.out}, the same call goes on", file=sys.stderr)
        return INTERRUPTED
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return IMPOSSIBLE
    print(report)
    if asked.pictures:
        write_pictures(asked.out, asked.pictures)
    return DONE if report.complete else FAILED


if __name__ == "__main__":
    sys.exit(main())
