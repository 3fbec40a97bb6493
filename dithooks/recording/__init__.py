"""One run, recorded."""
