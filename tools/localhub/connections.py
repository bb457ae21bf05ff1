"""Connections to the Hub: how many there may be, and how long each may keep it waiting."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# A request's first line and headers have to be here by then, from the connection's start or the last response on.
REQUEST_SECONDS = 30.0
# A body that is sent, or a response that is read, makes progress in every such time.
SILENCE_SECONDS = 60.0
_MOST = 1024
# What the Hub itself keeps open, and the connections that the event loop accepts before it hears of any.
_OWN_DESCRIPTORS = 96
# Of one turn of the event loop.
ACCEPTED_AT_ONCE = 32
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)
_logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection that is closed when its peer keeps the Hub waiting.

    uvicorn itself limits the pauses between requests only. Beyond ``most``, the one that has sent no request for
    longest makes room for a new one.
    """

    most = _MOST
    _warned = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = self._progress = self.loop.time()
        self._unsent = 0
        self._timer = self.loop.call_later(0, self._check)
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._progress = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._idle_since = self._progress = self.loop.time()
        super().on_response_complete()

    @property
    def _idle(self) -> bool:
        """True while no request, or only a part of its headers, has arrived."""
        return self.conn.their_state is h11.IDLE

    def _check(self) -> None:
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._progress = unsent, now
        receiving = self.conn.their_state is h11.SEND_BODY and not self.flow.read_paused
        if (self._idle and now - self._idle_since > REQUEST_SECONDS) or (
            (receiving or unsent) and now - self._progress > SILENCE_SECONDS
        ):
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(min(REQUEST_SECONDS, SILENCE_SECONDS) / 4, self._check)

    def _make_room(self) -> None:
        if not Connection._warned:
            Connection._warned = True
            _logger.warning("more than %d connections at once; those without a request are closed", self.most)
        idle = [
            connection
            for connection in self.connections
            if isinstance(connection, Connection)
            and connection is not self
            and connection._idle
            and not connection.transport.is_closing()
        ]
        if idle:
            min(idle, key=lambda connection: connection._idle_since).transport.abort()
        else:
            self.transport.write(_FULL)
            self.transport.close()


def allow_many_connections() -> None:
    """Raise this process's limit of open files, and take no more connections than it leaves room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY:
        # A request may open a file beside its connection.
        Connection.most = max(1, min(_MOST, (hard - _OWN_DESCRIPTORS) // 2))


def log_exhaustion_once(loop: asyncio.AbstractEventLoop) -> None:
    """Log that no connection can be accepted once, where asyncio does so thousands of times a second."""
    reported = False

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        nonlocal reported
        error = context.get("exception")
        exhausted = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if not (exhausted and reported):
            loop.default_exception_handler(context)
        reported = reported or exhausted

    loop.set_exception_handler(handle)
