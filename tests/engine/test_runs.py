"""Steps, branches and runs: whatever calls the model, a residual never reaches a call it is not for."""

import contextlib

import pytest
import torch
from toys import Net, Pipe, latents, prompt

from dithooks import DitCacheConfig, dit_cache, timestep_scope

pytestmark = pytest.mark.core

CONFIG = DitCacheConfig(2, 2, 1, 3)


def fresh(x, config=CONFIG, seed=1, **call):
    """The same call on a model attached for it alone."""
    net = make(seed)
    with dit_cache(Pipe(net), config) as cache:
        return Pipe(net)(x, **call), cache.stats


def make(seed=1, kind="swapped"):
    torch.manual_seed(seed)
    return Net(kind)


class TestBranches:
    def test_two_calls_per_step_keep_their_own_residuals(self):
        x, cond, uncond = latents(), prompt(), prompt()
        net = make()
        seen = {}

        def one(e, key):
            with dit_cache(Pipe(net), CONFIG):
                seen[key] = Pipe(net)(x, prompts=[e])

        one(cond, "cond"), one(uncond, "uncond")

        class Apart(Pipe):
            def __call__(self, x, prompts):
                xs = [x, x]
                self.scheduler.set_timesteps(8)
                for t in self.scheduler.timesteps:
                    for n, e in enumerate(prompts):
                        xs[n] = xs[n] - self.transformer(xs[n], timestep=t / 1000, encoder_hidden_states=e) / 8
                    self.scheduler.step()
                return xs

        pipe = Apart(net)
        with dit_cache(pipe, CONFIG) as cache:
            both = pipe(x, [cond, uncond])
            assert cache.stats.reused_calls == 2 * 3
        assert torch.equal(both[0], seen["cond"])
        assert torch.equal(both[1], seen["uncond"])

    @pytest.mark.parametrize("cond_first", [True, False])
    @pytest.mark.parametrize("guided", [range(3, 6), range(0, 4), range(5, 8), [1, 2, 6, 7]])
    def test_guidance_on_some_steps_only(self, cond_first, guided):
        """Each branch equals the same schedule of calls with branches named by hand."""
        x, cond, uncond = latents(), prompt(), prompt()

        def loop(net, name):
            outs = []
            for step in range(8):
                order = [("cond", cond), ("uncond", uncond)] if step in guided else [("cond", cond)]
                for key, e in order if cond_first else reversed(order):
                    with timestep_scope(step, branch=name and ("cond", "uncond").index(key)):
                        outs.append(net(x + step, timestep=torch.tensor(1 - step / 8), encoder_hidden_states=e))
            return outs

        net = make()
        with dit_cache(net, CONFIG) as cache:
            expected = loop(net, True)
            named = cache.stats.reasons
        with dit_cache(net, CONFIG) as cache:
            got = loop(net, None)
            assert cache.stats.reasons == named
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))

    def test_a_branch_that_missed_the_refresh_computes(self):
        net, x, t = make(kind="single"), latents(), torch.tensor(0.5)
        with dit_cache(net, DitCacheConfig(0, 3, 0, 5)) as cache:
            # The second branch is away at step 3, a refresh; what it computes at step 4 serves it at step 5.
            for step, branches in enumerate([2, 2, 2, 1, 2, 2]):
                for branch in range(branches):
                    with timestep_scope(step, branch=branch):
                        net(x, t)
            assert cache.stats.reasons == {"refresh": 3, "reuse": 7, "missed refresh": 1}

    def test_a_constant_made_anew_at_every_step_tells_nothing(self):
        """A guidance scale as a tensor of this step, given to both calls: neither is taken for a stranger."""

        class Guided(Pipe):
            def __call__(self, x, prompts, anew):
                self.scheduler.set_timesteps(8)
                scale = torch.full((1,), 3.5)
                for t in self.scheduler.timesteps:
                    scale = torch.full((1,), 3.5) if anew else scale
                    for e in prompts:
                        self.transformer(x, timestep=t / 1000, encoder_hidden_states=e, control=scale)
                    self.scheduler.step()

        pipe, x, prompts = Guided(make()), latents(), (prompt(), prompt())
        with dit_cache(pipe, DitCacheConfig(2, 3, 0, 5)) as cache:
            pipe(x, prompts, anew=False)
            once = cache.stats
            cache.reset()
            pipe(x, prompts, anew=True)
            assert cache.stats == once
            assert once.reasons == {"warm-up": 4, "refresh": 4, "reuse": 8}

    @pytest.mark.filterwarnings("ignore:.*reused nothing.*")
    @pytest.mark.parametrize(
        ("former", "latter", "reused"),
        [([], [1], 0), ([1], [1], 1), (None, [1], 0), (0.5, 0.7, 1), (3, 4, 1), (True, False, 0), ("a", "b", 0)],
    )
    def test_a_switch_that_is_thrown_computes(self, former, latter, reused):
        """Layers to leave out, say; a number that changes with every step is no switch."""

        class Switched(Net):
            def forward(self, hidden_states, timestep, switch=None):
                h = self.embed(hidden_states)
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for index, block in enumerate(self.blocks):
                    if not isinstance(switch, list) or index not in switch:
                        h = block(h, temb)
                return self.proj(h)

        net, x, t = Switched(), latents(), torch.tensor(0.5)
        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
            with timestep_scope(0):
                net(x, t, switch=[])
            for step, switch in ((2, former), (3, latter)):
                with timestep_scope(step, branch=0):
                    out = net(x, t, switch=switch)
            assert cache.stats.reused_calls == reused
            assert cache.stats.reasons.get("switch", 0) == 1 - reused
        torch.testing.assert_close(out, net(x, t, switch=latter))

    def test_a_changed_prompt_computes(self):
        net, x, t = make(), latents(), torch.tensor(0.5)
        first, second = prompt(), prompt()
        with dit_cache(net, DitCacheConfig(0, 4, 0, 5)) as cache:
            for step in range(4):
                with timestep_scope(step):
                    out = net(x, t, encoder_hidden_states=first if step < 2 else second)
                if step == 2:
                    assert cache.stats.reasons == {"refresh": 1, "reuse": 1, "no anchor": 1}
                    changed = out
        assert torch.equal(changed, net(x, t, encoder_hidden_states=second))

    def test_a_clock_that_stands_still_is_reported(self):
        net, x = make(kind="single"), latents()
        with dit_cache(net, CONFIG) as cache:
            for _ in range(64):
                net(x, timestep=torch.tensor(0.5))
            with pytest.warns(UserWarning, match="64 times at step 0"):
                net(x, timestep=torch.tensor(0.5))
            for _ in range(40):
                net(x, timestep=torch.tensor(0.5))
            assert cache.stats.reused_calls == 0
            assert cache.stats.bytes_held <= 16 * x.shape[0] * 6 * 8 * 4

    def test_more_calls_a_step_than_are_kept_at_the_first_have_theirs_from_the_second_on(self):
        """Forty tiles: as many residuals are kept at once the step has been seen to move."""
        net, tiles, e = make(), [latents() for _ in range(40)], prompt()
        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
            for step in range(6):
                tiles = [x - net(x, timestep=torch.tensor(1 - step / 8), encoder_hidden_states=e) / 8 for x in tiles]
            by_step = [sum(each.reuse for each in cache.decisions if each.step == step) for step in range(6)]
        assert by_step == [0, 16, 0, 40, 0, 40]


class TestRunsInOneWith:
    def test_other_shapes_batches_steps_and_prompts(self):
        net = make()
        pipe = Pipe(net)
        calls = [
            {"x": latents(), "steps": 8, "prompts": [prompt(), prompt()]},
            {"x": latents(3, 4), "steps": 11, "prompts": [prompt(3, 5)]},
            {"x": latents(), "steps": 5, "prompts": [prompt()]},
            {"x": latents(), "steps": 5, "prompts": [prompt()]},
        ]
        expected = [fresh(**call)[0] for call in calls]
        with dit_cache(pipe, CONFIG):
            assert all(torch.equal(pipe(**call), want) for call, want in zip(calls, expected, strict=True))

    @pytest.mark.filterwarnings("ignore:.*reused nothing.*")
    @pytest.mark.parametrize("change", ["tokens", "batch", "dtype"])
    def test_a_form_that_changes_in_mid_run_computes(self, change):
        net, t, x, e = make(), torch.tensor(0.5), latents(2, 6), prompt()
        other = {"tokens": latents(2, 4), "batch": latents(1, 6), "dtype": x}[change]
        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
            with timestep_scope(0):
                net(x, t, encoder_hidden_states=e)
            if change == "dtype":
                net.double()
                other, t, e = other.double(), t.double(), e.double()
            text = e[: len(other)]
            with timestep_scope(1):
                out = net(other, t, encoder_hidden_states=text)
            assert cache.stats.reasons["refresh"] == 1
            assert cache.stats.reused_calls == 0
        assert torch.equal(out, net(other, t, encoder_hidden_states=text))

    def test_a_form_that_only_the_blocks_see_computes(self):
        """The transformer's own arguments look the same, the stream does not."""

        class Cropping(Net):
            tokens = 6

            def forward(self, hidden_states, timestep):
                return super().forward(hidden_states[:, : self.tokens], timestep)

        torch.manual_seed(1)
        net, x, t = Cropping("single"), latents(), torch.tensor(0.5)
        with dit_cache(net, DitCacheConfig(0, 3, 0, 5)) as cache:
            with timestep_scope(0):
                net(x, t)
            net.tokens = 4
            with timestep_scope(1):
                assert net(x, t).shape[1] == 4
            assert cache.stats.reasons == {"refresh": 1, "shape": 1}
            with timestep_scope(2):
                out = net(x, t)
            assert cache.stats.reasons == {"refresh": 1, "shape": 1, "reuse": 1}
            assert out.shape[1] == 4

    def test_inference_mode_and_no_grad_mixed(self):
        net = make()
        pipe, x, e = Pipe(net), latents(), prompt()
        with dit_cache(pipe, CONFIG):
            with torch.inference_mode():
                first = pipe(x, prompts=[e])
            assert torch.equal(pipe(x, prompts=[e]), first)

    def test_with_gradients_everything_is_computed_and_said(self):
        net, x, e = make(), latents(), prompt()
        with torch.enable_grad(), dit_cache(Pipe(net), CONFIG) as cache:
            with pytest.warns(UserWarning, match="gradients enabled"):
                out = net(x, torch.tensor(0.5), encoder_hidden_states=e)
            out.sum().backward()
            assert cache.stats.reasons == {"gradients": 1}
        assert net.blocks[2].image.weight.grad.abs().sum() > 0


class Boom(Exception):
    pass


class TestInterrupted:
    @pytest.mark.parametrize("step", [0, 1, 3, 4, 7])
    @pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
    @pytest.mark.parametrize("where", ["between steps", "in a block", "between branches"])
    def test_the_next_run_equals_a_fresh_one(self, step, error, where):
        net = make()
        pipe, x, other = Pipe(net), latents(), latents()
        prompts, others = [prompt(), prompt()], [prompt(), prompt()]
        expected, stats = fresh(other, prompts=others)

        def at(now):
            if now == step and where == "between steps":
                raise error

        def block(module, args):
            if pipe.scheduler.step_index in (step, None if step == 0 else step) and where == "in a block":
                raise error

        def after(module, args, output):
            if pipe.scheduler.step_index in (step, None if step == 0 else step) and where == "between branches":
                raise error

        with dit_cache(pipe, CONFIG) as cache:
            hooks = [net.blocks[4].register_forward_pre_hook(block), net.register_forward_hook(after)]
            with pytest.raises(error):
                pipe(x, prompts=prompts, at=at)
            for hook in hooks:
                hook.remove()
            before = cache.stats.reasons
            assert torch.equal(pipe(other, prompts=others), expected)
            done = {key: cache.stats.reasons.get(key, 0) - before.get(key, 0) for key in stats.reasons}
            assert done == stats.reasons

    @pytest.mark.filterwarnings("ignore:.*reused nothing.*")  # told by timestep, a run does not know its length
    @pytest.mark.parametrize("step", [1, 3, 4])
    def test_by_timestep_alone(self, step):
        net, x, e = make(), latents(), prompt()

        def loop(x, stop=None):
            for k in range(8):
                if k == stop:
                    raise Boom
                x = x - net(x, timestep=torch.tensor(1 - k / 8), encoder_hidden_states=e) / 8
            return x

        with dit_cache(net, CONFIG):
            expected = loop(latents_of(7))
        with dit_cache(net, CONFIG):
            with pytest.raises(Boom):
                loop(x, step)
            assert torch.equal(loop(latents_of(7)), expected)

    def test_a_scope_left_by_an_exception_discards_its_run(self):
        net, x, t = make(kind="single"), latents(), torch.tensor(0.5)
        with dit_cache(net, DitCacheConfig(0, 4, 0, 5)) as cache:
            with timestep_scope(0):
                net(x, t)
            with contextlib.suppress(Boom), timestep_scope(1):
                net(x, t)
                raise Boom
            with timestep_scope(2):  # not smaller than the last step, and yet nothing is left to reuse
                net(x, t)
            assert cache.stats.reasons == {"refresh": 1, "reuse": 1, "no anchor": 1}

    def test_a_run_that_starts_later_than_the_last_one_stopped(self):
        """Image-to-image after an interrupted run: the step only goes forward, the scheduler's timesteps are new."""
        net = make(kind="single")
        pipe = Pipe(net)

        def partial(x, begin, end):
            pipe.scheduler.set_timesteps(8)
            pipe.scheduler.begin_index = begin
            for t in pipe.scheduler.timesteps[begin:end]:
                x = x - net(x, timestep=t / 1000) / 8
                pipe.scheduler.step()
            return x

        x = latents()
        with dit_cache(pipe, DitCacheConfig(1, 4, 0, 5)):
            expected = partial(x, 6, 8)
        with dit_cache(pipe, DitCacheConfig(1, 4, 0, 5)) as cache:
            partial(latents(), 0, 6)
            before = cache.stats.reasons.get("no anchor", 0)
            assert torch.equal(partial(x, 6, 8), expected)
            assert cache.stats.reasons["no anchor"] == before + 1


def latents_of(seed):
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))


class TestUseless:
    def test_a_start_beyond_the_run_is_said_at_its_first_call(self):
        pipe = Pipe(make(kind="single"))
        handle = dit_cache(pipe, DitCacheConfig(8, 2, 0, 5))
        with pytest.warns(UserWarning, match="nothing will be reused in a run of 8 steps: warm-up: 8 "):
            pipe(latents())
        handle.remove()

    def test_a_run_without_reuse_is_said_with_numbers(self):
        net, x = make(kind="single"), latents()
        handle = dit_cache(net, DitCacheConfig(5, 2, 0, 5))
        for k in range(4):
            net(x, timestep=torch.tensor(1 - k / 8))
        with pytest.warns(UserWarning, match=r"a run of 4 steps reused nothing \(calls computed for warm-up: 4\)"):
            handle.remove()

    def test_once_only(self, recwarn):
        pipe = Pipe(make(kind="single"))
        with dit_cache(pipe, DitCacheConfig(8, 2, 0, 5)):
            for _ in range(3):
                pipe(latents())
        assert len([w for w in recwarn if "reuse" in str(w.message)]) == 1
