"""Every transformer class of diffusers, tiny, without registration: which blocks are found, and which ranges work.

Blocks are never named, and what is refused is listed here with its reason: nothing may join or leave that list unseen.
"""

import importlib
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conformance import Subject, attempt, distance, flatten, mapped, same
from torch import nn

from dithooks.tiny import names

diffusers = pytest.importorskip("diffusers")

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
PINNED = f"diffusers=={version('diffusers')}" in CONSTRAINTS.split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning"),
]

ROUNDING = 1e-5  # float32: an addition here and there is made in another order
NOTICED = 1e-3  # what any mistake exceeds by far: see the test that leaves the residual out

# The lists of each trunk, in the order of their first blocks, and their lengths.
LAYOUTS = {
    "blocks:4": """
        AnimaTextConditioner AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel ChronoEditTransformer3DModel
        HeliosTransformer3DModel HunyuanDiT2DControlNetModel LongCatAudioDiTTransformer PRXTransformer2DModel
        SanaWMTransformer3DModel SkyReelsV2Transformer3DModel WanAnimate2Transformer3DModel
        WanAnimateTransformer3DModel WanTransformer3DModel WanTransformer3DModel#i2v WanTransformer3DModel#ti2v""",
    "blocks:6": "HunyuanDiT2DModel HunyuanDiT2DModel#controlnet",
    "blocks:9": "WanVACETransformer3DModel",
    "decoders:4": "T5FilmDecoder",
    "double_blocks:4": "JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel",
    "layers:4": """
        AceStepTransformer1DModel Cosmos3OmniTransformer ErnieImageTransformer2DModel Ideogram4Transformer2DModel
        LuminaNextDiT2DModel MiniMaxMusic3RVQDepthDecoder OmniGenTransformer2DModel""",
    "layers:5": """
        BriaFibo2Transformer2DModel Lumina2Transformer2DModel ZImageTransformer2DModel
        ZImageTransformer2DModel#controlnet""",
    "single_transformer_blocks:5": "Flux3Transformer2DModel",
    "transformer_blocks:4": """
        AllegroTransformer3DModel CogVideoXTransformer3DModel CogVideoXTransformer3DModel#v1.5
        CogView3PlusTransformer2DModel CogView4Transformer2DModel ConsisIDTransformer3DModel CosmosTransformer3DModel
        CosmosTransformer3DModel#controlnet CosmosTransformer3DModel#v2w DiTTransformer2DModel
        DreamLiteTransformer2DModel EasyAnimateTransformer3DModel GlmImageTransformer2DModel
        HunyuanVideo15Transformer3DModel Krea2Transformer2DModel LTX2VideoTransformer3DModel LTXVideoTransformer3DModel
        MiniMaxH3Transformer3DModel MiniMaxMusic3Transformer1DModel MochiTransformer3DModel
        NucleusMoEImageTransformer2DModel PixArtTransformer2DModel PriorTransformer QwenImage21Transformer2DModel
        QwenImageControlNetModel QwenImageTransformer2DModel QwenImageTransformer2DModel#controlnet
        SD3ControlNetModel SD3Transformer2DModel SD3Transformer2DModel#controlnet SD3Transformer2DModel#sd35
        SD3Transformer2DModel#skip_layers SanaControlNetModel SanaTransformer2DModel SanaTransformer2DModel#controlnet
        SanaVideoTransformer3DModel SanaWMLTX2RefinerTransformer3DModel StableAudio3DiTModel StableAudioDiTModel
        Transformer2DModel Transformer2DModel#ada_zero_patch Transformer2DModel#vectorized TransformerTemporalModel""",
    "transformer_in_blocks:4": "UTransformer2DModel",
    "transformer_layers:4": "RFD4ProteinaTransformer RFD4ProteinaTransformer#single_pass UVit2DModel",
    "visual_transformer_blocks:4": "Kandinsky6SRTransformer3DModel",
    "visual_transformer_blocks:5": """
        Kandinsky5Transformer3DModel Kandinsky6Transformer3DModel Kandinsky6Transformer3DModel#video_only""",
    "double_stream_blocks:4 + single_stream_blocks:4": "HiDreamImageTransformer2DModel",
    "joint_transformer_blocks:4 + single_transformer_blocks:4": "AuraFlowTransformer2DModel",
    "mode_blocks.image:4 + mode_blocks.image_cond:4 + single_transformer_blocks:4": """
        Flux3Transformer2DModel#image_cond""",
    "transformer_blocks:4 + single_transformer_blocks:4": """
        BriaFiboTransformer2DModel BriaTransformer2DModel BriaTransformer2DModel#controlnet ChromaTransformer2DModel
        ChromaTransformer2DModel#controlnet Flux2Transformer2DModel Flux2Transformer2DModel#kv_inputs
        FluxControlNetModel FluxTransformer2DModel FluxTransformer2DModel#controlnet HunyuanImageTransformer2DModel
        HunyuanVideoFramepackTransformer3DModel HunyuanVideoTransformer3DModel HunyuanVideoTransformer3DModel#i2v
        HunyuanVideoTransformer3DModel#token_replace LongCatImageTransformer2DModel MotifVideoTransformer3DModel
        MotifVideoTransformer3DModel#decoder OvisImageTransformer2DModel""",
    "transformer_blocks:4 + temporal_transformer_blocks:4": """
        LatteTransformer3DModel LatteTransformer3DModel#multiframe TransformerSpatioTemporalModel""",
    "transformers.0.transformer_blocks:4 | transformers.1.transformer_blocks:4": "DualTransformer2DModel",
}
TRUNKS = {name: layout for layout, listed in LAYOUTS.items() for name in listed.split()}

# Which ranges, by their first and last block, the first call refuses, and why.
COLLECTED = r"comes out [\d.]+ off \(relative L2\): the model uses more of these blocks than what leaves the last one"

CONTROLNET = "is a ControlNet: what each of its blocks returns is an output of its own"


def several(first, last):
    return first < last


def passes_a_long_skip(first, last):
    """The first two blocks also go to the last two."""
    return first < last < 5 - first


REFUSED = {
    "Flux3Transformer2DModel#image_cond": (  # streams of one list are no streams of the next
        lambda first, last: first // 4 != last // 4,
        r"the stream (encoder_)?hidden_states \[.*\] float32 is lost",
    ),
    "FluxControlNetModel": (lambda *_: True, CONTROLNET),
    "HunyuanDiT2DControlNetModel": (lambda *_: True, CONTROLNET),
    "HunyuanDiT2DModel": (
        passes_a_long_skip,
        r"an output of blocks\.[01] goes to blocks\.[45] \(skip=\), past the end",
    ),
    "HunyuanDiT2DModel#controlnet": (passes_a_long_skip, COLLECTED),  # what is skipped to gets a residual first
    "MotifVideoTransformer3DModel#decoder": (  # its last blocks work on a copy of what entered the first
        lambda first, last: first < 6 <= last,
        r"the model does more to hidden_states than was recognised",
    ),
    "QwenImageControlNetModel": (lambda *_: True, CONTROLNET),
    "RFD4ProteinaTransformer": (lambda *_: True, r"transformer_layers\.\d runs several times in one call"),
    "RFD4ProteinaTransformer#single_pass": (lambda first, last: first == 0 < last < 3, COLLECTED),  # pairs, in between
    "SD3ControlNetModel": (lambda *_: True, CONTROLNET),
    "SanaControlNetModel": (lambda *_: True, CONTROLNET),
    "TransformerSpatioTemporalModel": (  # each temporal block's output is mixed with what entered it
        lambda first, last: first < last and last % 2 == 1,
        COLLECTED,
    ),
    "UTransformer2DModel": (several, COLLECTED),
}
# Ranges with a block that the call leaves out: always computed.
NEVER = {"SD3Transformer2DModel#skip_layers": lambda first, last: first <= 1 <= last}

# Where the main input acts through the range's blocks alone: on the prompt's attention, on a last token.
DEAF = {"AnimaTextConditioner": [(0, 4)], "PriorTransformer": [(0, 4)]}

# Where the blocks do not run list by list, or not all lists are the trunk: the first call shows it, and is made again.
ELSEWHERE = (
    "Flux3Transformer2DModel",
    "LatteTransformer3DModel",
    "LatteTransformer3DModel#multiframe",
    "TransformerSpatioTemporalModel",
)

# Blocks that do not just add to their stream: they merge a long skip into it, or normalise the sum.
NOT_RESIDUAL = ("HunyuanDiT2DModel", "HunyuanDiT2DModel#controlnet", "UTransformer2DModel")
# Modules between blocks that add what depends on the inputs.
BETWEEN = {"WanAnimateTransformer3DModel": ["face_adapter"], "WanVACETransformer3DModel": ["vace_blocks"]}
# Blocks that add a conditioning as it is given, or a ControlNet's residual: what steers them has to stay.
STEERED = {
    "CosmosTransformer3DModel#controlnet": ["control"],
    "LongCatAudioDiTTransformer": ["encoder"],
    "StableAudio3DiTModel": ["timestep", "global"],
}


def expected(name, start, count):
    first, last = start, start + count - 1
    if name in REFUSED and REFUSED[name][0](first, last):
        return "refused"
    return "never" if name in NEVER and NEVER[name](first, last) else "exact"


def made(name):
    """With another version of diffusers, only of the classes it has."""
    try:
        return Subject(name, TRUNKS[name])
    except (AttributeError, ModuleNotFoundError):
        if PINNED:
            raise
        pytest.skip(f"diffusers {diffusers.__version__} has no such class")


def some_ranges(subject):
    """Whole, two in the middle and single blocks, of those that are reused."""
    size, half = subject.size, subject.size // 2
    ranges = [(0, size), (half - 1, 2), (half, 1), (size - 1, 1)]
    return [found for found in ranges if expected(subject.name, *found) == "exact"]


class TestTable:
    def test_every_variant_is_in_it_once(self):
        assert sorted(name for listed in LAYOUTS.values() for name in listed.split()) == sorted(names())
        assert {*REFUSED, *NEVER, *DEAF, *ELSEWHERE, *NOT_RESIDUAL, *BETWEEN, *STEERED} <= set(names())

    def test_every_exported_transformer_is_in_it(self):
        found = vars(importlib.import_module("diffusers.models.transformers")).items()
        classes = {name for name, cls in found if isinstance(cls, type) and issubclass(cls, nn.Module)}
        classes = {name for name in classes if hasattr(diffusers, name)}
        assert len(classes) > 40
        missing = classes - {name.partition("#")[0] for name in TRUNKS}
        if missing and not PINNED:
            pytest.skip(f"diffusers {diffusers.__version__} has more classes: {sorted(missing)}")
        assert not missing

    def test_how_many_classes_are_refused_in_part(self):
        everything = {name.partition("#")[0] for name in TRUNKS}
        refused = {name.partition("#")[0] for name in REFUSED}
        assert (len(TRUNKS), len(everything), len(refused)) == (110, 85, 11)


@pytest.fixture(scope="module", params=names())
def subject(request):
    return made(request.param)


@pytest.fixture(scope="module")
def trials(subject):
    return [attempt(subject, *found) for found in subject.ranges()]


@pytest.fixture
def exact(subject, trials):
    """The trials that reused; where all are refused, there is nothing to test."""
    found = [trial for trial in trials if trial.status == "exact"]
    if not found and all(expected(subject.name, *trial.range) == "refused" for trial in trials):
        pytest.skip("all ranges are refused")
    return found


class TestRanges:
    """Nothing is refused, and nothing left uncached, but what the table says; and the trunk is as long as it says."""

    def test_what_becomes_of_each_is_in_the_table(self, subject, trials):
        assert {t.range: t.status for t in trials} == {t.range: expected(subject.name, *t.range) for t in trials}

    def test_the_table_lists_no_exception_that_is_none(self, subject, trials):
        statuses = {trial.status for trial in trials}
        assert ("refused" in statuses) == (subject.name in REFUSED)
        assert ("never" in statuses) == (subject.name in NEVER)

    def test_a_refusal_is_a_value_error_with_the_reason(self, subject, trials):
        for trial in trials:
            if trial.error is not None:
                assert isinstance(trial.error, ValueError), trial.range
                assert re.search(REFUSED[subject.name][1], str(trial.error)), trial.range

    def test_there_is_no_block_past_the_last(self, subject):
        if "ControlNetModel" in subject.name:
            pytest.skip("refused whatever the range")
        with pytest.raises(ValueError, match="past the end"), subject.attach(subject.size, 1):
            subject.step(0)


class TestSteps:
    """Computed steps are the plain model's; reused ones do without the range, and only without it."""

    def test_a_computed_step_is_bit_identical(self, subject, trials):
        computed = [trial for trial in trials if trial.status != "refused"]
        assert not [trial.range for trial in computed if not same(trial.computed, subject.plain)]

    def test_a_range_that_is_never_reused_is_bit_identical(self, subject, trials):
        never = [trial for trial in trials if trial.status == "never"]
        assert not [trial.range for trial in never if not same(trial.reused, subject.plain)]

    def test_a_reused_step_with_the_same_inputs_gives_the_same(self, subject, exact):
        errors = {trial.range: distance(trial.reused, subject.plain) for trial in exact}
        assert not {found: error for found, error in errors.items() if error > ROUNDING}

    def test_without_the_residual_it_would_not(self, subject, exact):
        errors = {trial.range: distance(trial.without, subject.plain) for trial in exact}
        assert not {found: error for found, error in errors.items() if error < NOTICED}

    def test_another_main_input_counts_on_a_reused_step(self, subject, exact):
        deaf = [trial.range for trial in exact if distance(trial.changed, trial.reused) < NOTICED]
        assert deaf == DEAF.get(subject.name, [])

    def test_the_blocks_of_the_range_do_not_run_and_all_others_do(self, subject, exact):
        for trial in exact:
            skipped = subject.skipped(*trial.range)
            assert len(skipped) >= trial.count
            assert trial.runs == {path: n for path, n in subject.usual.items() if path not in skipped}, trial.range

    def test_computed_steps_run_each_block_as_often_as_without_a_cache(self, subject, exact):
        start, count = max((trial.range for trial in exact), key=lambda found: found[1])
        with subject.attach(start, count, interval=2, verify=False):
            subject.step(0)
            first = Counter(subject.runs)
            subject.step(1)
            again = subject.step(2)
        assert same(again, subject.plain)
        assert subject.runs == subject.usual
        assert first == Counter({path: n * (1 + (subject.name in ELSEWHERE)) for path, n in subject.usual.items()})

    def test_the_counts_are_right(self, subject, exact):
        transformers = len(subject.orders)
        for trial in exact:
            assert trial.reused_calls == 3 * transformers, trial.range
            assert trial.blocks_total == 4 * transformers * subject.size, trial.range


class TestModel:
    """What else can be seen of the model."""

    def test_the_state_dict_is_as_before_while_attached(self, subject, trials):
        keys = list(subject.model.state_dict())
        assert not [trial.range for trial in trials if trial.keys != keys]

    def test_removal_leaves_the_modules_as_they_were(self, trials):
        assert not {trial.range: trial.left for trial in trials if trial.left}

    def test_after_all_that_it_is_the_plain_model(self, subject, trials):
        assert same(subject.call(), subject.plain)
        assert subject.runs == subject.usual


@pytest.mark.parametrize("name", [name for name in names() if name not in NOT_RESIDUAL])
def test_a_reused_step_works_on_its_own_inputs(name):
    """Blocks whose residual depends on nothing: from any inputs, the reused step has to give what the model gives.

    A ControlNet's residuals count as well, wherever they are added.
    """
    subject = made(name)
    flatten(subject, *BETWEEN.get(name, []))
    for start, count in some_ranges(subject):
        kept = STEERED.get(name, [])
        other = subject.call(**subject.changed(*kept))
        with subject.attach(start, count) as cache:
            subject.step(0)
            reused = subject.step(1, **subject.changed(*kept))
            assert cache.stats.reused_calls == len(subject.orders)
        assert distance(reused, other) < ROUNDING, (start, count)


@pytest.mark.parametrize("name", [name for name in names() if name.endswith("#controlnet")])
def test_a_changed_controlnet_counts_on_a_reused_step(name):
    """Its residuals are added before the range or after it, if not within."""
    subject = made(name)
    half = subject.size // 2
    for start, count in [(0, half), (half, 1), (subject.size - 1, 1)]:
        if expected(name, start, count) == "refused":
            continue
        with subject.attach(start, count) as cache:
            subject.step(0)
            before = subject.step(1)
            after = subject.step(2, **{key: value for key, value in subject.inputs(1).items() if "control" in key})
            assert cache.stats.reused_calls == 2
        assert distance(after, before) > NOTICED, (start, count)


def batched(inputs):
    """Everything twice; positions that have no batch as they are."""
    flat = [key for key, value in inputs.items() if key.endswith("_ids") and value.ndim == 2]
    if isinstance(inputs.get("x"), list):
        return {key: value * 2 if isinstance(value, list) else value.repeat(2) for key, value in inputs.items()}
    twice = mapped(inputs, lambda value: value.repeat_interleave(2, 0))
    if "encoder_hidden_states_llama3" in inputs:  # by layer, then by picture
        twice["encoder_hidden_states_llama3"] = inputs["encoder_hidden_states_llama3"].repeat_interleave(2, 1)
    return {**twice, **{key: inputs[key] for key in flat}}


def cut(**parts):
    """Some inputs in part: what is joined, or exchanged with the batch, gets another length."""
    return lambda inputs: {**inputs, **{key: mapped(inputs[key], part) for key, part in parts.items()}}


def prompt(length, *, ids=None):
    parts = {"encoder_hidden_states": lambda value: value[:, :length]}
    return cut(**parts, **({} if ids is None else {"txt_ids": ids}))


# All kinds of streams: what makes their inputs of another length.
CHOSEN = {
    "ChromaTransformer2DModel#controlnet": prompt(20, ids=lambda value: value[:20]),
    "Flux2Transformer2DModel": prompt(20, ids=lambda value: value[:, :20]),
    "FluxTransformer2DModel": prompt(20, ids=lambda value: value[:20]),
    "HiDreamImageTransformer2DModel": cut(encoder_hidden_states_t5=lambda value: value[:, :5]),
    "LTX2VideoTransformer3DModel": cut(
        encoder_hidden_states=lambda value: value[:, :9],
        audio_encoder_hidden_states=lambda value: value[:, :9],
        encoder_attention_mask=lambda value: value[:, :9],
    ),
    "LatteTransformer3DModel#multiframe": cut(hidden_states=lambda value: value[..., :4]),
    "MotifVideoTransformer3DModel": prompt(7),
    "SD3Transformer2DModel": prompt(9),
    "WanTransformer3DModel": cut(hidden_states=lambda value: value[..., :4]),
    "ZImageTransformer2DModel": cut(x=lambda value: value[..., :8]),
}


@pytest.mark.parametrize("name", CHOSEN)
class TestRuns:
    """One cache, one model, many pictures."""

    def test_a_run_with_other_inputs_has_nothing_of_the_last(self, name):
        subject = made(name)
        other = subject.call(**subject.changed())
        assert distance(other, subject.plain) > NOTICED
        for found in some_ranges(subject)[:2]:
            with subject.attach(*found):
                for seed, plain in [(0, subject.plain), (1, other), (0, subject.plain)]:
                    assert same(subject.step(0, **subject.inputs(seed)), plain)
                    assert distance(subject.step(1, **subject.inputs(seed)), plain) < ROUNDING, found

    @pytest.mark.parametrize("shape", ["batched", "cut"])
    def test_a_run_of_another_shape_has_nothing_of_the_last(self, name, shape):
        subject = made(name)
        change = batched if shape == "batched" else CHOSEN[name]
        other = subject.call(**change(subject.changed()))
        for found in some_ranges(subject)[:2]:
            with subject.attach(*found) as cache:
                for make, plain in [(subject.inputs, subject.plain), (lambda: change(subject.changed()), other)] * 2:
                    assert same(subject.step(0, **make()), plain)
                    assert distance(subject.step(1, **make()), plain) < ROUNDING, found
                assert cache.stats.reused_calls == 4

    def test_reused_steps_are_alike_to_the_bit(self, name):
        subject = made(name)
        for found in some_ranges(subject)[:2]:
            with subject.attach(*found):
                subject.step(0)
                reused = subject.step(1)
                assert same(subject.step(1), reused)
                assert same(subject.step(2), reused)

    def test_inference_mode(self, name):
        subject = made(name)
        for found in some_ranges(subject)[:2]:
            with torch.inference_mode(), subject.attach(*found) as cache:
                assert same(subject.step(0), subject.plain)
                reused = subject.step(1)
                assert cache.stats.reused_calls == 1
            assert distance(reused, subject.plain) < ROUNDING, found

    def test_half_precision(self, name):
        subject = made(name)
        subject.model.to(torch.bfloat16)
        inputs = subject.inputs
        subject.inputs = lambda: mapped(
            inputs(), lambda value: value.bfloat16() if value.is_floating_point() else value
        )
        plain = subject.call()
        assert plain[0].dtype is torch.bfloat16
        for found in some_ranges(subject)[:2]:
            with subject.attach(*found) as cache:
                assert same(subject.step(0), plain)
                reused = subject.step(1)
                assert cache.stats.reused_calls == 1
            assert distance(reused, plain) < 2e-2, found
