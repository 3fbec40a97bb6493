"""The errors that this package raises on purpose; all of them are one-line messages for the user.

::

    DitHooksError
    ├── InvalidSetting (ValueError)   a value that cannot be used, or does not fit the model
    │   └── NothingSeen               ... a run that does not call the blocks
    ├── WrongType (TypeError)         a value of the wrong type
    ├── UsageError                    a command line that asks for what cannot be done
    ├── TargetError                   nothing to work on under the name that was given
    ├── WiringError (ValueError)      streams that cannot be followed through the blocks
    │   └── BlockError                ... through one of them
    ├── RunMismatch (RuntimeError)    a call that does not go with its run, handle or request
    └── RankMismatch (RuntimeError)   ranks that do not go together
"""

from __future__ import annotations


class DitHooksError(Exception):
    """Base of all errors that are raised on purpose."""


class InvalidSetting(DitHooksError, ValueError):
    """A value that is out of range, contradicts another, or does not fit the model."""


class NothingSeen(InvalidSetting):
    """A run that does not call the blocks it was to show."""


class WrongType(DitHooksError, TypeError):
    """A value of the wrong type."""


class UsageError(DitHooksError):
    """A command line that asks for what cannot be done: options, files to write, packages that are missing."""


class TargetError(DitHooksError):
    """A name under which there is nothing to work on."""


class WiringError(DitHooksError, ValueError):
    """Streams that cannot be followed through the blocks of a range; the message says what was seen."""


class BlockError(WiringError):
    """A block whose way of taking and returning its streams is not clear, whatever the range."""


class RunMismatch(DitHooksError, RuntimeError):
    """A call that does not go with its run, handle or request."""


class RankMismatch(DitHooksError, RuntimeError):
    """Ranks of a process group that are not at the same place, or do not answer."""
