"""What to add in place of a skipped range: ``predictor`` is the base class."""
