"""What users set, and its files."""
