"""Numbers of things in messages."""


def counted(number: int, noun: str) -> str:
    """``1 token`` or ``1,000 tokens``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
