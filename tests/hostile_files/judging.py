"""What becomes of a hostile file: a clear error, or something that works; in how much time and memory."""

import time
import tracemalloc
import warnings
from dataclasses import dataclass

import numpy as np

from dithooks import errors
from hostile_files.mutants import mutated

SECONDS, BYTES, LETTERS = 1.0, 50_000_000, 400
CLEAR = tuple(
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DitHooksError)
)


@dataclass(frozen=True)
class Verdict:
    """What came of one file.

    Args:
        refused: whether it was refused.
        wrong: what is wrong with that; empty if nothing is.
        seconds: of the processor, that it took.
        memory: the most bytes that it took at a time.
    """

    refused: bool
    wrong: str
    seconds: float
    memory: int


def mutant(number, kind, folder):
    """Write one mutant of a kind, the same for the same number, and return its path."""
    path = folder / kind.file
    data = mutated(np.random.default_rng([number, len(kind.data)]), kind.file, kind.data)
    path.write_bytes(data)
    return path


def judged(kind, path):
    """Read a file as its kind, use what is read, and judge what came of it."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        refused, wrong = _tried(kind, path)
    finally:
        seconds = time.process_time() - begin
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if seconds > SECONDS / 2:  # measuring the memory takes time of its own
        begin = time.process_time()
        _tried(kind, path)
        seconds = time.process_time() - begin
    if not wrong and seconds > SECONDS:
        wrong = f"{seconds:.1f} s"
    if not wrong and memory > BYTES:
        wrong = f"{memory / 1e6:.0f} MB"
    return Verdict(refused, wrong, seconds, memory)


def _tried(kind, path):
    read = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)  # of NumPy: a number that is none
            read = kind.load(path)
            kind.use(read)
    except CLEAR as error:
        said = str(error)
        if type(error) not in CLEAR or len(said) > LETTERS:
            return True, f"{type(error).__name__} of {len(said)} characters"
        named = read is not None or str(path) in said or str(path.parent) in said
        return True, "" if named else f"does not name the file: {said}"
    except Exception as error:  # whatever else is a fault
        return True, f"{type(error).__name__}: {str(error)[:200]}"
    return False, ""
