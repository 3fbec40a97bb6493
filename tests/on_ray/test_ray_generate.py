"""Batches of prompts drawn with Ray Data: a real one, whose processes are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")

import pyarrow.dataset  # noqa: E402
import pyarrow.fs as arrow_fs  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402
import ray_drawers  # noqa: E402
from ray_drawers import load_nothing, load_slides, one_too_many, resources  # noqa: E402

from dithooks import DitCacheConfig, dit_cache  # noqa: E402
from dithooks.config.transformer_plan import TransformerPlan  # noqa: E402
from dithooks.demo import PLANS, load_pipeline, load_plan  # noqa: E402
from dithooks.policies.conditional import Conditional  # noqa: E402
from dithooks.progress_bars import _Lines, _Rich, _Tqdm  # noqa: E402
from dithooks.ray import decoded, generate, read, read_prompts  # noqa: E402
from dithooks.ray.actor import DrawingActor, error_of, pack_chunk, unpack_results  # noqa: E402
from dithooks.ray.attempts import AttemptLog  # noqa: E402
from dithooks.ray.files import Folder, locked  # noqa: E402
from dithooks.ray.job import Job, differences, versions_here  # noqa: E402
from dithooks.ray.job_progress import ProgressActor, bars_of  # noqa: E402
from dithooks.ray.output import LOCK, chunks_in, scan_rows  # noqa: E402
from dithooks.ray.samples import encoded, samples_in  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_generate.py"
CAPTIONS = ["slice of pizza", "cat face", "watermelon", "taxi", "red heart", "zyzzyva", "sun", "dog face"]
BAD = 5  # a word that the demo has never seen
HALF = DitCacheConfig(1, 2, 0, 5)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two processors, and a GPU as far as Ray is told."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(ROOT)])
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the actors, so that sums are taken in the same order
    yield
    torch.set_num_threads(threads)
    ray.shutdown()


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(folder, *texts):
    return lines(folder / "prompts.jsonl", [{"prompt": text} for text in texts])


def statuses(out):
    return {row["id"]: row["status"] for row in read(out, ["id", "status"]).to_pylist()}


def kill_one(out, after, killed):
    """End a process that is at a call, when so many files are there."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if len(list(out.glob("0*.parquet"))) >= after:
            for path in (out / "_underway").glob("0*.json"):
                told = json.loads(path.read_text())
                if any(key != '["write"]' for key in told["calls"]):
                    os.kill(told["pid"], signal.SIGKILL)
                    killed.append(told)
                    return
        time.sleep(0.02)


# -- the whole ---------------------------------------------------------------------------------------------------


def test_a_job_on_two_actors_of_which_one_is_killed(tmp_path):
    """Every row is there once, with the very picture that is drawn in this process; what failed, with its error."""
    out, killed = tmp_path / "out", []
    file = lines(tmp_path / "p.jsonl", [{"id": f"n{n}", "prompt": p, "n": n} for n, p in enumerate(CAPTIONS)])
    killer = threading.Thread(target=kill_one, args=(out, 1, killed))
    killer.start()
    report = generate(
        file, out, load_pipeline, PLANS / "2x.json", actors=2, num_gpus=0.5, rows_per_file=2, verbose=False
    )
    killer.join()
    assert len(killed) == 1
    assert (report.rows, report.drawn, report.failed, report.skipped) == (8, 7, 1, 0)
    assert not report.complete
    assert report.blocks_total == 2 * report.blocks_run
    assert sum(each.drawn for each in report.actors.values()) == 7
    assert killed[0]["actor"] in report.actors
    assert len(report.actors) == 2

    table = read(out)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [f"n{n}" for n in range(8)]
    assert [row["n"] for row in rows] == list(range(8))
    assert [row["prompt"] for row in rows] == CAPTIONS
    bad = rows.pop(BAD)
    assert (bad["status"], bad["picture"]) == ("failed", None)
    assert bad["error"].startswith("InvalidSetting: caption 'zyzzyva': the demo has never seen")
    assert len(list(out.glob("*.parquet"))) == 4
    assert list((out / "_underway").iterdir()) == []

    pipe, plan = load_pipeline(), load_plan("2x")
    pipe.set_progress_bar_config(disable=True)
    with dit_cache(pipe, plan):
        for row in rows:
            drawn = pipe([row["prompt"]], generator=[torch.Generator("cpu").manual_seed(row["seed"])]).images[0]
            assert (row["status"], row["error"], row["format"]) == ("ok", None, "png")
            assert row["picture"] == encoded(drawn)[0]
            assert decoded(row["picture"], row["format"]).size == (32, 32)
            assert (row["blocks_run"], row["blocks_total"]) == (336, 672)  # 14 of 28 steps
            assert row["seconds"] > 0

    told = json.loads(parquet.read_schema(next(out.glob("*.parquet"))).metadata[b"dithooks"])
    assert told["versions"]["torch"] == torch.__version__
    assert told["purpose"]["plan"] == json.loads(plan.to_json())
    assert pyarrow.dataset.dataset(out).count_rows() == 8  # nothing but rows, for others that read folders

    again = generate(file, out, load_pipeline, plan, verbose=False)
    assert (again.drawn, again.failed, again.skipped, again.failed_before) == (0, 0, 8, 1)


def test_the_example_whose_driver_is_killed(tmp_path):
    """From the shell: started again it goes on, and what was done is not drawn again."""
    file, out = prompts(tmp_path, *CAPTIONS[:6]), tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, EXAMPLE, file, out, "--plan", "2x", "--actors", "2", "--rows-per-file", "1"]
    given = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True, "cwd": tmp_path}
    command = [*map(str, command), "--address", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **given) as driver:
        end = time.monotonic() + 120
        while len(list(out.glob("0*.parquet"))) < 2 and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        with pytest.raises(RuntimeError, match="another process is at work on this job"):
            generate(file, out, load_pipeline, verbose=False)
        driver.kill()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.parquet")}
    assert 2 <= len(there) < 6
    done = subprocess.run(command, capture_output=True, check=False, **given)
    assert done.returncode == 3, done.stderr  # a row failed
    assert f"{6 - len(there)} of {6 - len(there)} rows" in done.stderr
    assert f"6 rows in {out}: " in done.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    assert list(statuses(out)) == list(range(6))
    assert [row_id for row_id, status in statuses(out).items() if status == "failed"] == [BAD]


def test_rows_that_fail_in_every_way(tmp_path):
    """Errors, memory, a device that fails, a process that ends: only that row is lost, and it can be tried again."""
    for word in ray_drawers.ERRORS:
        (tmp_path / word).touch()
    texts = ["a", "wrong", "full", "b", "ended", "c", "device", "d", "e", None, "f", "g"]
    file, out = prompts(tmp_path, *texts), tmp_path / "out"
    given = {"options": {"folder": str(tmp_path)}, "batch_size": 2, "actors": 2, "verbose": False}
    report = generate(file, out, load_slides, HALF, rows_per_file=2, **given)
    errors = {row["prompt"]: row["error"] for row in read(out).to_pylist() if row["status"] == "failed"}
    assert errors == {
        "wrong": "LookupError: nothing to draw",
        "full": "OutOfMemoryError: no memory left",
        "ended": "the process that drew it ended 3 times",
        None: "ValueError: the prompt is null",
    }
    assert (report.drawn, report.failed) == (8, 4)
    calls = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len({call.split()[0] for call in calls}) >= 5  # processes
    counts = {
        word: sum(call.split()[1] == word for call in calls) for word in ("a+wrong", "a", "ended+c", "ended", "f+g")
    }
    assert counts == {"a+wrong": 1, "a": 1, "ended+c": 1, "ended": 3, "f+g": 1}

    assert (report.blocks_run, report.blocks_total) == (7 * 15, 7 * 20)  # a call of two rows counts once
    before = read(out)
    for word in ("wrong", "ended"):
        (tmp_path / word).unlink()
    (tmp_path / "log").unlink()
    report = generate(file, out, load_slides, HALF, retry_failed=True, **given)
    assert (report.drawn, report.failed, report.skipped, report.failed_before) == (2, 2, 8, 0)
    assert [row_id for row_id, status in statuses(out).items() if status == "failed"] == [2, 9]
    calls = (tmp_path / "log").read_text().split("\n")[:-1]
    assert {word for call in calls for word in call.split()[1].split("+")} == {"wrong", "full", "ended"}
    after = {row["id"]: row["picture"] for row in read(out).to_pylist()}
    assert all(after[row["id"]] == row["picture"] for row in before.to_pylist() if row["status"] == "ok")
    pictures = [picture for picture in after.values() if picture is not None]
    assert len(set(pictures)) == 10  # each has noise of its own

    _refusals(tmp_path, file, out, given)


def _refusals(tmp_path, file, out, given):
    """A folder goes on with the very same job only."""
    for changed, said in (
        ({"seed": 1}, r"seed: 0 there, 1 here"),
        ({"batch_size": 1}, r"batch_size: 2 there, 1 here"),
        ({"options": {}}, r"options: \{.*\} there, \{\} here"),
        ({"draw": resources}, r"draw: null there, \"ray_drawers:resources\" here"),
    ):
        with pytest.raises(ValueError, match=f"holds another job .*{said}.*give another folder"):
            generate(file, out, load_slides, HALF, **{**given, **changed})
    with pytest.raises(ValueError, match=r"plan: .* there, null here"):
        generate(file, out, load_slides, None, **given)
    with pytest.raises(ValueError, match=r"load: .* there, .ray_drawers:load_nothing. here"):
        generate(file, out, load_nothing, HALF, **given)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    with pytest.raises(ValueError, match=r"row 3 of the prompts has the prompt 'other', and .* drawn with 'b'"):
        generate(lines(tmp_path / "q.jsonl", [*rows[:3], {"prompt": "other"}]), out, load_slides, HALF, **given)
    with pytest.raises(ValueError, match=r"has the prompt 'found', and .* failed with None: retry_failed=True draws"):
        generate(lines(tmp_path / "q.jsonl", [*rows[:9], {"prompt": "found"}]), out, load_slides, HALF, **given)
    with pytest.raises(ValueError, match="row 0 of the prompts has the seed 5"):
        generate(lines(tmp_path / "q.jsonl", [{"prompt": "a", "seed": 5}]), out, load_slides, HALF, **given)
    with pytest.raises(ValueError, match=r"the ids in .* are of type int, those of the prompts str"):
        generate(lines(tmp_path / "q.jsonl", [{"id": "0", "prompt": "a"}]), out, load_slides, HALF, **given)
    head = json.loads((out / "_job.json").read_text())
    head["versions"]["torch"] = "1.0"
    (out / "_job.json").write_text(json.dumps(head))
    with pytest.warns(UserWarning, match=r"begun with other versions \(torch: .1.0. there"):
        assert generate(file, out, load_slides, HALF, **given).skipped == 12
    (out / "_job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"_job\.json cannot be read"):
        generate(file, out, load_slides, HALF, **given)
    (out / "_job.json").unlink()
    with pytest.raises(ValueError, match=r"holds .*parquet but no _job.json"):
        generate(file, out, load_slides, HALF, **given)


def test_what_an_actor_takes_and_other_samples(tmp_path):
    """Parts of GPUs and several threads, with a call and columns of one's own; arrays come back as they were."""
    file = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": list("abcd"), "letter": list("wxyz")}), file)
    report = generate(
        file, tmp_path / "out", "ray_drawers:load_slides", draw=resources, actors=(1, 2), num_cpus=1, num_gpus=0.25
    )
    assert (report.drawn, report.blocks_total, report.complete) == (4, 0, True)
    rows = read(tmp_path / "out").to_pylist()
    assert [row["format"] for row in rows] == ["npy"] * 4
    drawn = [decoded(row["picture"], row["format"]).tolist() for row in rows]
    assert drawn == [[1, 0.25, 1, ord(letter)] for letter in "wxyz"]
    assert {row["blocks_run"] for row in rows} == {None}


def test_what_ends_a_job(tmp_path):
    """What no row can be drawn with is raised as it is, before any row is kept; and no actor stays."""
    file = prompts(tmp_path, "a", "b", "c")
    plan = load_plan("2x")
    for number, (load, given, error, said) in enumerate(
        (
            (load_slides, {"plan": plan}, ValueError, "the plan was made for another model, FluxTransformer2DModel"),
            (load_nothing, {}, FileNotFoundError, "there are no weights"),
            ("ray_drawers:load_others", {}, ValueError, "ray_drawers has no function 'load_others'"),
            (load_slides, {"options": {"steps": 4}}, TypeError, "Slides takes no 'steps', only prompts, generator"),
            (load_slides, {"draw": one_too_many}, RuntimeError, "1 prompts drew 2 samples"),
        )
    ):
        out = tmp_path / f"out{number}"
        with pytest.raises(error, match=said) as raised:
            generate(file, out, load, **given, verbose=False)
        assert "Traceback" in str(raised.value.__cause__)
        assert chunks_in(Folder(str(out))) == []
    end = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


def test_an_actor_whose_process_ended_before_it_could_answer(tmp_path):
    """What is written is not drawn again; a pipeline that never loads is not loaded for ever."""
    folder, job = Folder(str(tmp_path)), Job(load_slides, HALF, {"folder": str(tmp_path)}, batch_size=3)
    (tmp_path / "wrong").touch()
    rows = read_prompts(prompts(tmp_path, "a", "wrong", "b"))
    batch = pack_chunk("00000000-a.parquet", rows)
    first, second = (unpack_results(DrawingActor(job, str(tmp_path))(batch))[0] for _ in range(2))
    assert (first.ok, first.failed, first.blocks_run, first.blocks_total) == (2, 1, 30, 40)
    assert first == second
    assert len((tmp_path / "log").read_text().splitlines()) == 4  # all three, then each, once
    for _ in range(3):
        AttemptLog(folder, "load-", "").begin(["load"])
    told = unpack_results(DrawingActor(job, str(tmp_path))(batch))[0]
    with pytest.raises(RuntimeError, match=r"the process that loaded the pipeline on .* ended 3 times"):
        raise error_of(told)


def test_a_node_with_other_versions_is_refused(tmp_path):
    """Less the build: a driver without an accelerator has another one of PyTorch."""
    here = versions_here()
    Job(load_slides, versions={**here, "torch": here["torch"].partition("+")[0] + "+other"}).check_versions()
    with pytest.raises(RuntimeError, match=r"has torch .*, and the driver 1\.0: install the same on all nodes"):
        Job(load_slides, versions={**here, "torch": "1.0"}).check_versions()


# -- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"actors": 0}, ValueError, "actors=0 is too small: give 1 or more"),
        ({"actors": (3, 2)}, ValueError, "the least is more than the most"),
        ({"actors": "2"}, TypeError, "actors='2' must be a whole number"),
        ({"num_gpus": -1}, ValueError, "num_gpus=-1 is out of range"),
        ({"num_gpus": 1.5}, ValueError, "num_gpus=1.5: Ray gives a part of one"),
        ({"num_cpus": None}, TypeError, "num_cpus=None must be a number"),
        ({"batch_size": 0}, ValueError, "batch_size=0 is too small"),
        ({"rows_per_file": 0}, ValueError, "rows_per_file=0 is too small"),
        ({"seed": "a"}, TypeError, "seed='a' must be a whole number"),
        ({"options": {"prompt": "a"}}, ValueError, "options has 'prompt', which comes from the rows"),
        ({"options": {"latents": torch.zeros(1)}}, TypeError, r"options\['latents'\]=.* cannot be kept"),
        ({"plan": 2}, TypeError, "plan=2 is no plan"),
        ({"plan": "none.json"}, FileNotFoundError, "plan='none.json': there is no such file"),
        ({"load": "nothing"}, ValueError, "load='nothing' names no function"),
        ({"load": 3}, TypeError, "load=3 cannot be called"),
        ({"draw": 3}, TypeError, "draw=3 cannot be called"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, given, error, said):
    file = prompts(tmp_path, "a")
    with pytest.raises(error, match=said):
        generate(file, tmp_path / "out", **{"load": load_slides, **given})
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="is a file: give a folder"):
        generate(prompts(tmp_path, "a"), tmp_path / "prompts.jsonl", load_slides)
    with pytest.raises(FileNotFoundError, match="holds no rows"):
        read(tmp_path / "nowhere")


# -- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_of_all_formats_are_the_same(tmp_path):
    rows = [{"id": "a", "prompt": 'one, "two"\nthree', "size": 1}, {"id": "b", "prompt": "2025-01-31", "size": 2}]
    lines(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text('id,prompt,size\na,"one, ""two""\nthree",1\nb,2025-01-31,2\n')
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = [read_prompts(tmp_path / f"p.{ending}") for ending in ("jsonl", "json", "csv", "parquet")]
    assert found[0].drop_columns(["seed"]).to_pylist() == [{"row": n, **row} for n, row in enumerate(rows)]
    assert all(table.equals(found[0]) for table in found)
    assert read_prompts((tmp_path / "p.jsonl").as_uri()).equals(found[0])
    assert read_prompts(tmp_path / "p.csv", seed=1)["seed"] != found[0]["seed"]


def test_ids_and_seeds_of_a_file(tmp_path):
    table = read_prompts(lines(tmp_path / "p.jsonl", [{"prompt": "a", "seed": 3}, {"prompt": None, "n": 1}]))
    assert table["id"].to_pylist() == [0, 1]
    assert table["prompt"].to_pylist() == ["a", None]
    assert table["n"].to_pylist() == [None, 1]
    seeds = table["seed"].to_pylist()
    assert seeds[0] == 3
    assert 0 <= seeds[1] < 2**63
    (tmp_path / "p.csv").write_text("id,prompt\n007,null\n")
    assert read_prompts(tmp_path / "p.csv").to_pylist()[0] | {"seed": 0} == {
        "row": 0, "id": "007", "prompt": "null", "seed": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        ("p.txt", "a", ValueError, "ends in '.txt': give a file of .parquet, .jsonl"),
        ("p", "a", ValueError, "ends in 'nothing'"),
        ("p.jsonl", "", ValueError, "has no column 'prompt': there are none"),
        ("p.csv", "", ValueError, "has no column 'prompt': there are none"),
        ("p.csv", "prompt\n", ValueError, "has no rows"),
        ("p.jsonl", '{"caption": "a", "id": 1}', ValueError, "no column 'prompt': there are caption, id; rename"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', ValueError, "line 2 is not JSON"),
        ("p.jsonl", '"a"', ValueError, "line 1 is no object: 'a'"),
        ("p.json", '[{"prompt": "a"}, 3]', ValueError, "entry 2 is no object: 3"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', ValueError, "column 'prompt' has values of several kinds"),
        ("p.jsonl", '{"prompt": 3}', TypeError, "the column 'prompt' holds int64: give texts"),
        ("p.csv", "id,prompt\na,x\nb,y\na,z\n", ValueError, "several rows have the id 'a': no two may be alike"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b"}', ValueError, "row 1 has no id"),
        ("p.jsonl", '{"prompt": "a", "id": 1.5}', TypeError, "the column 'id' holds double"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', TypeError, "the column 'seed' holds double"),
        ("p.csv", "prompt,status\na,b\n", ValueError, "has a column 'status', as the output will: rename it"),
        ("p.parquet", "no parquet", ValueError, "cannot be read as .parquet"),
        ("p.csv", "prompt\na,b\n", ValueError, "cannot be read as .csv"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, name, text, error, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=said):
        read_prompts(tmp_path / name)


def test_prompts_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_prompts(tmp_path / "p.csv")


# -- the output --------------------------------------------------------------------------------------------------


def test_half_a_file_is_never_met(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write("a", b"whole")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("ended")))
    with pytest.raises(OSError, match="ended"):
        folder.write("a", b"other")
    assert (folder.names(), folder.read("a")) == (["a"], b"whole")
    (tmp_path / ".x.0123456789ab.part.json").touch()
    folder.tidy()
    assert folder.names() == ["a"]


def test_rows_that_are_there_twice_are_kept_once(tmp_path):
    """As two drivers leave them where a folder cannot be locked."""
    columns = {"prompt": ["p", "q"], "seed": [1, 2], "status": ["ok", "failed"]}
    parquet.write_table(pa.table({"id": ["a", "b"], **columns}), tmp_path / "00000000-a.parquet")
    parquet.write_table(pa.table({"id": ["b", "c"], **columns}), tmp_path / "00000001-a.parquet")
    parquet.write_table(pa.table({"id": ["a", "b"], **columns}), tmp_path / "00000002-a.parquet")
    folder = Folder(str(tmp_path))
    found = scan_rows(folder)
    assert {row_id: row.file[:8] for row_id, row in found.items()} == {"a": "0" * 8, "b": "0" * 8, "c": "00000001"}
    assert [parquet.read_table(tmp_path / name)["id"].to_pylist() for name in chunks_in(folder)] == [["a", "b"], ["c"]]
    assert scan_rows(folder) == found
    (tmp_path / "00000001-a.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"cannot be read .* delete it, and its rows are drawn again"):
        scan_rows(folder)


def test_a_filesystem_that_is_no_disk():
    fsspec = pytest.importorskip("fsspec")
    memory = arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(fsspec.filesystem("memory")))
    folder = Folder("/job", memory)
    assert folder.local is None
    folder.make()
    AttemptLog(folder, "chunk", "a").begin(["x"])
    assert AttemptLog(folder, "chunk", "a").crashes(["x"]) == 1
    AttemptLog(folder, "chunk", "a").delete()
    folder.write("a.parquet", b"1")
    folder.write("a.parquet", b"2")
    assert (folder.names(), folder.names("_underway"), folder.read("a.parquet")) == (["a.parquet"], [], b"2")
    with locked(folder, LOCK), locked(folder, LOCK):
        folder.delete("a.parquet")
    assert not folder.has("a.parquet")


def test_calls_that_did_not_return_are_told_apart(tmp_path):
    folder = Folder(str(tmp_path))
    first = AttemptLog(folder, "chunk", "a")
    first.begin([1])
    first.returned([1])
    first.begin([2])
    first.note_error([2], "the device has failed")
    again = AttemptLog(folder, "chunk", "a")
    assert [again.crashes([n]) for n in (1, 2)] == [0, 1]
    assert again.last_error([2]) == " (the device has failed)"
    assert json.loads((tmp_path / "_underway" / "chunk.json").read_text())["pid"] == os.getpid()


# -- samples and progress ----------------------------------------------------------------------------------------


def test_samples_come_back():
    video = torch.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).to(torch.uint8)
    assert (decoded(*encoded(list(video))) == video.numpy()).all()
    picture = video[0].numpy()
    assert (np.asarray(decoded(*encoded(picture))) == picture).all()
    assert (np.asarray(decoded(*encoded(picture / 255.0))) == picture).all()
    latents = torch.randn(4, 3)
    assert (decoded(*encoded(latents)) == latents.numpy()).all()
    assert decoded(*encoded(latents.bfloat16())).dtype == np.float32
    assert encoded(torch.randn(4, 4, 3))[1] == "npy"  # values that no picture has
    assert len(samples_in(torch.zeros(3, 2))) == 3
    for wrong, error in (("a text", TypeError), (np.array(["a"]), TypeError), ([], TypeError)):
        with pytest.raises(error, match="sample"):
            encoded(wrong)
    with pytest.raises(TypeError, match="the pipeline returned int"):
        samples_in(3)
    with pytest.raises(ValueError, match="format='mp4' is not one of png, npy"):
        decoded(b"", "mp4")


@pytest.mark.parametrize("kind", [_Rich, _Tqdm, lambda: _Lines(10.0)])
def test_progress_shows_each_actor_and_all(kind, capsys):
    reporter = ProgressActor()
    reporter.report("chunk a", "1f2e", 2, 0)
    reporter.report("chunk b", "9c8d", 3, 1)
    display = kind()
    display.show(*bars_of({}, 8))
    display.show(*bars_of(reporter.progress(), 8))
    display.close()
    said = capsys.readouterr().err
    assert "1f2e" in said
    assert "9c8d" in said
    assert "3, 1 failed" in said
    assert "5 of 8" in said or "5/8" in said


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_without_the_extra_it_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; import dithooks.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert f"dithooks.ray needs {package}, which is not installed: pip install 'dithooks[ray]'" in done.stderr


def test_plans_that_differ_in_a_further_range_are_told_apart():
    """Steps 1 … 3 compute nothing, the last blocks and the first ones, or nothing and then the first ones alone."""
    ranges = [
        TransformerPlan("", first, 2, 4, bits, tuple(None if bit else (1.0,) for bit in bits), None)
        for first, bits in ((0, (1, 0, 0, 1)), (2, (1, 0, 1, 0)), (2, (1, 0, 0, 0)))
    ]
    plan = load_plan("2x")
    plan = replace(plan, made=replace(plan.made, steps=4), pieces=(replace(ranges[0], more_ranges=(ranges[1],)),))
    other = replace(plan, pieces=(replace(ranges[0], more_ranges=(ranges[2],)),))
    stored, ours = ({"plan": json.loads(each.to_json())} for each in (plan, other))
    (told,) = differences(stored, ours)
    there, here = "CachePlan FluxTransformer2DModel ●○◑◒ there", "CachePlan FluxTransformer2DModel ●○○◒ here"
    assert told == f"plan: {there}, {here}"


def test_plans_that_differ_in_steps_of_one_branch_alone_are_told_apart():
    bits, plan = (1, 0, 1, 1), load_plan("2x")
    weights = tuple(None if bit else (1.0,) for bit in bits)
    stored, ours = (
        {"plan": json.loads(replace(plan, made=replace(plan.made, steps=4), pieces=(piece,)).to_json())}
        for piece in (
            TransformerPlan("", 0, 4, 4, bits, weights, None, payload="output", conditional=conditional)
            for conditional in (None, Conditional(0, (0, 0, 1, 0)))
        )
    )
    (told,) = differences(stored, ours)
    assert told == "plan: CachePlan FluxTransformer2DModel ●○●● there, CachePlan FluxTransformer2DModel ●○◐● here"
