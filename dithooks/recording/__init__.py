"""One run, recorded: ``record`` runs it, ``recorder`` watches one transformer, ``recording`` is what comes of it."""
