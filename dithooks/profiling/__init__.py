"""The changes from step to step that a policy decides by, in a run without reuse."""
