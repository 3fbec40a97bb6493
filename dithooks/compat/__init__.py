"""The same engine under the names that users of other tools know."""
