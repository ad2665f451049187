"""Work on a CUDA device captured as a graph: warmed up, captured, replayed as often as wanted."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

_WARM_UPS = 2
"""Runs before a capture: kernels compile and workspaces are allocated outside of it."""


class GraphPool:
    """Makes graphs of one device that share memory: of any two, one is replayed at a time."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"device: expected a CUDA device, got {device}")
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def capture(
        self, run: Callable[[], Result], undo: Callable[[], object] | None = None
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        """A graph of what ``run`` launches, and what it returned: tensors that replays overwrite.

        run: reads and writes the same memory whenever it is called; it is called before the
        capture too. undo: takes back what a run changed, after each of those. Nothing has run when
        this returns but those runs. Raises what ``run`` raises; RuntimeError where it does what no
        graph can, as waiting for the device.
        """
        stream = self._stream
        # Warmed up on the capture's own stream, as workspaces are kept a stream.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
                if undo is not None:
                    undo()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile does not break the capture.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"
        ):
            result = run()
        return graph, result
