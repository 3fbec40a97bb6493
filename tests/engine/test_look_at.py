"""Which streams a policy looks at: those that become outputs of the model, or those that the user names."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from toys import Net, latents

from dithooks import Budget, DitCacheConfig, EasyCache, Interval, Threshold, dit_cache, profile, timestep_scope
from dithooks.blocks.observation import Observation, observed_blocks
from dithooks.blocks.registry import chains_of
from dithooks.blocks.tap import tap
from dithooks.blocks.wiring import resolve
from dithooks.tiny import build

STEPS, WIDTH = 14, 6
VIDEO, AUDIO = "hidden_states", "audio_hidden_states"


class Pair(nn.Module):
    """Both streams, each of its own."""

    def __init__(self):
        super().__init__()
        self.video, self.audio = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, audio_hidden_states, temb):
        video = hidden_states + torch.tanh(self.video(hidden_states))
        return video, audio_hidden_states + torch.tanh(self.audio(audio_hidden_states))


class Film(nn.Module):
    """Video and audio in, and what ``returns`` names out: in one tuple, or in the video's form of an image."""

    def __init__(self, returns="both"):
        super().__init__()
        self.returns, self.blocks = returns, nn.ModuleList(Pair() for _ in range(4))

    def forward(self, hidden_states, audio_hidden_states, temb=None):
        video, audio = hidden_states, audio_hidden_states
        for block in self.blocks:
            video, audio = block(video, audio, temb)
        return {
            "both": (video, audio),
            "images": (video.unflatten(1, (2, -1)), audio.transpose(1, 2)),  # of another form than the streams
            "video": (video,),
            "video and a number": (video, audio.mean()),
            "a list": [video[0], audio[0]],
        }[self.returns]


def inputs(seed=0, quiet=0.01, loud=0.2):
    """Of each step: video that hardly moves, and audio that moves by more now and then."""
    draw = torch.Generator().manual_seed(seed)
    video, audio = torch.randn(1, 10, WIDTH, generator=draw), torch.randn(1, 5, WIDTH, generator=draw)
    made = []
    for step in range(STEPS):
        video = video + quiet * torch.randn(video.shape, generator=draw)
        audio = audio + (loud if step % 5 == 4 else quiet) * torch.randn(audio.shape, generator=draw)
        made.append((video, audio))
    return made


@torch.no_grad()
def sample(model, given):
    for step, (video, audio) in enumerate(given):
        with timestep_scope(step, sigma=1 - step / STEPS, steps=STEPS, branch=0):
            model(video, audio)


def decisions(model, given, policy, **settings):
    with dit_cache(model, DitCacheConfig(policy=policy, **settings)) as cache:
        sample(model, given)
        return cache.decisions


def change(now, before):
    return float((now - before).abs().mean() / before.abs().mean())


def by_hand(seen, limit, streams):
    """(reuse, value) by step of a threshold on the largest change of some streams since the last computed step."""
    told, reference = [(False, None)], seen[0]
    for now in seen[1:]:
        value = max(change(now[n], reference[n]) for n in streams)
        told.append((value < limit, value))
        reference = reference if value < limit else now
    return told


def assert_told(made, wanted):
    assert [each.reuse for each in made] == [reuse for reuse, _ in wanted]
    for each, (_, value) in zip(made, wanted, strict=True):
        assert each.value == (None if value is None else pytest.approx(value, rel=1e-4))


def work_of_first_block(model, given):
    made = [model.blocks[0](video, audio, None) for video, audio in given]
    return [
        tuple((o - i).detach() for o, i in zip(out, into, strict=True)) for out, into in zip(made, given, strict=True)
    ]


@pytest.mark.parametrize(
    ("returns", "look_at", "streams"),
    [
        ("both", None, (0, 1)),
        ("images", None, (0, 1)),  # which stream an output is made of does not show, so each counts
        ("video", None, (0,)),
        ("video and a number", None, (0,)),
        ("a list", None, (0,)),
        ("both", (VIDEO,), (0,)),
        ("both", (AUDIO,), (1,)),
        ("video", (AUDIO,), (1,)),
        ("video", (AUDIO, VIDEO), (0, 1)),
    ],
)
@pytest.mark.parametrize("start", [0, 1])
def test_the_stream_that_changes_most_decides(returns, look_at, streams, start):
    model, given, policy = Film(returns), inputs(), Threshold(0.08, max_warmup_steps=1)
    made = decisions(model, given, policy, cache_block_start=start, look_at=look_at)
    seen = given if start == 0 else work_of_first_block(model, given)
    wanted = by_hand(seen, 0.08, streams)
    assert_told(made, wanted)
    assert {reuse for reuse, _ in wanted[1:]} == {True, False} or 1 not in streams


def test_a_compiled_model():
    """Its blocks are observed in a call of their own, whose outputs count."""
    model, given = Film(), inputs()
    model.compile(backend="eager")
    assert_told(decisions(model, given, Threshold(0.08, max_warmup_steps=1)), by_hand(given, 0.08, (0, 1)))


def test_each_stream_is_measured_against_itself():
    """Audio a thousand times as small moves as much of itself."""
    given = [(video, audio / 1000) for video, audio in inputs()]
    made = decisions(Film(), given, Threshold(0.08, max_warmup_steps=1))
    assert_told(made, by_hand(given, 0.08, (0, 1)))


@pytest.mark.parametrize("start", [0, 1])
def test_a_stream_that_stands_still_leaves_the_others_to_decide(start):
    """Silence is neither a change nor a number that is none."""
    given = [(video, torch.zeros_like(audio)) for video, audio in inputs(quiet=0.05)]
    model = Film()
    for block in model.blocks:
        nn.init.zeros_(block.audio.bias)
    made = decisions(model, given, Threshold(0.08, max_warmup_steps=1), cache_block_start=start)
    wanted = by_hand(given if start == 0 else work_of_first_block(model, given), 0.08, (0,))
    assert_told(made, wanted)
    assert {reuse for reuse, _ in wanted[1:]} == {True, False}
    standing = [(video, given[0][1] + 1.0) for video, _ in given]  # a rate is nothing of what does not move
    made = decisions(Film(), standing, EasyCache(0.5, max_warmup_steps=2))
    assert {"reuse"} <= {each.reason for each in made} <= {"warm-up", "reuse", "threshold"}


def test_easycache_adds_up_the_largest_expected_change():
    """By hand of what enters and leaves the range, whose blocks do the same at every step."""
    model, given = Film(), inputs()
    with torch.no_grad():
        left = [model(*each) for each in given]
    made = decisions(model, given, EasyCache(0.1, max_warmup_steps=2))
    computed, total, wanted = [0, 1], 0.0, [(False, None)] * 2
    for t in range(2, STEPS):
        r, s = computed[-2:]

        def expected(n, t=t, r=r, s=s):
            rate = (left[s][n] - left[r][n]).abs().mean() / (given[s][n] - given[r][n]).abs().mean()
            return float(rate * (given[t][n] - given[t - 1][n]).abs().mean() / left[s][n].abs().mean())

        value = max(map(expected, (0, 1)))
        reuse = total + value < 0.1
        total = total + value if reuse else 0.0
        computed += [] if reuse else [t]
        wanted.append((reuse, value))
    assert_told(made, wanted)
    assert {reuse for reuse, _ in wanted} == {True, False}


def test_a_profile_tells_what_the_policy_sees():
    """Its changes are those of the stream that changes most; its ratios are one stream's, the one that moves most."""
    model, given = Film(), inputs()
    config = DitCacheConfig(policy=Threshold(0.08, max_warmup_steps=1))
    (found,) = profile(model, lambda: sample(model, given), config).of()
    wanted = [max(change(now[n], before[n]) for n in (0, 1)) for before, now in pairwise(given)]
    assert found.changes == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        sizes = [(model(*each)[1] - each[1]).norm() for each in given]
    ratios = [1.0, *(float(now / before) for before, now in pairwise(sizes))]
    assert found.ratios == pytest.approx(ratios, rel=1e-4)
    (video,) = profile(model, lambda: sample(model, given), DitCacheConfig(policy=config.when, look_at=(VIDEO,))).of()
    assert video.changes == pytest.approx([change(b[0], a[0]) for a, b in pairwise(given)], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "looked_at"),
    [
        ("LTX2VideoTransformer3DModel", (VIDEO, AUDIO)),
        ("Kandinsky6Transformer3DModel", ("vis", "aud")),
        ("FluxTransformer2DModel", (VIDEO,)),
        ("FluxControlNetModel", (VIDEO,)),  # returns a list of each block's
        ("SD3Transformer2DModel", (VIDEO,)),
        ("CogVideoXTransformer3DModel", (VIDEO,)),
        ("Cosmos3OmniTransformer", ("und_seq", "gen_seq")),  # none is called hidden_states
    ],
)
def test_models_of_diffusers(name, looked_at):
    """Every range of one block and all before it; text that goes on beside the picture is not looked at."""
    model, given = build(name)
    chain = chains_of(model, None)[0][0]
    observation = Observation(observed_blocks(chain))
    with torch.no_grad(), tap([ref.block for ref in chain.block_refs], observation.enter, observation.leave):
        output = model(**given())
    observation.end(output)
    for end in range(len(chain.block_refs)):
        wiring = resolve(observation, range(len(chain.block_refs)), 0, end)
        assert tuple(wiring.entry[number] for number in wiring.measured) == looked_at


class TestRefused:
    def test_no_argument_of_a_block(self):
        """Before anything is touched, and with what there is."""
        model = Film()
        config = DitCacheConfig(policy=Threshold(0.1), look_at=("sound",))
        with pytest.raises(
            ValueError, match=r"'sound' is an argument of no block .*hidden_states, audio_hidden_states, t"
        ):
            dit_cache(model, config)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        with dit_cache(model, DitCacheConfig(policy=Interval(1, 2), look_at=("sound",))):  # does not look
            pass

    @pytest.mark.parametrize(("start", "where"), [(0, "the range"), (1, "the blocks before the range")])
    def test_no_stream(self, start, where):
        """An argument, but no stream: the first call shows it."""
        net = Net()
        config = DitCacheConfig(policy=Threshold(0.1), cache_block_start=start, look_at=("hidden_states", "temb"))
        with (
            torch.no_grad(),
            dit_cache(net, config),
            pytest.raises(ValueError, match=rf"'temb' is no stream of {where} of Net: there are 'hidden_states'"),
        ):
            net(latents(), torch.tensor(1.0))

    @pytest.mark.parametrize(
        ("look_at", "error", "match"),
        [
            ("hidden_states", TypeError, "look_at must be a tuple of streams' names"),
            ((1,), TypeError, "look_at must be a tuple of streams' names"),
            ((), ValueError, "at least one"),
            (("h", "h"), ValueError, "name each stream once"),
        ],
    )
    def test_what_is_no_list_of_names(self, look_at, error, match):
        with pytest.raises(error, match=match):
            DitCacheConfig(policy=Budget(2.0), look_at=look_at)


def test_it_is_saved_with_the_configuration():
    """And left out where it is not given, so that earlier versions read the file."""
    config = DitCacheConfig(policy=Threshold(0.1), look_at=[VIDEO, AUDIO], overrides={"a": {"look_at": [AUDIO]}})
    assert DitCacheConfig.from_json(config.to_json()) == config
    assert (config.look_at, config.overridden("a").look_at) == ((VIDEO, AUDIO), (AUDIO,))
    assert "look_at" not in DitCacheConfig(policy=Threshold(0.1)).to_json()
