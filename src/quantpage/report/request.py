"""What a report is asked for, and what is refused before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from quantpage.evaluate.caches import PEERS
from quantpage.evaluate.run import DTYPES
from quantpage.files import check_writable
from quantpage.formats import FORMATS

_COUNTS = ("windows", "prompt", "scored", "answers", "steps", "context")


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """What the flags of `quantpage report` say."""

    model: str
    out: Path
    """The page; data, pictures and finished parts stand beside it under the same name."""
    formats: tuple[str, ...] = ()
    """Whatever LayerFormats reads; empty: every dynamic format of FORMATS."""
    text: Path | None = None
    """A text file in UTF-8; None: Jane Austen's novels, kept in the user's cache folder."""
    windows: int = 2
    """Places in the text where predictions are compared."""
    prompt: int = 64
    """Tokens read before the first prediction, in each window."""
    scored: int = 1472
    """Predictions compared in each window; fewer where the model has fewer positions."""
    answers: int = 4
    """Answers of the model itself, each after ``answer_prompt`` tokens of text."""
    steps: int = 64
    """Tokens of each answer."""
    needle_lengths: tuple[int, ...] = (256, 512, 1024)
    """Tokens of the texts that a needle is hidden in, where the model has so many positions;
    empty: no needles."""
    needle_depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    context: int = 8192
    """Longest context that decode is timed at."""
    advice: bool = True
    """Whether every layer is measured alone, for the choice a layer."""
    page_size: int = 64
    dtype: str = "float32"
    """Of the model's arithmetic. In float32 the same predictions in bfloat16 are a yardstick."""
    device: str = "auto"
    calibration: str = "auto"
    """Of keys, as ``attach`` takes it; 'none' for None."""

    answer_prompt = 384
    map_tokens = 512
    advice_prompt, advice_scored = 256, 128
    """Of the text, on which layers and heads are looked at."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for depth in self.needle_depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"needle depths: expected numbers from 0 to 1, got {depth}")
        if self.out == self.data:
            raise ValueError(f"out: expected a page, such as report.html, got {self.out}")
        for path in (self.out, self.data):
            check_writable(path, "out", {"text": self.text, "calibration": Path(self.calibration)})
        if self.parts.exists() and not self.parts.is_dir():
            raise ValueError(f"out: expected no file called {self.parts}, as parts are kept there")

    @property
    def names(self) -> tuple[str, ...]:
        """Formats of the report, in order, each once."""
        default = tuple(name for name, each in FORMATS.items() if each.dynamic)
        return tuple(dict.fromkeys(self.formats or default))

    @property
    def chunk(self) -> int:
        """Predictions a forward.

        What ours make of a text does not depend on it, and the time does. Transformers' quantized
        caches read a forward's own tokens unquantized: there it is ``quantpage evaluate``'s.
        """
        return 32 if any(each in PEERS for each in self.names) else 128

    @property
    def data(self) -> Path:
        """Every figure, as JSON."""
        return self.out.with_suffix(".json")

    @property
    def parts(self) -> Path:
        """The folder of finished parts."""
        return self.out.with_suffix(".parts")
