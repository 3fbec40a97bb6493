"""Run by two processes (see sharded_ranks): models whose weights are sharded over them, by FSDP2 or by tensors."""

import torch
import torch.distributed as dist
from sharded_groups import SHORT, another_group, config, failed, net, parts, world
from sharded_ranks import Collectives, main, settled
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dithooks import DitCacheConfig, Mask, Threshold, dit_cache, timestep_scope

STEPS = 10


def mesh():
    return init_device_mesh("cpu", (2,))


def sharded(model, on=None, **given):
    """Each block, then the rest."""
    for block in model.blocks:
        fully_shard(block, mesh=on or mesh(), **given)
    return fully_shard(model, mesh=on or mesh(), **given)


def stepped(model, x, steps=STEPS):
    """A run; the picture, and what each step took: blocks run, collectives issued."""
    runs, gathers = [], []
    for k in range(steps):
        before = model.executions
        with Collectives() as collectives:
            x = x - model(x, torch.tensor(1 - k / steps)) / steps
        runs.append(model.executions - before)
        gathers.append(collectives.total)
    return {"picture": x.flatten().tolist(), "runs": runs, "gathers": gathers}


def hooks(model):
    return [[len(each._forward_pre_hooks), len(each._forward_hooks)] for each in model.modules()]


def masked(mask="1101001010"):
    return DitCacheConfig(cache_block_start=1, cache_num_blocks=4, policy=Mask(tuple(map(int, mask))))


def fsdp_static(rank):
    """A mask, attached before sharding or after, against the same on the model as a whole; then taken off."""
    x = parts(2 + rank)
    whole = net()
    plain = stepped(whole, x)
    with dit_cache(whole, masked()):
        cached = stepped(whole, x)
    found = {"plain": plain, "cached": cached}
    for order in ("shard, attach", "attach, shard"):
        model = net()
        blocks, keys = list(model.blocks), list(model.state_dict())
        if order == "shard, attach":
            sharded(model)
            without = hooks(model)
            cache = dit_cache(model, masked())
        else:
            cache = dit_cache(model, masked())
            sharded(model)
        first = stepped(model, x)
        again = stepped(model, x)
        state = model.state_dict()
        weights = [bool(torch.equal(state[key].full_tensor(), whole.state_dict()[key])) for key in keys]
        api = [isinstance(block, FSDPModule) for block in model.blocks]
        for block in model.blocks:  # FSDP's own methods, on what stands in for its modules
            block.unshard()
            block.reshard()
        stats = cache.stats
        cache.remove()
        if order == "attach, shard":
            twin = sharded(net())
            twin(x, torch.tensor(1.0))
            without = hooks(twin)
        for block in model.blocks:
            block.unshard()
            block.reshard()
        found[order] = {
            "first": first,
            "again": again,
            "reused": stats.reused_calls,
            "held": stats.bytes_held,
            "keys": list(state) == keys and all(isinstance(each, DTensor) for each in state.values()),
            "weights": all(weights),
            "api": all(api),
            "hooks": hooks(model) == without,
            "blocks": all(a is b for a, b in zip(model.blocks, blocks, strict=True)),
            "root": [block._get_fsdp_state()._is_root for block in model.blocks],
            "plain": stepped(model, x),
        }
    return found


def changed(model):
    """Other weights, in place."""
    if isinstance(model, FSDPModule):
        model.reshard()
    for parameter in model.parameters():
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).mul_(1.2)
    return model


def fsdp_prefetch(rank):
    """Each block asks for the weights of the next two, which may be passed over."""
    x = parts(2 + rank)
    whole = net()
    with dit_cache(whole, masked()):
        cached = stepped(whole, x)
    found = {"cached": cached}
    for order in ("before", "attached"):
        model = sharded(net())
        for attached in (False, True):
            if attached:
                cache = dit_cache(model, masked())
            if attached == (order == "attached"):
                blocks = list(model.blocks)
                for k, block in enumerate(blocks[:-1]):
                    block.set_modules_to_forward_prefetch(blocks[k + 1 : k + 3])
        found[order] = {**stepped(model, x), "reused": cache.stats.reused_calls}
        changed(model)  # after a step that was reused
        found[f"{order}, changed"] = stepped(model, x)
        cache.remove()
        found[f"{order}, plain"] = stepped(model, x)
    found["plain"] = stepped(changed(net()), x)
    whole = changed(net())
    with dit_cache(whole, masked()):
        found["cached, changed"] = stepped(whole, x)
    return found


def fsdp_mixed(rank):
    """Weights in bfloat16 while they are gathered; residuals as the blocks make them."""
    x = parts(2 + rank)
    found = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(net(), mp_policy=policy)
    still = model(x, torch.tensor(1.0))
    with dit_cache(model, masked("1100")) as cache:
        for k in range(4):
            with timestep_scope(k):
                y = model(x, torch.tensor(1.0))
        found["reused"] = cache.stats.reused_calls
    found["dtype"] = str(y.dtype)
    found["error"] = float((y - still).abs().max() / still.abs().max())
    return found


def fsdp_together(rank):
    """What is drawn differs so much that each would decide otherwise; with the group they do not."""
    x = parts()[:, :5] if rank == 0 else parts()[:, 5:]
    p = Threshold(0.11, max_warmup_steps=2)
    found = {}
    with dit_cache(net(), config(p)) as cache:
        stepped(cache._target, x)
        found["apart"] = settled(cache)
    for name, make in {"whole": net, "sharded": lambda: sharded(net())}.items():
        model = make()
        with dit_cache(model, config(p), process_group=world()) as cache:
            found[name] = {**stepped(model, x), "reused": cache.stats.reused_calls}
            found[name]["decisions"] = settled(cache)
    return found


def fsdp_apart(rank):
    """The same without a group: what each decides for itself cannot be done."""
    x = parts()[:, :5] if rank == 0 else parts()[:, 5:]
    p = Threshold(0.11, max_warmup_steps=2)
    group = another_group(SHORT)
    model = sharded(net(), DeviceMesh.from_group(group, "cpu"))
    with dit_cache(model, config(p)) as cache:
        result = []
        found = failed(lambda: result.append(stepped(model, x)))
        found["decisions"] = settled(cache)
        found["picture"] = result[0]["picture"] if result else None
    whole = net()
    with dit_cache(whole, config(p)) as cache:
        found["right"] = stepped(whole, x)["picture"]
        found["would"] = settled(cache)
    dist.barrier()
    return found


# -- weights as tensors over the ranks ------------------------------------------------------------------------------


class Mlp(nn.Module):
    """h → h + down(gelu(up(h) · (1 + t)))."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_states, t):
        return hidden_states + self.down(torch.nn.functional.gelu(self.up(hidden_states * (1 + t))))


class Mlps(nn.Module):
    """Blocks with matrices to be split; where ``over`` says, tokens are split between the blocks, too."""

    def __init__(self, depth=6, width=8):
        super().__init__()
        self.embed, self.proj = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Mlp(width) for _ in range(depth))
        self.over, self.executions = None, 0
        for block in self.blocks:
            block.register_forward_hook(self._count)

    def _count(self, *_):
        self.executions += 1

    def forward(self, hidden_states, timestep):
        h = self.embed(hidden_states)
        if self.over is not None:
            rank, size = self.over.get_local_rank(), self.over.size()
            h = DTensor.from_local(h.chunk(size, 1)[rank].contiguous(), self.over, [Shard(1)], run_check=False)
        for block in self.blocks:
            h = block(h, timestep)
        return self.proj(h.full_tensor() if self.over is not None else h)


def split(model, how):
    """In place: columns and rows over the ranks, and between the blocks all of the activations, or some tokens each."""
    model.over = mesh() if how == "tokens" else None
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if how == "tokens":
        down = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": down}
    for block in model.blocks if how else ():
        parallelize_module(block, mesh(), plan)
    return model


def mlps():
    torch.manual_seed(0)
    return Mlps()


def tensors(rank):
    """Columns and rows split, with whole activations or those of some tokens; a mask, and a threshold as one."""
    x = parts(2, 6)
    found = {}
    policies = {"mask": masked(), "threshold": config(Threshold(0.14, max_warmup_steps=2))}
    for how in (None, "matrices", "tokens"):
        plain = stepped(split(mlps(), how), x)
        found[str(how)] = {"plain": plain}
        for name, each in policies.items():
            for order in ("before", "after"):
                model = split(mlps(), how if order == "before" else None)
                group = world() if name == "threshold" and how else None
                with dit_cache(model, each, process_group=group) as cache:
                    if order == "after":
                        split(model, how)
                    found[str(how)][f"{name}, {order}"] = {
                        **stepped(model, x),
                        "decisions": settled(cache),
                        "reused": cache.stats.reused_calls,
                    }
    return found


if __name__ == "__main__":
    main(fsdp_static, fsdp_prefetch, fsdp_mixed, fsdp_together, tensors, fsdp_apart)
