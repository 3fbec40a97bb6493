"""Files that are nearly right are refused in words, or work, in little time and memory; many more by the bench."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from dithooks import CachePlan, DitCacheConfig, Mask, Recording, plan
from dithooks.compat.cache_dit import load_configs
from dithooks.config import safe_json
from dithooks.config.safe_json import strict
from dithooks.demo import PLANS, load_plan
from dithooks.errors import DitHooksError, InvalidSetting, WrongType
from dithooks.tuning.journal import Journal
from dithooks.tuning.trial_driver import check_measures
from dithooks.validation import shown
from hostile_files.judging import judged, mutant
from hostile_files.samples import MEASURES, PURPOSE, kinds, planned, recording

NAMES = (
    *(
        "plan",
        "tiers",
        "config",
        "msmodelslim",
        "cache-dit, JSON",
        "cache-dit, YAML",
        "recording",
        "journal, evaluations.jsonl",
    ),
    *("journal, purpose.json", "journal, recording.npz", "journal, reference.npz"),
)


@pytest.mark.parametrize("name", NAMES)
def test_mutants(name, tmp_path):
    found = kinds(tmp_path)
    assert found.keys() == set(NAMES)
    kind = found[name]
    (tmp_path / kind.file).write_bytes(kind.data)
    assert not judged(kind, tmp_path / kind.file).refused, "what is right is read: the others can tell"
    verdicts = [judged(kind, mutant(number, kind, tmp_path)) for number in range(12)]
    assert [each.wrong for each in verdicts if each.wrong] == []
    assert any(each.refused for each in verdicts)


def test_a_judge_who_can_tell(tmp_path):
    """Loaders that do what they should not are found out."""
    path = tmp_path / "plan.json"
    kind = kinds(tmp_path)["plan"]
    path.write_text("[")

    def fails(error):
        def load(path):
            raise error

        return judged(replace(kind, load=load), path).wrong

    assert "JSONDecodeError" in judged(replace(kind, load=lambda path: json.loads(path.read_text())), path).wrong
    assert "does not name the file" in fails(InvalidSetting("it is wrong"))
    assert fails(IndexError("list index out of range")) == "IndexError: list index out of range"
    assert "MB" in judged(replace(kind, load=lambda path: bytes(60_000_000), use=len), path).wrong
    assert fails(InvalidSetting(f"{path} is wrong")) == ""


# -- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["k0", "k49999"])
def test_a_name_that_stands_there_twice_is_found_in_linear_time(last):
    text = "{" + ",".join(f'"k{number}":1' for number in range(50_000)) + f',"{last}":2}}'
    begin = time.process_time()
    with pytest.raises(InvalidSetting, match=f"'{last}' stands there twice"):
        strict(text)
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, NaN]", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "'1e999' is more than a number can be"),
        ("[" + "9" * 5000 + "]", "a number of 5000 digits"),
        ('{"a": "\\ud800"}', "one half of a character"),
        ('{"\\udfff": 1}', "one half of a character"),
        ("[" * 50_000, "nested too deeply|not JSON|Expecting"),
        ("[" * 33 + "]" * 33, "nested more than 32 deep"),
        ("[" + "1," * 100_000 + "1]", "more than 100,000 values"),
    ],
)
def test_what_this_library_never_writes(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        strict(text)
    assert len(str(caught.value)) <= 400


def test_whole_characters_are_read():
    assert strict('["\\ud83d\\ude00", "größe", 1e308, ' + "9" * 300 + "]") == ["😀", "größe", 1e308, int("9" * 300)]


def test_yaml_does_not_grow(tmp_path):
    """Merged mappings of nine mappings of nine, and brackets in brackets, for which PyYAML takes minutes."""
    path = tmp_path / "c.yaml"
    for text, words in (
        ("a: &a {k: 1}\nb: &b {<<: [" + "*a," * 9 + "]}", "it merges mappings"),
        ("a: " + "[" * 3000, "it opens more than 200 brackets"),
        ("max_warmup_steps: 1\nmax_warmup_steps: 2", "'max_warmup_steps' stands there twice"),
        ("a: " + "x" * 20_000, "at most 16,384 are read"),
    ):
        path.write_text(text)
        begin = time.process_time()
        with pytest.raises(InvalidSetting, match=words):
            load_configs(path)
        assert time.process_time() - begin < 0.5


# -- recordings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("steps", [0, 1, 2, 3, 4, 6], r"traces\[0\]: steps must rise .* within the 6 of the schedule"),
        ("steps", [-1, 1, 2, 3, 4, 5], "steps must rise"),
        ("steps", [0, 2, 1, 3, 4, 5], "steps must rise"),
        ("steps", [0, 0, 1, 2, 3, 4], "steps must rise"),
        ("ranges", [[2, 0]] * 6, "ranges has blocks that are none of 3, or a range that ends before"),
        ("block_ms", [-1.0, 1.0, 1.0], "block_ms has numbers below 0"),
        ("block_ms", [np.nan, 1.0, 1.0], "block_ms has numbers that are not finite"),
        ("times", [np.inf, 0.8, 0.6, 0.4, 0.2, 0.1], "times has numbers that are not finite"),
    ],
)
def test_a_recording_that_the_planner_would_stumble_over(name, array, words, tmp_path):
    found = recording()
    broken = replace(found, traces=(replace(found.traces[0], **{name: np.array(array)}),))
    broken.save(tmp_path / "run.npz")
    with pytest.raises(InvalidSetting, match=words) as caught:
        Recording.load(tmp_path / "run.npz")
    assert str(tmp_path / "run.npz") in str(caught.value)


def test_a_transformer_that_is_called_at_some_steps_only(tmp_path):
    found = recording()
    trace = replace(found.traces[0], steps=np.array([1, 2, 3, 5, 8, 9]))
    some = replace(found, traces=(trace,), made=replace(found.made, steps=10), sigmas=None, sensitivity=None)
    some.save(tmp_path / "run.npz")
    again = Recording.load(tmp_path / "run.npz")
    planned(again)
    assert again.traces[0].steps.tolist() == [1, 2, 3, 5, 8, 9]
    assert plan(again, 1.5, cost="blocks").to_json() == plan(some, 1.5, cost="blocks").to_json()


# -- journals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"speedup": None}, "speedup must be a number, not None"),
        ({"speedup": "fast"}, "speedup must be a number, not 'fast'"),
        ({"speedup": {"float": "inf"}}, "speedup=inf is out of range"),
        ({"seconds": -1}, "seconds=-1 is out of range"),
        ({"psnr": {"float": "nan"}}, "psnr=nan is out of range"),
        ({"psnr": [41.0]}, r"psnr must be a number, not \[41.0\]"),
        ({"ssim": 2}, "ssim=2 is out of range"),
        ({"failure": None}, "failure must be a string"),
        ({"blocks": {"float": "much"}}, "'much' is no number that JSON lacks"),
    ],
)
def test_a_journal_with_something_else_where_numbers_belong(values, words, tmp_path):
    journal = Journal.open(tmp_path, PURPOSE)
    journal.keep_evaluation("plan a", MEASURES)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"key": "plan b", **values}) + "\n")
    with pytest.raises(InvalidSetting, match=rf"evaluations\.jsonl, line 3 is no evaluation \(.*{words}"):
        Journal.open(tmp_path, PURPOSE, check_measures)


def test_what_a_search_keeps_is_read_again(tmp_path):
    journal = Journal.open(tmp_path, PURPOSE)
    journal.keep_evaluation("plan a", MEASURES)
    failed = {"seconds": 0.0, "speedup": 0.0, "blocks": 0.0, "failure": "OutOfMemoryError: …"}
    journal.keep_evaluation("plan b", failed)
    journal.keep_evaluation("plan c", {**MEASURES, "psnr": -float("inf"), "worst": -float("inf"), "ssim": None})
    again = Journal.open(tmp_path, PURPOSE, check_measures)
    assert (again.evaluation("plan a"), again.evaluation("plan b")) == (MEASURES, failed)
    assert again.evaluation("plan c")["psnr"] == -float("inf")


def test_a_line_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    """The disk is full in the middle of a line: the next one does not go on there."""
    journal = Journal.open(tmp_path, PURPOSE)
    journal.keep_evaluation("plan a", MEASURES)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DitHooksError, match="cannot be written: No space left"):
            journal.keep_evaluation("plan b", MEASURES)
    journal.keep_evaluation("plan c", MEASURES)
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["plan a", "plan c"]


# -- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DitHooksError.__subclasses__())
def test_a_message_is_short_whatever_it_quotes(kind):
    said = str(kind("begin " + "x" * 10_000 + " remedy"))
    assert len(said) == 400
    assert said.startswith("begin x")
    assert said.endswith("x remedy")
    assert str(kind("short")) == "short"


@pytest.mark.parametrize(
    "make",
    [
        lambda: plan(np.ones((100, 100)), 2.0),
        lambda: DitCacheConfig(policy=np.ones((100, 100))),
        lambda: CachePlan([recording()] * 50, None, None),
        lambda: Mask(object()),
        lambda: DitCacheConfig(cache_step_start="x" * 10_000, cache_step_interval=2),
        lambda: replace(load_plan("2x").pieces[0], steps={"a": [1] * 10_000}),
    ],
)
def test_no_message_holds_what_it_was_given(make):
    with pytest.raises((InvalidSetting, WrongType)) as caught:
        make()
    assert len(str(caught.value)) <= 300
    assert "1., 1." not in str(caught.value)


def test_values_in_a_few_words():
    import torch

    linear = torch.nn.Linear(2, 2)
    values = [torch.ones(3, 4), np.ones(3), linear, 10**5000, "x" * 500, {"a": [1] * 99}, torch.float16, Mask((1, 0))]
    assert [shown(value) for value in values[:4]] == [
        "Tensor (3, 4) torch.float32", "ndarray (3,) float64", "a Linear", "an int of 16610 bits",
    ]  # fmt: skip
    assert all(len(shown(value)) <= (202 if isinstance(value, str) else 80) for value in values)
    assert shown(torch.float16) == "torch.float16"
    assert shown(Mask((1, 0))) == "Mask(steps=(1, 0), sigmas=None, dynamic=None)"


def test_the_bounds_are_far_from_what_is_written():
    sizes = [path.stat().st_size for path in PLANS.glob("*.json")]
    assert max(sizes) * 20 < safe_json.JSON_BYTES
    short, steps = load_plan("2x"), 1000
    weights = tuple(None if step % 2 or step < 6 else (1.0 / 3, -2.0 / 7, 0.1) for step in range(steps))
    bits, sigmas = tuple(int(each is None) for each in weights), tuple(np.linspace(1, 0, steps).tolist())
    corrections = tuple(
        (1 / 3, 1 / 7, 1 / 9) if each is None and step > 6 else None for step, each in enumerate(weights)
    )
    own = {"coefficients": weights, "corrections": corrections}
    branches = tuple(replace(each, **own) for each in short.pieces[0].branches)
    assert len(branches) == 2
    piece = replace(short.pieces[0], steps=bits, sigmas=sigmas, branches=branches, others=(), **own)
    long = replace(short, pieces=(piece,), made=replace(short.made, steps=steps))
    assert CachePlan.from_json(long.to_json()) == long
    assert len(long.to_json()) * 8 < safe_json.JSON_BYTES
