"""Plans tried for real, and the best of them."""
