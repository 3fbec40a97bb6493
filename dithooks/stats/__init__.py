"""What a cache did: the log of its decisions, statistics and tables derived from it, and the wording of warnings."""
