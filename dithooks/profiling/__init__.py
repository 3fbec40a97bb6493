"""How much changes from step to step in a run without reuse: what the policies that measure decide by."""
