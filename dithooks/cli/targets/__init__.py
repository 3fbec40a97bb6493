"""The targets that a command line names, as objects."""
