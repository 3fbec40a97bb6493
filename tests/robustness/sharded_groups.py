"""Run by two processes (see sharded_ranks): one model each, whole, and decisions made as one or apart."""

import datetime
import time
from itertools import count

import torch
import torch.distributed as dist
from sharded_ranks import WAIT, Collectives, main, settled
from torch.distributed.device_mesh import init_device_mesh
from toys import Net, Pipe, prompt

from dithooks import Budget, DitCacheConfig, EasyCache, Mask, Threshold, dit_cache, timestep_scope

STEPS = 12
SHORT = 6  # seconds that a group of its own waits


def net(kind="single"):
    torch.manual_seed(0)
    return Net(kind, 6)


def parts(batch=3, tokens=7):
    """What one process would be given whole; of tokens and samples that change by very different amounts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, tokens, 4, generator=generator)
    return x * torch.logspace(-1, 1, tokens)[None, :, None] * torch.logspace(-0.5, 0.5, batch)[:, None, None]


def config(policy, start=1, **given):
    return DitCacheConfig(cache_block_start=start, policy=policy, **given)


def policies():
    return {
        "threshold": Threshold(0.11, max_warmup_steps=2, max_continuous_cached_steps=3),
        "largest": Threshold(0.17, max_warmup_steps=2, reduce="max"),
        "budget": Budget(1.6),
        "rate": EasyCache(0.1, max_warmup_steps=3),
        "rate, largest": EasyCache(0.1, max_warmup_steps=3, reduce="max"),
        "masked": Mask((1, 0) * 6, dynamic=Threshold(0.055, max_warmup_steps=0)),
        "at once": Threshold(0.11, max_warmup_steps=0),
    }


def drawn(policy, x, group=None, steps=STEPS, prompts=(None,), start=1, model=None, at=None, **given):
    """A run's decisions, and how it came out: the picture, blocks run and collectives."""
    pipe = Pipe(model or net("single" if prompts == (None,) else "straight"))
    before = pipe.transformer.executions
    with (
        dit_cache(pipe, config(policy, start), process_group=group, verify=False) as cache,
        Collectives() as collectives,
    ):
        y = pipe(x, steps, prompts, at=at, **given)
        stats = cache.stats
    return {
        "decisions": settled(cache),
        "picture": y.flatten().tolist(),
        "reused": stats.reused_calls,
        "blocks": pipe.transformer.executions - before,
        "blocks counted": stats.blocks_run,
        "collectives": dict(collectives.counts),
    }


def world():
    return dist.group.WORLD


def tokens_split(rank):
    """Each has some of the tokens of all samples, not as many: 5 and 2."""
    x = parts()
    mine = x[:, :5] if rank == 0 else x[:, 5:]
    return {
        name: {"whole": drawn(p, x), "apart": drawn(p, mine), "together": drawn(p, mine, world())}
        for name, p in policies().items()
    }


def samples_split(rank):
    """Each has some of the samples: 2 and 1."""
    x = parts()
    mine = x[:2] if rank == 0 else x[2:]
    return {
        name: {"whole": drawn(p, x), "apart": drawn(p, mine), "together": drawn(p, mine, world())}
        for name, p in policies().items()
    }


def branches_split(rank):
    """One branch of the guidance each, against both in one batch."""
    x, e = parts(1), torch.cat([prompt(1), 3 * prompt(1)])
    whole = torch.cat([x, x])
    found = {}
    for name in ("threshold", "rate"):
        p = policies()[name]
        # Each steps its own branch, as if they had been mixed: what is decided, not what is drawn, is of interest.
        found[name] = {
            "whole": drawn(p, whole, prompts=(e,)),
            "together": drawn(p, x, world(), prompts=(e[rank : rank + 1],)),
        }
    model = net("straight")
    with dit_cache(model, config(policies()["threshold"]), process_group=world(), verify=False) as cache:
        for k in range(STEPS):
            with timestep_scope(k, branch=rank):
                model(x, torch.tensor(1 - k / STEPS), encoder_hidden_states=e[rank : rank + 1])
    return {**found, "numbered": settled(cache)}


def several_ranges_and_branches(rank):
    """Two ranges, two calls a step, one decision for both branches; no block before the range."""
    x = parts(2 + rank) * (1 + rank)
    e = prompt(2 + rank), 3 * prompt(2 + rank)
    found = {}
    for separate in (True, False):
        pipe = Pipe(net("two_lists"))
        p = Threshold(0.15, max_warmup_steps=2, separate_branches=separate)
        both = {"blocks": {"cache_block_start": 1}, "singles": {"cache_block_start": 0}}
        with (
            dit_cache(pipe, config(p, overrides=both), process_group=world(), verify=False) as cache,
            Collectives() as collectives,
        ):
            pipe(x, STEPS, e)
        found[f"separate {separate}"] = {"decisions": settled(cache), "collectives": dict(collectives.counts)}
    return found


def one_cannot(rank):
    """The second is given other shapes from step 5 to 7."""
    model, x = net(), parts()
    scope, p = timestep_scope, Threshold(5.0, max_warmup_steps=2)
    with dit_cache(model, config(p), process_group=world(), verify=False) as cache:
        for k in range(STEPS):
            with scope(k):
                model(x[:, :3] if rank and 5 <= k < 7 else x, torch.tensor(1 - k / STEPS))
    return {"decisions": settled(cache)}


def not_reached(rank):
    """The second's model passes over all blocks at step 5."""

    class Passing(Net):
        away = False

        def forward(self, hidden_states, timestep):
            return self.proj(self.embed(hidden_states)) if self.away else super().forward(hidden_states, timestep)

    torch.manual_seed(0)
    model, x = Passing("single", 6), parts()
    p = Threshold(5.0, max_warmup_steps=2)
    with dit_cache(model, config(p), process_group=world(), verify=False) as cache:
        for k in range(STEPS):
            with timestep_scope(k):
                model.away = bool(rank and k == 5)
                model(x, torch.tensor(1 - k / STEPS))
    return {"decisions": settled(cache)}


def interrupted(rank):
    """The second's call at step 5 is broken off before the range, and made again; then both draw another."""
    found = {}
    for warmup in (0, 2):
        model, calls = net(), count()

        def stop(*_, calls=calls):
            if rank and next(calls) == 5:
                raise InterruptedError

        model.embed.register_forward_hook(stop)
        pipe = Pipe(model)
        p = Threshold(5.0, max_warmup_steps=warmup)

        def draw(pipe=pipe):
            pipe.scheduler.set_timesteps(STEPS)
            for time_ in pipe.scheduler.timesteps:
                try:
                    pipe.transformer(parts(), timestep=time_ / 1000)
                except InterruptedError:
                    pipe.transformer(parts(), timestep=time_ / 1000)
                pipe.scheduler.step()

        with dit_cache(pipe, config(p), process_group=world(), verify=False) as cache:
            error = failed(draw)["error"]
            first = settled(cache)
            cache.reset()
            draw()
        found[f"warm-up {warmup}"] = {"error": error, "first": first, "second": settled(cache)}
    return found


def static(rank):
    """Policies that do not look, with a group given."""
    x = parts() * (1 + rank)
    found = {}
    for name, p in {"interval": None, "mask": Mask("fast")}.items():
        pipe = Pipe(net())
        own = DitCacheConfig(2, 2, 1) if p is None else config(p)
        with dit_cache(pipe, own, process_group=world()) as cache, Collectives() as collectives:
            pipe(x, STEPS)
            found[name] = {"collectives": collectives.total, "reused": cache.stats.reused_calls}
    return found


def independent(rank):
    """No group given: 12 steps here, 5 there, and nothing is asked."""
    x = parts() * (1 + rank)
    p = Threshold(0.3, max_warmup_steps=1)
    return drawn(p, x, steps=(12, 5)[rank])


def another_group(seconds=WAIT):
    """One that may be broken."""
    return dist.new_group([0, 1], timeout=datetime.timedelta(seconds=seconds))


def failed(run):
    """What a run ends with, and after how long."""
    began = time.monotonic()
    try:
        run()
        return {"error": None}
    except Exception as error:
        return {"error": str(error), "type": type(error).__name__, "after": time.monotonic() - began}


def other_step_counts(rank):
    """12 steps here, 5 there, which the schedulers say."""
    p, group = policies()["threshold"], another_group()
    return failed(lambda: drawn(p, parts(), group, steps=(12, 5)[rank]))


def other_steps(rank):
    """The second is a step ahead."""
    group = another_group()
    model, p = net(), Threshold(5.0, max_warmup_steps=2)

    def run():
        with dit_cache(model, config(p), process_group=group, verify=False):
            for k in range(rank, STEPS):
                with timestep_scope(k):
                    model(parts(), torch.tensor(1 - k / STEPS))

    return failed(run)


def other_policies(rank):
    """Another threshold in each."""
    p, group = Threshold(1.0 + rank, max_warmup_steps=2), another_group()
    return failed(lambda: drawn(p, parts(), group))


def one_stops(rank):
    """12 steps here, 5 there, and nothing tells how many: the second has ended when the first asks at step 5."""
    group = another_group(SHORT)
    model, p = net(), Threshold(5.0, max_warmup_steps=2)
    reached = []

    def run():
        with dit_cache(model, config(p), process_group=group, verify=False) as cache:
            try:
                for k in range((12, 5)[rank]):
                    with timestep_scope(k):
                        model(parts(), torch.tensor(1 - k / STEPS))
            finally:
                reached.extend(settled(cache))

    found = failed(run)
    dist.barrier()  # by the other group, which is none the worse
    return {**found, "decisions": reached}


def wrong_groups(rank):
    """What is no group to decide with is refused before the model is touched."""
    model = net()
    blocks, p = list(model.blocks), policies()["threshold"]
    alone = dist.new_group([0])
    found = {}
    for name, group in {
        "number": 7,
        "name": "WORLD",
        "others": alone if rank else -100,
        "mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp")),
    }.items():
        found[name] = failed(lambda group=group: dit_cache(model, config(p), process_group=group))
    found["untouched"] = all(a is b for a, b in zip(model.blocks, blocks, strict=True)) and not model._forward_hooks
    return found


def meshes_and_updates(rank):
    """A mesh of one dimension is as good, and update() keeps it."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    pipe = Pipe(net())
    found = []
    with dit_cache(pipe, config(policies()["rate"]), process_group=mesh["dp"], verify=False) as cache:
        for name in ("rate", "threshold"):
            cache.update(config(policies()[name]))
            with Collectives() as collectives:
                pipe(parts() * (1 + rank), STEPS)
            found.append([settled(cache), collectives.total])
    alone = drawn(policies()["threshold"], parts() * (1 + rank), mesh["tp"])  # of one rank: there is none to ask
    return {"runs": found, "alone": alone}


def compiled(rank):
    """Blocks compiled, and the whole model."""
    found = {}
    p = policies()["threshold"]
    mine = parts()[:, :5] if rank == 0 else parts()[:, 5:]
    for how in ("eager", "blocks", "whole"):
        model = net()
        if how == "blocks":
            for block in model.blocks:
                block.compile(backend="eager")
        if how == "whole":
            model.compile(backend="eager")
        found[how] = drawn(p, mine, world(), model=model)["decisions"]
    return found


if __name__ == "__main__":
    main(
        tokens_split,
        samples_split,
        branches_split,
        several_ranges_and_branches,
        one_cannot,
        not_reached,
        interrupted,
        static,
        independent,
        wrong_groups,
        meshes_and_updates,
        other_step_counts,
        other_steps,
        other_policies,
        one_stops,
        compiled,
    )
