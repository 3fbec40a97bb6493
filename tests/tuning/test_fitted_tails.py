"""Plans whose last blocks may run alone: fitted in closed loop, against NumPy along the whole trajectory; searched."""

import numpy as np
import pytest
import torch
from tuning.test_closed_loop import DEPTH, SIGMAS, STEPS, ByHand, Case, line, pictures, pipeline, same_weights

from dithooks import CachePlan, dit_cache, search
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.tuning.evaluation import Fit

HEAD, TAIL = (1, 1, 0, 0, 1, 0, 0, 0), (1, 1, 0, 1, 1, 0, 1, 0)
SPANS = ((0, 3, HEAD), (3, DEPTH, TAIL))


def weights_at(mask, step):
    return None if mask[step] else tuple(line([k for k in range(step - 1, -1, -1) if mask[k]], step))


def piece_of(first, end, mask, *more):
    weights = tuple(weights_at(mask, step) for step in range(STEPS))
    sigmas = tuple(SIGMAS[:STEPS])
    return TransformerPlan("transformer", first, end - first, DEPTH, mask, weights, sigmas, more_ranges=more)


PLAN = piece_of(*SPANS[0], piece_of(*SPANS[1]))


class InTwo(ByHand):
    """With two ranges, whose residuals are forecast each by its own line; outputs are those of computed heads."""

    def __init__(self, *given):
        super().__init__(*given, payload="residual", mask=HEAD)

    def is_partial(self, step):
        return not (HEAD[step] and TAIL[step])

    def raw(self, step, x, reused):
        self.branches, self.step = [], step
        with torch.no_grad():
            t = torch.tensor(SIGMAS[step])
            guided = self.pipe.guided(self.called, torch.from_numpy(x), t, self.prompts).numpy()
        if self.pipe.guidance == "batch":
            self.branches = np.split(self.branches[0], 2)
        return guided

    def called(self, x, t, encoder_hidden_states=None):
        model, e = self.pipe.transformer, encoder_hidden_states
        h, temb = model.embed(x), model.time(t.reshape(-1, 1).to(x.dtype)).expand(x.shape[0], -1)
        for first, end, mask in SPANS:
            kept, before = self.residuals.setdefault((first, len(self.branches)), []), (h, e)
            weights = None if self.uncached else weights_at(mask, self.step)
            if weights is None:
                for block in model.blocks[first:end]:
                    e, h = block(h, encoder_hidden_states=e, temb=temb)
                kept.insert(0, (h - before[0], e - before[1]))
            else:
                h, e = (
                    own + sum(w * r[n] for w, r in zip(weights, kept, strict=False)) for n, own in enumerate((h, e))
                )
        self.branches.append(model.proj(h).numpy())
        return model.proj(h)

    uncached = False

    def reference(self):
        self.uncached = True
        found = super().reference()
        self.uncached = False
        return found


@pytest.mark.parametrize("guidance", ["calls", "batch"])
def test_weights_and_latents(guidance):
    pipe, x, prompts = pipeline(guidance)
    run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
    case, hand = Case(pipe, run, PLAN), InTwo(pipe, x, prompts)
    wanted = hand.cached(hand.reference())
    found = case.evaluator(case.plan)
    assert (found.fit, found.failure) == (Fit.ALL, "")
    (piece,) = found.plan.pieces
    same_weights(piece.corrections, hand.corrections)
    for branch, (_, corrections) in zip(piece.branches, hand.of_branches, strict=True):
        same_weights(branch.corrections, corrections)
    assert piece.more_ranges == PLAN.more_ranges
    assert CachePlan.from_json(found.plan.to_json()) == found.plan
    with dit_cache(pipe, found.plan) as cache:
        drawn = torch.cat(run(pipe)).numpy()
        stats = cache.stats
    np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(drawn, wanted[-1], rtol=0, atol=2e-5)
    assert stats.blocks_total / stats.blocks_run == pytest.approx(found.plan.speedup)
    assert piece.picture == "●●○◑●○◑○"
    assert case.untouched()


def test_a_search_tries_them_where_that_is_asked_for():
    pipe, x, prompts = pipeline("calls")
    run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
    found = search(pipe, run, 1.5, cost="blocks", modes=("tail",), max_runs=None, verbose=False)
    parted = [each for each in found.evaluations if each.plan.pieces[0].more_ranges]
    assert {each.failure for each in parted} == {""}
    head, tail = parted[0].plan.pieces[0].ranges  # "and": a comma is between transformers
    assert f"0–{head.blocks - 1} and {tail.first}–{tail.first + tail.blocks - 1} " in str(found)
    with dit_cache(pipe, parted[0].plan):
        drawn = run(pipe)
    errors = [(one - other).square().mean() for one, other in zip(drawn, run(pipe), strict=True)]
    assert all(float(error) > 0 for error in errors)
    without = search(pipe, run, 1.5, cost="blocks", max_runs=None, verbose=False)
    assert not any(each.plan.pieces[0].more_ranges for each in without.evaluations)


@pytest.mark.parametrize("given", [{"interval": 2}, {"targets": (1.5, 2.0)}, {"target_psnr": 40.0}])
def test_what_excludes_modes(given):
    pipe, x, _ = pipeline()
    with pytest.raises(ValueError, match=f"modes and {next(iter(given))} exclude each other"):
        search(pipe, lambda pipe: pictures(pipe(x, STEPS)), modes=("tail",), **given)


def test_modes_that_there_are_not():
    pipe, x, _ = pipeline()
    with pytest.raises(ValueError, match="modes='head': there are"):
        search(pipe, lambda pipe: pictures(pipe(x, STEPS)), modes=("head",))
    with pytest.raises(TypeError, match="modes must be a tuple"):
        search(pipe, lambda pipe: pictures(pipe(x, STEPS)), modes="tail")
