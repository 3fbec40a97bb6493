"""A cache by hand, to compare with: decisions written out as letters, and a residual for each true branch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# The decisions of one run: for each branch a letter per step, C (computed), R (reused) or . (not called).
Decisions = dict[str, str]


class OneStream:
    """The streams of a block ``block(h, ...) -> h``: where they are in its arguments and in its output."""

    def read(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """Return the streams that a block is given."""
        return [args[0]]

    def take(self, output: Any) -> list[Tensor]:
        """Return the streams that a block returns."""
        return [output]

    def build(self, streams: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """Return the output of a block that returns these streams."""
        return streams[0]


class ByHand:
    """Blocks whose ``forward`` is replaced: computed calls keep the residual of their branch, reused ones add it.

    Args:
        lists: lists of blocks, of which a call runs one, from the first block to the last.
        decide: whether a call is reused, by its branch and step.
        streams: where the blocks have their streams.
        mixed: keep one residual for all branches, which is the fault to be seen.
    """

    def __init__(
        self,
        lists: Sequence[nn.ModuleList],
        decide: Callable[[str, int], bool],
        streams: OneStream,
        mixed: bool = False,
    ) -> None:
        self.lists, self.decide, self.streams, self.mixed = lists, decide, streams, mixed
        self.residuals: dict[str, list[Tensor]] = {}
        self.calls: list[tuple[str, int]] = []
        self.branch, self.reuse, self.entered = "", False, list[Tensor]()

    @contextmanager
    def call(self, branch: str, step: int) -> Iterator[None]:
        """Declare which branch and step the model's call inside is of."""
        self.calls.append((branch, step))
        self.branch, self.reuse = "all" if self.mixed else branch, self.decide(branch, step)
        yield

    def __enter__(self) -> ByHand:
        for blocks in self.lists:
            for index, block in enumerate(blocks):
                block.forward = self._forward(block.forward, index == 0, index == len(blocks) - 1)
        return self

    def __exit__(self, *_: object) -> None:
        for block in (block for blocks in self.lists for block in blocks):
            del block.forward

    def _forward(self, forward: Callable[..., Any], first: bool, last: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            here = self.streams.read(args, kwargs)
            if first:
                self.entered = here
            if not self.reuse:
                output = forward(*args, **kwargs)
                if last:
                    left = self.streams.take(output)
                    self.residuals[self.branch] = [b - a for a, b in zip(self.entered, left, strict=True)]
                return output
            if last:
                here = [h + delta for h, delta in zip(here, self.residuals[self.branch], strict=True)]
            return self.streams.build(here, args, kwargs)

        return run


def by_letters(decisions: Decisions) -> Callable[[str, int], bool]:
    """Return decisions by the letters of each branch."""
    return lambda branch, step: decisions[branch][step] == "R"


def at_once(items: Iterable[Any]) -> Iterable[Any]:
    """Return the items of a loop to which no line is added."""
    return items


def untold(branch: str, step: int) -> Any:
    """Tell nothing of a call."""
    return nullcontext()


def off(a: Tensor, b: Tensor) -> float:
    """Return how far one result is from another, relative to the latter."""
    return float((a - b).norm() / b.norm())


def state_of(models: Iterable[nn.Module]) -> dict[str, Any]:
    """Return the identities of all that modules hold: instance dicts, and the items of each dict and set in them."""
    return {
        f"{number}.{name}": {
            key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
        }
        for number, model in enumerate(models)
        for name, module in model.named_modules()
    }


def check(
    models: Sequence[nn.Module],
    lists: Sequence[nn.ModuleList],
    sample: Callable[..., Tensor],
    attach: Callable[[], Any],
    decisions: Decisions | Sequence[Decisions],
    *,
    steps: Callable[[Iterable[Any]], Iterable[Any]] = at_once,
    scope: Callable[[str, int], Any] = untold,
    streams: OneStream | None = None,
    said: str | None = None,
) -> None:
    """Compare a loop under the cache with the same loop by hand, in two runs one after the other.

    Args:
        models: what has to be left as it was.
        lists: the lists of blocks, each of which is a range.
        sample: the loop, ``sample(steps, call, seed)``: it takes its steps from ``steps(...)``, and makes each call
            of the model within ``call(branch, step)``, which tells the truth to the cache by hand.
        attach: attaches the cache, and returns its handle or a list of handles.
        decisions: what is computed and what is reused, in each run; or in the first and in the second.
        steps: the line of the user's around the items of the loop.
        scope: the line of the user's around each call of the model.
        streams: where the blocks have their streams.
        said: what the one warning has to say, if there is to be one.
    """
    streams = streams or OneStream()
    each = [decisions, decisions] if isinstance(decisions, dict) else decisions
    wanted = []
    for seed, letters in enumerate(each):
        decide = by_letters(letters)
        with ByHand(lists, decide, streams) as hand:
            wanted.append(sample(at_once, hand.call, seed))
        written = {
            (branch, step) for branch, line in letters.items() for step, letter in enumerate(line) if letter != "."
        }
        assert sorted(hand.calls) == sorted(written), "the letters are not those of the loop's calls"
        assert off(sample(at_once, untold, seed), wanted[-1]) > 1e-3, "reuse makes no difference: nothing is tested"
        if len(letters) > 1:
            with ByHand(lists, decide, streams, mixed=True) as hand:
                mixed = sample(at_once, hand.call, seed)
            assert off(mixed, wanted[-1]) > 3e-5, f"mixed branches make no difference: {off(mixed, wanted[-1])}"

    before = state_of(models)
    with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
        warnings.simplefilter("always")
        handles = attach()
        handles = handles if isinstance(handles, list) else [handles]
        for handle in handles:
            stack.enter_context(handle)
        got, reused, computed = [], [], []
        for seed in range(len(each)):
            got.append(sample(steps, scope, seed))
            reused.append(sum(handle.stats.reused_calls for handle in handles) - sum(reused))
            computed.append(sum(handle.stats.computed_calls for handle in handles) - sum(computed))
        log = [" ".join(f"{r.step}.{r.branch}:{r.reason}" for r in handle.decisions) for handle in handles]
    letters = ["".join(run.values()) for run in each]
    messages = [str(warning.message) for warning in caught]
    as_wanted = not messages if said is None else len(messages) == 1 and said in messages[0]
    wrong = [] if as_wanted else [f"warned: {messages}, not {said}"]
    for name, counted, letter in (("reused", reused, "R"), ("computed", computed, "C")):
        right = [line.count(letter) for line in letters]
        wrong += [f"calls {name} in each run: {counted}, not {right}"] * (counted != right)
    far = [off(a, b) for a, b in zip(got, wanted, strict=True)]
    wrong += [f"results are off those by hand by {far}"] * (not max(far) <= 1e-5)
    if wrong and len(handles) == len(lists) == 1:  # is it the decisions, or are residuals taken from other branches?
        own = by_own_decisions(lists, sample, streams, handles[0].decisions, len(each))
        wrong.append(
            "by the cache's own decisions, they would be off by "
            + ", ".join(f"{off(a, b):.2g}" if isinstance(b, Tensor) else b for a, b in zip(got, own, strict=True))
        )
    wrong += ["the model is not as it was"] * (state_of(models) != before)
    assert not wrong, "\n".join([*wrong, *log])


def by_own_decisions(
    lists: Sequence[nn.ModuleList],
    sample: Callable[..., Tensor],
    streams: OneStream,
    decisions: Iterable[Any],
    runs: int,
) -> list[Tensor | str]:
    """Return what each run gives by hand if it reuses where the cache did; or what it could not have reused."""
    reused, results = iter([record.reuse for record in decisions]), list[Tensor | str]()
    for seed in range(runs):
        with ByHand(lists, lambda branch, step: next(reused, False), streams) as hand:
            try:
                results.append(sample(at_once, hand.call, seed))
            except KeyError as error:
                results.append(f"a residual that {error} does not have")
    return results


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normal noise of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
