"""Text of messages."""

from collections.abc import Sequence


def name_list(names: Sequence[str]) -> str:
    """Join names by commas: the first three, then the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
