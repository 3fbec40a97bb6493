"""The runtime of a cached range, from hook to residual. Private."""
