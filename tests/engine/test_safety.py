"""What once went wrong, or nearly: residuals of other pictures and prompts, outputs used on the side."""

import warnings

import pytest
import torch
from toys import Net, latents, loop, prompt

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.engine import branches

pytestmark = pytest.mark.core

EVERY_OTHER = DitCacheConfig(0, 2, 0, 5)


class TestAnotherPictureAtTheSameStep:
    """A run broken off at the step where the next one starts looks like one more call of that step."""

    @pytest.mark.parametrize("scoped", [False, True])
    @pytest.mark.parametrize("before", [1, 2, 3])
    @pytest.mark.parametrize("prompts", ["none", "same", "other", "copied"])
    def test_is_a_run_of_its_own(self, scoped, before, prompts):
        net = Net("single" if prompts == "none" else "swapped")
        first, second = prompt(), prompt()
        x, other = latents(), latents() * 5

        def embedded(e):
            return {} if prompts == "none" else {"encoder_hidden_states": e.clone() if prompts == "copied" else e}

        def go(x, e, stop=4):
            for k in range(stop):
                with timestep_scope(k) if scoped else warnings.catch_warnings():
                    x = x - net(x, torch.tensor(1 - k / 4), **embedded(e)) / 4
            return x

        mine = first if prompts == "same" else second
        with dit_cache(net, EVERY_OTHER):
            expected = go(x, mine)
        with dit_cache(net, EVERY_OTHER) as cache:
            go(other, first, stop=before)
            cache_before = cache.stats.reused_calls
            assert torch.equal(go(x, mine), expected)
            assert cache.stats.reused_calls > cache_before

    def test_a_jump_forward_starts_anew(self):
        net, x = Net("single"), latents()
        with dit_cache(net, EVERY_OTHER) as cache:
            loop(net, latents(), steps=2, scoped=True)
            loop(net, x, steps=6, begin=3, scoped=True)
            assert cache.stats.reasons == {"refresh": 2, "reuse": 2, "no anchor": 1}

    def test_two_calls_on_the_same_latents_are_branches(self):
        """Perturbed attention guidance: the same prompt and latents twice per step."""
        net, x, e = Net("swapped"), latents(), prompt()
        with dit_cache(net, EVERY_OTHER) as cache:
            for k in range(4):
                for _ in range(2):
                    net(x, torch.tensor(1 - k / 4), encoder_hidden_states=e)
                x = x + 0.1
            assert cache.stats.reasons == {"refresh": 4, "reuse": 4}


class TestConditioning:
    @pytest.mark.parametrize("form", ["same object", "copied", "view"])
    @pytest.mark.parametrize("guided", [range(1, 6), range(0, 3), range(2, 4)])
    def test_uncond_first_on_some_steps(self, form, guided):
        net, x, pair = Net("swapped"), latents(), torch.cat([prompt(), prompt()])

        def embedded(part):
            e = pair[2 * part : 2 * part + 2]
            return {"same object": halves[part], "copied": e.clone(), "view": e}[form]

        def go(named):
            outs = []
            for k in range(6):
                for part in (1, 0) if k in guided else (0,):
                    with timestep_scope(k, branch=part if named else None):
                        outs.append(net(x + k, torch.tensor(1 - k / 6), encoder_hidden_states=embedded(part)))
            return outs

        halves = [pair[:2], pair[2:]]
        with dit_cache(net, EVERY_OTHER) as cache:
            expected = go(True)
            reasons = cache.stats.reasons
        with dit_cache(net, EVERY_OTHER) as cache:
            got = go(False)
            assert cache.stats.reasons == reasons
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_known_prompts_are_not_compared_by_value(self, monkeypatch):
        """Comparing waits for the device: only at the second step, where runs may have been broken off unseen."""
        net, x, cond, uncond = Net("swapped"), latents(), prompt(), prompt()
        compared, real = [], branches.distance
        monkeypatch.setattr(branches, "distance", lambda a, b: compared.append(1) or real(a, b))
        with dit_cache(net, EVERY_OTHER) as cache:
            for k in range(6):
                for e in (cond, uncond):
                    net(x + k, torch.tensor(1 - k / 6), encoder_hidden_states=e)
            assert cache.stats.reused_calls == 6
        assert len(compared) <= 2

    def test_what_changes_at_every_step_does_not_stop_the_cache(self):
        net, x = Net("single"), latents()
        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
            for k in range(10):
                net(x, torch.tensor(1 - k / 10), control=torch.randn(2, 6, 8))
            # once and twice strange: computed; from then on known to change
            assert cache.stats.reused_calls >= 4

    def test_prompts_in_lists_count(self):
        class Listed(Net):
            def forward(self, hidden_states, timestep, prompts):
                return super().forward(hidden_states, timestep, prompts["texts"][0])

        net, x, first, second = Listed("swapped"), latents(), prompt(), prompt()
        with dit_cache(net, EVERY_OTHER) as cache:
            for k, e in enumerate([first, first, first, second]):
                out = net(x, torch.tensor(1 - k / 4), {"texts": [e.clone()]})
            assert cache.stats.reasons == {"refresh": 2, "reuse": 1, "no anchor": 1}
        assert torch.equal(out, net(x, torch.tensor(0.25), {"texts": [second]}))

    def test_memory_does_not_grow_with_changing_prompts(self):
        net, x = Net("swapped"), latents()
        with dit_cache(net, DitCacheConfig(0, 3, 0, 5)) as cache:
            held = set()
            for k in range(60):
                if k % 3 == 0:
                    e = prompt()
                net(x, torch.tensor(1 - k / 60), encoder_hidden_states=e)
                held.add(cache.stats.bytes_held)
            (run,) = cache._attached[0].cache.decider._runs.values()
            assert len(run.branches) <= 17
            assert max(held) <= 2 * min(held - {0})


class TestSideOutputs:
    """Blocks whose outputs are used elsewhere: a residual of the range is not all of what they do."""

    def refuse(self, net, same=True, **kwargs):
        x, t = latents(), torch.tensor(0.5)
        plain = net(x, t)
        with (
            dit_cache(net, DitCacheConfig(0, 2, 0, 4), **kwargs),
            pytest.raises(ValueError, match=r"comes out .* off \(relative L2\): the model uses more of these blocks"),
        ):
            net(x, t)
        assert same is None or torch.equal(net(x, t), plain)
        with dit_cache(net, DitCacheConfig(0, 2, 0, 4), verify=False, **kwargs) as cache:
            loop(net, x)
            assert cache.stats.reused_calls == 2

    def test_collected_as_a_controlnet_does(self):
        class Collecting(Net):
            def forward(self, hidden_states, timestep):
                h, outs = self.embed(hidden_states), []
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for block in self.blocks:
                    h = block(h, temb)
                    outs.append(h)
                return self.proj(sum(outs))

        self.refuse(Collecting())

    def test_collected_by_layers_that_are_zeros_at_first(self):
        """As a ControlNet's before it is trained: its first output shows nothing, so the next one has to."""

        class Collecting(Net):
            gain = 0.0

            def forward(self, hidden_states, timestep):
                h, outs = self.embed(hidden_states), []
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for block in self.blocks:
                    h = block(h, temb)
                    outs.append(h)
                return self.gain * self.proj(sum(outs))

        net, x = Collecting(), latents()
        with dit_cache(net, DitCacheConfig(0, 2, 0, 4)) as cache:
            loop(net, x)
            assert cache.stats.reused_calls == 2
            net.gain = 1.0
            with pytest.raises(ValueError, match="the model uses more of these blocks"):
                net(x, torch.tensor(0.5))

    def test_a_model_that_is_zeros_at_first(self):
        """It is tested at each computed step until there is something to see, then once more, and no more."""

        class Zeros(Net):
            gain = 0.0

            def forward(self, hidden_states, timestep):
                return self.gain * super().forward(hidden_states, timestep)

        net, x, executions = Zeros("single"), latents(), []
        with dit_cache(net, DitCacheConfig(0, 2, 1, 3)) as cache:
            for gain in (0.0, 1.0, 1.0):
                net.gain = gain
                loop(net, x)
                executions.append(net.executions)
            assert cache.stats.reused_calls == 6
        once = 2 * 5 + 2 * 2  # two computed, two reused; a test is of blocks 0 and 4
        assert executions == [once + 2 * 2, 2 * once + 3 * 2, 3 * once + 3 * 2]

    def test_several_passes_in_one_call(self):
        class Recycling(Net):
            def forward(self, hidden_states, timestep):
                h = self.embed(hidden_states)
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for _ in range(2):
                    for block in self.blocks:
                        h = block(h, temb)
                return self.proj(h)

        net, x, t = Recycling(), latents(), torch.tensor(0.5)
        with (
            dit_cache(net, DitCacheConfig(0, 2, 0, 4)),
            pytest.raises(ValueError, match=r"blocks\.0 runs several times"),
        ):
            net(x, t)
        with dit_cache(net, DitCacheConfig(0, 2, 0, 4), verify=False) as cache:  # its passes are branches of a step
            loop(net, x)
            assert cache.stats.reasons == {"refresh": 4, "reuse": 4}

    def test_a_model_that_is_not_deterministic(self):
        class Noisy(Net):
            def forward(self, hidden_states, timestep):
                return super().forward(hidden_states, timestep) + torch.randn(())

        self.refuse(Noisy(), same=None)

    def test_the_test_is_once_per_handle_and_skips_the_range(self):
        net, x = Net("single"), latents()
        with dit_cache(net, DitCacheConfig(0, 2, 1, 3)):
            loop(net, x)
            assert net.executions == 2 * 5 + 2 * 2 + 2  # two computed, two reused, and blocks 0 and 4 once more
            loop(net, x)
            assert net.executions == 2 * (2 * 5 + 2 * 2) + 2

    def test_arguments_that_may_remember_are_not_replayed(self):
        class Cache:
            calls = 0

        class Remembering(Net):
            def forward(self, hidden_states, timestep, kv):
                kv.calls += 1
                return super().forward(hidden_states, timestep)

        net, kv = Remembering(), Cache()
        with dit_cache(net, EVERY_OTHER) as cache:
            loop(net, latents(), kv=kv)
            assert (kv.calls, cache.stats.reused_calls) == (4, 2)
