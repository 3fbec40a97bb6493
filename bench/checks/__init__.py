"""Checks: ``python -m bench.checks``, whether what holds on a CPU holds on an accelerator; ``python -m
bench.checks.mutants``, whether the tests notice a broken engine; ``python -m bench.checks.serving``, whether the
serving example holds under hostile clients.
"""
