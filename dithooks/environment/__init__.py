"""The machine: packages, accelerators, what keeps them from working."""
