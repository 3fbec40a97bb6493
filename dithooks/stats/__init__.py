"""What a cache did: decisions, counts, tables."""
