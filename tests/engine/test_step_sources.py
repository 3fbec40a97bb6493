"""The step of a call, by hand: fake schedulers and timesteps that move, stand and go back, and loops over steps()."""

import contextvars
from contextlib import suppress

import pytest
import torch
from entered_sessions import inside

from dithooks import steps, timestep_scope
from dithooks.engine.clock import CountedCalls, SchedulerIndex, StepClock, StepSettings, TimestepArgument, goes_back
from dithooks.engine.sessions import Session, current_context, current_session, open_scope
from dithooks.engine.step_source import Asked, RunTime
from dithooks.engine.timestep_argument import TIMESTEP_NAMES, Found, is_same, note, read, timesteps_in

pytestmark = pytest.mark.core


class Scheduler:
    """A scheduler that counts steps, as far as the clock reads it."""

    def __init__(self, steps=8, index=None, begin=None):
        self.timesteps, self.step_index, self.begin_index = torch.linspace(1000, 1, steps), index, begin


class Loop:
    """Calls of one run: each tells the scheduler's step and some arguments, and asks one source."""

    def __init__(self, source=None, steps=8):
        self.scheduler, self.time = Scheduler(steps), RunTime()
        self.source = source or SchedulerIndex(TimestepArgument(TIMESTEP_NAMES))

    def call(self, index, *around, **arguments):
        """Return step and restart, or ``None``."""
        self.scheduler.step_index = index
        tick = self.source.tick(Asked(self.scheduler, (arguments, *around), self.time))
        return None if tick is None else (tick.step, tick.restart)


class TestSchedulerIndex:
    def test_counts_steps_and_not_calls(self):
        loop = Loop()
        calls = [(None, 9.0), (None, 9.0), (1, 8.0), (1, 8.0), (2, 7.0)]
        assert [loop.call(index, timestep=t) for index, t in calls] == [(step, False) for step in (0, 0, 1, 1, 2)]

    def test_begins_where_the_scheduler_says(self):
        loop = Loop()
        loop.scheduler.begin_index = 3
        assert loop.call(None, timestep=9.0) == (3, False)

    def test_is_not_trusted_once_its_schedule_is_over(self):
        loop = Loop(steps=2)
        assert loop.call(2, timestep=9.0) is None
        assert loop.call(2, timestep=8.0) is None
        assert loop.call(0, timestep=7.0) == (0, True)  # it is used again: a run begins

    def test_is_not_trusted_while_it_stands_and_the_timestep_moves(self):
        loop = Loop()
        assert loop.call(3, timestep=9.0) == (3, False)
        assert loop.call(3, timestep=8.0) is None
        assert loop.call(3, timestep=7.0) is None
        assert loop.time.stood_at == 3
        assert loop.call(4, timestep=6.0) == (4, True)  # it moves after all

    def test_is_trusted_for_good_once_it_has_moved(self):
        loop = Loop()
        calls = [(0, 9.0), (1, 8.0), (1, 7.0), (1, 6.0)]
        assert [loop.call(index, timestep=t) for index, t in calls] == [(step, False) for step in (0, 1, 1, 1)]

    def test_a_timestep_that_is_written_into_moves(self):
        loop, t = Loop(), torch.tensor([9.0])
        assert loop.call(0, timestep=t) == (0, False)
        t.sub_(1)
        assert loop.call(0, timestep=t) is None

    def test_a_timestep_that_is_lower_for_one_frame_moves(self):
        loop = Loop()
        assert loop.call(0, timestep=torch.tensor([9.0, 5.0])) == (0, False)
        assert loop.call(0, timestep=torch.tensor([9.0, 4.0])) is None

    def test_the_timestep_goes_on_counting_where_the_scheduler_stood(self):
        argument = TimestepArgument(TIMESTEP_NAMES)
        loop = Loop(SchedulerIndex(argument))
        loop.call(3, timestep=9.0)
        assert loop.call(3, timestep=8.0) is None
        tick = argument.tick(Asked(loop.scheduler, ({"timestep": 8.0},), loop.time))
        assert (tick.step, tick.restart, tick.epoch, tick.steps) == (4, False, None, None)  # the list is another's


class TestTimestepsThatStand:
    """The scheduler moves, and the timestep does not: the step of another pipeline, or as this loop's always do."""

    def loop(self):
        return Loop(SchedulerIndex(TimestepArgument(TIMESTEP_NAMES)))

    def restarts(self, loop, *calls):
        loop.time = RunTime()  # of another run
        return [tick and tick[1] for tick in (loop.call(index, timestep=t) for index, t in calls)]

    def test_the_first_time_it_is_another_run(self):
        assert self.restarts(self.loop(), (0, 9.0), (1, 9.0)) == [False, True]

    def test_the_second_time_it_is_this_loops_way(self):
        loop = self.loop()
        assert self.restarts(loop, (0, 9.0), (1, 9.0)) == [False, True]
        assert self.restarts(loop, (1, 9.0), (2, 9.0), (3, 9.0)) == [False, False, False]
        assert self.restarts(loop, (0, 9.0), (1, 9.0)) == [False, False]

    @pytest.mark.parametrize("second", [(1, 8.0), (2, 8.0)], ids=["another makes the steps", "both move"])
    def test_a_timestep_that_moves_shows_that_it_was_another_run(self, second):
        loop = self.loop()
        assert self.restarts(loop, (0, 9.0), (1, 9.0)) == [False, True]
        self.restarts(loop, (1, 9.0), second)
        assert self.restarts(loop, (0, 9.0), (1, 9.0)) == [False, True]

    def test_later_in_a_run_timesteps_may_come_in_pairs(self):
        assert self.restarts(self.loop(), (0, 9.0), (1, 8.0), (2, 8.0)) == [False, False, False]


class TestGoesBack:
    def returns(self, *values, new=True):
        time = RunTime(watched="t", reader=float, start=values[0], shown=values[0])
        return [goes_back({"t": value}, time, new) for value in values[1:]]

    def test_a_value_against_the_way_of_those_before(self):
        assert self.returns(9.0, 8.0, 7.0, 9.0) == [False, False, True]
        assert self.returns(1.0, 2.0, 1.0) == [False, True]

    def test_from_the_latest_value(self):
        assert self.returns(9.0, 7.0, 8.0) == [False, True]

    def test_the_way_is_kept_where_a_value_stands(self):
        assert self.returns(9.0, 8.0, 8.0, 9.0) == [False, False, True]

    def test_within_a_step_to_the_first_value_only(self):
        time = RunTime(watched="t", reader=float, start=9.0, shown=9.0)
        assert not goes_back({"t": 7.0}, time)
        assert not goes_back({"t": 8.0}, time, False)
        assert goes_back({"t": 9.0}, time, False)


class TestClock:
    def read(self, clock, calls):
        session, time, scheduler = Session(None), RunTime(), clock.scheduler_of(Session(None))
        found = []
        for index, t in calls:
            scheduler.step_index = index
            tick = clock.read(session, None, {"timestep": t}, time)
            found.append((tick.step, tick.source, tick.restart))
        return found

    def clock(self, *step_settings, steps=8):
        scheduler = Scheduler(steps)
        return StepClock(lambda: scheduler, "net", *step_settings)

    def test_a_scheduler_whose_timesteps_go_back_is_another_runs(self):
        found = self.read(self.clock(), [(0, 9.0), (1, 8.0), (2, 9.0)])
        assert found == [(0, "scheduler", False), (1, "scheduler", False), (2, "scheduler", True)]

    def test_a_timestep_may_go_back_part_of_the_way_within_a_step(self):
        """As in a second evaluation of one step."""
        found = self.read(self.clock(), [(0, 9.0), (1, 8.0), (2, 7.0), (2, 7.5)])
        assert found == [(step, "scheduler", False) for step in (0, 1, 2, 2)]

    def test_a_scheduler_that_is_through_tells_nothing_more(self):
        found = self.read(self.clock(steps=2), [(0, 9.0), (1, 8.0), (2, 7.0)])
        assert [source for _, source, _ in found] == ["scheduler", "scheduler", "timestep"]

    def test_a_named_timestep_comes_before_the_scheduler(self):
        assert self.read(self.clock(StepSettings("timestep")), [(5, 9.0)]) == [(0, "timestep", False)]


class TestCountedCalls:
    def loop(self):
        return Loop(CountedCalls(2, 3, TimestepArgument(TIMESTEP_NAMES)))

    def test_count_steps(self):
        loop = self.loop()
        assert [loop.call(None) for _ in range(7)] == [(n // 2, n == 6) for n in range(7)]

    def test_begin_anew_where_the_timestep_goes_back(self):
        loop = self.loop()
        assert [loop.call(None, timestep=t)[1] for t in (9.0, 9.0, 8.0, 9.0)] == [False, False, False, True]


class TestTimestepArgument:
    def loop(self, **more):
        return Loop(TimestepArgument(TIMESTEP_NAMES), **more)

    def steps(self, *values, loop=None):
        loop = loop or self.loop()
        return [loop.call(None, timestep=value) for value in values]

    def test_counts_different_values(self):
        assert self.steps(9.0, 9.0, 8.0, 8.0, 7.0, 7.0) == [(step, False) for step in (0, 0, 1, 1, 2, 2)]
        frames = [torch.tensor(pair) for pair in ([9.0, 5.0], [9.0, 4.0], [9.0, 3.0])]
        assert self.steps(*frames) == [(0, False), (1, False), (2, False)]

    def test_a_value_that_goes_back_begins_another_run(self):
        assert self.steps(9.0, 8.0, 9.0) == [(0, False), (1, False), (0, True)]
        assert self.steps(1.0, 2.0, 3.0, 1.0)[-1] == (0, True)

    def test_goes_the_way_of_its_own_run(self):
        """Whichever way another run goes meanwhile."""
        one = self.loop()
        other = Loop(one.source)
        assert self.steps(9.0, 8.0, loop=one) == [(0, False), (1, False)]
        assert self.steps(1.5, 2.5, 3.5, loop=other) == [(0, False), (0, True), (1, False)]
        assert self.steps(7.0, loop=one) == [(2, False)]

    def test_forgets_its_way_after_runs_of_one_value_that_go_against_it(self):
        loop = self.loop()
        self.steps(9.0, 8.0, loop=loop)
        loop.time = RunTime()
        assert self.steps(5.0, 6.0, 7.0, loop=loop) == [(0, False), (0, True), (1, False)]

    def test_finds_the_first_value_in_the_schedulers_list(self):
        loop = self.loop()
        loop.scheduler.timesteps = torch.tensor([900.0, 900.0, 600.0, 600.0, 300.0])
        tick = loop.source.tick(Asked(loop.scheduler, ({"timestep": 600.0},), loop.time))
        assert (tick.step, tick.steps) == (1, 3)
        assert tick.epoch is loop.scheduler.timesteps

    def test_the_argument_that_moves_is_taken_until_it_has_moved(self):
        loop = self.loop()
        calls = [(0.5, 0.9), (0.5, 0.7), (0.5, 0.6), (0.4, 0.6)]
        found = [loop.call(None, timestep=t, sigma=sigma) for t, sigma in calls]
        assert found == [(0, False), (1, False), (2, False), (2, False)]

    def test_another_argument_that_moves_later_is_not_taken(self):
        loop = self.loop()
        calls = [(9.0, 0.5), (8.0, 0.5), (8.0, 0.4)]
        found = [loop.call(None, timestep=t, sigma=sigma) for t, sigma in calls]
        assert found == [(0, False), (1, False), (1, False)]
        assert loop.time.path == "timestep"

    def test_is_found_in_containers_two_deep(self):
        found = [*timesteps_in([{"opts": {"a": {"sigma": 3.0, "b": {"t": 1.0}}}}])]
        assert found == [Found("opts.a.sigma", 3.0)]

    def test_the_likeliest_in_a_container_comes_first(self):
        found = [*timesteps_in([{"opts": {"last_sigma": 1.0, "sigma": 2.0, "timestep": 3.0}}])]
        assert found == [Found("opts.timestep", 3.0), Found("opts.sigma", 2.0)]


class TestReading:
    def test_of_numbers_and_flags(self):
        assert read(5) == read(5.0) == read(torch.tensor(5)) == ((5.0,), 5.0, 5.0)
        assert read(True) is None
        assert read("5") is None

    def test_of_frames_leaves_out_clean_ones(self):
        assert read(torch.tensor([0.0, 2.0, 1.0])) == ((1.0, 2.0), 2.0, 1.0)
        assert read(torch.zeros(3)).values == (0.0,)

    def test_of_an_embedding_is_none(self):
        assert read(torch.linspace(0, 1, 65)) is None
        assert read(torch.linspace(0, 1, 64)).highest == 1
        assert len(read(torch.linspace(0.1, 1, 65).repeat_interleave(2)).values) == 65  # two tokens each

    def test_what_is_noted_stays(self):
        value = torch.tensor([5.0])
        noted = note(Found("t", value))
        assert noted.is_still(value)
        value.sub_(1)
        assert not noted.is_still(value)
        assert noted.given.item() == 5

    def test_tensors_are_the_same_if_they_are_the_same_view(self):
        square = torch.ones(2, 2)
        assert is_same(square, square.view(2, 2))
        assert not is_same(square, square.T)
        assert not is_same(square, square[:1])
        assert not is_same(square, square.view(torch.int32))

        class Bare(torch.Tensor):
            """A tensor without memory."""

            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                raise NotImplementedError

        assert not is_same(*[torch.Tensor._make_wrapper_subclass(Bare, (2, 2)) for _ in range(2)])


class TestLoops:
    def test_each_step_is_a_scope_of_one_loop(self):
        scopes, loops = [], set()
        for t in steps([9, 8, 7], sigmas=[0.9, 0.8, 0.7]):
            session, scope = current_context()
            assert session is scope.session is current_session()
            scopes.append((t, scope.step, scope.sigma, scope.steps))
            loops.add(scope.loop)
        assert scopes == [(9, 0, 0.9, 3), (8, 1, 0.8, 3), (7, 2, 0.7, 3)]
        assert len(loops) == 1
        assert current_context()[1] is None

    def test_a_loop_that_ends_is_trusted_and_one_broken_off_is_not(self):
        session = current_session()
        before = session.epoch
        for _ in steps([2, 1]):
            pass
        assert session.epoch == before
        for _ in steps([2, 1]):
            break
        assert session.epoch == before + 1
        with suppress(InterruptedError):
            for _ in steps([2, 1]):
                raise InterruptedError
        assert session.epoch == before + 2

    def test_a_step_is_over_with_the_next_one_wherever_it_was_seen(self):
        loop = steps([2, 1])
        next(loop)
        elsewhere = contextvars.copy_context()  # as of a thread
        assert elsewhere.run(open_scope).step == 0
        next(loop)
        assert elsewhere.run(open_scope) is None
        assert elsewhere.run(current_context)[1] is None
        assert open_scope().step == 1
        loop.close()
        assert open_scope() is None

    def test_a_loop_that_is_closed_late_ends_no_other(self):
        session = current_session()
        late = steps([2, 1])
        next(late)
        within = steps([4, 3])
        next(within)
        before, scope = session.epoch, open_scope()
        late.close()
        assert open_scope() is scope
        assert session.epoch == before
        within.close()
        assert open_scope() is None

    def test_a_scope_around_a_loop_counts_again_after_it(self):
        with timestep_scope(5):
            around = open_scope()
            late = steps([2, 1])
            next(late)
            elsewhere = contextvars.copy_context()
            late.close()
            assert elsewhere.run(open_scope) is around
            assert elsewhere.run(current_context)[1] is around
            assert open_scope() is around

    def test_a_scope_is_the_requests_that_is_entered_within(self):
        request = Session(None)
        with timestep_scope(5), inside(request):
            session, scope = current_context()
            assert session is request
            assert (scope.step, scope.session) == (5, request)
