"""When: compute or reuse at this step. One policy a file; all are frozen, and keep nothing from call to call."""
