"""A cache is put on, changed and taken off while threads and tasks call the model, while Ctrl-C comes at any line of
the library, and while the process is forked: no call is lost or wrong, nothing is left on, nobody waits for ever.
"""

import os
import random
import signal
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from races import CONFIG, OTHER, STEPS, Sum, child_of, forks, hasty, left_on, race, race_of_changes, run_of, sample
from traces import seamless

import dithooks
from dithooks import dit_cache
from dithooks.engine import compiled_calls

pytestmark = [pytest.mark.line("Concurrency"), pytest.mark.on("four blocks whose output shows their step")]
OURS = str(Path(dithooks.__file__).parent)
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")


class TestRaces:
    """Changes beside calls and beside each other."""

    @pytest.mark.parametrize("kind", ["called", "forward", "looped"])
    def test_changed_while_others_call(self, kind):
        """Whether the model, its forward or its blocks are called: every output is of its own run's step."""
        tally = race(kind, 6)
        assert (tally["pairs"], tally["left"], tally["stuck"]) == (6, 0, 0)
        assert not [what for what in tally if what.startswith(("dead", "wrong")) and tally[what]]

    def test_update_and_remove_at_once(self):
        """Of an update and a removal one comes first, and nothing is attached in the end."""
        tally = race_of_changes(100)
        assert set(tally) <= {
            "RunMismatch: this cache was removed: attach a new one with dit_cache(...)",
            "pairs",
            "left",
        }
        assert (tally["pairs"], tally["left"]) == (100, 0)

    def test_what_is_being_removed_is_not_changed(self):
        """A removal waits for a log: what another thread does meanwhile is refused, and does not come in between."""
        model = Sum()
        cache = dit_cache(model, CONFIG)
        removing = threading.Thread(target=cache.remove)
        with cache._attached[0].log.lock:
            removing.start()
            while left_on(model):
                pass
            for action in (lambda: cache.update(OTHER), cache.__enter__, cache.request):
                with pytest.raises(RuntimeError, match="was removed"):
                    action()
        removing.join(20)
        assert (left_on(model), cache.active) == (0, False)

    def test_numbers_read_while_another_thread_removes(self):
        """They are those of the calls, before, during and after: never zero."""
        model, found = Sum(), set()
        cache = dit_cache(model, CONFIG)
        for _ in run_of(model, "called", Counter()):
            pass
        over = []

        def read():
            while not over:
                found.add((cache.stats.calls, len(cache.decisions), len(cache.ranges)))

        reading = threading.Thread(target=read)
        with hasty():
            reading.start()
            cache.remove()
            over.append(True)
            reading.join()
        assert found | {(cache.stats.calls, len(cache.decisions), len(cache.ranges))} == {(STEPS, STEPS, 1)}

    def test_removed_by_a_finalizer_in_the_midst_of_a_change(self):
        """What a finalizer removes while it is being updated is gone afterwards, and the update says so."""
        model = Sum()
        cache = dit_cache(model, CONFIG)

        class Garbage:
            pass

        class Meddling(Sum):
            def register_forward_hook(self, *args, **kwargs):
                garbage = Garbage()
                weakref.finalize(garbage, cache.remove)
                del garbage
                return super().register_forward_hook(*args, **kwargs)

        model.__class__ = Meddling
        with pytest.raises(RuntimeError, match="was removed"):
            cache.update(OTHER)
        assert (left_on(model), cache.active) == (0, False)

    def test_removed_by_a_finalizer_while_its_log_is_read(self):
        """The thread that holds a lock may need it once more, in a finalizer."""
        model = Sum()
        cache = dit_cache(model, CONFIG)

        def read():
            with cache._attached[0].log.lock:
                cache.remove()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert left_on(model) == 0


class Pausing(Sum):
    """A model whose call waits, once it is told to: before its blocks, or behind them."""

    def __init__(self):
        super().__init__()
        self.inside, self.go_on, self.pauses = threading.Event(), threading.Event(), (False, False)

    @torch._dynamo.disable
    def pause(self, number):
        if self.pauses[number]:
            self.pauses = False, False
            self.inside.set()
            self.go_on.wait(20)

    def forward(self, x, timestep):
        self.pause(0)
        x = super().forward(x, timestep)
        self.pause(1)
        return x


def compiled_model():
    """A compiled model that has a cache and has made a run."""
    model = Pausing()
    model.compile(backend="eager")
    cache = dit_cache(model, CONFIG)
    for _ in run_of(model, "called", tally := Counter()):
        pass
    assert (tally["calls"], tally["wrong"]) == (STEPS, 0)
    return model, cache


class TestBesideCompiledCalls:
    """What compiled code reads stays as it is until its call is over."""

    def run_beside(self, model):
        """Make a run in another thread; return that and what comes of it."""
        tally = Counter()
        thread = threading.Thread(target=lambda: [None for _ in run_of(model, "called", tally)])
        thread.start()
        return thread, tally

    def test_a_change_waits_for_them(self):
        """A removal comes after the call that is in compiled code, which is right."""
        model, cache = compiled_model()
        model.pauses = False, True
        thread, tally = self.run_beside(model)
        assert model.inside.wait(20)
        removing = threading.Thread(target=cache.remove)
        removing.start()
        removing.join(0.3)
        assert (removing.is_alive(), left_on(model) > 0) == (True, True)
        model.go_on.set()
        removing.join(20)
        thread.join(20)
        assert (left_on(model), tally["calls"], tally["wrong"]) == (0, STEPS, 0)

    def test_they_wait_for_a_change(self):
        """A call that begins while another thread changes the cache is made afterwards."""
        model, cache = compiled_model()
        with cache._compiled_calls.kept_out():
            thread, tally = self.run_beside(model)
            thread.join(0.3)
            assert tally["calls"] == 0
        thread.join(20)
        cache.remove()
        assert (tally["calls"], tally["wrong"], left_on(model)) == (STEPS, 0, 0)

    def test_one_that_never_ends_is_not_waited_for_forever(self):
        """After a second the cache is taken off all the same."""
        model, cache = compiled_model()
        model.pauses = False, True
        thread, _ = self.run_beside(model)
        assert model.inside.wait(20)
        cache.remove()
        assert left_on(model) == 0
        model.go_on.set()
        thread.join(20)

    def test_a_change_that_was_broken_off_is_waited_for_once(self, monkeypatch):
        """Ctrl-C may have come before its last line: the first call waits for nothing, the others do not."""
        monkeypatch.setattr(compiled_calls, "PATIENCE", 0.02)
        model, cache = compiled_model()
        cache._compiled_calls._changing.append(-1)
        for _ in run_of(model, "called", tally := Counter()):
            assert cache._compiled_calls._changing == []
        cache.remove()
        assert (tally["calls"], tally["wrong"], left_on(model)) == (STEPS, 0, 0)

    def test_attached_in_the_midst_of_a_call(self):
        """A call that has begun without the hooks is a plain one: nothing of it is counted, nor learnt."""
        model = Pausing()
        model.pauses = True, False
        thread, tally = self.run_beside(model)
        assert model.inside.wait(20)
        cache = dit_cache(model, CONFIG)
        model.go_on.set()
        thread.join(20)
        assert (tally["calls"], tally["wrong"], cache.stats.calls) == (STEPS, 0, STEPS - 1)
        cache.remove()


def interrupted(action, at):
    """Do something, with Ctrl-C before the so manyth line of ours. Where that was; ``None``: there are not as many."""
    count, place = at, None

    def trace(frame, event, _):
        nonlocal count, place
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line" and frame.f_lineno not in seamless(frame.f_code):
            count -= 1
            if count == 0:
                place = frame.f_code.co_name, frame.f_lineno - frame.f_code.co_firstlineno
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        assert place is not None
    finally:
        sys.settrace(before)
    return place


class TestInterrupted:
    """Ctrl-C, as an exception at a line of the library's own code."""

    def test_anywhere_in_a_with(self):
        """Attaching, three steps, removing: at any of 60 lines, drawn by chance, nothing is left of it."""
        model = Sum()
        sample(model)
        total = next(at for at in range(1000, 100_000, 500) if interrupted(lambda: sample(model), at) is None)
        for at in sorted(random.Random(0).sample(range(1, total - 500), 60)):
            place = interrupted(lambda: sample(model), at)
            assert place is not None
            assert left_on(model) == 0, place
        with ThreadPoolExecutor(1) as pool:  # no lock is kept either
            pool.submit(sample, model).result(10)

    def test_at_lines_of_leaving(self):
        """The removal is finished, and Ctrl-C raised then."""
        model, at = Sum(), 0
        while True:
            at += 7
            cache = dit_cache(model, CONFIG)
            place = interrupted(lambda cache=cache: cache.__exit__(None, None, None), at)
            assert left_on(model) == 0, place
            cache.remove()
            assert (left_on(model), cache.active) == (0, False)
            if place is None:
                break
        assert at > 100

    def test_twice_in_one_removal(self):
        """Impatience does not help: the second Ctrl-C comes while the removal is being finished."""
        model, given = Sum(), [KeyboardInterrupt("first"), KeyboardInterrupt("second"), SystemExit()]
        cache = dit_cache(model, CONFIG)
        detaches = cache._attached[0].detach

        def impatient():
            if given:
                raise given.pop(0)
            return detaches()

        cache._attached[0].detach = impatient
        with pytest.raises(KeyboardInterrupt, match="first"):
            cache.remove()
        assert (given, left_on(model), cache.active) == ([], 0, False)

    def test_a_removal_that_cannot_succeed_says_so(self):
        """An error that comes again and again is none from outside: it is raised, not tried for ever."""
        model = Sum()
        cache = dit_cache(model, CONFIG)
        broken = cache._attached[0]
        broken.detach = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            cache.remove()
        del broken.detach
        cache.remove()
        assert left_on(model) == 0

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
    def test_a_real_signal_while_calls_are_waited_for(self):
        """A call stays in the range, so that the removal waits; the signal ends the wait, not the removal."""
        model = Sum()
        cache = dit_cache(model, CONFIG)
        for _ in run_of(model, "called", Counter()):
            pass
        inside = cache._attached[0].cache.active_calls
        inside._passing, patience = (lambda: bool(patience)), [1]

        def interrupt(*_):
            patience.clear()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                cache.remove()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert (left_on(model), cache.active) == (0, False)


@forking
class TestForked:
    """In a forked child only the thread that forks goes on."""

    def locks(self, cache):
        attached = cache._attached[0]
        return [attached.log, attached.cache.decider._weights, dithooks.handle.MODEL_LOCK]

    @pytest.mark.parametrize("number", range(3))
    def test_while_another_thread_holds_a_lock(self, number):
        """Each lock that a call or a removal needs: the child calls the model, and takes its cache off."""
        model = Sum()
        cache = dit_cache(model, CONFIG)
        held, go_on = threading.Event(), threading.Event()

        def hold():
            with self.locks(cache)[number].lock:
                held.set()
                go_on.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(20)
            assert child_of(model, 5) == "fine"
        finally:
            go_on.set()
            thread.join()
        cache.remove()

    def test_while_other_threads_are_in_a_call(self):
        """Theirs are no longer under way in the child: they are not waited for, nor is a scheduler theirs."""
        model, inside, go_on = Sum(), threading.Event(), threading.Event()
        cache = dit_cache(model, CONFIG)

        class Waiting(Sum):
            def forward(self, x, timestep):
                for number, block in enumerate(self.blocks):
                    x = block(x, timestep)
                    if number == 1 and threading.current_thread() is thread and cache.stats.reused_calls:
                        inside.set()
                        go_on.wait(20)
                return x

        def call():
            for _ in run_of(model, "called", Counter()):
                pass

        model.__class__, thread = Waiting, threading.Thread(target=call)
        thread.start()
        assert inside.wait(20)
        began = os.times().elapsed
        child = os.fork()
        if not child:
            signal.alarm(10)
            runs = len(cache._attached[0].cache.decider._runs)
            cache.remove()
            os._exit(0 if (runs, left_on(model)) == (0, 0) else 3)
        status = os.waitpid(child, 0)[1]
        go_on.set()
        thread.join()
        cache.remove()
        assert status == 0
        assert os.times().elapsed - began < 0.9  # the second that a removal waits for such calls

    def test_a_request_that_another_thread_has_entered_is_free(self):
        """The child enters it, leaves it and closes it."""
        model = Sum()
        cache, entered, go_on = dit_cache(model, CONFIG), threading.Event(), threading.Event()
        request = cache.request()

        def enter():
            with request:
                entered.set()
                go_on.wait(20)

        thread = threading.Thread(target=enter)
        thread.start()
        assert entered.wait(20)
        child = os.fork()
        if not child:
            signal.alarm(10)
            with request:
                pass
            request.close()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        go_on.set()
        thread.join()
        cache.remove()
        assert status == 0

    def test_within_a_call_it_goes_on(self):
        """The thread that forks is in a call itself: the child ends that call as the parent does."""
        model, children = Sum(), []

        class Forking(Sum):
            def forward(self, x, timestep):
                for number, block in enumerate(self.blocks):
                    x = block(x, timestep)
                    if number == 1 and cache.stats.reused_calls and not children:
                        children.append(os.fork())
                return x

        model.__class__, tally = Forking, Counter()
        with dit_cache(model, CONFIG) as cache:
            for _ in run_of(model, "called", tally):
                if children == [0]:
                    os._exit(1 if [what for what in tally if what.startswith(("dead", "wrong"))] else 0)
        assert os.waitpid(children[0], 0)[1] == 0

    def test_under_load(self):
        """Four threads call the model, another one attaches, updates and removes: the child's runs are right."""
        assert forks(4, seconds=10) == {"fine": 4, "left": 0, "dead or wrong calls in the parent": 0}
