"""Plans tried for real, and the best of them: ``search`` is the entry, ``trial_driver`` runs the ``proposals``."""
