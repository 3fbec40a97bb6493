"""The output folder of a job: the rows that are done, and the check that they are this job's."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as parquet  # type: ignore[import-untyped]

from ..config.safe_json import strict
from ..errors import InvalidSetting
from ..stats.user_warning import warn_user
from ..validation import shown
from .files import Folder
from .job import SCHEMA, Job, differences

# What begins with an underscore is passed over by what reads a folder of parquet files
HEAD, LOCK, KIND = "_job.json", "_lock", "dithooks.ray job"
METADATA = b"dithooks"
OK, FAILED = "ok", "failed"
READERS = 16  # files at a time: of a store far away, most of the time is waiting
RESULT = (
    ("status", pa.string()),
    ("error", pa.string()),
    ("picture", pa.large_binary()),  # videos: more than 2 GB a file is possible
    ("format", pa.string()),
    ("seconds", pa.float64()),
    ("blocks_run", pa.float64()),  # of a call, divided by its rows
    ("blocks_total", pa.float64()),
    ("remarks", pa.list_(pa.string())),
    ("actor", pa.string()),
)


@dataclass(frozen=True)
class OutputRow:
    """A row of the output: its file, the prompt and seed that it was drawn from, and whether it failed."""

    file: str
    prompt: str | None
    seed: int
    failed: bool


def claim_folder(folder: Folder, job: Job, rows_per_file: int) -> int:
    """Check that a folder is new or this job's, and write the job's head to a new one.

    Returns:
        The rows per file that were chosen when the job began.

    Raises:
        ValueError: the folder is another job's, or holds other files.

    Warns:
        UserWarning: the job was begun with other versions.
    """
    purpose = job.purpose()
    if (data := folder.read(HEAD)) is not None:
        try:
            stored = strict(data.decode())
            if (stored["kind"], stored["schema"]) != (KIND, SCHEMA):
                raise InvalidSetting(f"it is a {stored['kind']} of schema {stored['schema']}, not {KIND} of {SCHEMA}")
            former, known, chosen = stored["purpose"], stored["versions"], int(stored["rows_per_file"])
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidSetting(f"{folder.path(HEAD)} cannot be read ({error}): give another folder as out") from None
        if other := differences(former, purpose):
            raise InvalidSetting(
                f"out={shown(folder.place)} holds another job ({'; '.join(other)}): give another folder"
            )
        if other := differences(known, job.versions):
            warn_user(f"{folder.place} was begun with other versions ({'; '.join(other)}): pictures may differ")
        return chosen
    if names := chunks_in(folder):
        raise InvalidSetting(
            f"out={shown(folder.place)} holds {names[0]} but no {HEAD} that names its job: give another folder"
        )
    head = {"schema": SCHEMA, "kind": KIND, "purpose": purpose, "rows_per_file": rows_per_file}
    text = json.dumps({**head, "versions": dict(job.versions)}, indent=2, ensure_ascii=False)
    folder.write(HEAD, f"{text}\n".encode())
    return rows_per_file


def chunks_in(folder: Folder) -> list[str]:
    """Return the names of the files that hold rows, in the order of the prompts."""
    return [name for name in folder.names() if name.endswith(".parquet") and not name.startswith("_")]


def chunk_name(rows: pa.Table) -> str:
    """Return the name of the file of some rows. It depends on the rows only, so that a new attempt replaces it.

    Example:
        >>> chunk_name(pa.table({"row": [16, 17], "id": ["a", "b"]}))
        '00000016-3554d2b8a1e3.parquet'
    """
    ids = json.dumps(rows["id"].to_pylist()).encode()
    return f"{rows['row'][0].as_py():08d}-{hashlib.sha256(ids).hexdigest()[:12]}.parquet"


def write_rows(folder: Folder, name: str, rows: pa.Table, results: Sequence[Mapping[str, Any]], job: Job) -> None:
    """Write the results of a chunk's rows to a file, all at once."""
    table = rows
    for column, kind in RESULT:
        table = table.append_column(column, pa.array([result.get(column) for result in results], kind))
    head = {"versions": job.versions, "purpose": job.purpose()}
    table = table.replace_schema_metadata({METADATA: json.dumps(head, default=dict).encode()})
    _write(folder, name, table)


def read_rows(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file's rows.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with folder.filesystem.open_input_file(folder.path(name)) as file:
            return parquet.read_table(file, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise InvalidSetting(
            f"{folder.path(name)} cannot be read ({error}): delete it, and its rows are drawn again"
        ) from None


def scan_rows(folder: Folder) -> dict[Any, OutputRow]:
    """All rows that are there, by their ids. Of one that is there twice, the later file loses it.

    That happens where two drivers were at one folder that could not be locked.
    """
    found: dict[Any, OutputRow] = {}
    names = chunks_in(folder)
    with ThreadPoolExecutor(READERS) as readers:
        tables = readers.map(lambda name: read_rows(folder, name, ("id", "prompt", "seed", "status")), names)
    for name, table in zip(names, tables, strict=True):
        columns, twice = table.to_pydict(), set()
        for row_id, prompt, seed, status in zip(*columns.values(), strict=True):
            if row_id in found:
                twice.add(row_id)
            else:
                found[row_id] = OutputRow(name, prompt, seed, status == FAILED)
        if twice:
            drop_rows(folder, name, twice)
    return found


def drop_rows(folder: Folder, name: str, ids: Collection[Any]) -> None:
    """Remove rows from a file, or the whole file if it has no others."""
    table = read_rows(folder, name)
    table = table.filter(pa.array([row_id not in ids for row_id in table["id"].to_pylist()], pa.bool_()))
    if table.num_rows:
        _write(folder, name, table)
    else:
        folder.delete(name)


def check_same(folder: Folder, prompts: pa.Table, there: Mapping[Any, OutputRow], retry_failed: bool) -> None:
    """Check that the rows that are done have the prompts and seeds of the prompts file.

    Raises:
        ValueError: a row has others.
    """
    ids = prompts["id"].to_pylist()
    if there and type(next(iter(there))) is not type(ids[0]):
        kinds = [type(each).__name__ for each in (next(iter(there)), ids[0])]
        raise InvalidSetting(
            f"the ids in out={shown(folder.place)} are of type {kinds[0]}, those of the prompts {kinds[1]}"
        )
    for row_id, prompt, seed in zip(ids, prompts["prompt"].to_pylist(), prompts["seed"].to_pylist(), strict=True):
        row = there.get(row_id)
        if row is None or (row.failed and retry_failed):
            continue
        for name, then, now in (("prompt", row.prompt, prompt), ("seed", row.seed, seed)):
            if then != now:
                remedy = "retry_failed=True draws it again" if row.failed else "give it another id, or another folder"
                done = "failed" if row.failed else "drawn"
                raise InvalidSetting(
                    f"row {shown(row_id)} of the prompts has the {name} {shown(now)}, and {row.file} in "
                    f"out={shown(folder.place)} holds it {done} with {shown(then)}: {remedy}"
                )


def _write(folder: Folder, name: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    plain = [column for column in table.column_names if column != "picture"]  # no two pictures are the same
    parquet.write_table(table, buffer, use_dictionary=plain, write_statistics=plain)
    folder.write(name, buffer.getvalue())
