"""Other libraries' private names, and nothing else's."""
