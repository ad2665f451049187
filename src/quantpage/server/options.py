"""What `quantpage serve` is asked for, whichever engine answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `quantpage serve` was asked for."""

    model: str
    kv_format: str = "int8"
    page_size: int = 64
    calibration: str = "auto"
    """As ``attach`` takes it."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """What clients call the model; None: its folder's name."""
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the server from a browser; '*': all."""
    memory: int | None = None
    """Bytes of the cache; None: every answer's longest, at most a quarter of what is free."""
    max_requests: int | None = None
    """Answers that share a step; None: 64, or as vLLM chooses."""
    max_waiting: int | None = None
    """Answers that wait for a place or for pages; None: 256. vLLM has no limit."""
    context: int | None = None
    """Most tokens of a prompt and its answer; None: the model's own limit."""
    step_tokens: int | None = None
    """Decode and chunks of prompts together; None: 256, or as vLLM chooses."""
    drain: int | None = None
    """Seconds that answers under way have when the server is told to stop; None: 60. vLLM has its
    own."""
    prefix_cache: bool = True
    prefix_cache_file: str | None = None
    """Known prompts are read from it at the start, and written to it at the end."""
    dtype: str = "auto"
    device: str = "auto"
    weights: str = "model"
    """'int8': weight-only int8 linears (CPU)."""

    def __post_init__(self) -> None:
        if self.prefix_cache_file is not None and not self.prefix_cache:
            raise ValueError("prefix_cache_file: expected a prefix cache beside it, got none")
        if self.api_key == "":
            raise ValueError("api_key: expected a key, or none for a server open to all, got ''")
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("weights", ("model", "int8")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
