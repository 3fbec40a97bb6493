"""What a policy would see in a run."""
