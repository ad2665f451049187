"""How a command may end (docs/commands.md)."""

WRONG_INPUT, UNAVAILABLE = 2, 3
INTERRUPTED, BROKEN_PIPE = 130, 141
