"""Quality at equal compute: every method swept over its own knob, on several models."""
