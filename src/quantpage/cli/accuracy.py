"""`quantpage evaluate`: what each format costs in accuracy, on real text."""


def command() -> None:
    """Placeholder until evaluate lands."""
