"""Other libraries at work beside the cache; their private names stand in this folder only."""
