"""What can be cached in a model: ``survey`` finds it, ``model_report`` and ``model_table`` show it."""
