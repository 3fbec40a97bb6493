"""The results of a job, read from its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa  # type: ignore[import-untyped]

from ..errors import InvalidSetting
from ..validation import shown
from .files import Folder
from .output import chunks_in, read_rows


def read(out: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows that are done, in the order of the prompts.

    All rows are read into memory. For more than fits, ``pyarrow.dataset.dataset(out)`` and
    ``ray.data.read_parquet(out)`` read the folder file by file. :func:`decoded` turns the columns ``picture`` and
    ``format`` into a picture or array.

    Args:
        out: the output folder.
        columns: columns to read; left out, all.

    Raises:
        FileNotFoundError: the folder holds no rows.
        ValueError: a file cannot be read, or a column does not exist.
    """
    folder = Folder(os.fspath(out))
    names = chunks_in(folder)
    if not names:
        raise FileNotFoundError(f"out={shown(folder.place)} holds no rows: generate(…) writes them")
    asked = None if columns is None else list(dict.fromkeys([*columns, "row"]))
    tables = [read_rows(folder, name, asked).replace_schema_metadata() for name in names]
    table = pa.concat_tables(tables, promote_options="permissive").sort_by("row")
    if columns is None:
        return table
    if strange := [name for name in columns if name not in table.column_names]:
        raise InvalidSetting(f"columns has {shown(strange[0])}, which is not in {folder.place}")
    return table.select(list(columns))
