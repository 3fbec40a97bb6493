"""The command line: ``main``, one file a subcommand, and the ``targets`` that a command can name."""
