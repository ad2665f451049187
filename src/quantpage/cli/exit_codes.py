"""How a command may end (docs/commands.md)."""

WRONG_INPUT, UNAVAILABLE, CHECK_FAILED = 2, 3, 4
INTERRUPTED, BROKEN_PIPE = 130, 141
