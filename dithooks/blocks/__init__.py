"""Where: the lists of blocks of a model, and how their streams are wired."""
