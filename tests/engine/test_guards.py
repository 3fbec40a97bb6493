"""Small guards of the engine, each with what goes wrong without it."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from toys import Net, Pipe, latents, prompt

from dithooks import (
    BlockAdapter,
    DitCacheConfig,
    EasyCache,
    Interval,
    InvalidSetting,
    Linear,
    Threshold,
    dit_cache,
    handle,
    timestep_scope,
)
from dithooks.blocks.stream_transforms import Stream
from dithooks.engine import active_calls
from dithooks.engine.active_calls import ActiveCalls
from dithooks.engine.arguments import CallArguments
from dithooks.engine.attachment import Attachment
from dithooks.engine.branches import choose_branch
from dithooks.engine.call import Call, Mode, Stage
from dithooks.engine.clock import StepClock, Tick
from dithooks.engine.output_comparison import difference, tolerance
from dithooks.engine.replay import Replay, replaying
from dithooks.engine.residual import apply_residual, measured_outputs, take_residual
from dithooks.engine.run import Branch, Run
from dithooks.engine.sessions import Session
from dithooks.engine.step_source import RunTime
from dithooks.engine.timestep_argument import is_same
from dithooks.handle import handles_of
from dithooks.policies.history import BranchHistory

HALF = torch.tensor(0.5)


class LongSkip(Net):
    """Adds to the stream in place after every block, and what entered the first block at the end."""

    def forward(self, hidden_states, timestep):
        embedded = h = self.embed(hidden_states)
        temb = self.time(timestep.reshape(-1, 1)).expand(len(h), -1)
        for block in self.blocks:
            h = block(h, temb=temb)
            h += 0.5
        return self.proj(h + embedded)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_model_adds_in_place_reaches_neither_the_input_nor_the_result(mode):
    """With versions (no_grad) h_in + Δ̂ itself is handed on, without (inference_mode) a copy of h_in."""
    net = LongSkip()
    with dit_cache(net, DitCacheConfig(0, 2, 0, 4)) as cache, mode():
        x, outputs = latents(), []
        for step in range(2):
            with timestep_scope(step):
                outputs.append(net(x, HALF))
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_model_that_begins_to_write_into_what_the_range_was_given_is_refused():
    """Into what the range was given alone, it does no harm; into the stream as well, no result can be made again."""

    class Overwriting(Net):
        stream = given = False

        def forward(self, hidden_states, timestep):
            embedded = h = self.embed(hidden_states)
            temb = self.time(timestep.reshape(-1, 1)).expand(len(h), -1)
            for block in self.blocks:
                h = block(h, temb=temb)
                if self.stream:
                    h += 1
                if self.given:
                    embedded += 1
            return self.proj(h)

    net, x, outputs = Overwriting(), latents(), []
    with dit_cache(net, DitCacheConfig(0, 8, 0, 4)):
        for step, net.given in enumerate([False, True]):
            with timestep_scope(step):
                outputs.append(net(x, HALF))
        torch.testing.assert_close(outputs[1], outputs[0])
        net.stream = True
        with timestep_scope(2), pytest.raises(ValueError, match="writes into what the range was given"):
            net(x, HALF)


@pytest.mark.parametrize("number", [2, 3])
def test_a_block_of_the_range_that_is_called_once_more_after_it_runs(number):
    """Also its last one, whose second output is not the range's."""

    class Again(Net):
        def forward(self, hidden_states, timestep):
            h = self.embed(hidden_states)
            temb = self.time(timestep.reshape(-1, 1)).expand(len(h), -1)
            for block in (*self.blocks, self.blocks[number]):
                h = block(h, temb=temb)
            return self.proj(h)

    net, x = Again(), latents()
    full = net(x, HALF)
    with dit_cache(net, DitCacheConfig(0, 2, 1, 3)) as cache:
        for step in range(2):
            with timestep_scope(step):
                torch.testing.assert_close(net(x, HALF), full)
        assert cache.stats.reused_calls == 1


def test_a_model_that_writes_into_its_own_arguments_is_tested_with_what_it_was_given():
    class Writing(Net):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states.mul_(2), timestep)

    net = Writing()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache:
        Pipe(net)(latents(), steps=2)
        assert cache.stats.reused_calls == 1


def test_an_argument_that_remembers_calls_is_told_of_each_once():
    class Remembering(Net):
        def forward(self, hidden_states, timestep, memory):
            memory.timesteps.append(float(timestep))
            return super().forward(hidden_states, timestep)

    net, x, memory = Remembering(), latents(), SimpleNamespace(timesteps=[], lock=threading.Lock())  # not to be copied
    with dit_cache(net, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        with timestep_scope(0), pytest.warns(UserWarning, match=r"memory \(SimpleNamespace\).*nor was .* tested"):
            net(x, torch.tensor(1.0), memory=memory)
        with timestep_scope(1):
            net(x, HALF, memory=memory)
        assert cache.stats.reused_calls == 1
    assert memory.timesteps == [1.0, 0.5]


def test_two_ranges_that_are_tested_on_one_call_both_keep_its_residual():
    """The call is made again for the one before it is over for the other."""
    net, x, e = Net("two_lists"), latents(), prompt()
    config = DitCacheConfig(0, 2)
    both = BlockAdapter(transformer=net, blocks=["blocks", "singles"], params=[config, config])
    with dit_cache(both, config) as cache, torch.no_grad():
        executions = []
        for step in range(2):
            with timestep_scope(step):
                net(x, HALF, e)
            executions.append(net.executions)
        assert cache.stats.reasons == {"refresh": 2, "reuse": 2}
    assert executions[1] == executions[0]  # no block ran


def test_a_step_that_leaves_out_the_first_block_is_computed_and_counted_so():
    """Nothing is known of what would have entered that block; nor is an older residual taken at the steps after it."""

    class Guided(Net):
        first = 0

        def forward(self, hidden_states, timestep):
            h = self.embed(hidden_states)
            temb = self.time(timestep.reshape(-1, 1)).expand(len(h), -1)
            for block in list(self.blocks)[self.first :]:
                h = block(h, temb=temb)
            return self.proj(h)

    net, x = Guided(), latents()
    with dit_cache(net, DitCacheConfig(0, 4)) as cache, torch.no_grad():
        for step, net.first in enumerate([0, 1, 0, 0]):
            with timestep_scope(step):
                output = net(x, HALF)
            if net.first:
                shorter = output
        assert [each.reuse for each in cache.decisions] == [False, False, False, True]
        assert (cache.stats.computed_calls, cache.stats.reused_calls) == (3, 1)
    net.first = 1
    assert torch.equal(shorter, net(x, HALF))


def test_a_change_is_measured_on_what_entered_not_on_what_blocks_made_of_it():
    net, x = Net("in_place"), latents()
    with dit_cache(net, DitCacheConfig(policy=Threshold(9.0, 0))) as cache:
        for step in range(2):
            with timestep_scope(step):
                net(x, HALF)
        assert cache.decisions[-1].value == 0


def test_a_change_since_a_later_step_is_measured_on_what_entered_it_too():
    """The first call is captured before it is known what streams there are; all others after."""
    net, x = Net("in_place"), latents()
    with dit_cache(net, DitCacheConfig(policy=Threshold(9.0, max_warmup_steps=2))) as cache, torch.no_grad():
        for step in range(3):
            with timestep_scope(step):
                net(x, HALF)
        assert [(each.reason, each.value) for each in cache.decisions][1:] == [("warm-up", None), ("reuse", 0)]


class TestBranches:
    def run_of(self, *prompts, used):
        run = Run(0, step=1, used=used)
        for number, given in enumerate(prompts):
            branch = run.branches[number] = Branch(BranchHistory(number), position=number)
            branch.given = CallArguments({"x": self.x, "e": given}, frozenset({"x"}))
        return run

    def number(self, run, e):
        return choose_branch(run, CallArguments({"x": self.x, "e": e}, frozenset({"x"}))).number

    x = torch.ones(2)

    def test_a_draw_goes_to_the_one_that_came_first_among_these(self):
        same, other = prompt(), prompt()
        run = self.run_of(other, same, same, used=[])
        assert self.number(run, same) == 1  # though it is not the first call of a step
        run.used = [1]
        assert self.number(run, same) == 2

    def test_a_draw_goes_to_those_called_at_the_last_step_first(self):
        same = prompt()
        run = self.run_of(same, same, same, used=[])
        run.last_step = 4
        run.branches[1].called = run.branches[2].called = 4
        assert self.number(run, same) == 1

    def test_other_views_of_the_same_memory_are_other_tensors(self):
        square = torch.ones(2, 2)
        assert is_same(square, square.view(2, 2))
        assert not is_same(square, square.T)
        assert not is_same(square, square[:1])

    def test_the_branch_with_most_in_common_is_taken_before_its_turn(self):
        """Where what differs is known to change from step to step."""
        same = prompt()
        run = self.run_of(prompt(), same, used=[])
        run.branches[0].changes = {"e": 0.5}
        assert self.number(run, same) == 1

    def test_the_branch_in_use_outlives_those_before(self):
        """Prompts that change every three steps make a branch each, of which the oldest is dropped."""
        net, x = Net("swapped"), latents()
        with dit_cache(net, DitCacheConfig(0, 3, 0, 5)) as cache:
            prompts = [prompt() for _ in range(20)]
            for step in range(60):
                with timestep_scope(step):
                    net(x, HALF, encoder_hidden_states=prompts[step // 3])
            assert cache.stats.reused_calls == 40

    @pytest.mark.parametrize(
        ("cause", "reason"), [("shape", "shape"), ("switch", "switch"), ("weights", "weights"), ("new", "no anchor")]
    )
    def test_one_branch_that_cannot_reuse_keeps_no_other_from_it(self, cause, reason):
        """Where the first call of a step decides for all, its own reason is not theirs."""

        class Switched(Net):
            def forward(self, hidden_states, timestep, switch=False):
                return super().forward(hidden_states, timestep)

        net, x = Switched(), latents()
        policy = Threshold(9.0, 0, separate_branches=False)
        with dit_cache(net, DitCacheConfig(policy=policy)) as cache:

            def call(step, branch, x, switch=False):
                with timestep_scope(step, branch=branch):
                    net(x, HALF, switch=switch)

            if cause != "new":
                call(0, 0, x)
            if cause == "weights":
                net.blocks[2].proj.weight.add_(0.01)
            call(0, 1, x)
            call(1, 0, x[:, :4] if cause == "shape" else x, cause == "switch")
            call(1, 1, x)
            assert [each.reason for each in cache.decisions][-2:] == [reason, "reuse"]

    def test_the_first_branch_that_can_decides_for_all_that_follow(self):
        net, x = Net(), latents()
        with dit_cache(net, DitCacheConfig(policy=Threshold(0.1, 0, separate_branches=False))) as cache:
            for step, inputs in enumerate([(x, x, x), (x, x[:, :4], -x)]):  # the third has changed, but is not asked
                for branch, each in enumerate(inputs):
                    with timestep_scope(step, branch=branch):
                        net(each, HALF)
            assert [each.reason for each in cache.decisions][-3:] == ["reuse", "shape", "reuse"]

    def test_one_branch_that_is_not_measured_keeps_no_other_from_it(self):
        net, x = Net(), latents()
        with dit_cache(net, DitCacheConfig(policy=EasyCache(9.0, 2, separate_branches=False))) as cache:
            for step, calls in enumerate([(1,), (0, 1), (0, 1)]):  # the first branch was computed once, the other twice
                for branch in calls:
                    with timestep_scope(step, branch=branch):
                        net(x + step / 10, HALF)
            assert [each.reason for each in cache.decisions][-2:] == ["unmeasured", "reuse"]

    def test_one_branch_that_leaves_the_blocks_out_keeps_no_other_from_it(self):
        class Short(Net):
            def forward(self, hidden_states, timestep, short=False):
                return hidden_states if short else super().forward(hidden_states, timestep)

        net, x = Short(), latents()
        policy = Threshold(9.0, 0, separate_branches=False)
        with dit_cache(net, DitCacheConfig(policy=policy, predictor=Linear())) as cache:
            for step, short in enumerate([(None, None), (0.5, None), (None, None)]):  # a number, which is no switch
                for branch in (0, 1):
                    with timestep_scope(step, branch=branch):
                        net(x, HALF, short=short[branch])
            assert [each.reason for each in cache.decisions][-4:] == ["not reached", "reuse", "no anchor", "reuse"]


def test_a_call_cut_short_in_another_thread_leaves_nothing_to_reuse():
    """Blocks driven by hand, for one request: the thread that goes on has seen nothing of the exception."""
    net, x = Net(), latents()
    temb = torch.ones(2, 8)
    config = DitCacheConfig(policy=Threshold(9.0, 0), predictor=Linear())  # which keeps two residuals
    with dit_cache(net, config) as cache:
        request = cache.request()

        def drive(step, breaks=False):
            with torch.no_grad(), request, timestep_scope(step):
                h = net.embed(x) * (100 if breaks else 1)  # a change that is not reused
                for number, block in enumerate(net.blocks):
                    if breaks and number == 2:
                        return
                    h = block(h, temb=temb)

        drive(0)
        drive(1, breaks=True)
        thread = threading.Thread(target=drive, args=(2,))
        thread.start()
        thread.join()
        assert [each.reason for each in cache.decisions] == ["no anchor", "threshold", "no anchor"]


def test_a_call_that_an_exception_has_ended_ends_its_run():
    """Also where the calls that follow would fit into it: the other branch of the same step."""

    def fail(*_):
        raise MemoryError

    net, x, prompts = Net("swapped"), latents(), (prompt(), prompt())
    with dit_cache(net, DitCacheConfig(0, 4)) as cache:
        for e in prompts:
            net(x, torch.tensor(1.0), encoder_hidden_states=e)
        hook = net.proj.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            net(x, HALF, encoder_hidden_states=prompts[0])
        hook.remove()
        net(x, HALF, encoder_hidden_states=prompts[1])
        assert [(each.run, each.reuse) for each in cache.decisions] == [(0, False), (0, False), (0, True), (1, False)]


def test_an_update_that_fails_leaves_nothing_to_reuse(monkeypatch):
    net, real = Net(), Attachment.attach
    left = [True]

    def failing(self):
        if left:
            left.clear()
            raise MemoryError
        real(self)

    with dit_cache(net, DitCacheConfig(0, 2)) as cache:
        for step in range(2):
            with timestep_scope(step):
                net(latents(), HALF)
            if step == 0:
                monkeypatch.setattr(Attachment, "attach", failing)
                with pytest.raises(MemoryError):
                    cache.update(DitCacheConfig(0, 3))
                assert cache.stats.bytes_held == 0
        assert [each.reason for each in cache.decisions] == ["refresh", "no anchor"]


def test_an_error_after_attaching_takes_the_cache_off(monkeypatch):
    def fail(_):
        raise MemoryError

    net = Net()
    monkeypatch.setattr(handle, "_warn", fail)
    with pytest.raises(MemoryError):
        dit_cache(net, DitCacheConfig(0, 2))
    assert handles_of(net) == []


def test_sigmas_that_repeat_do_not_tell_the_step():
    class Scheduler:
        timesteps, sigmas = torch.arange(4), torch.tensor([1.0, 0.5, 0.5, 0.2])

    clock, tick = StepClock(Scheduler, "net"), Tick(0, "scheduler", epoch=Scheduler.timesteps, steps=4)
    assert clock.sigmas(Session(None), tick) is None
    Scheduler.sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert clock.sigmas(Session(None), tick) == (1.0, 0.75, 0.5, 0.25)
    Scheduler.sigmas = torch.linspace(1, 0, 7)  # of a solver of higher order, say
    assert clock.sigmas(Session(None), tick) is None


def steps_of(clock, *values):
    scheduler, time = clock.scheduler_of(Session(None)), RunTime()
    ticks = [clock.timed(scheduler, {"timestep": torch.tensor(value)}, time) for value in values]
    return [(tick.step, tick.restart) for tick in ticks]


def test_a_run_of_one_timestep_goes_the_way_of_the_run_before():
    clock = StepClock(lambda: None, "net")
    assert steps_of(clock, 1.0, 0.5) == [(0, False), (1, False)]
    assert steps_of(clock, 0.5, 1.0) == [(0, False), (0, True)]


def test_a_run_that_begins_beside_the_listed_timesteps_counts_them():
    class Scheduler:
        timesteps = torch.tensor([900.0, 600.0, 300.0])

    assert steps_of(StepClock(Scheduler, "net"), 300.0) == [(2, False)]
    assert steps_of(StepClock(Scheduler, "net"), 950.0, 300.0) == [(0, False), (1, False)]


def test_a_step_back_begins_another_run():
    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        for step in (0, 1, 0, 1):
            with timestep_scope(step):
                net(x, HALF)
        assert [each.run for each in cache.decisions] == [0, 0, 1, 1]


def test_a_refresh_that_was_lost_is_no_missed_one():
    class Short(Net):
        def forward(self, hidden_states, timestep, short=False):
            return hidden_states if short else super().forward(hidden_states, timestep)

    net, x = Short(), latents()
    with dit_cache(net, DitCacheConfig(0, 3)) as cache, torch.no_grad():
        for step in range(5):
            with timestep_scope(step):
                net(x, HALF, short=0.5 if step == 3 else None)
        assert [each.reason for each in cache.decisions][-2:] == ["refresh", "no anchor"]


def test_closing_expires_calls_and_waits_for_those_of_other_threads(monkeypatch):
    monkeypatch.setattr(active_calls, "PATIENCE", 0.01)
    calls, own, other = ActiveCalls(), *(Call(Mode.REUSE, Stage.INSIDE) for _ in range(2))
    here, there = calls.join(), calls.join()
    assert calls.is_closed
    calls.open()
    here.calls = (own,)
    assert calls.close()
    calls.open()
    there.calls, there.thread = (other,), there.thread + 1
    assert not calls.close()
    assert own.stale
    calls.expire(but=own)
    assert (own.stale, other.stale) == (False, True)


def test_a_call_that_begins_while_the_cache_is_being_closed_is_stale(monkeypatch):
    net = Net()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        flow = cache._attached[0].cache
        decide = flow.decider.decide

        def closing(*call):
            flow.active_calls.close()  # by another thread, which cannot see this call yet
            return decide(*call)

        monkeypatch.setattr(flow.decider, "decide", closing)
        begun = []
        net.blocks[1].register_forward_pre_hook(lambda *_: begun.append(flow.state.call.stale))
        net(latents(), torch.zeros(2))
    assert begun == [True]


def test_a_branch_that_was_just_called_is_kept_whatever_its_policy_thinks_outdated():
    class Hasty(Interval):
        def outdated(self, step, branch, idle, anchors):
            return True

    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(policy=Hasty(0, 2))) as cache, torch.no_grad():
        for step in range(2):
            with timestep_scope(step):
                net(x, HALF)
        assert [each.reason for each in cache.decisions] == ["refresh", "reuse"]


def test_a_scheduler_may_serve_a_request_after_another_that_is_through():
    pipe, x = Pipe(Net()), latents()
    pipe.scheduler.set_timesteps(4)
    with dit_cache(pipe, DitCacheConfig(0, 2)) as cache, torch.no_grad(), cache.request():
        for requests in (nullcontext(), cache.request()):
            pipe.scheduler.step_index = 0  # the same schedule, from its start
            with requests:
                for step in range(4):
                    pipe.transformer(x, torch.tensor(1 - step / 4))
                    pipe.scheduler.step()
        assert [each.reason for each in cache.decisions] == ["refresh", "reuse"] * 4


def test_a_run_that_was_computed_for_its_scheduler_is_not_blamed_for_its_speed(recwarn):
    class Blaming(Interval):
        def warning_at_end(self, speedup):
            return "too slow"

    pipe, x = Pipe(Net()), latents()
    pipe.scheduler.set_timesteps(4)
    with dit_cache(pipe, DitCacheConfig(policy=Blaming(0, 2))) as cache, torch.no_grad():
        for steps in (1, 4):  # the former request is not through when the latter begins
            with cache.request() if steps > 1 else nullcontext():
                pipe.scheduler.step_index = 0
                for _ in range(steps):
                    pipe.transformer(x, HALF)
                    pipe.scheduler.step()
        assert [each.reason for each in cache.decisions] == ["refresh", *["shared scheduler"] * 4]
    assert not any("too slow" in str(each.message) for each in recwarn)


def test_what_does_not_change_at_all_is_reused():
    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(policy=EasyCache(0.1, 2))) as cache, torch.no_grad():
        for step in range(4):
            with timestep_scope(step):
                net(x, HALF)
        assert [each.reason for each in cache.decisions][2:] == ["reuse", "reuse"]  # 0 of 0 is no change


def test_the_end_of_a_run_frees_what_changes_are_measured_by():
    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(policy=Threshold(9.0, 0))) as cache, torch.no_grad():
        for step in range(3):
            with timestep_scope(step, steps=3):
                net(x, HALF)
            (run,) = cache._attached[0].cache.decider._runs.values()
            assert (run.branches[0].metric.held == []) is (step == 2)


def test_runs_of_one_step_are_known_by_their_latents():
    net = Net()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        for x in (latents(), latents()):
            for _ in range(2):  # both branches of guidance take the same latents
                with timestep_scope(0, steps=1):
                    net(x, HALF)
        assert [(each.run, each.branch) for each in cache.decisions] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_step_after_the_last_is_refused():
    with pytest.raises(InvalidSetting, match="step=3 is not one of steps=3"), timestep_scope(3, steps=3):
        pass


def test_a_request_left_by_an_exception_reuses_nothing_of_before():
    pipe, x = Pipe(Net()), latents()
    pipe.scheduler.set_timesteps(4)
    with dit_cache(pipe, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        request = cache.request()

        def cut_short():
            with request:
                pipe.transformer(x, HALF)
                raise MemoryError

        with pytest.raises(MemoryError):
            cut_short()
        pipe.scheduler.step()
        with request:
            pipe.transformer(x, HALF)
        assert [(each.run, each.reason) for each in cache.decisions] == [(0, "refresh"), (1, "no anchor")]


def test_a_residual_tested_while_the_range_changed_is_tested_once_more():
    class Changing(Net):
        def forward(self, hidden_states, timestep):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:  # the first call made again, to test its residual
                flow.active_calls.expire()  # by another thread
            return super().forward(hidden_states, timestep)

    net, x = Changing(), latents()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        flow = cache._attached[0].cache
        for step, unverified in ((0, True), (2, False)):
            with timestep_scope(step):
                net(x, HALF)
            assert flow.unverified is unverified


def test_a_call_can_be_expired_until_its_residual_is_kept(monkeypatch):
    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache, torch.no_grad():
        flow = cache._attached[0].cache
        after_call = flow._after_call

        def moved(call):
            flow.active_calls.expire()  # by another thread, which has found that the range is of other blocks
            return after_call(call)

        with timestep_scope(0), monkeypatch.context() as patch:
            patch.setattr(flow, "_after_call", moved)
            net(x, HALF)
        assert cache.stats.bytes_held == 0


def test_a_run_ends_once_though_its_last_step_makes_more_calls_than_others(caplog):
    net, x = Net(), latents()
    with caplog.at_level("INFO"), dit_cache(net, DitCacheConfig(0, 2)), torch.no_grad():
        for step, branches in enumerate((1, 1, 3)):
            for branch in range(branches):
                with timestep_scope(step, steps=3, branch=branch):
                    net(x, HALF)
    assert [" over: " in each.message for each in caplog.records].count(True) == 1


def test_a_residual_of_another_shape_is_freed_when_one_of_the_new_shape_is_taken():
    net, x = Net(), latents()
    with dit_cache(net, DitCacheConfig(0, 2, predictor=Linear())) as cache, torch.no_grad():
        for step, tokens in ((0, 6), (1, 3)):
            with timestep_scope(step):
                net(x[:, :tokens], HALF)
        assert [each.reason for each in cache.decisions] == ["refresh", "shape"]
        half = cache.stats.bytes_held
        with timestep_scope(2):
            net(x[:, :3], HALF)
        assert cache.stats.bytes_held == 2 * half > 0


def test_a_line_keeps_two_residuals_and_no_third():
    net, x, held = Net(), latents(), []
    with dit_cache(net, DitCacheConfig(0, 2, predictor=Linear())) as cache, torch.no_grad():
        for step in range(5):
            with timestep_scope(step):
                net(x, HALF)
            held.append(cache.stats.bytes_held)
    assert held[0] > 0
    assert [each / held[0] for each in held] == [1, 1, 2, 2, 2]


def test_a_residual_kept_in_another_dtype_is_added_in_that_of_the_model():
    net, x = Net().bfloat16(), latents().bfloat16()
    with dit_cache(net, DitCacheConfig(0, 2, cache_dtype="float32")) as cache, torch.no_grad():
        for step in range(2):
            with timestep_scope(step):
                assert net(x, HALF.bfloat16()).dtype == torch.bfloat16
        assert cache.decisions[-1].reuse


def test_a_model_that_uses_one_percent_of_an_inner_block_is_refused():
    class Leaking(Net):
        def forward(self, hidden_states, timestep):
            h = self.embed(hidden_states)
            temb = self.time(timestep.reshape(-1, 1)).expand(len(h), -1)
            inner = 0
            for number, block in enumerate(self.blocks):
                h = block(h, temb=temb)
                inner = h if number == 2 else inner
            return self.proj(h + 0.02 * inner)

    net = Leaking()
    with dit_cache(net, DitCacheConfig(0, 2)) as cache:
        with pytest.raises(ValueError, match=r"comes out 0\.0[0-4]\d* off"):
            net(latents(), HALF)
        assert cache.stats.bytes_held == 0


def test_a_residual_of_another_shape_does_not_fit():
    net = Net()
    with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
        Pipe(net)(latents(), steps=2)
        wiring = cache._attached[0].cache.block_range.wiring
    h, delta = torch.ones(2, 6, 8), torch.ones(2, 6, 8)
    assert apply_residual(wiring, [h], [delta]) is not None
    for dtype in (torch.float64, torch.bfloat16):  # that of the stream where it left the range
        (found,) = apply_residual(wiring, [h], [delta.to(dtype)])
        assert torch.equal(found, torch.full((2, 6, 8), 2.0, dtype=dtype))
    assert apply_residual(wiring, [h], [delta[:, :1]]) is None


class TestResiduals:
    def test_of_a_stream_that_leaves_twice(self):
        h, outputs = torch.ones(2), (torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0]))
        wiring = SimpleNamespace(leave=(Stream(0), Stream(0)), plain=False)
        taken = take_residual(wiring, [-h], outputs)
        assert [delta.tolist() for delta in taken] == [[2.0, 3.0], [4.0, 5.0]]

    def test_of_an_output_that_was_none_when_the_wiring_was_seen(self):
        wiring = SimpleNamespace(leave=(Stream(0), None), plain=True)
        assert len(take_residual(wiring, [torch.ones(2)], (torch.ones(2), None))) == 1
        assert take_residual(wiring, [torch.ones(2)], (torch.ones(2), torch.ones(2))) == ()

    def test_what_is_measured_is_a_copy(self):
        value = torch.ones(2)
        (kept,) = measured_outputs(SimpleNamespace(measured_outputs=(0,)), (value,))
        value += 1
        assert kept.tolist() == [1.0, 1.0]


class TestReplays:
    def test_rounding_is_tolerated_and_something_for_nothing_is_not(self):
        assert tolerance(torch.ones(1)) == 1e-3
        assert tolerance(torch.ones(1, dtype=torch.bfloat16)) == 16 * torch.finfo(torch.bfloat16).eps
        nothing, something = torch.zeros(2), torch.ones(2)
        assert (difference(nothing, nothing), difference(something, nothing)) == (0.0, 1.0)

    def test_arguments_are_fed_once_and_other_caches_stand_aside(self):
        class Remembering(torch.nn.Module):
            def forward(self, kept):
                kept.append(replaying.get())
                return list(kept)

        kept = []
        replay = Replay(Remembering(), (), {"kept": kept})
        assert replay(eager=False).output == [True]
        assert (kept, replaying.get()) == ([], False)

    def test_what_may_remember_is_found_in_dicts(self):
        assert Replay(torch.nn.Identity(), (), {"given": {"scale": 1.0}}).safe
        assert not Replay(torch.nn.Identity(), (), {"given": {"kv": iter([1])}}).safe


def test_what_never_reuses_is_not_attached():
    net = Net()
    with pytest.warns(UserWarning, match="cache_step_interval"), dit_cache(net, DitCacheConfig(0, 1)) as cache:
        assert (cache.ranges, handles_of(net)) == ((), [])
