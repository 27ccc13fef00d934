"""What a terminal shows: text that cannot steer it, and whether it has colours."""

import os
import re
import sys

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def printable(text: str) -> str:
    """Control characters spelt out: data must not steer the terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def wants_colour() -> bool:
    """Whether standard output is a terminal whose user did not ask for plain text."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain
