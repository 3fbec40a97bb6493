"""From a recording to plans: ``plan`` is the entry. NumPy only, no model."""
