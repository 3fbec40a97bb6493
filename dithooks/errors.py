"""The errors that this package raises on purpose; each has a one-line message for the user.

::

    DitHooksError
    ├── InvalidSetting (ValueError)   a value that cannot be used, or does not fit the model
    │   ├── NothingSeen               ... a run that does not call the blocks
    │   └── NotProvided (AttributeError)   ... a name of another tool that has no counterpart here
    ├── WrongType (TypeError)         a value of the wrong type
    ├── MissingPackage (ModuleNotFoundError)   a package that has to be installed first
    ├── BrokenPyTorch (ImportError)   PyTorch, where it cannot be imported
    ├── UsageError                    a command line that asks for what cannot be done
    ├── TargetError                   a target or file of a command that is not there
    ├── FileError (OSError)           a file that cannot be read or written
    │   └── MissingFile (FileNotFoundError)   ... because there is none
    ├── WiringError (ValueError)      streams that cannot be followed through the blocks
    │   └── BlockError                streams that cannot be followed through one block
    ├── RunMismatch (RuntimeError)    a call that does not fit its run, handle or request
    │   └── TargetMissed              ... plans, the best of which draws worse than is allowed
    └── RankMismatch (RuntimeError)   ranks that are at different calls, or do not answer
"""

from __future__ import annotations

LONGEST = 400  # characters of a message, whatever it quotes
ENDING = 150  # of these from the end of a longer one, where the remedy stands


class DitHooksError(Exception):
    """The base of all errors that this library raises on purpose. Of a long message, the beginning and end are kept.

    Example:
        >>> from dithooks import DitCacheConfig
        >>> try:
        ...     DitCacheConfig(cache_step_start=2, cache_step_interval=0)
        ... except DitHooksError as error:
        ...     print(error)
        cache_step_interval=0 is out of range: it must be at least 1
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))


class InvalidSetting(DitHooksError, ValueError):
    """A value that is out of range, contradicts another, or does not fit the model."""


class NothingSeen(InvalidSetting):
    """A run that does not call the blocks it was to show."""


class NotProvided(InvalidSetting, AttributeError):
    """A name of another tool that has no counterpart here; the message says what to take instead."""


class WrongType(DitHooksError, TypeError):
    """A value of the wrong type."""


class MissingPackage(DitHooksError, ModuleNotFoundError):
    """A package that has to be installed first; the message says how."""


class BrokenPyTorch(DitHooksError, ImportError):
    """PyTorch, where it cannot be imported: it is not installed, or an accelerator's plug-in breaks it."""


class UsageError(DitHooksError):
    """A command line that asks for what cannot be done: options, files to write, packages that are missing."""


class TargetError(DitHooksError):
    """A command's target or file that is not there, or cannot be used."""


class FileError(DitHooksError, OSError):
    """A file that cannot be read or written; ``errno`` is that of the system, where it gave one."""


class MissingFile(FileError, FileNotFoundError):
    """A file that is not there."""


class WiringError(DitHooksError, ValueError):
    """Streams that cannot be followed through the blocks of a range; the message names what was observed."""


class BlockError(WiringError):
    """Streams that cannot be followed through one block, whatever the range."""


class RunMismatch(DitHooksError, RuntimeError):
    """A call that does not fit its run, handle or request."""


class TargetMissed(RunMismatch):
    """Plans, the best of which draws worse than was asked for."""


class RankMismatch(DitHooksError, RuntimeError):
    """Ranks of a process group that are at different calls, or do not answer."""


class DitHooksWarning(UserWarning):
    """Warning of an attached cache, at the user's line: something does not work as the user will expect."""


def shortened(text: str, longest: int = LONGEST) -> str:
    """Return a text; of a long one, its beginning and its end.

    Example:
        >>> shortened("a" * 90, 9), len(shortened("a" * 900))
        ('aaa … aaa', 400)
    """
    if len(text) <= longest:
        return text
    end = min(ENDING, (longest - 3) // 2)
    return f"{text[: longest - 3 - end]} … {text[-end:]}"
