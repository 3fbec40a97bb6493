"""Corrected outputs of models of diffusers: their own container, and compiled ones."""

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from robustness.compilers import Counted, Overwriting, breaks, flux, fresh, inputs, sample
from toys import Ladder

from dithooks import DitCacheConfig, Fitted, Mask, dit_cache, timestep_scope


def config(corrections, mask, weights):
    predictor = Fitted(weights, None, corrections)
    return DitCacheConfig(cache_block_start=1, cache_num_blocks=3, policy=Mask(mask), predictor=predictor)


class Wrapping(Ladder):
    """Returns what it computes as models of diffusers do."""

    def forward(self, h, timestep):
        return Transformer2DModelOutput(sample=super().forward(h, timestep))


def test_an_output_of_diffusers():
    """A new one, whose tensor is the sum by name and by key; that of the model stays as it was."""
    model, plain, x = Wrapping(4), Wrapping(4), torch.ones(1, 3)
    own = []
    model.register_forward_hook(lambda module, args, output: own.append((output, output.sample.clone())))
    given = config((None, (0.5, 0.25), None), (1, 1, 0), (None, None, (1.0,)))
    with torch.no_grad(), dit_cache(model, given, verify=False):
        found, raw = [], []
        for step in range(2):
            time = torch.tensor(1 - step / 3)
            with timestep_scope(step, steps=3):
                found.append(model(x + step, time))
            raw.append(plain(x + step, time).sample)
    assert type(found[1]) is Transformer2DModelOutput
    torch.testing.assert_close(found[0].sample, raw[0])
    torch.testing.assert_close(found[1].sample, 0.5 * raw[1] + 0.25 * raw[0])
    assert found[1]["sample"] is found[1].sample
    assert all(torch.equal(output.sample, before) for output, before in own)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_a_compiled_model(whole):
    """As eager code, by hand from its outputs without corrections, which graphs return in memory of their own."""
    model, given = flux(), inputs()
    mask, weights = (1, 1, 0, 1, 0, 1, 1, 0), (None, None, (1.5, -0.5), None, (0.75, 0.25), None, None, (1.0,))
    corrections = (None, (1.25, -0.25), (0.75, 0.5, -0.25), (1.5, -0.5), (0.5,), (1.0, 0.5, -0.5), None, (0.75, 0.25))
    places = [[0], [1, 0], [2, 1, 0], [3, 1], [4], [5, 3, 1], [6], [7, 6]]
    with dit_cache(model, config(None, mask, weights)):
        raw = sample(model, given).double().numpy()
    expected = [
        sum(w * raw[place] for w, place in zip(chosen or (1.0,), earlier, strict=True))
        for chosen, earlier in zip(corrections, places, strict=True)
    ]
    assert min(abs(expected[step] - raw[step]).max() for step in (1, 2, 3, 4, 5, 7)) > 1e-3
    with fresh(), dit_cache(model, config(corrections, mask, weights)) as cache:
        backend = Overwriting() if whole else Counted()
        if whole:
            model.compile(backend=backend, fullgraph=True)
        else:
            model.compile_repeated_blocks(backend=backend, fullgraph=True)
        for _ in range(2):
            found = sample(model, given).double()
            torch.testing.assert_close(found, torch.from_numpy(np.stack(expected)), rtol=1e-4, atol=1e-4)
        assert cache.stats.reused_calls == 6
        assert not breaks()
        if whole:
            assert backend.graphs == 2
            assert backend.overwritten > 8
