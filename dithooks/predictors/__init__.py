"""What to add in place of a skipped range."""
