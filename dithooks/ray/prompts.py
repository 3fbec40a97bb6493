"""The prompts of a job, read from a file: each has an id and a seed of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.csv as arrow_csv  # type: ignore[import-untyped]
import pyarrow.parquet as parquet  # type: ignore[import-untyped]

from ..errors import InvalidSetting, MissingFile, WrongType
from ..validation import shown
from .files import opened

FORMATS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")
GIVEN = ("id", "prompt", "seed")
# Further columns of the output: no column of the prompts can have such a name.
MADE = (
    *("row", "status", "error", "picture", "format", "seconds"),
    *("blocks_run", "blocks_total", "remarks", "actor"),
)
SHOWN = 3  # of many, in messages


def read_prompts(path: str | os.PathLike[str], seed: int = 0) -> pa.Table:
    """Read a prompts file; return its rows as they will be drawn.

    Args:
        path: path of the file, or a URI that pyarrow knows (``s3://…``). Its ending sets the format: parquet, JSON
            lines (``.jsonl``, ``.ndjson``; ``.json`` may also be one list of objects) or CSV, in UTF-8. The file needs
            a column ``prompt``. An optional column ``id`` has unique texts or whole numbers, in CSV always texts;
            without it, a row's number in the file, from 0 on, is its id. An optional column ``seed`` has whole numbers,
            and may be empty in some rows.
        seed: the seeds of rows that have none are made from this seed and their ids.

    Returns:
        The columns ``row`` (the row's number in the file), ``id``, ``prompt``, ``seed``, and all others unchanged. A
        prompt that is null stays null, and its row will be kept as failed.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError, ValueError: the file cannot be read or is empty; or a column is missing or invalid.

    Example: the same row has the same seed whatever else stands in the file.
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "prompts.csv")
        ...     _ = path.write_text("id,prompt,mood\\na,slice of pizza,good\\nb,taxi,bad\\n")
        ...     both = read_prompts(path)
        ...     _ = path.write_text("id,prompt,mood\\nb,taxi,bad\\n")
        ...     one = read_prompts(path)
        >>> both.column_names, both["prompt"].to_pylist()
        (['row', 'id', 'prompt', 'seed', 'mood'], ['slice of pizza', 'taxi'])
        >>> both["seed"][1] == one["seed"][0] != both["seed"][0]
        True
    """
    name = os.fspath(path)
    ending = os.path.splitext(name)[1].lower()
    if ending not in FORMATS:
        raise InvalidSetting(
            f"prompts={shown(name)} ends in {shown(ending or 'nothing')}: give a file of {', '.join(FORMATS)}"
        )
    try:
        with opened(name) as file:
            table = _parsed(file.read(), ending)
    except FileNotFoundError:
        raise MissingFile(f"prompts={shown(name)}: there is no such file") from None
    except (pa.ArrowInvalid, UnicodeDecodeError, ValueError) as error:  # the first two are of the third
        raise InvalidSetting(f"prompts={shown(name)} cannot be read as {ending}: {error}") from None
    if "prompt" not in table.column_names:
        there = ", ".join(table.column_names) or "none"
        raise InvalidSetting(f"prompts={shown(name)} has no column 'prompt': there are {there}; rename one of them")
    if not table.num_rows:
        raise InvalidSetting(f"prompts={shown(name)} has no rows: give a prompt at least")
    if taken := sorted(set(MADE) & set(table.column_names)):
        raise InvalidSetting(f"prompts={shown(name)} has a column {shown(taken[0])}, as the output will: rename it")
    rows = pa.array(range(table.num_rows), pa.int64())
    ids = _ids(table, name) if "id" in table.column_names else rows
    others = [column for column in table.column_names if column not in GIVEN]
    columns = {"row": rows, "id": ids, "prompt": _texts(table["prompt"], name), "seed": _seeds(table, ids, seed, name)}
    return pa.table({**columns, **{column: table[column] for column in others}}).combine_chunks()


def seed_of(seed: int, row_id: int | str) -> int:
    """Return a row's seed, 0 … 2⁶³ − 1, from the job's seed and the row's id: the same in any file, order or batch.

    Example:
        >>> seed_of(0, 7) == seed_of(0, "7") != seed_of(1, 7)
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8], "big") >> 1


# -- files ------------------------------------------------------------------------------------------------------


def _parsed(data: bytes, ending: str) -> pa.Table:
    if ending == ".parquet":
        return parquet.read_table(pa.BufferReader(data))
    if ending == ".csv":
        texts = {name: pa.string() for name in ("id", "prompt")}
        if not data.strip():
            return pa.table({})
        return arrow_csv.read_csv(
            pa.BufferReader(data),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=texts),
        )
    return _columns(_objects(data.decode("utf-8-sig"), ending))


def _objects(text: str, ending: str) -> list[dict[str, Any]]:
    """Parse JSON objects; pyarrow would turn texts like dates into dates, and not name the line that is wrong."""
    if ending == ".json" and text.lstrip().startswith("["):
        found = [(f"entry {number}", each) for number, each in enumerate(json.loads(text), 1)]
    else:
        found = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a prompt may hold other separators
            if line.strip():
                try:
                    found.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise InvalidSetting(
                        f"line {number} is not JSON ({error}): one object a line is expected"
                    ) from None
    for where, each in found:
        if not isinstance(each, dict):
            raise InvalidSetting(f"{where} is no object: {shown(each)}")
    return [each for _, each in found]


def _columns(objects: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for each in objects for name in each)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([each.get(name) for each in objects])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise InvalidSetting(f"column {shown(name)} has values of several kinds ({error})") from None
    return pa.table(columns)


# -- columns ----------------------------------------------------------------------------------------------------


def _texts(column: Any, name: str) -> Any:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise WrongType(f"prompts={shown(name)}: the column 'prompt' holds {column.type}: give texts")
    return column.cast(pa.string())


def _ids(table: pa.Table, name: str) -> Any:
    column = table["id"]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    whole = pa.types.is_integer(kind)
    if not (whole or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise WrongType(f"prompts={shown(name)}: the column 'id' holds {column.type}: give texts or whole numbers")
    if column.null_count:
        row = column.to_pylist().index(None)
        raise InvalidSetting(f"prompts={shown(name)}: row {row} has no id: give it one, or leave the column out")
    twice = [each for each, count in Counter(column.to_pylist()).items() if count > 1]
    if twice:
        more = f" and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
        raise InvalidSetting(
            f"prompts={shown(name)}: several rows have the id {', '.join(map(shown, twice[:SHOWN]))}{more}: "
            "no two may be alike"
        )
    return column.cast(pa.int64() if whole else pa.string())


def _seeds(table: pa.Table, ids: Any, seed: int, name: str) -> Any:
    given: list[int | None] = [None] * table.num_rows
    if "seed" in table.column_names:
        column = table["seed"]
        if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
            raise WrongType(f"prompts={shown(name)}: the column 'seed' holds {column.type}: give whole numbers")
        try:
            given = column.cast(pa.int64()).to_pylist()
        except pa.ArrowInvalid as error:
            raise InvalidSetting(
                f"prompts={shown(name)}: a seed is too large ({error}): give less than 2**63"
            ) from None
    drawn = [seed_of(seed, row_id) if own is None else own for row_id, own in zip(ids.to_pylist(), given, strict=True)]
    return pa.array(drawn, pa.int64())
