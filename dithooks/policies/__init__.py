"""When to reuse: one file a policy. ``policy`` is the base class, ``history`` what policies decide by."""
