"""How far a report is: one bar for all its parts, with the time left; lines where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from rich.progress import Progress, TaskID

from quantpage import console


@dataclass(slots=True)
class Steps:
    """Counts tokens that go through the model, which is what takes the time."""

    progress: Progress
    task: TaskID
    _total: float = 0
    _started: float = field(default_factory=monotonic)
    _said: str = ""

    def expect(self, tokens: float) -> None:
        """So many more will go through; a negative number: of those told of, so many will not."""
        self._total += tokens
        self.progress.update(self.task, total=self._total)

    def begin(self, what: str, name: str = "") -> None:
        """Say what is measured now, and for which format."""
        self.progress.update(self.task, description=f"{what}: {name}" if name else what)
        # A bar is drawn on terminals only; a log gets a line for each kind of part.
        if not self.progress.console.is_terminal and what != self._said:
            self._said = what
            console.note(f"{what}{self._left()}")

    def advance(self, tokens: float) -> None:
        """So many went through."""
        self.progress.advance(self.task, tokens)

    def _left(self) -> str:
        done = self.progress.tasks[0].completed
        if not done:
            return ""
        left = (self._total - done) * (monotonic() - self._started) / done
        return f" (about {max(1, round(left / 60))} min left)"


@contextmanager
def counted() -> Iterator[Steps]:
    """A bar for as long as the report takes."""
    with console.progress() as progress:
        yield Steps(progress, progress.add_task("", total=None))
