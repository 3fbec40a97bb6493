"""Plans: as files, and what they refuse."""

import dataclasses
import json
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from config.test_codec import kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Net, Pipe, latents

from dithooks import CachePlan, DitCacheConfig, Fitted, dit_cache
from dithooks.blocks.block_lists import fingerprint
from dithooks.blocks.registry import chains_of
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan

LEVELS = (1.0, 0.75, 0.5, 0.25)
PIECE = TransformerPlan("transformer", 1, 2, 4, (1, 1, 0, 0), (None, None, (1.5, -0.5), (0.25,)), LEVELS)
MADE = PlanTarget("Net", "0123456789abcdef", 4, "float32", 4, "Counter", (6, 4))
FOUND = Provenance("2025-01-31", {"torch": "2.6.0"}, "CPU", 4, 2.0, "by hand", 1.9, 0.01)
PLAN = CachePlan((PIECE,), MADE, FOUND)


def made_for(target, steps, scheduler="Counter", dtype="float32", blocks=None):
    chains = [chain for chain, _ in chains_of(target, blocks)]
    model = "+".join(type(chain.owner).__name__ for chain in chains)
    number = sum(len(chain.block_refs) for chain in chains)
    return PlanTarget(model, fingerprint(chains), number, dtype, steps, scheduler, (6, 4))


def plan_for(target, *pieces, **made):
    return CachePlan(pieces, made_for(target, len(pieces[0].steps), **made), FOUND)


@contextmanager
def listening():
    """What is said meanwhile; filled in at the end."""
    told = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        yield told
    told += [str(each.message) for each in said if issubclass(each.category, UserWarning)]


# --- as JSON --------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6) | st.sampled_from([1 / 3, 5e-324, 0.1])
positive = st.floats(0, 1e6, exclude_min=True) | st.sampled_from([5e-324, 1 / 3])
words = st.text(min_size=1, max_size=8)


@st.composite
def pieces(draw, path, number):
    bits = (1, *(draw(st.integers(0, 1)) for _ in range(number - 1)))
    coefficients = tuple(
        None if bit else tuple(draw(st.lists(numbers, min_size=1, max_size=min(3, sum(bits[:step])))))
        for step, bit in enumerate(bits)
    )
    axis = draw(st.sampled_from(["sigma", "timestep", "step"]))
    level = st.floats(0, 1e6) if axis == "sigma" else numbers
    sigmas = draw(st.none() | st.lists(level, min_size=number, max_size=number).map(tuple))
    first, blocks, after = draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 40))
    called = draw(st.sampled_from([None, (0, number)]))
    return TransformerPlan(path, first, blocks, first + blocks + after, bits, coefficients, sigmas, axis, called)


@st.composite
def plans(draw):
    number = draw(st.integers(1, 9))
    paths = draw(st.lists(st.text(max_size=6), min_size=1, max_size=3, unique=True))
    parts = tuple(draw(pieces(path, number)) for path in paths)
    made = PlanTarget(
        draw(words),
        draw(words),
        sum(part.total for part in parts) + draw(st.integers(0, 5)),
        draw(st.sampled_from(["float32", "bfloat16"])),
        number,
        draw(st.none() | words),
        tuple(draw(st.lists(st.integers(1, 999), max_size=4))),
    )
    found = Provenance(
        draw(words),
        draw(st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3)),
        draw(words),
        draw(st.integers(1, 99)),
        draw(positive),
        draw(words),
        draw(positive),
        draw(st.floats(0, 1e6)),
        measured_speedup=draw(st.none() | positive),
        psnr=draw(st.none() | st.just(math.inf) | st.floats(-100, 300)),
        relative_l1=draw(st.none() | st.floats(0, 10)),
        ssim=draw(st.none() | st.floats(-1, 1)),
        reached=draw(st.booleans()),
    )
    return CachePlan(parts, made, found)


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


class TestJson:
    @settings(deadline=None, max_examples=100)
    @given(plans())
    def test_round_trip(self, plan):
        text = plan.to_json()
        read = CachePlan.from_json(text)
        assert read == plan
        assert hash(read) == hash(plan)
        assert read.to_json() == text
        assert all(kinds(a) == kinds(b) for a, b in zip(read.pieces, plan.pieces, strict=True))
        assert kinds(read.made) == kinds(plan.made)
        json.loads(text, parse_constant=no_constant)
        assert str(read) == str(plan)

    @settings(deadline=None, max_examples=50)
    @given(plans())
    def test_as_a_configuration(self, plan):
        """That, too, can be written; and every transformer has what its piece says."""
        config = plan.config
        assert DitCacheConfig.from_json(config.to_json()) == config
        assert config.fingerprint == plan.made.fingerprint
        for piece in plan.pieces:
            own = config.overridden(piece.path) if piece.path in config.overrides else config
            assert (own.cache_block_start, own.cache_num_blocks) == (piece.first, piece.blocks)
            assert own.when.steps == piece.steps
            assert own.predictor == Fitted(piece.coefficients, piece.sigmas)

    def test_every_field(self):
        found = dataclasses.replace(
            FOUND, measured_speedup=1.8, psnr=math.inf, relative_l1=0.0, ssim=1.0, reached=False
        )
        assert json.loads(CachePlan((PIECE,), MADE, found).to_json()) == {
            "schema": 1,
            "kind": "CachePlan",
            "pieces": [
                {
                    "path": "transformer",
                    "first": 1,
                    "blocks": 2,
                    "total": 4,
                    "steps": [1, 1, 0, 0],
                    "coefficients": [None, None, [1.5, -0.5], [0.25]],
                    "sigmas": [1.0, 0.75, 0.5, 0.25],
                    "axis": "sigma",
                    "called": None,
                }
            ],
            "made": {
                "model": "Net",
                "fingerprint": "0123456789abcdef",
                "blocks": 4,
                "dtype": "float32",
                "steps": 4,
                "scheduler": "Counter",
                "size": [6, 4],
            },
            "provenance": {
                "date": "2025-01-31",
                "versions": {"torch": "2.6.0"},
                "machine": "CPU",
                "samples": 4,
                "target": 2.0,
                "method": "by hand",
                "predicted_speedup": 1.9,
                "predicted_error": 0.01,
                "measured_speedup": 1.8,
                "psnr": "inf",
                "relative_l1": 0.0,
                "ssim": 1.0,
                "reached": False,
            },
        }

    def test_what_has_a_default_may_be_left_out(self):
        data = json.loads(PLAN.to_json())
        for name in ("axis", "called"):
            del data["pieces"][0][name]
        for name in ("measured_speedup", "psnr", "relative_l1", "ssim", "reached"):
            del data["provenance"][name]
        assert CachePlan.from_json(json.dumps(data)) == PLAN

    def test_a_file(self, tmp_path):
        plan = CachePlan((PIECE,), MADE, dataclasses.replace(FOUND, machine="Größe", psnr=math.inf))
        plan.save(tmp_path / "p.json")
        assert CachePlan.load(tmp_path / "p.json") == CachePlan.load(str(tmp_path / "p.json")) == plan

    @pytest.mark.parametrize(
        ("data", "error", "match"),
        [
            (b"{", ValueError, "not a CachePlan: the text is not JSON"),
            (b"\xff\xfe", ValueError, "utf-8"),
            (b"[]", ValueError, 'a JSON object with "kind": "CachePlan" is expected'),
            (b'{"kind": "DitCacheConfig", "schema": 2}', ValueError, '"kind": "CachePlan" is expected'),
            (b'{"kind": "CachePlan", "schema": 9}', ValueError, "schema 9 is not known: this version reads 1"),
            (b'{"kind": "CachePlan", "schema": 1}', ValueError, "CachePlan lacks pieces, made, provenance"),
            (PLAN.to_json().replace("1.9", '"1.9"').encode(), TypeError, "provenance: predicted_speedup must be a num"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, data, error, match):
        (tmp_path / "bad.json").write_bytes(data)
        with pytest.raises(error, match=r"bad\.json: .*" + match):
            CachePlan.load(tmp_path / "bad.json")

    @pytest.mark.parametrize(
        ("where", "change", "error", "match"),
        [
            ("", {"pieces": {}}, TypeError, "pieces must be a list"),
            ("", {"pieces": []}, ValueError, "pieces is empty"),
            (
                "",
                {"pieces": [3]},
                TypeError,
                r"pieces\[0\] must be an object with the fields of a TransformerPlan, not 3",
            ),
            ("", {"made": None}, TypeError, "made must be an object"),
            ("", {"provenance": "me"}, TypeError, "provenance must be an object"),
            ("", {"speed": 2}, ValueError, "CachePlan has no field speed"),
            ("pieces", {"last": 2}, ValueError, r"pieces\[0\] has no field last: known are path, first"),
            ("pieces", {"first": -1}, ValueError, r"pieces\[0\]: first=-1 is out of range"),
            ("pieces", {"first": "1"}, TypeError, r"pieces\[0\]: first must be an int"),
            ("made", {"width": 8}, ValueError, "made has no field width"),
            ("made", {"steps": 0}, ValueError, "made: steps=0 is out of range"),
            ("made", {"steps": 5}, ValueError, r"'transformer' has 4 steps, but made\.steps=5"),
            ("provenance", {"psnr": "much"}, TypeError, "provenance: psnr must be a number"),
            ("provenance", {"ssim": "inf"}, TypeError, "provenance: ssim must be a number"),
            ("provenance", {"author": ""}, ValueError, "provenance has no field author"),
        ],
    )
    def test_bad_fields(self, where, change, error, match):
        data = json.loads(PLAN.to_json())
        part = data if not where else data[where][0] if where == "pieces" else data[where]
        part.update(change)
        with pytest.raises(error, match=match):
            CachePlan.from_json(json.dumps(data))

    @pytest.mark.parametrize(
        ("where", "name"),
        [("pieces", "coefficients"), ("pieces", "sigmas"), ("made", "scheduler"), ("provenance", "versions")],
    )
    def test_missing_fields(self, where, name):
        data = json.loads(PLAN.to_json())
        part = data[where][0] if where == "pieces" else data[where]
        del part[name]
        with pytest.raises(ValueError, match=f"lacks {name}$"):
            CachePlan.from_json(json.dumps(data))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"path": None}, TypeError, "path must be a string"),
        ({"first": -1}, ValueError, "first=-1 is out of range"),
        ({"first": 1.0}, TypeError, "first must be an int"),
        ({"blocks": 0}, ValueError, "blocks=0 is out of range"),
        ({"blocks": True}, TypeError, "blocks must be an int"),
        ({"total": 0}, ValueError, "total=0"),
        ({"total": 2}, ValueError, "first=1 and blocks=2 reach past the end: total=2"),
        ({"steps": "fast"}, TypeError, "steps must be a 1 or 0 for each step, not 'fast'"),
        ({"steps": 4}, TypeError, "steps must be"),
        ({"steps": ()}, ValueError, "the first a 1"),
        ({"steps": (0, 1, 0, 0)}, ValueError, "the first a 1"),
        ({"steps": (1, 2, 0, 0)}, ValueError, r"give 1 \(computed\) or 0 \(reused\)"),
        ({"steps": (1, 1, 0)}, ValueError, "coefficients has 4 entries, but there are 3 steps"),
        ({"steps": (1, 0, 0, 0)}, ValueError, r"step 1 is reused \(0\), but has no coefficients"),
        ({"steps": (1, 1, 1, 0)}, ValueError, r"step 2 is computed \(1\), but has coefficients"),
        ({"coefficients": None}, TypeError, "coefficients must be None or a list"),
        ({"coefficients": (None, None, (1.0, 2.0, 3.0), (1.0,))}, ValueError, "step 2 has 3 coefficients, but 2"),
        ({"coefficients": (None, None, ("1",), (1.0,))}, TypeError, "a coefficient must be a number"),
        ({"coefficients": (None, None, (math.nan,), (1.0,))}, ValueError, "a coefficient=nan"),
        ({"sigmas": (1.0, 0.5)}, ValueError, "sigmas has 2 entries, but coefficients has 4"),
        ({"sigmas": 1.0}, TypeError, "sigmas must be a number for each step, or None"),
        ({"sigmas": "1234"}, TypeError, "sigmas must be a number for each step, or None"),
        ({"sigmas": (1.0, 0.5, math.inf, 0.1)}, ValueError, "a sigma=inf"),
        ({"sigmas": (1.0, 0.5, "0.3", 0.1)}, TypeError, "a sigma must be a number"),
        ({"sigmas": (1.0, 0.5, 0.3, -0.1)}, ValueError, "a noise level is not negative"),
        ({"axis": "time"}, ValueError, "axis='time': there are 'sigma', 'timestep', 'step'"),
        ({"called": 3}, TypeError, "called must be the first step and the one after the last"),
        ({"called": (0, 1, 2)}, TypeError, "called must be the first step"),
        ({"called": (0.0, 4)}, TypeError, "called must be an int"),
        ({"called": (2, 2)}, ValueError, r"called=\(2, 2\) is out of range: there are 4 steps"),
        ({"called": (0, 5)}, ValueError, r"called=\(0, 5\) is out of range"),
        ({"called": (0, 3)}, ValueError, r"called=\(0, 3\), but steps has 0 \(reused\) at step 3, outside"),
        ({"called": (2, 4)}, ValueError, r"called=\(2, 4\): step 2 takes 2 residuals, and 0 are computed before it"),
        ({"called": (1, 4)}, ValueError, r"called=\(1, 4\): step 2 takes 2 residuals, and 1 are computed before it"),
    ],
)
def test_what_is_no_piece(change, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(PIECE, **change)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": ""}, ValueError, "model is an empty string"),
        ({"model": Net}, TypeError, "model must be a string"),
        ({"fingerprint": None}, TypeError, "fingerprint must be a string"),
        ({"blocks": 0}, ValueError, "blocks=0"),
        ({"dtype": torch.float32}, TypeError, "dtype must be a string"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": None}, TypeError, "steps must be an int"),
        ({"scheduler": 3}, TypeError, "scheduler must be a string"),
        ({"scheduler": ""}, ValueError, "scheduler is an empty string"),
        ({"size": 64}, TypeError, "size must be the shape"),
        ({"size": "64"}, TypeError, "size must be the shape"),
        ({"size": (64, 0)}, ValueError, "a length in size=0"),
        ({"size": (64, 1.5)}, TypeError, "a length in size must be an int"),
    ],
)
def test_what_is_not_what_it_was_made_for(change, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(MADE, **change)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"date": ""}, ValueError, "date is an empty string"),
        ({"date": 2025}, TypeError, "date must be a string"),
        ({"versions": ["torch"]}, TypeError, "versions must be a mapping"),
        ({"versions": {"torch": 2}}, TypeError, "versions must be a mapping"),
        ({"versions": None}, TypeError, "versions must be a mapping"),
        ({"machine": None}, TypeError, "machine must be a string"),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"samples": 1.5}, TypeError, "samples must be an int"),
        ({"target": 0}, ValueError, "target=0 is out of range: it must be above 0"),
        ({"target": "2"}, TypeError, "target must be a number"),
        ({"method": ""}, ValueError, "method is an empty string"),
        ({"predicted_speedup": math.inf}, ValueError, "predicted_speedup=inf"),
        ({"predicted_speedup": None}, TypeError, "predicted_speedup must be a number"),
        ({"predicted_error": -0.1}, ValueError, "predicted_error=-0.1"),
        ({"predicted_error": math.nan}, ValueError, "predicted_error=nan"),
        ({"measured_speedup": 0}, ValueError, "measured_speedup=0"),
        ({"psnr": math.nan}, ValueError, "psnr=nan"),
        ({"psnr": -math.inf}, ValueError, "psnr=-inf"),
        ({"psnr": "inf"}, TypeError, "psnr must be a number"),
        ({"relative_l1": -1}, ValueError, "relative_l1=-1"),
        ({"relative_l1": math.inf}, ValueError, "relative_l1=inf"),
        ({"ssim": 1.01}, ValueError, "ssim=1.01 is out of range: it must be at most 1"),
        ({"ssim": -2}, ValueError, "ssim=-2"),
        ({"reached": 1}, TypeError, "reached must be True or False"),
    ],
)
def test_what_is_no_provenance(change, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(FOUND, **change)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pieces": ()}, ValueError, "pieces is empty"),
        ({"pieces": PIECE}, TypeError, "pieces must be a tuple of TransformerPlan"),
        ({"pieces": (PIECE, MADE)}, TypeError, "pieces must be a tuple of TransformerPlan"),
        ({"pieces": (PIECE, PIECE)}, ValueError, "pieces has several of 'transformer'"),
        (
            {"pieces": (PIECE, dataclasses.replace(PIECE, path="b"))},
            ValueError,
            r"8 blocks together, but made\.blocks=4",
        ),
        ({"made": FOUND}, TypeError, "made must be a PlanTarget"),
        ({"provenance": None}, TypeError, "provenance must be a Provenance"),
        ({"made": dataclasses.replace(MADE, steps=3)}, ValueError, r"'transformer' has 4 steps, but made\.steps=3"),
        ({"made": dataclasses.replace(MADE, blocks=3)}, ValueError, r"4 blocks together, but made\.blocks=3"),
    ],
)
def test_what_is_no_plan(change, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize("wrong", [None, 2.0, CachePlan, PIECE])
def test_what_is_neither_plan_nor_configuration(wrong):
    with pytest.raises(TypeError, match="config must be a DitCacheConfig, a CachePlan, a policy"):
        dit_cache(Net(), wrong)


# --- by hand --------------------------------------------------------------------------------------------------------


# --- several ranges -------------------------------------------------------------------------------------------------

HEAD, TAIL = (1, 0, 0, 1), (1, 0, 1, 1)


def ranged(path, *spans, total=5):
    """A plan of ranges, each given by its first block, its number of blocks and its steps."""
    made = []
    for first, blocks, bits in spans:
        weights = tuple(None if bit else (1.0,) for bit in bits)
        levels = tuple(1 - step / len(bits) for step in range(len(bits)))
        made.append(TransformerPlan(path, first, blocks, total, bits, weights, levels))
    return dataclasses.replace(made[0], more_ranges=tuple(made[1:]))


class Two(Pipe):
    """Both transformers at each step."""

    def __init__(self):
        super().__init__(Net())
        self.transformer_2 = Net()

    def __call__(self, x, steps=4):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            for model in (self.transformer, self.transformer_2):
                x = x - model(x, timestep=t / 1000) / steps
            self.scheduler.step()
        return x


@pytest.mark.parametrize("second", ["one range", "blocks of the first", "none"])
@torch.no_grad()
def test_one_transformer_in_two_ranges_beside_another(second):
    """What the second has is its own, also where the first one's further range would fit it."""
    pipe = Two()
    first = ranged("transformer", (0, 3, HEAD), (3, 2, TAIL))
    other = {"one range": (0, 5, HEAD), "blocks of the first": (0, 3, HEAD)}.get(second)
    plan = plan_for(pipe, first, *([] if other is None else [ranged("transformer_2", other)]))
    wanted = {("transformer.blocks[0:3]", 0, 3), ("transformer.blocks[3:5]", 3, 2)}
    wanted |= set() if other is None else {("transformer_2.blocks", 0, other[1])}
    assert DitCacheConfig.from_json(plan.config.to_json()) == plan.config
    with dit_cache(pipe, plan) as cache:
        pipe(latents())
        assert {(each.range, each.first, each.blocks) for each in cache.ranges} == wanted
        assert cache.stats.blocks_total / cache.stats.blocks_run == pytest.approx(plan.speedup)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"others": (ranged("", (3, 2, (1, 0, 0))),)}, "has others: that belongs"),
        ({"corrections": (None, (1.0, 0.0), None, None)}, "has corrections: that belongs to the first"),
    ],
)
def test_what_a_further_range_has_none_of(change, match):
    behind = dataclasses.replace(ranged("", (3, 2, TAIL)), **change)
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(ranged("", (0, 3, HEAD)), more_ranges=(behind,))


def test_a_further_range_of_another_number_of_steps():
    first, behind = (dataclasses.replace(ranged("", span), sigmas=None) for span in ((0, 3, HEAD), (3, 2, (1, 0, 0))))
    with pytest.raises(ValueError, match="of 3 steps, and the first range of 4"):
        dataclasses.replace(first, more_ranges=(behind,))


@pytest.mark.parametrize("name", ["path", "kind", "policy"])
def test_long_names_in_one_of_several_ranges(name):
    """What is said stays within three lines, and names the place."""
    long = "x" * 400
    if name == "path":
        data = json.loads(plan_for(Pipe(Net()), ranged("transformer", (0, 3, HEAD), (3, 2, TAIL))).to_json())
        data["pieces"][0]["path"], data["pieces"][0]["more_ranges"][0]["path"] = long, long + "y"
        kind, place = CachePlan, "pieces[0]: one of more_ranges has path="
    else:
        further = DitCacheConfig(1, 2, cache_block_start=3)
        config = DitCacheConfig(1, 2, cache_num_blocks=3, more_ranges=(further,))
        data, kind, place = json.loads(config.to_json()), DitCacheConfig, "more_ranges[0]: "
        data["more_ranges"][0][name] = long if name == "kind" else {"kind": long}
    with pytest.raises(ValueError, match="xxxxx") as caught:
        kind.from_json(json.dumps(data))
    assert place in str(caught.value)
    assert len(str(caught.value)) <= 300
