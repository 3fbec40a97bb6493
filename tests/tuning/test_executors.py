"""Searches whose plans are run several at a time: the same plan as one after another, and what is run in vain."""

import random
from itertools import accumulate, pairwise

import pytest
import torch
from tuning.test_search import Toy
from tuning.test_search_failures import Noisy

from dithooks import record, search
from dithooks.tuning.executors.executor import plan_key
from dithooks.tuning.executors.lookahead import MAX_CONTINUATIONS, likely_next

TESTS = [{}, {"max_evals": 8}, {"max_evals": 2, "local_moves": 12}, {"max_evals": 1}, {"interval": 2}]
TESTS += [{"max_evals": 9, "local_moves": 9, "max_runs": most} for most in (1.1, 3.0, 6.0)]


class Crew:
    """Several workers, all of them this process."""

    def __init__(self, size, fail=()):
        self.size, self.fail, self.seconds, self.run_equivalents, self.batches, self.closed = (
            size,
            fail,
            None,
            0.0,
            [],
            0,
        )
        self.ran = 0

    def check(self, models):
        assert all(isinstance(model, torch.nn.Module) for model in models)

    def start(self, evaluator, results, most):
        self.evaluator, self.seconds, self.most = evaluator, evaluator.seconds, most
        return self

    def run(self, plans):
        self.batches.append([plan_key(plan) for plan in plans])
        found = {}
        for plan in plans:
            self.ran += 1
            found[plan_key(plan)] = ArithmeticError(f"{self.ran}") if self.ran in self.fail else self.evaluator(plan)
        return found

    def run_here(self, evaluator, plan):
        return evaluator(plan)

    def close(self):
        self.closed += 1


def told(found):
    """All that a search says, but for how long it took."""
    shown = [(each.plan.to_json(), each.score, each.blocks, each.speedup, each.failure) for each in found.evaluations]
    return found.plan.to_json(), found.reached, found.interrupted, shown


class TestSame:
    @pytest.mark.parametrize("size", [1, 2, 5])
    @pytest.mark.parametrize("given", TESTS, ids=str)
    @pytest.mark.parametrize("steps", [8, 12])
    def test_as_one_after_another(self, size, given, steps):
        toy, crew = Toy(steps=steps), Crew(size)
        one = toy.search(1.6, **given)
        spread = toy.search(1.6, executor=crew, **given)
        assert told(spread) == told(one)
        ran = [key for batch in crew.batches for key in batch]
        assert len(set(ran)) == len(ran)
        assert all(len(batch) <= size for batch in crew.batches)
        assert {plan_key(each.plan) for each in one.evaluations} <= set(ran)
        assert spread.run_equivalents >= one.run_equivalents
        vain = len(ran) - len(one.evaluations)
        assert (spread.run_equivalents == pytest.approx(one.run_equivalents)) == (vain == 0)
        assert (crew.closed, crew.most) == (1, given.get("max_evals", 4) + given.get("local_moves", 0))
        assert toy.untouched()

    @pytest.mark.parametrize("size", [2, 3])
    def test_plans_that_fail(self, size):
        """Of a range that cannot be followed: the next ones are of others."""
        torch.manual_seed(0)
        one = Noisy().search(1.3)
        torch.manual_seed(0)
        spread = Noisy().search(1.3, executor=Crew(size))
        assert any(each.failure for each in one.evaluations)
        assert told(spread) == told(one)

    def test_two_transformers(self):
        toy = Toy("two_lists")
        assert told(toy.search(1.5, executor=Crew(4))) == told(toy.search(1.5))

    def test_with_a_journal(self, tmp_path):
        """What a search was answered is known to the next."""
        toy, crew = Toy(steps=12), Crew(3)
        given = {"local_moves": 4, "max_runs": None}  # what is known costs nothing: with a limit, more would be run
        one = toy.search(1.6, **given)
        kept = toy.search(1.6, **given, executor=Crew(2), journal=tmp_path / "journal")
        again = toy.search(1.6, **given, executor=crew, journal=tmp_path / "journal")
        assert told(kept) == told(one)
        assert [each.score for each in again.evaluations] == [each.score for each in one.evaluations]
        assert (crew.batches, crew.closed) == ([], 1)


class TestSaved:
    @pytest.mark.parametrize("size", [2, 4])
    def test_fewer_rounds(self, size):
        """Of local moves, most of which are no better, nearly all that is run ahead is of use."""
        toy, crew = Toy(steps=14, depth=6), Crew(size)
        given = {"max_evals": 4, "local_moves": 20, "max_runs": None}
        found = toy.search(1.6, executor=crew, **given)
        evaluations, rounds = len(found.evaluations), len(crew.batches)
        assert evaluations >= 8
        assert evaluations / size <= rounds <= 0.5 + 1.6 * evaluations / size


class TestErrors:
    def test_only_what_is_asked_for_counts(self):
        """A plan that was run ahead failed: nothing is said until it is asked for."""
        toy = Toy(steps=12)
        most = {"max_evals": 1}
        assert told(toy.search(1.6, executor=Crew(3, fail={2, 3}), **most)) == told(toy.search(1.6, **most))
        crew = Crew(3, fail={1})
        with pytest.raises(ArithmeticError, match=r"^1$"):
            toy.search(1.6, executor=crew)
        assert crew.closed == 1
        assert toy.untouched()

    def test_broken_off(self):
        toy = Toy(steps=12)

        class Stopped(Crew):
            def run(self, plans):
                if self.batches:
                    raise KeyboardInterrupt
                return super().run(plans)

        crew = Stopped(2)
        found = toy.search(1.6, max_evals=8, executor=crew)
        assert found.interrupted
        assert len(found.evaluations) >= 1
        assert (crew.closed, found.plan.provenance.psnr) == (1, max(each.psnr for each in found.evaluations))

    @pytest.mark.parametrize(
        ("executor", "error", "message"),
        [
            ("slurm", ValueError, "executor='slurm' is not known: give 'ray' or 'torchrun'"),
            (4, TypeError, r"executor must be 'ray', 'torchrun' or dithooks.ray.Actors\(...\), not 4"),
            ("torchrun", ValueError, "torch.distributed is not initialized: start the program with torchrun"),
        ],
    )
    def test_what_it_is_not(self, executor, error, message):
        """Said before anything is run."""
        toy = Toy()
        with pytest.raises(error, match=message):
            toy.search(executor=executor)
        assert toy.run.calls == 0

    def test_a_run_that_does_not_draw_with_what_it_is_given(self):
        toy, other = Toy(), Toy()
        recording = record(toy.pipe, toy.run)
        run = lambda pipe: other.run(other.pipe)  # noqa: E731
        with pytest.raises(ValueError, match="run made no step of the target: it has to draw with the one"):
            search(toy.pipe, run, 1.6, recording=recording, cost="blocks", verbose=False)
        assert toy.untouched()


class TestAhead:
    """``after`` is a search in itself: what it asks for is a number, and depends on how the best has changed."""

    @staticmethod
    def after(answers):
        best = accumulate(answers, max)
        return None if len(answers) == 12 else (tuple(b > a for a, b in pairwise(best)), len(answers))

    def test_the_likeliest_first(self):
        """By how it went: where plans were mostly no better, that is what is reckoned with."""
        found = list(likely_next(self.after, [3.0, 1.0], lambda plan: None))
        assert found[0] == self.after([3.0, 1.0])
        assert found[1:3] == [self.after([3.0, 1.0, -1.0]), self.after([3.0, 1.0, -1.0, -2.0])]
        better = list(likely_next(self.after, [1.0, 2.0, 3.0], lambda plan: None))
        assert better[1:3] == [self.after([1.0, 2.0, 3.0, 4.0]), self.after([1.0, 2.0, 3.0, 4.0, 5.0])]
        assert 12 < len(found) < MAX_CONTINUATIONS

    def test_what_is_known_is_not_asked_for(self):
        """Nor is what would only come after another answer than the one known."""
        first = self.after([3.0])
        found = list(likely_next(self.after, [3.0], lambda plan: (4.0,) if plan == first else None))
        assert first not in found
        assert found[0] == self.after([3.0, 4.0])

    def test_nothing_more(self):
        assert list(likely_next(lambda answers: None, [], lambda plan: None)) == []
        assert list(likely_next(lambda answers: 1 if not answers else None, [], lambda plan: None)) == [1]

    @pytest.mark.parametrize("seed", range(20))
    def test_what_comes_is_among_it(self, seed):
        """Whatever the answer, the next was foreseen."""
        rng = random.Random(seed)
        answers = [rng.random() for _ in range(rng.randint(1, 9))]
        shown = list(likely_next(self.after, answers, lambda plan: None))
        for answer in (min(answers) - 1, max(answers) + 1):
            assert self.after([*answers, answer]) in shown
