"""The JSON files of a saved model, read within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.safe_json import read_file
from ...errors import MissingFile, TargetError

MOST = 2**25  # 32 MiB: a tokenizer's configuration may list all its words


def read_object(path: Path) -> Mapping[str, Any]:
    """Read the JSON object of a regular file; empty if there is no such file.

    Raises:
        TargetError: the file cannot be read as one.
    """
    try:
        read = read_file(path, json.loads, MOST)
    except MissingFile:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{path} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise TargetError(f"{path} holds no JSON object")
    return read
