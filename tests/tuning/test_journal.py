"""The journal of a search: what it keeps, what a killed process may leave, and several processes with one."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Net, Pipe, latents

from dithooks.errors import FileError
from dithooks.recording.rank_broadcast import broadcast_from_rank_0, is_rank_0
from dithooks.recording.record import record
from dithooks.tuning import journal as journal_module
from dithooks.tuning.journal import Journal

PURPOSE = {"fingerprint": "0123456789abcdef", "steps": 4, "size": (8, 8), "cost": None}
SAMPLES = [np.arange(12, dtype=np.float32).reshape(3, 4), np.full((2, 2, 3), 0.5, np.float32)]


@pytest.fixture
def recording():
    return record(Pipe(Net()), lambda pipe: pipe(latents(), steps=4))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "flux"


def evaluated(folder, *keys):
    journal = Journal.open(folder, PURPOSE)
    for number, key in enumerate(keys):
        journal.keep_evaluation(key, {"psnr": 40.0 + number, "seconds": [1.5, 1.25]})
    return folder / "evaluations.jsonl"


def test_an_evaluation_comes_back(folder):
    evaluated(folder, "a", "b")
    journal = Journal.open(str(folder), PURPOSE)
    assert journal.evaluation("b") == {"psnr": 41.0, "seconds": [1.5, 1.25]}
    assert journal.evaluation("c") is None
    journal.evaluation("b")["seconds"].clear()
    assert journal.evaluation("b")["seconds"] == [1.5, 1.25]


def test_the_later_of_two_counts(folder):
    evaluated(folder, "a", "b", "a")
    assert Journal.open(folder, PURPOSE).evaluation("a")["psnr"] == 42.0


def test_without_a_folder_it_is_remembered_only(tmp_path, monkeypatch, recording):
    monkeypatch.chdir(tmp_path)
    journal = Journal.open(None, PURPOSE)
    assert journal.recording() is None
    journal.keep_recording(recording, SAMPLES)
    journal.keep_evaluation("a", {"psnr": math.inf, "seconds": (1.5,)})
    assert journal.evaluation("a") == {"psnr": math.inf, "seconds": [1.5]}  # as if it had been read
    assert journal.recording().results == SAMPLES
    assert Journal.open(None, PURPOSE).evaluation("a") is None
    assert not list(tmp_path.iterdir())


def test_a_recording_comes_back_with_its_samples(folder, recording):
    journal = Journal.open(folder, PURPOSE)
    assert journal.recording() is None
    journal.keep_recording(recording, SAMPLES)
    assert all(a is b for a, b in zip(journal.recording().results, SAMPLES, strict=True))
    found = Journal.open(folder, PURPOSE).recording()
    assert (found.traces[0].grams == recording.traces[0].grams).all()
    assert (found.made, found.run_ms, found.sigmas) == (recording.made, recording.run_ms, recording.sigmas)
    assert len(found.results) == len(SAMPLES)
    for ours, theirs in zip(found.results, SAMPLES, strict=True):
        assert (ours == theirs).all()
        assert ours.dtype == theirs.dtype
    assert sorted(path.name for path in folder.iterdir()) == ["purpose.json", "recording.npz", "reference.npz"]


def test_more_than_ten_samples_keep_their_order(folder, recording):
    samples = [np.full((2,), number, np.float32) for number in range(23)]
    Journal.open(folder, PURPOSE).keep_recording(recording, samples)
    assert [each[0] for each in Journal.open(folder, PURPOSE).recording().results] == list(range(23))


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
VALUES = st.recursive(
    NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3).filter(lambda each: set(each) != {"float"})
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(
    key=st.text(),
    values=st.dictionaries(st.text().filter(lambda name: name != "key"), VALUES, max_size=4),
)
def test_every_value_survives_as_standard_json(key, values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal.open(folder, {})
    journal.keep_evaluation(key, values)
    found = Journal.open(folder, {}).evaluation(key)
    assert repr(found) == repr(journal.evaluation(key)) == repr(values)  # nan is not nan, but reads like it

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (line,) = (folder / "evaluations.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=refuse)


def test_numbers_of_numpy(folder):
    journal = Journal.open(folder, PURPOSE)
    journal.keep_evaluation("a", {"psnr": np.float64("-inf"), "n": np.int64(3), "s": np.array([1.5, np.inf])})
    assert Journal.open(folder, PURPOSE).evaluation("a") == {"psnr": -math.inf, "n": 3, "s": [1.5, math.inf]}


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"key": 1}, ValueError, "'plan a': give another name"),
        ({"psnr": 1 + 2j}, TypeError, "numbers, texts, None.*complex"),
        ({"psnr": [object()]}, TypeError, "numbers, texts"),
        ({1: 2.0}, TypeError, "give other texts"),
        ({"score": {"float": "inf"}}, TypeError, "'float'"),
    ],
)
def test_what_cannot_be_kept(folder, values, error, words):
    journal = Journal.open(folder, PURPOSE)
    with pytest.raises(error, match=words):
        journal.keep_evaluation("plan a", values)
    assert journal.evaluation("plan a") is None
    assert not (folder / "evaluations.jsonl").exists()


# -- purpose ----------------------------------------------------------------------------------------------------


def test_the_same_search_may_say_it_otherwise(folder):
    Journal.open(folder, PURPOSE)
    Journal.open(folder, {"cost": None, "size": [8, 8], "steps": 4, "fingerprint": PURPOSE["fingerprint"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 5}, r"\(steps: 4 there, 5 here\): give another folder"),
        ({"size": (8, 9), "cost": 1}, r"\(size: \[8, 8\] there, \[8, 9\] here; cost: null there, 1 here\)"),
        ({"seed": None}, r"\(seed: nothing there, null here\)"),
    ],
)
def test_another_search_is_refused(folder, change, words):
    path = evaluated(folder, "a")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        Journal.open(folder, {**PURPOSE, **change})
    assert path.read_bytes() == before


@pytest.mark.parametrize(("value", "error"), [(object(), TypeError), (math.nan, ValueError)])
def test_a_purpose_is_json(folder, value, error):
    with pytest.raises(error, match="give plain values"):
        Journal.open(folder, {"value": value})
    assert not folder.exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        Journal.open(tmp_path / "file", PURPOSE)


def test_a_journal_without_a_purpose_is_refused(folder):
    evaluated(folder, "a")
    (folder / "purpose.json").unlink()
    with pytest.raises(ValueError, match=r"has evaluations\.jsonl, but no purpose\.json"):
        Journal.open(folder, PURPOSE)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "kind": "Journal"}', '{"schema": 1, "kind": "Journal"}'])
def test_a_purpose_that_cannot_be_read(folder, text):
    Journal.open(folder, PURPOSE)
    (folder / "purpose.json").write_text(text)
    with pytest.raises(ValueError, match=r"purpose\.json cannot be read.*give another"):
        Journal.open(folder, PURPOSE)


def test_other_files_are_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    evaluated(folder, "a")
    assert (folder / "notes.txt").read_text() == "mine"


# -- what may have happened to it -------------------------------------------------------------------------------


def test_a_line_cut_off_anywhere_is_forgotten(folder):
    """Killed while it was writing: the lines before count, and what comes next is a line of its own."""
    whole = evaluated(folder, "a", "b").read_bytes()
    path, first = folder / "evaluations.jsonl", whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal.open(folder, PURPOSE)
        assert journal.evaluation("a")["psnr"] == 40.0
        assert journal.evaluation("b") is None
        journal.keep_evaluation("c", {"psnr": 42.0})
        assert Journal.open(folder, PURPOSE).evaluation("c") == {"psnr": 42.0}
        assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b'{"psnr": 1.0}', b'{"key": 3}', b"\xff", b'{"key": "c", "psnr": {"float": "much"}}']
)
def test_other_damage_is_named(folder, line):
    path = evaluated(folder, "a", "b")
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 2 .*delete the line"):
        Journal.open(folder, PURPOSE)
    path.write_bytes(b"\n".join([first, b"", second, b""]))  # as it said
    assert Journal.open(folder, PURPOSE).evaluation("b")["psnr"] == 41.0


@pytest.mark.parametrize("name", ["recording.npz", "reference.npz"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-40], lambda data: b"text" * 40])
def test_a_recording_that_cannot_be_read(folder, recording, name, damage):
    Journal.open(folder, PURPOSE).keep_recording(recording, SAMPLES)
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*give another"):
        Journal.open(folder, PURPOSE).recording()


def test_a_recording_without_its_samples_is_none(folder, recording):
    Journal.open(folder, PURPOSE).keep_recording(recording, SAMPLES)
    (folder / "reference.npz").unlink()
    assert Journal.open(folder, PURPOSE).recording() is None


@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError])
def test_what_is_broken_off_leaves_nothing_half(folder, recording, monkeypatch, what):
    def compress(file, **arrays):
        file.write(b"half")
        raise what

    journal = Journal.open(folder, PURPOSE)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", compress)
        with pytest.raises(what):
            journal.keep_recording(recording, SAMPLES)
    assert sorted(path.name for path in folder.iterdir()) == ["purpose.json", "reference.npz"]
    again = Journal.open(folder, PURPOSE)
    assert again.recording() is None
    again.keep_recording(replace(recording, run_ms=5.0), SAMPLES)
    assert Journal.open(folder, PURPOSE).recording().run_ms == 5.0


@pytest.mark.parametrize("length", [150, 1000, 5000])
def test_a_disk_that_is_full_within_a_line_leaves_nothing_of_it(folder, length):
    """A limit of the process in place of a disk: some bytes are still written, and then none."""
    resource = pytest.importorskip("resource")
    journal = Journal.open(folder, PURPOSE)
    journal.keep_evaluation("first", {"psnr": 1.0})
    kept = (folder / "evaluations.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 100, hard))
    try:
        with pytest.raises(FileError, match=r"evaluations\.jsonl cannot be written: File too large"):
            journal.keep_evaluation("second", {"failure": "x" * length})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "evaluations.jsonl").read_bytes() == kept
    journal.keep_evaluation("third", {"psnr": 3.0})
    again = Journal.open(folder, PURPOSE)
    assert [again.evaluation(key) for key in ("first", "second", "third")] == [{"psnr": 1.0}, None, {"psnr": 3.0}]


def test_what_was_kept_outlives_a_killed_process(folder):
    code = """
import os, signal, sys
from dithooks.tuning.journal import Journal
journal = Journal.open(sys.argv[1], {"steps": 4})
journal.keep_evaluation("a", {"psnr": 40.0})
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(folder)], timeout=120).returncode == 9
    assert Journal.open(folder, {"steps": 4}).evaluation("a") == {"psnr": 40.0}


# -- several processes ------------------------------------------------------------------------------------------


def test_one_process_agrees_with_itself_and_leads():
    value = object()
    assert broadcast_from_rank_0(value) is value
    assert is_rank_0()


def test_only_the_first_process_writes(folder, recording, monkeypatch):
    evaluated(folder, "a")
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write("torn")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(journal_module, "is_rank_0", lambda: False)
    other = Journal.open(folder, PURPOSE)
    assert other.evaluation("a")["psnr"] == 40.0
    other.keep_evaluation("b", {"psnr": 41.0})
    other.keep_recording(recording, SAMPLES)
    assert other.evaluation("b") == {"psnr": 41.0}
    assert other.recording().results == SAMPLES
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    Journal.open(folder / "new", PURPOSE).keep_evaluation("b", {})
    assert not (folder / "new").exists()


PEER = """
import json, os, sys
import numpy as np
import torch.distributed as dist
from dithooks.tuning.journal import Journal
from dithooks.recording.rank_broadcast import broadcast_from_rank_0, is_rank_0

rank, meet, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
assert is_rank_0() and broadcast_from_rank_0(rank) == rank  # before there is a group
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
journal = Journal.open(folder, {"steps": 4})
dist.barrier()
journal.keep_evaluation(f"by {rank}", {"psnr": 40.0 + rank})
dist.barrier()
large = broadcast_from_rank_0(np.full(100_000, rank))
values = rank, None if rank else "text", {"s": [rank + 0.5]}
found = [*map(broadcast_from_rank_0, values), int(large.sum())]
print(json.dumps([is_rank_0(), found, Journal.open(folder, {"steps": 4}).evaluation("by 1")]))
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo now and then aborts while it is taken down
"""


def test_two_processes(tmp_path):
    pytest.importorskip("torch.distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name resolves to
    meet, folder = tmp_path / "meet", tmp_path / "journal"
    arguments = [[sys.executable, "-c", PEER, str(rank), str(meet), str(folder)] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    peers = [subprocess.Popen(each, env=environment, **pipes) for each in arguments]
    try:
        said = [peer.communicate(timeout=120) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert [peer.returncode for peer in peers] == [0, 0], said
    first, second = (json.loads(out) for out, _ in said)
    assert first == [True, [0, "text", {"s": [0.5]}, 0], None]
    assert second == [False, [0, "text", {"s": [0.5]}, 0], None]
    assert [json.loads(line)["key"] for line in (folder / "evaluations.jsonl").read_text().splitlines()] == ["by 0"]
