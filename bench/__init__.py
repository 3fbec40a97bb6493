"""What the library is worth: measurements, next to whatever else does the same."""
