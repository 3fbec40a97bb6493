"""What users set, and its files: ``cache_config``, and ``cache_plan`` for what a search has found."""
