"""Sessions as the tests enter them: calls of a block of code belong to one, as those of a request do."""

from contextlib import contextmanager

from dithooks.engine.sessions import SessionEntry


@contextmanager
def inside(session):
    """Let the calls made inside belong to a session."""
    entry, failed = SessionEntry(session), True
    try:
        yield
        failed = False
    finally:
        entry.leave(failed)
