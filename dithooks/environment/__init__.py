"""The machine: its packages, its accelerators, and what keeps these from working."""
