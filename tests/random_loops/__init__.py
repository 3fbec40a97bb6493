"""Random sampling loops against an oracle that knows whose residual each call was given."""
