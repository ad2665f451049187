"""The end of a server: answers under way are finished, and those that take too long are told so."""

import signal
import socket
import threading
from types import FrameType

import uvicorn

from quantpage.engine import Engine


class DrainingServer(uvicorn.Server):
    """uvicorn's server, whose connections end with an answer or with a sentence.

    uvicorn by itself waits for connections too, and then cuts them: a client could not tell a
    stopped answer from a broken network, and a traceback a connection would be logged.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float) -> None:
        """seconds: how long answers may go on after the server was told to stop."""
        config.timeout_graceful_shutdown = int(seconds) + _TO_SAY_SO
        super().__init__(config)
        self._engine, self._seconds = engine, seconds
        self._hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second Ctrl-C waits no longer: answers under way end now, and say so; a third cuts."""
        if self.should_exit and sig == signal.SIGINT and not self._hurried:
            self._hurried = True
            # Not here: a signal comes between any two lines, of the engine's callers too.
            threading.Thread(target=self._engine.stop, daemon=True).start()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, and wait for the others."""
        late = threading.Timer(self._seconds, self._engine.stop)
        late.daemon = True
        late.start()
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


_TO_SAY_SO = 10
"""Seconds that clients have to read the end of a stopped answer."""
