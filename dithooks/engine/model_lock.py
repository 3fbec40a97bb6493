"""The lock under which a model is changed: hooks and stand-ins go on, move and come off in one thread at a time.

Of two threads that attach to the same blocks, the second has to see the first. Who holds it waits for no other lock, so
that a finalizer or a signal handler may wait for it wherever it comes in.
"""

from ..fork import ForkLock

MODEL_LOCK = ForkLock()
