"""What happens to a tiny model when ranges of its blocks are cached: measured once per range, for many tests.

Nothing here asks the library which blocks it skips: hooks on the original blocks, set before the cache is attached,
count what runs, and the order of the blocks is that of their calls in the plain model.
"""

import dataclasses
import warnings
from collections import Counter
from functools import partial
from unittest import mock

import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.engine.decider import CallDecider
from dithooks.tiny import build


class Subject:
    """A tiny model without a cache: its output, how often its blocks run, and in which order.

    Args:
        name: of the tiny model.
        layout: the lists that are expected to be its trunk, ``"path:length + path:length"``; with ``|`` between those
            of several transformers, all of which are cached.
    """

    def __init__(self, name, layout):
        self.name = name
        self.model, self.inputs = build(name)
        self.main = next(iter(self.inputs()))
        self.runs, self._trace = Counter(), []
        for path, blocks in self.model.named_modules():
            for index, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else []):
                block.register_forward_pre_hook(partial(self._count, f"{path}.{index}"))
        self.plain = self.call()
        self.usual, self.state = Counter(self.runs), state(self.model)
        lists = [[item.split(":") for item in trunk.split(" + ")] for trunk in layout.split(" | ")]
        self.lengths = [int(length) for _, length in lists[0]]
        self.listed = [[f"{path}.{i}" for path, length in trunk for i in range(int(length))] for trunk in lists]
        self.orders = [self._order(blocks) for blocks in self.listed]
        self.size = len(self.orders[0])

    def call(self, **changed):
        """The tensors of the output, counting anew."""
        self.runs.clear()
        self._trace.clear()
        with torch.no_grad():
            return tensors(self.model(**{**self.inputs(), **changed}))

    def step(self, number, **changed):
        """The same at a step; of one branch, or calls with other inputs would be taken for another's."""
        with timestep_scope(number, branch=0):
            return self.call(**changed)

    def attach(self, start, count, interval=9, **options):
        """Steps 0, ``interval``, … are computed, the others reused."""
        if self.inputs().get("kv_cache_mode") == "extract":  # each call fills a cache, and so none can be tested
            options.setdefault("verify", False)
        return dit_cache(self.model, DitCacheConfig(0, interval, start, count), **options)

    def changed(self, *without):
        """All inputs as of another seed, but for those with one of these words in their names."""
        return {key: value for key, value in self.inputs(1).items() if not any(word in key for word in without)}

    def ranges(self):
        """All of a short trunk; of a longer one all kinds, and across the end of each list."""
        size, half = self.size, self.size // 2
        if size <= 5:
            return [(start, count) for start in range(size) for count in range(1, size - start + 1)]
        ends = {sum(self.lengths[:number]) for number in range(1, len(self.lengths))}
        kinds = {(0, size), (0, half), (half, size - half), (1, size - 1), (0, size - 1)}
        return sorted(kinds | {(0, 1), (half, 1), (size - 1, 1)} | {(end - 1, 2) for end in ends})

    def skipped(self, start, count):
        """The counted modules that are a block of the range, or part of one."""
        blocks = tuple(f"{path}." for order in self.orders for path in order[start : start + count])
        return {path for path in self.usual if f"{path}.".startswith(blocks)}

    def _order(self, listed):
        """Blocks by their first call; one that is not called stays behind the one before it."""
        first = {path: number for number, path in reversed(list(enumerate(self._trace)))}
        keys, last = {}, -1
        for path in listed:
            last = first.get(path, last)
            keys[path] = (last, path not in first)
        return sorted(listed, key=keys.__getitem__)

    def _count(self, path, *_):
        self.runs[path] += 1
        self._trace.append(path)


@dataclasses.dataclass
class Trial:
    """What a cache on one range did, and what it left behind."""

    start: int
    count: int
    error: Exception | None = None  # of the first call
    keys: list = dataclasses.field(default_factory=list)  # of the state dict, while attached
    computed: list = dataclasses.field(default_factory=list)
    reused: list = dataclasses.field(default_factory=list)
    changed: list = dataclasses.field(default_factory=list)  # reused, with another main input
    without: list = dataclasses.field(default_factory=list)  # reused, less the residual
    runs: Counter = dataclasses.field(default_factory=Counter)  # of each block on the reused step
    reused_calls: int = 0
    blocks_total: int = 0
    left: dict = dataclasses.field(default_factory=dict)  # modules that are not as they were, after removal

    @property
    def range(self):
        return self.start, self.count

    @property
    def status(self):
        if self.error is not None:
            return "refused"
        return "exact" if self.reused_calls else "never"


def attempt(subject, start, count):
    """Attach a cache to one range, run four steps, and remove it."""
    trial = Trial(start, count)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*reused nothing")
        try:
            handle = subject.attach(start, count)
        except ValueError as error:
            trial.error, trial.keys = error, list(subject.model.state_dict())
            return trial
        try:
            _observe(subject, handle, trial)
        finally:
            handle.remove()
    after = state(subject.model)
    trial.left = {path: found for path, found in after.items() if found != subject.state.get(path)}
    trial.left.update(dict.fromkeys(subject.state.keys() - after.keys()))
    return trial


def _observe(subject, handle, trial):
    trial.keys = list(subject.model.state_dict())
    try:
        trial.computed = subject.step(0)
    except Exception as error:
        trial.error = error
        return
    trial.reused = subject.step(1)
    trial.runs = Counter(subject.runs)
    trial.changed = subject.step(2, **{subject.main: subject.inputs(1)[subject.main]})
    with mock.patch.object(CallDecider, "_predicted", _nothing):
        trial.without = subject.step(3)
    trial.reused_calls, trial.blocks_total = handle.stats.reused_calls, handle.stats.blocks_total


def _nothing(decider, call, branch):
    """In place of the residual of a reused step: zeros."""
    return tuple(map(torch.zeros_like, branch.anchors[0].kept))


def flatten(subject, *besides):
    """Zero the matrices of all blocks: what each adds to its streams depends no more on what it is given.

    Then the residual of one call is that of any other, and a reused step has to give what the plain model gives, from
    whatever inputs. ``besides``: further modules in between.
    """
    for path in [*besides, *(path for order in subject.orders for path in order)]:
        for parameter in subject.model.get_submodule(path).parameters():
            if parameter.ndim > 1:
                nn.init.zeros_(parameter)
    subject.plain = subject.call()


def tensors(output):
    """All tensors of an output, whatever it is made of."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    elif not isinstance(output, (list, tuple)):
        output = list(vars(output).values()) if hasattr(output, "__dict__") else []
    return [tensor for item in output for tensor in tensors(item)]


def mapped(value, change):
    """The same structure of lists, tuples and dicts, its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return type(value)(mapped(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def same(ones, others):
    """Whether two outputs have the same bits."""
    return len(ones) == len(others) > 0 and all(map(torch.equal, ones, others))


def distance(ones, others):
    """How far an output is from another: relative L2 of the worst of its tensors; infinite if one is no number."""
    pairs = [(one.double(), other.double()) for one, other in zip(ones, others, strict=True)]
    return max(float(((one - other).norm() / other.norm()).nan_to_num(torch.inf)) for one, other in pairs)


def state(model):
    """All that a cache might leave behind, by module: another object or class, an attribute, a child, a hook."""
    return {
        path: (
            id(module),
            type(module),
            sorted(vars(module)),
            [(name, id(child)) for name, child in module._modules.items()],
            [(name, list(value.items())) for name, value in vars(module).items() if "_hooks" in name],
        )
        for path, module in model.named_modules(remove_duplicate=False)
    }
