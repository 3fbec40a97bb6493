"""Pictures of what the cache does: see :mod:`dithooks.plot`."""
