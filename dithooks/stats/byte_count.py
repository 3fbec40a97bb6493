"""Numbers of bytes, as people read them."""


def size(count: int) -> str:
    """Format a number of bytes with a unit.

    Example:
        >>> size(0), size(1_769_472), size(5 * 2**30)
        ('0 B', '1.7 MiB', '5.0 GiB')
    """
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"
