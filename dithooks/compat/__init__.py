"""Other tools' interfaces on this library's engine: for users who change only an import."""
