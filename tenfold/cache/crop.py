"""What every cache layer checks when tokens are taken back."""

from __future__ import annotations


def tokens_left(tokens_to_remove: int, held: int) -> int:
    """Tokens that stay after a crop, as transformers asks for it.

    Args:
        tokens_to_remove: 0 or negative.
        held: tokens in the cache.

    Raises:
        ValueError: a positive number, or more tokens than there are.

    >>> tokens_left(-3, 10)
    7
    """
    if tokens_to_remove > 0:
        raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
    if held + tokens_to_remove < 0:
        raise ValueError(f"crop({tokens_to_remove}): the cache has {held} tokens")
    return held + tokens_to_remove
