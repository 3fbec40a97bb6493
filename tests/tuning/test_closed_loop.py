"""The closed-loop fit, against the formula worked out anew in NumPy along the whole cached trajectory."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from solvers import Euler, Solved
from toys import Net, latents, prompt

from dithooks import CachePlan, dit_cache, plan, record, search
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.planning.conditional_schedules import ConditionalSchedules
from dithooks.policies.conditional import Conditional
from dithooks.recording.guidance_shares import shares_of
from dithooks.recording.image_metrics import compare, samples_of
from dithooks.tuning.evaluation import Evaluator, Fit
from dithooks.tuning.timed_run import TimedRun

STEPS, DEPTH = 8, 4
MASK = (1, 1, 0, 1, 0, 0, 1, 0)
FIRST, BLOCKS = 1, 2
SIGMAS = np.linspace(1, 0, STEPS + 1)


def line(known, step):
    """Weights of the line through the last two outputs, in σ."""
    if len(known) < 2:
        return [1.0]
    (a, b), at = [SIGMAS[k] for k in known[:2]], SIGMAS[step]
    return [(at - b) / (a - b), (at - a) / (b - a)]


def solved(parts, aim, start, ridge, some, earlier, places):
    """argmin Σ_s n_s ‖Σ w_k f_k − aim‖² + ridge·mean‖f‖²·‖w − start‖², by the stacked least squares of its rows."""
    start = np.array([*start, *[0.0] * (len(parts) - len(start))])
    flat = np.stack(parts).reshape(len(parts), len(aim), -1)[:, some][..., places]
    target = aim.reshape(len(aim), -1)[some][..., places]
    errors = ((np.einsum("k,ksd->sd", start, flat) - target) ** 2).mean(1)
    counts = np.clip(errors / errors.mean(), 1e-3, 1e3) ** 0.25
    rows = (flat * np.sqrt(counts)[None, :, None]).reshape(len(parts), -1)
    earlier.append((rows, (target * np.sqrt(counts)[:, None]).ravel()))
    rows = np.concatenate([each for each, _ in earlier], 1)
    pull = np.sqrt(ridge * (rows**2).sum() / len(parts))
    system = np.concatenate([rows.T, pull * np.eye(len(parts))])
    right = np.concatenate([*(each for _, each in earlier), pull * start])
    return np.linalg.lstsq(system, right, rcond=None)[0]


class ByHand:
    """A pipeline's run in NumPy, uncached or with weights that are fitted on the way."""

    def __init__(self, pipe, x, prompts, payload="output", mask=MASK, some=None, rows=None, places=None, alone=()):
        self.alone, self.held = alone, None  # steps at which the first branch alone is computed; the difference
        self.rows = {} if rows is None else rows  # of each step, of earlier runs
        self.shares = () if pipe.guidance == "none" else (3.0, -2.0)  # two + 3·(one − two)
        self.of_branches = [([None] * STEPS, [None] * STEPS) for _ in self.shares]
        self.pipe, self.prompts, self.payload, self.mask = pipe, prompts, payload, mask
        self.x, self.some = x.double().numpy(), slice(None) if some is None else some
        self.places = slice(None) if places is None else places
        self.coefficients, self.corrections = [None] * STEPS, [None] * STEPS
        self.kept, self.residuals = [], {}

    def raw(self, step, x, reused):
        """The guided output of a computed step, or of one whose range's residual is forecast, of each branch."""
        model = self.pipe.model(step)
        t = torch.tensor(SIGMAS[step])

        def called(x, t, encoder_hidden_states=None):
            kept = self.residuals.setdefault((id(model), len(self.branches)), [])
            made = forecast(model, x, t, encoder_hidden_states, kept, self.plan_of(step), reused)
            if len(self.branches) == 1 or self.pipe.guidance == "batch":
                made = self.with_difference(made, step)
            self.branches.append(made.numpy())
            return made

        self.branches = []
        with torch.no_grad():
            guided = self.pipe.guided(called, torch.from_numpy(x), t, self.prompts).numpy()
        if self.pipe.guidance == "batch":
            self.branches = np.split(self.branches[0], 2)
        return guided

    def is_partial(self, step):
        """Whether not all that there is to compute is computed."""
        return not self.mask[step] or step in self.alone

    def with_difference(self, made, step):
        """The second branch's output, or that of the batch, as far from the first as it was, or as it is."""
        in_batch = self.pipe.guidance == "batch"
        first, second = made.chunk(2) if in_batch else (torch.from_numpy(self.branches[0]), made)
        if step in self.alone:
            second = first + self.held
        self.held = second - first
        return torch.cat([first, second]) if in_batch else second

    def plan_of(self, step):
        known = [k for k in range(step - 1, -1, -1) if self.mask[k]]
        return line(known, step)

    def reference(self):
        x, found = self.x, []
        for step in range(STEPS):
            x = x + (SIGMAS[step + 1] - SIGMAS[step]) * self.raw(step, x, False)
            found.append(x)
        self.residuals = {}
        return found

    def cached(self, reference):
        x, found, was_partial = self.x, [], False
        for step in range(STEPS):
            gain, reused = SIGMAS[step + 1] - SIGMAS[step], not self.mask[step]
            own = [] if reused and self.payload == "output" else [self.raw(step, x, reused)]
            parts = [*own, *[v for _, v, _ in self.kept[: 3 - len(own)]]]
            branches = [*[self.branches for _ in own], *[each for _, _, each in self.kept[: 3 - len(own)]]]
            y = parts[0]
            if self.is_partial(step) or (was_partial and len(parts) > 1):
                start = [1.0] if own else line([k for k, *_ in self.kept], step)
                ridge = 1e-2 if own else 3e-4
                aim = (reference[step] - x) / gain
                w = solved(parts, aim, start, ridge, self.some, self.rows.setdefault(step, []), self.places)
                (self.corrections if own else self.coefficients)[step] = w
                if self.shares:
                    start = [*w] * len(self.shares)
                    parts = [s * each[n] for n, s in enumerate(self.shares) for each in branches]
                    own_rows = self.rows.setdefault((step, "own"), [])
                    w = solved(parts, aim, start, 2e-4, self.some, own_rows, self.places)
                    for weights, own_weights in zip(self.of_branches, np.split(w, len(self.shares)), strict=True):
                        weights[bool(own)][step] = own_weights
                y = sum(a * f for a, f in zip(w, parts, strict=True))
            if not reused:
                self.kept.insert(0, (step, own[0], self.branches))
            was_partial = self.is_partial(step)
            x = x + gain * y
            found.append(x)
        return found


def forecast(model, x, t, e, kept, weights, reused):
    """The output of a Net by its blocks, of which a range's residual is forecast, or kept."""
    h = model.embed(x)
    temb = model.time(t.reshape(-1, 1).to(h.dtype)).expand(h.shape[0], -1)
    pair = e is not None
    before = None
    for index, block in enumerate(model.blocks):
        if index == FIRST:
            before = (h, e)
            if reused:
                deltas = [sum(w * r[n] for w, r in zip(weights, kept, strict=False)) for n in range(1 + pair)]
                h, e = h + deltas[0], (e + deltas[1] if pair else None)
        if not (reused and FIRST <= index < FIRST + BLOCKS):
            if pair:
                e, h = block(h, encoder_hidden_states=e, temb=temb)
            else:
                h = block(h, temb=temb)
        if index == FIRST + BLOCKS - 1 and not reused:
            kept.insert(0, [h - before[0]] + ([e - before[1]] if pair else []))
    return model.proj(h)


def pipeline(guidance="none", **given):
    torch.manual_seed(4)
    pipe = Solved(Net("single" if guidance == "none" else "swapped", DEPTH).double(), guidance, **given)
    return pipe, latents(5).double(), [] if guidance == "none" else [prompt(5).double(), prompt(5).double()]


def piece_of(payload, mask=MASK, path="transformer", called=None):
    """A plan's piece whose weights are the line's, and 0 for a third output."""
    sigmas, begin = tuple(SIGMAS[:STEPS]), called[0] if called else 0
    known = [[k for k in range(step - 1, begin - 1, -1) if mask[k]] for step in range(STEPS)]
    weights = [None if mask[step] else tuple(line(known[step], step)) for step in range(STEPS)]
    if payload == "output":
        weights = [each and (*each, *[0.0] * (min(3, len(known[k])) - len(each))) for k, each in enumerate(weights)]
        return TransformerPlan(path, 0, DEPTH, DEPTH, mask, weights, sigmas, called=called, payload="output")
    return TransformerPlan(path, FIRST, BLOCKS, DEPTH, mask, weights, sigmas, called=called)


class Case:
    """A pipeline that was recorded, and what evaluates plans of it."""

    def __init__(self, pipe, run, *pieces, fit=Fit.ALL):
        self.drawn = []

        def kept(pipe):
            self.drawn.append(run(pipe))
            return self.drawn[-1]

        self.pipe, self.run = pipe, run
        self.recording = record(pipe, run)
        assert self.recording.solver is not None, self.recording.unsolved
        made = plan(self.recording, 1.3, cost="blocks")
        self.plan = CachePlan(pieces, made.made, made.provenance)
        trace = self.recording.traces[0]
        timed = TimedRun(kept, None, trace.path, trace.inputs, trace.second, trace.calls)
        reference = samples_of(self.recording.results)
        executions = float(sum(len(each.blocks) * each.calls for each in self.recording.traces))
        self.evaluator = Evaluator(pipe, timed, reference, None, executions, solver=self.recording.solver, fit=fit)

    def untouched(self):
        hooked = any(len(each._forward_hooks) > 1 for each in self.pipe.transformer.blocks)  # one counts
        return "step" not in vars(self.pipe.scheduler) and not hooked and "forward" not in vars(self.pipe.transformer)


def same_weights(found, wanted):
    assert [each is None for each in found] == [each is None for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=0, atol=5e-5)


def pictures(x):
    return [each[None] for each in x]


@pytest.mark.parametrize("payload", ["output", "residual"])
@pytest.mark.parametrize("guidance", ["none", "calls", "batch"])
class TestTheFormula:
    def test_weights_and_latents(self, payload, guidance):
        pipe, x, prompts = pipeline(guidance)
        run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
        case = Case(pipe, run, piece_of(payload))
        hand = ByHand(pipe, x, prompts, payload)
        reference = hand.reference()
        np.testing.assert_allclose(torch.cat(case.recording.results).numpy(), reference[-1], atol=1e-9)
        wanted = hand.cached(reference)
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        (piece,) = found.plan.pieces
        assert piece.in_batch is (guidance == "batch")
        same_weights(piece.corrections or [None] * STEPS, hand.corrections)
        if payload == "output":
            same_weights(piece.coefficients, hand.coefficients)
        else:
            assert piece.coefficients == case.plan.pieces[0].coefficients
        for branch, (coefficients, corrections) in zip(piece.branches, hand.of_branches, strict=True):
            same_weights(branch.corrections or [None] * STEPS, corrections)
            if payload == "output":
                same_weights(branch.coefficients, coefficients)
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(drawn, wanted[-1], rtol=0, atol=2e-5)
        told = compare(samples_of(pictures(torch.from_numpy(wanted[-1]))), samples_of(case.recording.results))
        assert found.score.psnr == pytest.approx(told.psnr, abs=0.05)
        with dit_cache(pipe, case.plan):
            as_planned = compare(samples_of(run(pipe)), samples_of(case.recording.results))
        if payload == "output":  # corrections are held back by their ridge: by so few numbers, they may do harm
            assert found.score.psnr > as_planned.psnr + 1
        assert case.untouched()


class TestOneBranchAlone:
    """At some steps the first branch alone is computed: at step 1 after one with both, and after reused ones."""

    def conditional(self, guidance, alone=(3, 6)):
        return Conditional(0, [int(step in alone) for step in range(STEPS)], guidance == "batch")

    @pytest.mark.parametrize("alone", [(3, 6), (1, 3), (1,)], ids=str)
    @pytest.mark.parametrize("guidance", ["calls", "batch"])
    def test_weights_and_latents(self, guidance, alone):
        pipe, x, prompts = pipeline(guidance)
        run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
        case = Case(pipe, run, replace(piece_of("output"), conditional=self.conditional(guidance, alone)))
        hand = ByHand(pipe, x, prompts)
        reference = hand.reference()
        hand = ByHand(pipe, x, prompts, alone=alone)
        wanted = hand.cached(reference)
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        assert found.blocks == pytest.approx((4 - len(alone) / 2) / STEPS)
        (piece,) = found.plan.pieces
        assert piece.conditional == case.plan.pieces[0].conditional
        assert piece.in_batch is (guidance == "batch")
        same_weights(piece.coefficients, hand.coefficients)
        same_weights(piece.corrections, hand.corrections)
        assert [step for step, each in enumerate(piece.corrections) if each is not None] == sorted({*alone, 3, 6})
        for branch, (coefficients, corrections) in zip(piece.branches, hand.of_branches, strict=True):
            same_weights(branch.coefficients, coefficients)
            same_weights(branch.corrections, corrections)
        assert len(piece.branches) == 2
        with dit_cache(pipe, found.plan) as cache:
            drawn = torch.cat(run(pipe)).numpy()
            assert cache.stats.reasons["conditional only"] == len(alone)
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(drawn, wanted[-1], rtol=0, atol=2e-5)
        assert found.is_exact
        assert case.untouched()

    @pytest.mark.parametrize("guidance", ["calls", "batch"])
    def test_a_schedule_of_what_was_recorded(self, guidance):
        """From a recording to a plan: guidance drifts slowly here, so that holding it is cheaper than reuse."""
        pipe, x, prompts = pipeline(guidance)
        run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
        solver = Case(pipe, run, piece_of("output")).recording.solver
        every = ConditionalSchedules(solver.gram, SIGMAS[:STEPS], np.abs(solver.gains), solver.apart_squares, 3)
        best = every.best(4.5)
        assert best.cost <= 4.5
        assert 1 in best.conditional
        made = replace(
            piece_of("output", best.computed),
            conditional=Conditional(solver.conditional, best.conditional, solver.in_batch),
        )
        assert made.executions[0] - made.executions[1] == best.cost * DEPTH
        case = Case(pipe, run, made)
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        assert found.blocks == pytest.approx(best.cost / STEPS)
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)

    def test_two_experts(self):
        """Each holds the difference of its own branches."""
        torch.manual_seed(4)
        one, two = Net("swapped", DEPTH).double(), Net("swapped", DEPTH).double()
        pipe, x = Solved(one, "calls", second=two, boundary=4), latents(5).double()
        prompts = [prompt(5).double(), prompt(5).double()]
        run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
        first, second = (1, 1, 1, 0, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 0, 1)
        pieces = [
            replace(piece_of("output", mask, path, called=called), conditional=Conditional(0, alone))
            for mask, path, called, alone in (
                (first, "transformer", (0, 4), (0, 1, 1, 0, 0, 0, 0, 0)),
                (second, "transformer_2", (4, 8), (0, 0, 0, 0, 0, 1, 0, 1)),
            )
        ]
        case = Case(pipe, run, *pieces)
        one.executions = two.executions = 0
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        assert (one.executions, two.executions) == (4 * DEPTH, 4 * DEPTH)
        with dit_cache(pipe, found.plan) as cache:
            drawn = torch.cat(run(pipe)).numpy()
            assert cache.stats.reasons["conditional only"] == 4
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)

    def test_in_single_precision(self):
        torch.manual_seed(4)
        pipe, x, prompts = Solved(Net("swapped", DEPTH), "calls"), latents(5), [prompt(5), prompt(5)]
        run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
        case = Case(pipe, run, replace(piece_of("output"), conditional=self.conditional("calls")))
        found = case.evaluator(case.plan)
        assert found.fit is Fit.ALL
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)

    def test_branches_that_are_alike_at_a_step_keep_their_shares(self):
        """Where both return the same, any shares explain the guided output: those of the step before hold."""
        one = np.array([[1.0, -2.0, 0.5]], np.float32)
        other = one + 1
        known = shares_of([one, other], 3 * one - 2 * other)
        np.testing.assert_allclose(known, [3.0, -2.0], atol=1e-5)
        np.testing.assert_allclose(shares_of([one, one], one), [0.5, 0.5])
        np.testing.assert_allclose(shares_of([one, one], one, known), [3.0, -2.0], atol=1e-5)
        assert shares_of([one, one], other, known) is None


class TestPictures:
    def test_those_that_are_left_out(self):
        """The weights are those of pictures 0, 2 and 4; what is promised is of 1 and 3, and all are compared."""
        pipe, x, prompts = pipeline()
        run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
        case = Case(pipe, run, piece_of("output"), fit=Fit.HALF)
        hand = ByHand(pipe, x, prompts, some=[0, 2, 4])
        wanted = hand.cached(hand.reference())
        found = case.evaluator(case.plan)
        same_weights(found.plan.pieces[0].coefficients, hand.coefficients)
        drawn = samples_of(pictures(torch.from_numpy(wanted[-1])))
        reference = samples_of(case.recording.results)
        others = compare([drawn[n] for n in (1, 3)], [reference[n] for n in (1, 3)])
        assert found.score.psnr == pytest.approx(others.psnr, abs=0.05)
        assert found.every.psnr == pytest.approx(compare(drawn, reference).psnr, abs=0.05)
        assert found.score.psnr != found.every.psnr

    def test_several_runs(self):
        """Each run goes on with the weights of all pictures so far; those of the last are the plan's."""
        pipe, x, prompts = pipeline()
        parts = [x, (x.flip(0) * 0.9)[:3]]
        run = lambda pipe: [each for part in parts for each in pictures(pipe(part, STEPS))]  # noqa: E731
        case = Case(pipe, run, piece_of("output"))
        assert case.recording.solver.outputs.shape[:2] == (STEPS, 8)
        rows, drawn = {}, []
        for part in parts:
            hand = ByHand(pipe, part, prompts, rows=rows)
            drawn.append(hand.cached(hand.reference())[-1])
        found = case.evaluator(case.plan)
        same_weights(found.plan.pieces[0].coefficients, hand.coefficients)
        same_weights(found.plan.pieces[0].corrections, hand.corrections)
        fitted = torch.cat(case.drawn[-1]).numpy()
        np.testing.assert_allclose(fitted, np.concatenate(drawn), rtol=0, atol=2e-5)
        assert case.evaluator(case.plan).plan.pieces == found.plan.pieces

    @pytest.mark.parametrize(("first", "second"), [(6, 9), (9, 6)], ids=["a larger one", "a smaller one"])
    @pytest.mark.parametrize("guidance", ["none", "calls"])
    def test_runs_of_two_sizes(self, guidance, first, second):
        """Of each picture as many numbers count as a picture of the first run has, spread evenly over it."""
        pipe, _, prompts = pipeline(guidance)
        parts = [latents(3, first).double(), latents(3, second).double()]
        prompts = [each[:3] for each in prompts]
        run = lambda pipe: [each for part in parts for each in pictures(pipe(part, STEPS, prompts))]  # noqa: E731
        case = Case(pipe, run, piece_of("output"))
        numbers = 4 * first
        spread = [[place * 4 * tokens // numbers for place in range(numbers)] for tokens in (first, second)]
        assert spread[1] != spread[0]
        rows, references = {}, []
        for part, places in zip(parts, spread, strict=True):
            hand = ByHand(pipe, part, prompts, rows=rows, places=places)
            references.append(hand.reference())
            hand.cached(references[-1])
        kept = case.recording.solver
        wanted = [reference[-1].reshape(3, -1)[:, places] for reference, places in zip(references, spread, strict=True)]
        np.testing.assert_allclose(kept.latents[-1], np.concatenate(wanted), rtol=0, atol=1e-5)
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        (piece,) = found.plan.pieces
        same_weights(piece.coefficients, hand.coefficients)
        same_weights(piece.corrections, hand.corrections)
        for branch, (coefficients, _) in zip(piece.branches, hand.of_branches, strict=True):
            same_weights(branch.coefficients, coefficients)
        assert len(piece.branches) == (2 if guidance == "calls" else 0)


class TestModels:
    @pytest.mark.parametrize("payload", ["output", "residual"])
    def test_two_experts(self, payload):
        torch.manual_seed(4)
        one, two = Net("single", DEPTH).double(), Net("single", DEPTH).double()
        pipe = Solved(one, second=two, boundary=4)
        x = latents(5).double()
        run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
        first, second = (1, 1, 0, 0, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 0, 0)
        case = Case(
            pipe,
            run,
            piece_of(payload, first, called=(0, 4)),
            piece_of(payload, second, "transformer_2", called=(4, 8)),
        )
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)
        with dit_cache(pipe, case.plan):
            as_planned = compare(samples_of(run(pipe)), samples_of(case.recording.results))
        if payload == "output":
            assert found.score.psnr > as_planned.psnr

    @pytest.mark.parametrize("payload", ["output", "residual"])
    def test_two_at_every_step(self, payload):
        """Of the same schedule, both get the weights of their sum; of two schedules, there are no such weights."""

        class Both(Solved):
            def guided(self, model, x, t, prompts):
                return 0.3 * self.transformer(x, t) + 0.7 * self.transformer_2(x, t)

        torch.manual_seed(4)
        pipe, x = Both(Net("single", DEPTH).double(), second=Net("single", DEPTH).double()), latents(5).double()
        run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
        alike = Case(pipe, run, piece_of(payload), piece_of(payload, path="transformer_2"))
        found = alike.evaluator(alike.plan)
        assert found.fit is Fit.ALL
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(alike.drawn[-1]).numpy(), rtol=0, atol=1e-5)
        case = Case(pipe, run, piece_of(payload), piece_of(payload, (1, 1, 1, 0, 1, 0, 0, 1), "transformer_2"))
        found = case.evaluator(case.plan)
        assert (found.fit, found.plan) == (Fit.NONE, case.plan)

    def test_the_first_expert_uncached_in_several_runs(self):
        """Steps of a transformer that the plan leaves alone are counted, too, from one run to the next."""
        torch.manual_seed(4)
        pipe = Solved(Net("single", DEPTH).double(), second=Net("single", DEPTH).double(), boundary=3)
        x = [latents(3).double() for _ in range(2)]
        run = lambda pipe: [each for part in x for each in pictures(pipe(part, STEPS))]  # noqa: E731
        mask = (1, 1, 1, 1, 1, 0, 1, 0)
        case = Case(pipe, run, piece_of("output", mask, "transformer_2", called=(3, 8)))
        found = case.evaluator(case.plan)
        assert found.fit is Fit.ALL
        assert found.plan.pieces != case.plan.pieces

    def test_half_precision(self):
        """Latents in float32, a model in bfloat16: the plan draws what the fit has drawn, but for rounding: that of an
        output is 2⁻⁹ of it at most, and goes into the latents, and by them into later outputs, by 1/8."""
        torch.manual_seed(4)
        net = Net("single", DEPTH).bfloat16()

        class Mixed(Solved):
            def guided(self, model, x, t, prompts):
                return model(x.bfloat16(), t.bfloat16())

        pipe, x = Mixed(net), latents(5)
        run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
        case = Case(pipe, run, piece_of("output"))
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe))
        fitted, plain = torch.cat(case.drawn[-1]), torch.cat(case.recording.results)
        assert float((drawn - fitted).abs().max()) < 2**-8 * float(plain.abs().max())
        with dit_cache(pipe, case.plan):
            as_planned = torch.cat(run(pipe))
        assert float((fitted - plain).norm()) < float((as_planned - plain).norm())


class TestFailures:
    def test_a_scheduler_that_fails_midway(self):
        """Its copies do: the plan is run as it is, once more, and both runs are counted."""

        class Fragile(Euler):
            fails = False

            def __deepcopy__(self, memo):
                if self.fails and self.step_index == 4:
                    raise ArithmeticError("no copy")
                twin = Euler()
                vars(twin).update({name: value for name, value in vars(self).items() if name != "step"})
                return twin

        pipe, x, _ = pipeline(scheduler=Fragile())
        run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
        case = Case(pipe, run, piece_of("output"))
        pipe.scheduler.fails = True
        found = case.evaluator(case.plan)
        assert (found.fit, found.plan) == (Fit.NONE, case.plan)
        assert found.blocks == pytest.approx(2 * 4 / 8)
        with dit_cache(pipe, case.plan):
            assert found.score == compare(samples_of(run(pipe)), samples_of(case.recording.results))
        assert case.untouched()

    def test_guidance_that_is_no_weighted_sum(self):
        """Weights of guided outputs would not be those of the branches, so that nothing is fitted."""

        class Bent(Solved):
            is_plain = True

            def guided(self, model, x, t, prompts):
                made = super().guided(model, x, t, prompts)
                return made if self.is_plain else (20.0 * made).sin()

        torch.manual_seed(4)
        pipe, x = Bent(Net("swapped", DEPTH).double(), "calls"), latents(5).double()
        prompts = [prompt(5).double(), prompt(5).double()]
        run = lambda pipe: pictures(pipe(x, STEPS, prompts=prompts))  # noqa: E731
        case = Case(pipe, run, piece_of("output"))
        assert case.evaluator(case.plan).fit is Fit.ALL
        pipe.is_plain = False
        case = Case(pipe, run, piece_of("output"))
        found = case.evaluator(case.plan)
        assert (found.fit, found.plan) == (Fit.NONE, case.plan)
        assert case.untouched()

    def test_ctrl_c_in_a_fit(self):
        pipe, x, _ = pipeline()
        stop = []

        def at(step):
            if stop and step == 5:
                raise KeyboardInterrupt

        run = lambda pipe: pictures(pipe(x, STEPS, at=at))  # noqa: E731
        case = Case(pipe, run, piece_of("residual"))
        before = [len(each._forward_hooks) for each in pipe.transformer.modules()]
        plain = torch.cat(run(pipe))
        stop.append(1)
        with pytest.raises(KeyboardInterrupt):
            case.evaluator(case.plan)
        stop.clear()
        assert "step" not in vars(pipe.scheduler)
        assert [len(each._forward_hooks) for each in pipe.transformer.modules()] == before
        assert torch.equal(torch.cat(run(pipe)), plain)

    def test_a_rank_that_cannot_fit_alone(self):
        """It goes on with what rank 0 has found; where rank 0 cannot fit, no rank does."""
        pipe, x, _ = pipeline()
        run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
        case = Case(pipe, run, piece_of("output"))
        sent = []
        first = replace(case.evaluator, agreed=lambda found: sent.append(found) or found)(case.plan)
        answers = iter(sent)
        broken = replace(case.recording.solver, latents=case.recording.solver.latents[:, :, :3])  # none of it fits
        other = replace(case.evaluator, solver=broken, agreed=lambda found: next(answers))(case.plan)
        assert other.plan.pieces == first.plan.pieces
        assert other.score == first.score
        assert next(answers, None) is None
        failed = replace(case.evaluator, agreed=lambda found: None)(case.plan)
        assert (failed.fit, failed.plan) == (Fit.NONE, case.plan)


class Changing(Solved):
    """Guidance by two calls at steps from 3 to 6 only; or at all steps, and more and more of it."""

    grows = False

    def guided(self, model, x, t, prompts):
        step = self.scheduler.step_index or 0
        one = model(x, t, encoder_hidden_states=prompts[0])
        if not self.grows and not 3 <= step < 7:
            return one
        two = model(x, t, encoder_hidden_states=prompts[1])
        return two + (0.75 * step if self.grows else 3.0) * (one - two)


class TestChangingGuidance:
    """An earlier output is kept as it was guided then, and a plan's weights are of outputs that are guided now."""

    @pytest.mark.parametrize("payload", ["output", "residual"])
    def test_on_some_steps_only(self, payload):
        """Where guidance begins or ends nothing is summed across: the plan draws what the fit has drawn."""
        torch.manual_seed(4)
        pipe, x = Changing(Net("swapped", DEPTH).double()), latents(5).double()
        prompts = [prompt(5).double(), prompt(5).double()]
        run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
        case = Case(pipe, run, piece_of(payload, (1, 1, 0, 1, 0, 1, 0, 1)))
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        corrections = found.plan.pieces[0].corrections
        assert [step for step, each in enumerate(corrections) if each] == ([5] if payload == "output" else [2, 5, 6])
        assert len(corrections[5]) == 2  # its own output, and that of step 3
        with warnings.catch_warnings(), dit_cache(pipe, found.plan):
            warnings.simplefilter("ignore")  # that a branch which begins has fewer residuals than is planned
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)

    def growing(self):
        torch.manual_seed(4)
        pipe, x = Changing(Net("swapped", DEPTH).double()), latents(3).double()
        pipe.grows = True
        prompts = [prompt(3).double(), prompt(3).double()]
        return pipe, lambda pipe: pictures(pipe(x, STEPS, prompts))

    def test_where_it_grows_a_search_says_what_the_plan_draws(self):
        """Not what its fit has drawn: of an output that is left out, it is not known how it would have been guided."""
        pipe, run = self.growing()
        found = search(pipe, run, 1.4, cost="blocks", max_evals=2, max_runs=None, verbose=False)
        fitted = max(each.merit("both") for each in found.evaluations)
        with dit_cache(pipe, found.plan):
            drawn = compare(samples_of(run(pipe)), samples_of(found.recording.results))
        assert drawn.psnr < fitted - 1
        assert found.plan.provenance.psnr == pytest.approx(drawn.psnr, abs=0.01)

    def test_where_it_grows_weights_of_residuals_are_exact(self):
        """Both calls are made at every step, and how they are guided is seen."""
        pipe, run = self.growing()
        case = Case(pipe, run, piece_of("residual"))
        found = case.evaluator(case.plan)
        assert (found.fit, found.failure) == (Fit.ALL, "")
        with dit_cache(pipe, found.plan):
            drawn = torch.cat(run(pipe)).numpy()
        np.testing.assert_allclose(drawn, torch.cat(case.drawn[-1]).numpy(), rtol=0, atol=1e-5)


def test_a_search_promises_what_pictures_say_that_were_left_out():
    """Of block executions, too: those of the last run, which is fitted on every second picture."""
    pipe, x, _ = pipeline()
    run = lambda pipe: pictures(pipe(x, STEPS))  # noqa: E731
    found = search(pipe, run, 1.4, cost="blocks", max_evals=1, max_runs=None, verbose=False)
    (only,) = found.evaluations
    case = Case(pipe, run, *only.plan.pieces, fit=Fit.HALF)
    assert found.plan.provenance.psnr == pytest.approx(case.evaluator(case.plan).score.psnr, abs=1e-6)
    assert found.plan.provenance.psnr != pytest.approx(only.every.psnr, abs=1e-3)
