"""Plans, configurations, recordings and journals that are damaged, foreign or made to harm: cut at every length,
changed in every field, nested without end, with numbers that no machine holds, and with code in them.
"""

import copy
import io
import itertools
import json
import os
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hostile_files.samples import TIERS
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Ladder, Pipe
from traces import attributes

from dithooks import CachePlan, DitCacheConfig, Fitted, Mask, PlanTiers, Threshold, dit_cache
from dithooks.cli.main import main
from dithooks.compat.cache_dit import enable_cache, load_configs
from dithooks.compat.msmodelslim.adaptor_configs import DitCacheConfig as SlimConfig
from dithooks.config.safe_json import LARGEST
from dithooks.demo import PLANS
from dithooks.errors import FileError, InvalidSetting, MissingFile, WrongType
from dithooks.recording.recording import Recording, Trace
from dithooks.tuning.journal import Journal

pytestmark = [
    pytest.mark.line("Fault campaign"),
    pytest.mark.on("files of plans, configurations, recordings, journals"),
]

CONFIG = DitCacheConfig(
    cache_block_start=1,
    compute_last=1,
    policy=Mask((1, 0, 1, 0), (1.0, 0.75, 0.5, 0.25), dynamic=Threshold(0.1, 0)),
    predictor=Fitted((None, (1.0,), None, (1.5, -0.5))),
    cache_dtype="bfloat16",
    overrides={"blocks": {"policy": Threshold(0.2)}},
)
SLIM = SlimConfig(2, 2, 0, 3)
YAML = "cache_config:\n  max_warmup_steps: 4\n  residual_diff_threshold: 0.12\n  enable_taylorseer: true\n"
LOADERS = {
    "config": DitCacheConfig.load,
    "plan": CachePlan.load,
    "tiers": PlanTiers.load,
    "slim": SlimConfig.load,
    "yaml": load_configs,
}
ODD = (None, True, -1, 0, 1.5, 10**12, 10**400, -(10**400), "", "text", "1", [], {}, [[]], [None], {"kind": "Mask"},
       {"kind": "Reuse"}, {"kind": "nothing"}, {"": {}}, [1] * 9, "x" * 5000, "\0", "\ud800")  # fmt: skip


# Each list holds the one before nine times.
LAUGHS = "a: &a [" + "x," * 9 + "]\n"
LAUGHS += "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi"))


def written(kind):
    if kind == "plan":
        return (PLANS / "2x.json").read_text(encoding="utf-8")
    return {"config": CONFIG.to_json(), "tiers": TIERS.to_json(), "slim": json.dumps(SLIM.to_dict()), "yaml": YAML}[
        kind
    ]


def ending(kind):
    return "yaml" if kind == "yaml" else "json"


def refused(load, path):
    """What is said of a file that is refused, in words that name it; ``None``: it is read."""
    try:
        load(path)
        return None
    except (ValueError, TypeError, OSError) as error:
        kind, said = type(error), str(error)
    assert kind in (InvalidSetting, WrongType, FileError, MissingFile), f"{kind.__name__}: {said}"
    assert str(path)[-80:] in said or repr(str(path))[-80:] in said, f"the file is not named: {said}"
    assert len(said) <= 400, "the message is as long as the file"
    return said


@pytest.fixture(params=LOADERS)
def kind(request):
    return request.param


@pytest.fixture
def path(kind, tmp_path):
    return tmp_path / f"file.{ending(kind)}"


class TestText:
    def test_what_is_right_is_read(self, kind, path):
        """Each file as it is written is read: the tests below can tell."""
        path.write_text(written(kind), encoding="utf-8")
        assert LOADERS[kind](path)

    def test_cut_at_every_length(self, kind, path):
        """What is left of a file that was cut is refused, whatever its length; of YAML, as far as that can be seen."""
        data = written(kind).strip().encode()
        for length in range(0, len(data), 1 if len(data) < 1500 else 7):
            path.write_bytes(data[:length])
            assert refused(LOADERS[kind], path) or kind == "yaml", f"{length} bytes of {len(data)} are taken for all"

    @pytest.mark.parametrize(
        "data",
        [
            b"", b" \n", b"\0" * 64, b"\xff\xfe\x00", bytes(range(256)), b"null", b"[]", b"1", b'"text"', b"true",
            b"NaN",
            b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b'{"kind":"a"}',
            b'{"kind": "DitCacheConfig"}',
            b'{"schema": 99, "kind": "CachePlan"}', b"{}", b'{"kind": ["CachePlan"]}',
            b"[" * 500 + b"]" * 500, b"PK\x03\x04", b"\x80\x04\x95.", b"GIF89a", b"<html></html>", b"%PDF-1.7",
            b"\xef\xbb\xbf{}", "{'größe': 1}".encode("latin-1"), '{"kind": "CachePlan"}'.encode("utf-16"),
        ],
        ids=lambda data: repr(data[:12]),
    )  # fmt: skip
    def test_something_else(self, kind, path, data):
        """Nothing, bytes, another format, another kind of JSON, nesting without end: an error that names the file."""
        path.write_bytes(data)
        said = refused(LOADERS[kind], path)
        assert said or (kind == "yaml" and not data.strip(b" \n{}\xef\xbb\xbf")), "it is read"

    def test_no_file(self, kind, path, tmp_path):
        """A name of nothing, a folder, a link that leads to itself, a name too long: the system's error, or ours."""
        assert refused(LOADERS[kind], path)
        path.mkdir()
        assert refused(LOADERS[kind], path)
        loop = tmp_path / f"loop.{ending(kind)}"
        loop.symlink_to(loop)
        assert refused(LOADERS[kind], loop)
        assert refused(LOADERS[kind], tmp_path / ("x" * 5000))
        assert refused(LOADERS[kind], tmp_path / "x\0.json")

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
    def test_no_permission(self, kind, path):
        """A file that must not be read: the system's error."""
        path.write_text(written(kind), encoding="utf-8")
        path.chmod(0)
        assert refused(LOADERS[kind], path)

    def test_too_much(self, kind, path):
        """A list of a million numbers is refused before anything is made of it."""
        path.write_text('{"kind": "CachePlan", "steps": [' + "1," * LARGEST + "1]}", encoding="utf-8")
        if kind != "yaml":  # PyYAML alone takes a minute for it
            assert refused(LOADERS[kind], path)


def leaves(value, where=()):
    """The places of a JSON value, itself included."""
    yield where
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 2)):  # of a list, two stand for all
            yield from leaves(value[key], (*where, key))


def changed(value, where, to):
    """A copy with another value in a place."""
    if not where:
        return to
    value = copy.copy(value)
    value[where[0]] = changed(value[where[0]], where[1:], to)
    return value


class TestFields:
    @pytest.mark.parametrize("kind", ["config", "plan", "tiers", "slim"])
    def test_every_field_with_odd_values(self, kind, path):
        """Every place of a file with each of two dozen odd values: refused in words, or read as it stands; and what
        is read can be written, printed and read again."""
        data, count = json.loads(written(kind)), 0
        for where in leaves(data):
            for odd in ODD:
                path.write_text(json.dumps(changed(data, where, odd)), encoding="utf-8")
                said = refused(LOADERS[kind], path)
                count += said is not None
                if said is None and kind != "slim":
                    read = LOADERS[kind](path)
                    assert type(read).from_json(read.to_json()) == read, (where, odd)
                    assert str(read)
        assert count > 0.7 * len(ODD) * len(list(leaves(data)))

    @pytest.mark.parametrize("kind", ["config", "plan", "tiers", "slim"])
    def test_more_and_fewer_fields(self, kind, path):
        """A field that is not known, one that is missing where it is needed, and one that stands there twice."""
        data = json.loads(written(kind))
        path.write_text(json.dumps({**data, "strange": 1}), encoding="utf-8")
        assert "strange" in refused(LOADERS[kind], path)
        for name in list(data)[:3]:
            path.write_text(json.dumps({key: value for key, value in data.items() if key != name}), encoding="utf-8")
            assert refused(LOADERS[kind], path)
        path.write_text(written(kind).replace("{", f'{{"{name}": 1, ', 1), encoding="utf-8")
        assert "twice" in refused(LOADERS[kind], path)

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
            max_leaves=12,
        ),
        place=st.integers(0, 10_000),
        kind=st.sampled_from(["config", "plan", "tiers", "slim"]),
    )
    def test_any_json_at_any_place(self, tmp_path_factory, kind, place, value):
        """Whatever JSON stands in whatever place: read, or refused in words."""
        path = tmp_path_factory.getbasetemp() / f"any-{kind}.json"
        data = json.loads(written(kind))
        places = list(leaves(data))
        path.write_text(json.dumps(changed(data, places[place % len(places)], value)), encoding="utf-8")
        refused(LOADERS[kind], path)

    @pytest.mark.parametrize(
        "text",
        [
            "cache_config: !!python/object/apply:os.system ['touch {path}.harm']",
            "!!python/object/apply:os.mkdir ['{path}.harm']",
            "cache_config: !!python/name:os.system",
            LAUGHS, "&a [*a]", "cache_config: &a {max_warmup_steps: *a}", "cache_config: {max_warmup_steps: !!int ''}",
            "cache_config: {max_warmup_steps: !!bool maybe}", "cache_config: {max_warmup_steps: !!timestamp maybe}",
            "? [a]\n: b", "cache_config: 2001-99-99", "- " * 100_000, "cache_config: {? {a: b} : c}",
            "%YAML 9.9\n---\na: b", "a: b\n---\nc: d", "\t", "cache_config: {1: 2}", "1: 2",
        ],
        ids=lambda text: text[:40],
    )  # fmt: skip
    def test_yaml(self, tmp_path, text):
        """Tags that would run code, aliases that would fill the memory or never end, values not fit for their tags."""
        path = tmp_path / "file.yaml"
        path.write_text(text.replace("{path}", str(path)), encoding="utf-8")
        assert refused(load_configs, path)
        assert not (tmp_path / "file.yaml.harm").exists()


class TestAttaching:
    @pytest.mark.parametrize(
        "entry",
        ["max_warmup_steps: .inf", "residual_diff_threshold: .nan", "residual_diff_threshold: 1" + "0" * 400,
         "max_warmup_steps: 0x" + "f" * 5000, "max_warmup_steps: [1]", "steps_computation_mask: text",
         "Fn_compute_blocks: -1",
         "Fn_compute_blocks: 1.5", "Bn_compute_blocks: 1000000000000"],
        ids=lambda text: text[:40],
    )  # fmt: skip
    def test_a_yaml_file(self, tmp_path, entry):
        """What is written in YAML and makes no sense is refused where it is read or where it is attached."""
        pipe, path = Pipe(Ladder(5)), tmp_path / "cache.yaml"
        path.write_text(f"cache_config: {{{entry}}}", encoding="utf-8")
        before = attributes(pipe.transformer)
        with pytest.raises((ValueError, TypeError)) as caught:
            enable_cache(pipe, **load_configs(path))
        assert type(caught.value) in (InvalidSetting, WrongType, ValueError)
        assert attributes(pipe.transformer) == before

    """What is refused leaves the model as it is, and a cache that is attached in force."""

    def plans(self):
        data = json.loads(written("plan"))
        yield "another model", data
        piece = data["pieces"][0]
        yield "a range past the end", changed(data, ("pieces", 0, "total"), piece["first"])
        yield "no steps", changed(data, ("pieces", 0, "steps"), [])
        yield "very many steps", changed(data, ("made", "steps"), 10**12)

    def test_a_plan_of_another_model(self, tmp_path):
        """… or one that contradicts itself: not attached, nothing changed, and the handle there works as before."""
        pipe, path = Pipe(Ladder(5)), tmp_path / "plan.json"
        before, x = attributes(pipe.transformer), torch.zeros(1, 2, 4)
        for name, data in self.plans():
            path.write_text(json.dumps(data), encoding="utf-8")
            with pytest.raises((ValueError, TypeError)):
                dit_cache(pipe, CachePlan.load(path))
            assert attributes(pipe.transformer) == before, name
        with dit_cache(pipe, DitCacheConfig(1, 2, 1, 3)) as handle:
            expected, attached = pipe(x), attributes(pipe.transformer)
            for name, data in self.plans():
                path.write_text(json.dumps(data), encoding="utf-8")
                with pytest.raises((ValueError, TypeError)):
                    handle.update(CachePlan.load(path))
                assert attributes(pipe.transformer) == attached, name
                reused = handle.stats.reused_calls
                assert torch.equal(pipe(x), expected)
                assert handle.stats.reused_calls > reused
        assert attributes(pipe.transformer) == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"cache_num_blocks": 10**12}, {"cache_block_start": 10**400}, {"compute_last": 10**12},
            {"cache_block_start": 5},
            {"overrides": {"nothing": {"cache_block_start": 1}}}, {"fingerprint": "f" * 16},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_configuration_that_does_not_fit(self, changes, tmp_path):
        """Blocks that are not there, lists that are not there, another model's fingerprint."""
        pipe, path = Pipe(Ladder(5)), tmp_path / "config.json"
        before = attributes(pipe.transformer)
        data = json.loads(DitCacheConfig(1, 2).to_json())
        path.write_text(json.dumps({**data, **changes}), encoding="utf-8")
        with pytest.raises(ValueError):  # noqa: PT011 - many words
            dit_cache(pipe, DitCacheConfig.load(path))
        assert attributes(pipe.transformer) == before

    def test_enormous_numbers_that_fit(self, tmp_path):
        """Steps and orders beyond all reason take no memory: they are never reached."""
        threshold = {"residual_diff_threshold": 1e300, "max_warmup_steps": 1, "max_cached_steps": 10**18}
        for policy in ({"kind": "Interval", "start": 1, "interval": 10**18}, {"kind": "Threshold", **threshold}):
            data = json.loads(DitCacheConfig(1, 2).to_json())
            data |= {"cache_step_start": None, "cache_step_interval": None, "policy": policy}
            data["predictor"] = {"kind": "Taylor", "order": 10**15, "axis": "sigma"}
            (tmp_path / "config.json").write_text(json.dumps(data), encoding="utf-8")
            pipe = Pipe(Ladder(5))
            with dit_cache(pipe, DitCacheConfig.load(tmp_path / "config.json")) as cache:
                pipe(torch.zeros(1, 2, 4))
                assert cache.stats.reused_calls > 3


class Harm:
    """Pickled, it would make a folder where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def recording(tmp_path):
    trace = Trace(
        "transformer", ("a.0", "a.1"), np.array([[0, 0], [0, 1]]), np.ones((2, 3, 3)), np.ones((2, 3)), np.arange(3),
        np.linspace(1, 0.3, 3), "sigma", 1.0, np.ones(2), 2.0, 1.0, {"x": np.ones((3, 4), np.float32)},
    )  # fmt: skip
    made = replace(CachePlan.load(PLANS / "2x.json").made, steps=3)
    path = tmp_path / "run.npz"
    Recording((trace,), made, (1.0, 0.65, 0.3), 1, 1, 5.0, 6.0).save(path)
    return path


def rewritten(path, **changes):
    """The archive with other members; ``None``: without."""
    with np.load(path) as file:
        members = {**{name: file[name] for name in file.files}, **changes}
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: array for name, array in members.items() if array is not None})


class TestRecordings:
    def test_what_is_right_is_read(self, recording):
        """The file as it is written is read: the tests below can tell."""
        assert Recording.load(recording).traces[0].blocks == ("a.0", "a.1")

    def test_cut_and_changed(self, recording):
        """Cut at many lengths, or with a byte changed: refused, or read as it was."""
        data = recording.read_bytes()
        for length in range(0, len(data), 61):
            recording.write_bytes(data[:length])
            assert refused(Recording.load, recording)
        for place in range(0, len(data), 29):
            recording.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
            refused(Recording.load, recording)

    def test_every_number_of_the_head(self, recording):
        """Every place of its head with odd values: refused in words, or read."""
        with np.load(recording) as file:
            head = json.loads(str(file["head"]))
        count, places = 0, list(leaves(head))
        for where in places:
            for odd in ODD[:-2]:
                rewritten(recording, head=np.array(json.dumps(changed(head, where, odd))))
                count += refused(Recording.load, recording) is not None
        assert count > 0.6 * len(places) * len(ODD[:-2])

    @pytest.mark.parametrize("name", ["ranges", "grams", "norms", "steps", "times", "block_ms"])
    def test_arrays(self, recording, name):
        """Arrays that are missing, of another form, or of texts."""
        for odd in (
            None,
            np.array(1.0),
            np.ones((7, 7)),
            np.array(["a"]),
            np.array([]),
            np.ones((2, 3, 3, 1)),
            np.array([1j]),
        ):
            original = recording.read_bytes()
            rewritten(recording, **{f"0.{name}": odd})
            assert refused(Recording.load, recording), odd
            recording.write_bytes(original)

    def test_code_is_not_run(self, recording, tmp_path):
        """Pickled objects, as a member, as an array of objects, or as the whole file."""
        harm = Harm(str(tmp_path / "harm"))
        original = recording.read_bytes()
        rewritten(recording, head=np.array([harm], dtype=object))
        assert refused(Recording.load, recording)
        recording.write_bytes(pickle.dumps(harm))
        assert refused(Recording.load, recording)
        recording.write_bytes(original)
        with zipfile.ZipFile(recording, "a") as file:
            file.writestr("code.npy", pickle.dumps(harm))
        refused(Recording.load, recording)
        assert not (tmp_path / "harm").exists()

    def test_bombs(self, recording):
        """An array that claims 8 TB, and one of zeros that would unpack to a thousand times the file's size."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
        original = recording.read_bytes()
        with zipfile.ZipFile(recording, "a") as file:
            file.writestr("0.more.npy", header.getvalue())
        assert refused(Recording.load, recording)
        recording.write_bytes(original)
        with zipfile.ZipFile(recording, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("0.more.npy", bytes(2**27))
        assert "unpacks to" in refused(Recording.load, recording)
        recording.write_bytes(header.getvalue())
        assert refused(Recording.load, recording)


class TestJournals:
    @pytest.mark.parametrize("name", ["purpose.json", "evaluations.jsonl"])
    @pytest.mark.parametrize(
        "data",
        [b"\0\n", b"[]\n", b"null\n", b"[" * 100_000 + b"\n", b'{"key": 1}\n',
         b'{"key": "a", "x": {"float": "text"}}\n',
         b'{"key": "a", "x": {"float": ' + b"9" * 400 + b"}}\n", b'{"key": "a", "x": ' + b"9" * 5000 + b"}\n",
         b'{"key": "a", "x": {"float": []}}\n', b"\xff\xfe\n", b'{"kind": "Journal", "schema": 1, "purpose": 7}\n'],
        ids=lambda data: repr(data[:30]),
    )  # fmt: skip
    def test_damaged(self, tmp_path, name, data):
        """Its purpose or a line of its evaluations is something else: an error that names the file and the remedy."""
        folder = tmp_path / "journal"
        Journal.open(folder, {"steps": 4}).keep_evaluation("a", {"psnr": 1.0})
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"(?s)journal.*(delete|another)") as caught:
            Journal.open(folder, {"steps": 4})
        assert type(caught.value) is InvalidSetting

    def test_code_in_its_arrays_is_not_run(self, tmp_path, recording):
        """The samples of a journal, pickled: refused."""
        folder, harm = tmp_path / "journal", Harm(str(tmp_path / "harm"))
        journal = Journal.open(folder, {"steps": 4})
        journal.keep_recording(Recording.load(recording), [np.ones(3)])
        np.savez(folder / "reference.npz", arr_0=np.array([harm], dtype=object))
        with pytest.raises(ValueError, match=r"reference\.npz cannot be read"):
            Journal.open(folder, {"steps": 4}).recording()
        assert not (tmp_path / "harm").exists()


@pytest.mark.on("dithooks demo")
def test_command_line(tmp_path, capsys, monkeypatch):
    """``dithooks demo --plan`` with such files: one line that names the file, exit code 2, no traceback."""
    monkeypatch.chdir(tmp_path)
    data = changed(json.loads(written("plan")), ("pieces", 0, "steps"), "\n")
    texts = {"deep": b"[" * 100_000, "empty": b"", "binary": b"\xff\xfe\x00", "digits": b"9" * 5000,
             "kind": b"{}", "lines": json.dumps(data).encode()}  # fmt: skip
    paths = [tmp_path / f"{name}.json" for name in texts]
    for path, data in zip(paths, texts.values(), strict=True):
        path.write_bytes(data)
    for path in [*paths, tmp_path, tmp_path / "nothing.json"]:
        assert main(["demo", "--plan", str(path), "--pairs", "1"]) == 2
        said = [
            line for line in capsys.readouterr().err.strip().splitlines() if "torch" not in line
        ]  # what imports say
        assert len(said) == 1, said
        assert said[0].startswith("dithooks: error: ")
        assert path.name in said[0]
    assert not (tmp_path / "demo.png").exists()
