"""The branch of a call, by hand: what a run has seen, what the next call is given, and whose call that is."""

import pytest
import torch
from entered_sessions import inside
from toys import Counter, Net

from dithooks import DitCacheConfig, Interval, dit_cache, timestep_scope
from dithooks.engine.arguments import CallArguments, latents_among
from dithooks.engine.branches import Match, choose_branch, distance, settle_claims
from dithooks.engine.run import Branch, Claim, Run
from dithooks.engine.sessions import Session
from dithooks.policies.history import BranchHistory

pytestmark = pytest.mark.core

X = torch.ones(1, 8)  # latents of the calls that do not say
EAST, NORTH = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 1.0, 0, 0]])  # prompts √2 apart: as far as two can be
STEADY = {"e": 0.0}  # a prompt that was the same at two steps


def towards_north(angle):
    """A prompt at a distance of 2 sin(angle / 2) from EAST."""
    angle = torch.tensor(angle)
    return torch.stack([angle.cos(), angle.sin(), *torch.zeros(2)]).reshape(1, 4)


def given(e=None, x=X, **more):
    named = {"x": x, "e": e, **more}
    return CallArguments({name: value for name, value in named.items() if value is not None}, frozenset({"x"}))


def seen(arguments, position=0, called=0, steps=2, **more):
    """A branch whose last call was given these arguments."""
    branch = Branch(BranchHistory(0), given=arguments, position=position, called=called, steps=steps, **more)
    branch.changes = dict(branch.changes)
    return branch


def at_step_1(*branches, used=(), **more):
    """A run at its second step, whose branches were called at the first."""
    return Run(0, step=1, last_step=0, used=list(used), branches=dict(enumerate(branches)), **more)


class TestPrompts:
    """What the conditioning of a call tells."""

    @pytest.mark.parametrize("name", ["r_timestep", "timestep_r"])
    def test_where_a_step_leads_to_is_no_prompt(self, name):
        """Flow maps are given it beside the timestep, for each frame; as a prompt, this would be quite another one."""
        run = at_step_1(seen(given(EAST, **{name: torch.tensor([[0.9, 0.9]])})))
        match = choose_branch(run, given(EAST, **{name: torch.tensor([[0.1, 0.0]])}))
        assert (match.number, match.claim) == (0, None)

    def test_a_prompt_that_repeats_is_told_by(self):
        run = at_step_1(seen(given(EAST), 0, changes=STEADY), seen(given(NORTH), 1, changes=STEADY))
        assert choose_branch(run, given(NORTH)) == Match(1, None, {"e": 0, "x as form": 0, "e as form": 0})
        assert choose_branch(run, given(EAST)).number == 0

    def test_another_prompt_than_one_that_repeats_is_a_new_branch_without_a_claim(self):
        run = at_step_1(seen(given(EAST), changes=STEADY))
        match = choose_branch(run, given(NORTH))
        assert (match.number, match.claim) == (1, None)

    def test_a_new_branch_has_the_number_of_its_turn_or_else_a_new_one(self):
        run = at_step_1(seen(given(EAST), changes=STEADY))
        run.branches = {4: run.branches[0]}
        assert choose_branch(run, given(NORTH)).number == 0
        run.branches = {0: run.branches[4], 3: seen(given(EAST), changes=STEADY)}
        assert choose_branch(run, given(NORTH)).number == 4

    def test_a_branch_is_called_once_a_step(self):
        run = at_step_1(seen(given(EAST), changes=STEADY), used=[0])
        assert choose_branch(run, given(EAST)).number == 1

    @pytest.mark.parametrize(
        ("last", "change", "doubtful"),
        [
            (None, 0.02, False),
            (None, 0.04, True),
            (0.001, 0.02, False),  # small, though far more than before
            (0.1, 0.29, False),
            (0.1, 0.31, True),
            (0.001, 0.04, True),
            (0.4, 0.79, False),
            (0.4, 0.81, True),  # as far as another prompt, though not thrice the last change
            (0.9, 1.3, False),  # known to change as much
        ],
    )
    def test_a_prompt_may_drift_but_not_jump(self, last, change, doubtful):
        now = towards_north(2 * float(torch.asin(torch.tensor(change / 2))))
        assert distance(EAST, now) == pytest.approx(change, abs=1e-4)
        run = at_step_1(seen(given(EAST), changes={} if last is None else {"e": last}))
        match = choose_branch(run, given(now))
        assert match.changes["e"] == pytest.approx(change, abs=1e-4)
        assert (match.number, match.claim) == ((1, Claim(0, int(change > 0.8))) if doubtful else (0, None))

    def test_a_prompt_is_far_if_it_changed_by_four_fifths(self):
        run = at_step_1(seen(given(EAST)))
        assert choose_branch(run, given(towards_north(0.7))).claim == Claim(0, 0)  # by 0.69
        assert choose_branch(run, given(towards_north(0.9))).claim == Claim(0, 1)  # by 0.87

    def test_the_branch_whose_prompt_is_not_far_is_claimed(self):
        run = at_step_1(seen(given(NORTH), 0), seen(given(EAST), 1))
        assert choose_branch(run, given(towards_north(0.7))).claim == Claim(1, 0)

    def test_a_number_for_each_sample_may_fade(self):
        run = at_step_1(seen(given(EAST, strength=torch.tensor([1.0])), changes=STEADY | {"strength": 0.0}))
        assert choose_branch(run, given(EAST, strength=torch.tensor([0.2]))).number == 0
        both = torch.ones(2, 8)
        run = at_step_1(seen(given(EAST, both, strength=torch.tensor([1.0, 1.0])), changes={"strength": 0.0}))
        assert choose_branch(run, given(EAST, both, strength=torch.tensor([0.2, 0.1]))).number == 0

    def test_what_another_branch_was_given_is_not_compared_by_value(self):
        run = at_step_1(seen(given(EAST.clone()), 0), seen(given(EAST), 1))
        assert choose_branch(run, given(EAST)).number == 1

    def test_latents_that_were_taken_for_conditioning_tell_nothing(self):
        run = at_step_1(seen(given(EAST, audio=torch.ones(1, 4)), changes=STEADY | {"audio": 0.0}))
        run.branches[0].given.conditioning["audio"] = torch.ones(1, 4)
        now = given(EAST)
        now.latents["audio"] = torch.zeros(1, 4)
        now.form = run.branches[0].given.form
        assert choose_branch(run, now).number == 0


class TestForms:
    """What flags and shapes tell."""

    def test_a_form_that_repeats_is_told_by(self):
        run = at_step_1(seen(given(EAST, flag=True), changes={"flag as form": 0.0}))
        assert choose_branch(run, given(EAST, flag=False)).number == 1
        assert choose_branch(run, given(EAST, flag=True)).number == 0

    def test_a_switch_that_is_thrown_is_another_branch_a_shape_that_changes_may_be_the_same(self):
        run = at_step_1(seen(given(EAST, flag=True)))
        assert choose_branch(run, given(EAST, flag=False)).number == 1
        match = choose_branch(at_step_1(seen(given(EAST))), given(EAST, X.repeat(2, 1)))
        assert (match.number, match.changes["x as form"]) == (0, 1.0)

    def test_the_branch_of_the_same_form_is_taken_first(self):
        run = at_step_1(seen(given(EAST, flag=True, a=1.5), 0), seen(given(EAST, flag=False), 1))
        assert choose_branch(run, given(EAST, flag=False)).number == 1

    def test_more_in_common_counts_where_as_much_differs(self):
        run = at_step_1(seen(given(EAST, k=torch.ones(1)), 0), seen(given(NORTH), 1))
        run.branches[0].changes = {"e": 1.5}
        run.branches[1].changes = {"e": 1.5, "k": 0.5}
        run.branches[1].given = given(towards_north(1.5), k=torch.ones(1))
        assert choose_branch(run, given(towards_north(1.5).clone(), k=torch.zeros(1))).number == 1


class TestClaims:
    """New branches that may be others going on."""

    def test_the_first_of_two_that_are_as_far_has_the_claim(self):
        other = seen(given(NORTH), claim=Claim(0, 1))
        run = at_step_1(seen(given(EAST)), other, used=[1])
        assert choose_branch(run, given(-EAST)).claim is None
        assert choose_branch(run, given(towards_north(0.5))).claim == Claim(0, 0)

    def test_the_best_claim_counts(self):
        claims = [Claim(0, 2), Claim(0, 0)]
        run = at_step_1(seen(given(EAST)), *[seen(given(NORTH), claim=claim) for claim in claims], used=[1, 2])
        assert choose_branch(run, given(-EAST)).claim is None

    def test_a_branch_that_was_idle_at_the_last_step_is_not_claimed(self):
        run = at_step_1(seen(given(EAST), called=-1))
        assert choose_branch(run, given(NORTH)).claim is None
        assert choose_branch(run, given(EAST)).number == 0

    def settled(self, *far, used=(1, 2), dropped=False, before=()):
        changes = [{"e": 1.4 if each else 0.3} for each in far]
        new = [seen(given(), claim=Claim(0, each), changes=change) for each, change in zip(far, changes, strict=True)]
        run = at_step_1(seen(given(EAST), jumps=set(before)), *new, used=used)
        if dropped:
            del run.branches[0]
        settle_claims(run)
        assert all(branch.claim is None for branch in new)
        return [(branch.changes, branch.jumps) for branch in new]

    def test_the_nearest_takes_the_place(self):
        assert self.settled(1, 0) == [({}, set()), ({"e": 0.3}, set())]
        assert self.settled(0, 1) == [({"e": 0.3}, set()), ({}, set())]

    def test_nobody_takes_the_place_of_a_branch_that_is_called(self):
        assert self.settled(0, 1, used=(1, 2, 0)) == [({}, set()), ({}, set())]

    def test_nobody_takes_the_place_of_a_branch_that_was_dropped(self):
        assert self.settled(0, dropped=True, used=[1]) == [({}, set())]

    def test_another_prompt_is_known_to_change_after_the_second_time(self):
        assert self.settled(1, used=[1]) == [({}, {"e"})]
        assert self.settled(1, used=[1], before={"e"}) == [({"e": 1.4}, {"e"})]


class TestRunsThatAreThrough:
    """Another picture, which is given what the last one was, or one more evaluation."""

    NOISE = torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])

    def run(self, finished=True, **more):
        return at_step_1(seen(given(EAST, **more)), used=[0], finished=finished)

    def test_other_latents_of_the_same_prompt_are_another_picture(self):
        assert choose_branch(self.run(), given(EAST, self.NOISE)) is None
        assert choose_branch(self.run(), given(EAST.clone(), self.NOISE)) is None

    def test_the_same_latents_or_another_prompt_are_one_more_call(self):
        assert choose_branch(self.run(), given(EAST)).number == 1
        assert choose_branch(self.run(), given(EAST, X.clone())).number == 1
        assert choose_branch(self.run(), given(NORTH, self.NOISE)).number == 1
        assert choose_branch(self.run(k=NORTH), given(EAST, self.NOISE)).number == 1
        assert choose_branch(self.run(), given(EAST, self.NOISE, k=NORTH)).number == 1

    def test_a_run_that_is_not_through_goes_on(self):
        assert choose_branch(self.run(finished=False), given(EAST, self.NOISE)).number == 1


class TestNearest:
    """Branches that are given the same: their latents tell, where these are apart, and else their order."""

    WINDOWS = tuple(torch.eye(4)[n : n + 1] for n in range(4))  # each √2 from the others: at a relative distance of √2

    def test_windows_are_told_by_their_latents(self):
        run = at_step_1(*[seen(given(EAST, x), n, changes=STEADY) for n, x in enumerate(self.WINDOWS)])
        for number, x in enumerate(self.WINDOWS):
            assert choose_branch(run, given(EAST, x * 1.1 + 0.01)).number == number

    def test_evaluations_of_one_step_are_told_by_their_order(self):
        """Latents that lie nearer to each other than those of two windows do tell nothing."""
        run = at_step_1(*[seen(given(EAST, torch.tensor([[1.0, y]])), n) for n, y in enumerate((0.0, 0.5))])
        assert choose_branch(run, given(EAST, torch.tensor([[1.0, 0.5]]))).number == 0

    def test_what_is_but_somewhat_nearer_is_not_near(self):
        run = at_step_1(*[seen(given(EAST, x), n) for n, x in enumerate((self.WINDOWS[0], self.WINDOWS[1]))])
        between = self.WINDOWS[0] * 0.45 + self.WINDOWS[1] * 0.55
        assert choose_branch(run, given(EAST, between)).number == 0

    def test_latents_of_few_numbers_tell_too(self):
        one, other = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
        run = at_step_1(seen(given(EAST, one), 0), seen(given(EAST, other), 1))
        assert choose_branch(run, given(EAST, other * 1.1)).number == 1

    def test_conditioning_tells_before_latents(self):
        changes = {"e": 1.4}  # known to be another one at each step
        run = at_step_1(seen(given(NORTH), 0, changes=changes), seen(given(EAST), 1, changes=changes))
        assert choose_branch(run, given(towards_north(0.2))).number == 1

    def test_strengths_tell_no_branches(self):
        changes = {"strength": 1.0}
        forms = [given(EAST, strength=torch.tensor([value])) for value in (0.1, 1.0)]
        run = at_step_1(*[seen(form, n, changes=changes) for n, form in enumerate(forms)])
        assert choose_branch(run, given(EAST, strength=torch.tensor([0.99]))).number == 0

    def test_what_is_farthest_of_all_arguments_counts(self):
        changes = {"e": 1.4, "k": 1.4}
        run = at_step_1(
            seen(given(NORTH, k=EAST.clone()), 0, changes=changes),
            seen(given(EAST.clone(), k=EAST.clone()), 1, changes=changes),
        )
        assert choose_branch(run, given(towards_north(0.1), k=towards_north(0.1))).number == 1

    def test_branches_of_the_last_step_come_before_idle_ones(self):
        run = at_step_1(seen(given(EAST), 0, called=-1), seen(given(EAST), 1, called=0))
        assert choose_branch(run, given(EAST)).number == 1

    def test_the_first_position_of_the_last_step_goes_first(self):
        run = at_step_1(*[seen(given(EAST), position) for position in (1, 0, 2)])
        assert choose_branch(run, given(EAST)).number == 1


class TestDoubts:
    """Whether a branch may be left over from a run that was broken off at its first step."""

    FAR = torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])  # from X, at a relative distance of √2

    def doubtful(self, x, *branches, **more):
        match = choose_branch(at_step_1(*branches, **more), given(EAST, x))
        assert match.number == 0
        return match.is_doubtful

    def test_a_branch_of_one_call_whose_latents_are_far_is_doubtful(self):
        other = seen(given(NORTH), 1, changes={"e": 0.0})
        assert self.doubtful(self.FAR, seen(given(EAST), steps=1), other)
        assert not self.doubtful(self.FAR, seen(given(EAST), steps=1))  # the only one there was
        assert not self.doubtful(X * 1.1, seen(given(EAST), steps=1), other)

    def test_one_of_several_calls_is_not(self):
        assert not self.doubtful(self.FAR, seen(given(EAST), steps=2))
        assert not self.doubtful(self.FAR, seen(given(EAST), 0, steps=2), seen(given(EAST), 1, steps=2))

    def test_one_is_not_if_the_scheduler_tells_runs(self):
        assert not self.doubtful(self.FAR, seen(given(EAST), steps=1), epoch=X)
        assert not self.doubtful(self.FAR, *[seen(given(EAST), n, steps=1) for n in range(2)], epoch=X)

    def test_one_beside_others_is_not_if_it_is_near(self):
        assert not self.doubtful(X, seen(given(EAST, X * 1.1), 0, steps=1), seen(given(EAST, self.FAR), 1, steps=1))

    def test_one_is_not_for_another_prompt(self):
        changes = {"e": 1.4}
        assert not self.doubtful(X, seen(given(NORTH), steps=1, changes=changes))

    def test_latents_of_another_form_show_elsewhere(self):
        assert not self.doubtful(torch.ones(1, 6), *(seen(given(EAST), n, steps=1) for n in range(2)))

    @pytest.mark.parametrize(
        ("prompt", "called", "doubtful"),
        [
            (EAST, 0, True),  # an evaluation that began at the last step, given what the other one was
            (EAST, -1, False),
            (towards_north(-0.1), 0, False),  # farther
        ],
    )
    def test_one_is_doubtful_if_a_branch_of_one_call_is_as_near(self, prompt, called, doubtful):
        known, once = seen(given(EAST), 0, changes={"e": 0.09}), seen(given(prompt), 1, called=called, steps=1)
        match = choose_branch(at_step_1(known, once), given(towards_north(0.1)))
        assert (match.number, match.is_doubtful) == (0, doubtful)

    @pytest.mark.parametrize(
        ("source", "is_first", "steps", "rival", "doubtful"),
        [
            ("timestep", True, 1, 0.6, True),  # the first step has one evaluation: one of the two is another run's
            ("timestep", True, 1, 1.0, False),  # both are as near: they are alike
            ("timestep", True, 2, 0.6, False),
            ("timestep", False, 1, 0.6, False),
            ("scope", True, 1, 0.6, False),
        ],
    )
    def test_rivals_of_the_first_step_are_doubtful(self, source, is_first, steps, rival, doubtful):
        branches = [
            seen(given(EAST, x.clone()), n, steps=steps, is_first=is_first) for n, x in enumerate((X, X * rival))
        ]
        assert self.doubtful(X * 0.9 if doubtful else X * 0.95, *branches, source=source) is doubtful


class TestDistance:
    def test_is_relative_to_the_greater_one(self):
        assert distance(EAST, 4 * EAST) == distance(4 * EAST, EAST) == pytest.approx(0.75)
        assert distance(0 * EAST, EAST) == 1
        assert distance(0 * EAST, 0 * EAST) == 0

    def test_of_complex_tensors(self):
        assert distance(EAST * 1j, EAST * 1j) == 0
        assert distance(EAST + 0j, EAST * (1 + 1j)) == pytest.approx(0.5**0.5)

    def test_of_what_cannot_be_compared_is_infinite(self):
        inf = float("inf")
        assert distance(EAST, None) == distance(EAST, EAST[0]) == distance(EAST, EAST.double()) == inf
        assert distance(EAST, EAST * float("nan")) == inf
        assert distance(EAST.to("meta"), EAST.to("meta")) == inf


class TestLatents:
    """What of a call's arguments is denoised, by what comes out."""

    IMAGE, TEXT = torch.zeros(1, 8, 4), torch.zeros(1, 5, 4)

    def names(self, output, **arguments):
        return latents_among(arguments, "x", output)

    def test_a_prompt_of_the_latents_form_is_none(self):
        assert self.names(self.IMAGE, x=self.IMAGE, e=self.IMAGE) == {"x"}

    def test_each_further_output_has_one(self):
        audio = torch.zeros(1, 3, 4)
        found = self.names((self.IMAGE, audio), x=self.IMAGE, audio=audio, again=audio, e=self.TEXT)
        assert found == {"x", "audio"}

    def test_timesteps_are_none(self):
        t = torch.zeros(3)
        assert self.names((self.IMAGE, t), x=self.IMAGE, timestep=t, opts={"sigma": t}) == {"x"}

    def test_all_of_a_list_is_denoised(self):
        assert self.names([self.IMAGE], x=[self.IMAGE, self.TEXT], e=self.TEXT) == {"x.0", "x.1"}

    def test_the_first_tensor_is_taken_where_no_output_is_like_one(self):
        assert self.names(torch.zeros(7), x={"video": self.IMAGE, "e": self.TEXT}) == {"x.video"}


REUSE = DitCacheConfig(policy=Interval(0, 100))  # wherever there is something to reuse


def letters(cache):
    """C for each computed call and R for each reused one."""
    return "".join("CR"[each.reuse] for each in cache.decisions)


class TestCalls:
    """What becomes of the calls of whole loops."""

    PROMPTS = torch.eye(8).reshape(8, 1, 1, 8)  # each as far from the others as can be
    T = torch.tensor(0.5)

    def sample(self, *calls, config=REUSE):
        """Call with some prompts at each step, by their numbers; return the letters."""
        net, x = Net("swapped"), torch.ones(1, 3, 4)
        with dit_cache(net, config) as cache, torch.no_grad():
            for step, numbers in enumerate(calls):
                for number in numbers:
                    with timestep_scope(step):
                        net(x, self.T, self.PROMPTS[number])
            return letters(cache)

    def test_a_prompt_that_another_has_replaced_is_freed(self):
        assert self.sample([0], [0], [1], [0]) == "CRCC"

    def test_a_prompt_that_another_has_joined_is_not(self):
        assert self.sample([0], [0], [0, 1], [0, 1]) == "CRRCRR"

    def test_a_prompt_beside_one_that_repeats_does_not_take_its_place(self):
        """Nor is it known to change, so that the next one is a third one's."""
        assert self.sample([0], [1, 0], [2, 0]) == "CCRCR"

    def test_a_prompt_that_repeated_takes_two_changes_more_to_be_known_to_change(self):
        prompts = [*self.PROMPTS]
        net, x = Net("swapped"), torch.ones(1, 3, 4)
        with dit_cache(net, REUSE) as cache, torch.no_grad():
            for step, e in enumerate([prompts[0], prompts[0], *prompts[1:5]]):
                with timestep_scope(step):
                    net(x, self.T, e)
            assert letters(cache) == "CRCCCR"

    def test_a_residual_is_not_reused_at_the_step_that_it_was_taken_at(self):
        net, x = Net(), torch.ones(1, 3, 4)
        with dit_cache(net, REUSE) as cache, torch.no_grad():
            for step in (1, 1, 2):
                with timestep_scope(step, branch=0):
                    net(x, self.T)
            assert letters(cache) == "CCR"

    def test_a_form_that_repeats_beside_one_that_changes_is_told_by(self):
        class Switched(Net):
            def forward(self, hidden_states, timestep, flag):
                return super().forward(hidden_states, timestep)

        net = Switched()
        with dit_cache(net, REUSE) as cache, torch.no_grad():
            for step, (tokens, flag) in enumerate([(3, True), (3, False), (5, False)]):
                with timestep_scope(step):
                    net(torch.ones(1, tokens, 4), self.T, flag)
            assert [each.branch for each in cache.decisions] == [0, 1, 1]

    def test_a_step_may_make_twice_the_calls_of_the_one_before(self, recwarn):
        net, x = Net(), torch.ones(1, 3, 4)
        with dit_cache(net, REUSE) as cache, torch.no_grad():
            for step, calls in enumerate((40, 70)):
                for _ in range(calls):
                    with timestep_scope(step):
                        net(x, self.T)
            assert {each.run for each in cache.decisions} == {0}
        assert not [each for each in recwarn if "step" in str(each.message)]

    def test_one_call_is_no_reason_for_a_word(self, recwarn):
        net = Net()
        with dit_cache(net, REUSE), torch.no_grad(), timestep_scope(0):
            net(torch.ones(1, 3, 4), self.T)
        assert not recwarn.list

    def test_pictures_of_one_step_are_told_apart_by_the_second_latents_too(self):
        class Both(Net):
            def forward(self, hidden_states, timestep, audio):
                return super().forward(hidden_states, timestep), audio + 1

        net, x = Both(), torch.ones(1, 3, 4)
        with dit_cache(net, REUSE) as cache, torch.no_grad():
            for sign in (1, -1):
                with timestep_scope(0, steps=1):
                    net(x * sign, self.T, torch.ones(1, 2, 4) * sign)
            assert [each.run for each in cache.decisions] == [0, 1]


@pytest.mark.filterwarnings("ignore:Net is called in several threads")
class TestAbandonedRuns:
    """Requests that were cancelled hold nothing once another one begins."""

    def held(self, cancel, other=None):
        """Return what a request holds that made two steps, once it was cancelled and another one has begun."""
        net, x, scheduler = Net(), torch.ones(1, 3, 4), Counter()
        scheduler.set_timesteps(4)
        first, second = Session(None), Session(None, other)
        with dit_cache(net, REUSE, scheduler=scheduler) as cache, torch.no_grad():
            with inside(first):
                net(x, torch.tensor(1.0))
                scheduler.step()
                net(x, torch.tensor(0.9))
            runs = cache._attached[0].cache.decider._runs
            run = runs[first]
            assert sum(branch.nbytes for branch in run.branches.values()) > 0
            cancel(first, scheduler)
            with inside(second):
                net(x, torch.tensor(1.0))
            return sum(branch.nbytes for branch in run.branches.values())

    def test_by_an_exception(self):
        def cancel(session, scheduler):
            with pytest.raises(InterruptedError), inside(session):
                raise InterruptedError

        assert self.held(cancel) == 0

    def test_by_other_timesteps_for_its_scheduler(self):
        assert self.held(lambda _, scheduler: scheduler.set_timesteps(4)) == 0

    def test_one_whose_scheduler_goes_on_keeps_what_it_has(self):
        other = Counter()
        other.set_timesteps(4)
        assert self.held(lambda *_: None, other) > 0
