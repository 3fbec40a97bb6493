"""From a recording to plans. NumPy only."""
