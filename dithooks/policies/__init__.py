"""When to reuse."""
