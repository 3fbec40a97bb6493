"""What can be cached in a model."""
