"""Weights of each branch of guidance: whose they are, what is refused, and files of them."""

import math
from dataclasses import replace

import pytest
import torch
from solvers import Solved
from toys import Net, latents, prompt

from dithooks import DitCacheConfig, Fitted, Mask, dit_cache
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.engine import part_decider
from dithooks.engine.batch_parts import is_repeated
from dithooks.predictors.fitted import BranchWeights
from dithooks.predictors.predictor import Moment

ALL = (None, None, (1.5, -0.5), None, (1.25,))
FIRST = BranchWeights((None, None, (2.0, -1.0), None, (0.75,)), (None, None, None, (0.5, 0.25), None))
SECOND = BranchWeights((None, None, (1.0, 0.0), None, (0.5,)), (None, None, None, (1.0, 0.0), None))
CORRECTIONS = (None, None, None, (0.9, 0.1), None)
STEPS = 5


def fitted(**given):
    return Fitted(ALL, corrections=CORRECTIONS, branches=(FIRST, SECOND), **given)


class TestWhoseTheyAre:
    def test_each_branch_has_its_own(self):
        at = [Moment(1, 0.8), Moment(0, 1.0)], Moment(2, 0.6)
        assert [fitted().of_branch(n, 2).weights(*at) for n in (0, 1)] == [(2.0, -1.0), (1.0, 0.0)]
        at = [Moment(1, 0.8)], Moment(3, 0.4)
        assert [fitted().of_branch(n, 2).output_weights(*at) for n in (0, 1)] == [(0.5, 0.25), (1.0, 0.0)]

    @pytest.mark.parametrize(("number", "count"), [(0, 1), (0, 3), (2, 3), (2, 2)])
    def test_another_number_of_branches_has_those_of_all(self, number, count):
        assert fitted().of_branch(number, count) == fitted()

    def test_sigmas_go_with_them(self):
        own = fitted(sigmas=(1.0, 0.8, 0.6, 0.4, 0.2)).of_branch(1, 2)
        assert own.weights([Moment(1, 0.8), Moment(0, 1.0)], Moment(2, 0.5)) is None

    def test_in_a_run_of_another_number_of_steps(self):
        """Each branch has what was fitted for it there."""
        times = (1.0, 0.5, 0.2)
        weights = [BranchWeights((None, None, (number + 1.5, -number))) for number in (0, 1)]
        other = Fitted((None, None, (1.25, -0.25)), times, branches=weights)
        whole = fitted(sigmas=(1.0, 0.8, 0.6, 0.4, 0.2), others=(other,))
        at = [Moment(1, 0.5), Moment(0, 1.0)], Moment(2, 0.2)
        assert [whole.of_branch(n, 2).weights(*at) for n in (0, 1)] == [(1.5, 0.0), (2.5, -1.0)]
        assert whole.of_branch(0, 3).weights(*at) == (1.25, -0.25)

    @pytest.mark.parametrize(("branches", "own"), [(2, True), (1, False)])
    def test_in_a_run_by_hand(self, branches, own):
        """A reused step's output is the sum of its branch's outputs; without guidance, by the weights of all."""

        class Seen(Solved):
            def guided(self, model, x, t, prompts):
                made = [model(x, t, encoder_hidden_states=each) for each in prompts]
                outputs.append([each.clone() for each in made])
                return made[0]

        torch.manual_seed(1)
        outputs, pipe, prompts = [], Seen(Net("swapped", 2)), [prompt(2), prompt(2)][:branches]
        predictor = Fitted(ALL, branches=(BranchWeights(FIRST.coefficients), BranchWeights(SECOND.coefficients)))
        policy = Mask(tuple(int(each is None) for each in ALL))
        with dit_cache(pipe, DitCacheConfig(payload="output", policy=policy, predictor=predictor)) as cache:
            pipe(latents(2), STEPS, prompts)
            assert cache.stats.reused_calls == 2 * branches
        weights = [FIRST.coefficients, SECOND.coefficients] if own else [ALL]
        for number, each in enumerate(weights):
            known = [step[number] for step in outputs]
            for step, kept in ((2, (1, 0)), (4, (3,))):
                wanted = sum(weight * known[at] for weight, at in zip(each[step], kept, strict=True))
                torch.testing.assert_close(known[step], wanted)


class TestPartsOfABatch:
    """Guidance by one call on a batch of both: each half has the weights of a branch."""

    PREDICTOR = Fitted(ALL, corrections=CORRECTIONS, branches=(FIRST, SECOND), in_batch=True)

    def runs(self, *cases, predictor=None, payload="output"):
        """What the transformer returned, and what the pipeline was given, at each step of a run of each case."""
        returned, given_on, found = [], [], []

        class Seen(Solved):
            def guided(self, model, x, t, prompts):
                if self.guidance == "calls":
                    given_on.append([model(x, t, encoder_hidden_states=each).clone() for each in prompts])
                    return given_on[-1][0]
                both = x if self.guidance == "none" else torch.cat([x, x])
                made = model(both, t, encoder_hidden_states=torch.cat(prompts))
                given_on.append(made.clone())
                return made[: len(x)]

        torch.manual_seed(1)
        pipe = Seen(Net("swapped", 2))
        policy = Mask(tuple(int(each is None) for each in ALL))
        config = DitCacheConfig(payload=payload, policy=policy, predictor=predictor or self.PREDICTOR)
        with dit_cache(pipe, config) as cache:
            hook = pipe.transformer.register_forward_hook(lambda *call: returned.append(call[-1].clone()), prepend=True)
            for number, (x, pipe.guidance) in enumerate(cases):
                pipe(x, STEPS, [prompt(len(x))] * (1 if pipe.guidance == "none" else 2))
                assert cache.stats.reused_calls == 2 * (number + 1) * (1 + (pipe.guidance == "calls"))
                found.append((returned.copy(), given_on.copy()))
                returned.clear()
                given_on.clear()
            hook.remove()
        return found

    @staticmethod
    def halves(weights, tensors):
        """Σ w_k x_k of the first half by the first weights, and of the second half by the second."""
        middle = len(tensors[0]) // 2
        parts = [[each[:middle] for each in tensors], [each[middle:] for each in tensors]]
        return torch.cat(
            [sum(w * x for w, x in zip(own, part, strict=True)) for own, part in zip(weights, parts, strict=True)]
        )

    def test_each_part_has_the_weights_of_its_branch(self):
        (((zero, one, three), given_on),) = self.runs((latents(2), "batch"))
        torch.testing.assert_close(given_on[2], self.halves([(2.0, -1.0), (1.0, 0.0)], [one, zero]))
        torch.testing.assert_close(given_on[3], self.halves([(0.5, 0.25), (1.0, 0.0)], [three, one]))
        torch.testing.assert_close(given_on[4], self.halves([(0.75,), (0.5,)], [three]))

    def test_parts_that_have_the_same_weights_have_their_own_all_the_same(self):
        own = BranchWeights((None, None, (2.0, -1.0), None, (0.75,)))
        predictor = Fitted(ALL, branches=(own, own), in_batch=True)
        (((zero, one, _), given_on),) = self.runs((latents(2), "batch"), predictor=predictor)
        torch.testing.assert_close(given_on[2], 2 * one - zero)

    def test_corrections_of_outputs_whose_residual_is_forecast(self):
        """At a reused step, too, by each branch's own weights."""
        corrections = [[None, None, (0.9, 0.2), None, None], [None, None, (1.2, -0.3), None, None]]
        branches = [BranchWeights(ALL, own) for own in corrections]
        predictor = Fitted(ALL, corrections=corrections[0], branches=branches, in_batch=True)
        ((returned, given_on),) = self.runs((latents(2), "batch"), predictor=predictor, payload="residual")
        wanted = self.halves([(0.9, 0.2), (1.2, -0.3)], [returned[2], returned[1]])
        torch.testing.assert_close(given_on[2], wanted)

    def test_pictures_that_are_no_copies_of_each_other_have_those_of_all(self):
        """Without guidance two pictures are a batch as large, and neither is the other's branch."""
        (((zero, one, three), given_on),) = self.runs((latents(2), "none"))
        torch.testing.assert_close(given_on[2], 1.5 * one - 0.5 * zero)
        torch.testing.assert_close(given_on[3], 0.9 * three + 0.1 * one)
        torch.testing.assert_close(given_on[4], 1.25 * three)

    def test_an_odd_batch_has_those_of_all(self):
        (((zero, one, _), given_on),) = self.runs((latents(3), "none"))
        torch.testing.assert_close(given_on[2], 1.5 * one - 0.5 * zero)

    def test_calls_of_a_step_have_those_of_all(self):
        """Which of them is which branch of the batch is not known."""
        (((*zero, a, b, _, _), given_on),) = self.runs((latents(2), "calls"))
        assert given_on[2][0].shape == a.shape
        for number, one in enumerate((a, b)):
            torch.testing.assert_close(given_on[2][number], 1.5 * one - 0.5 * zero[number])

    def test_latents_are_compared_where_weights_differ_only(self, monkeypatch):
        """Not at step 0, where a correction is the same for all: that would wait for the device."""
        compared = []
        monkeypatch.setattr(part_decider, "is_repeated", lambda *given: compared.append(given) or is_repeated(*given))
        corrections = ((0.5,), *CORRECTIONS[1:])
        own = [BranchWeights(each.coefficients, ((0.5,), *each.corrections[1:])) for each in (FIRST, SECOND)]
        seen = []

        class Seen(Solved):
            def guided(self, model, x, t, prompts):
                made = model(torch.cat([x, x]), t, encoder_hidden_states=torch.cat(prompts))
                seen.append(len(compared))
                return made[: len(x)]

        torch.manual_seed(1)
        pipe = Seen(Net("swapped", 2))
        predictor = Fitted(ALL, corrections=corrections, branches=own, in_batch=True)
        policy = Mask(tuple(int(each is None) for each in ALL))
        with dit_cache(pipe, DitCacheConfig(payload="output", policy=policy, predictor=predictor)):
            pipe(latents(2), STEPS, [prompt(2)] * 2)
        assert (seen, len(compared)) == ([0, 0, 1, 1, 1], 1)

    def test_it_is_asked_anew_of_each_run(self):
        """Two pictures without guidance are a batch as large as one with it."""
        cases = [(latents(1), "batch"), (latents(2), "none"), (latents(2), "batch"), (latents(2), "none")]
        for (_, guidance), ((zero, one, _), given_on) in zip(cases, self.runs(*cases), strict=True):
            weights = [(2.0, -1.0), (1.0, 0.0)] if guidance == "batch" else [(1.5, -0.5)] * 2
            torch.testing.assert_close(given_on[2], self.halves(weights, [one, zero]))


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("branches", "said"),
        [
            ((FIRST,), "of one branch"),
            ((FIRST, None), "BranchWeights"),
            ("ab", "BranchWeights"),
            ((FIRST, BranchWeights(ALL[:4], CORRECTIONS)), r"branches\[1\].coefficients"),
            ((FIRST, BranchWeights((None, None, (1.0,), None, (1.0,)), CORRECTIONS)), r"branches\[1\].coefficients"),
            ((FIRST, BranchWeights(ALL)), r"branches\[1\].corrections"),
            ((FIRST, BranchWeights((None, None, (math.nan, 0.0), None, (1.0,)), CORRECTIONS)), "coefficient"),
        ],
    )
    def test_what_does_not_go_with_the_others(self, branches, said):
        with pytest.raises((TypeError, ValueError), match=said) as raised:
            Fitted(ALL, corrections=CORRECTIONS, branches=branches)
        assert len(str(raised.value)) <= 300

    @pytest.mark.parametrize(
        ("given", "said"),
        [({"in_batch": True}, "there are none"), ({"in_batch": 1, "branches": (FIRST, SECOND)}, "True or False")],
    )
    def test_parts_of_a_batch_without_weights(self, given, said):
        with pytest.raises((TypeError, ValueError), match=said):
            Fitted(ALL, corrections=CORRECTIONS, **given)


class TestFiles:
    def test_a_configuration_comes_back(self):
        config = DitCacheConfig(policy=Mask((1, 1, 0, 1, 0)), predictor=fitted())
        assert DitCacheConfig.from_json(config.to_json()) == config

    def test_a_piece_of_a_plan_hands_them_on(self):
        piece = TransformerPlan(
            "", 0, 2, 2, (1, 1, 0, 1, 0), ALL, None, corrections=CORRECTIONS, branches=[FIRST, SECOND]
        )
        assert piece.predictor == fitted()
        assert replace(piece, in_batch=True).predictor == fitted(in_batch=True)

    def test_parts_of_a_batch_come_back(self):
        config = DitCacheConfig(policy=Mask((1, 1, 0, 1, 0)), predictor=fitted(in_batch=True))
        assert DitCacheConfig.from_json(config.to_json()) == config

    def test_without_them_nothing_is_written(self):
        config = DitCacheConfig(policy=Mask((1, 1, 0, 1, 0)), predictor=Fitted(ALL))
        assert "branches" not in config.to_json()
        assert "in_batch" not in replace(config, predictor=fitted()).to_json()
