"""What there is, and what happened: surveys of models, for people to read."""
