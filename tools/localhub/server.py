"""Run the Hub: bind, lock the root, serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from .connections import ACCEPTED_AT_ONCE, Connection, allow_many_connections, log_exhaustion_once
from .errors import HubError
from .http.app import create_app
from .names import is_name
from .store import locked

_STOP_SECONDS = 5
_QUEUE = 1024


def serve(
    root: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    trust: Iterable[str] = (),
    *,
    open_writes: bool = False,
    verbose: bool = False,
) -> None:
    """Serve the Hub at ``root`` until SIGINT or SIGTERM; returns after a clean stop.

    Prints one line with its address once it answers. Must be called from the main thread.

    Args:
        root: The Hub's directory, created when missing.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        trust: Organizations that are trusted kernel publishers.
        open_writes: Take writes without a token as long as none was created; on loopback addresses only.
        verbose: Log every request.

    Raises:
        HubError: ``open_writes`` on an address that others can reach, the port is taken, the root cannot be
            used or another Hub uses it, or a name in ``trust`` cannot be an organization.
    """
    organizations = sorted(set(trust))
    for name in organizations:
        if not is_name(name):
            raise HubError(f"{name!r} cannot be the name of an organization (--trust)")
    with locked(root), _listening(host, port) as listener:
        address, bound_port = listener.getsockname()[:2]
        loopback = ipaddress.ip_address(address).is_loopback
        if open_writes and not loopback:
            raise HubError(
                f"--open lets everybody write who can reach {address}; use it on 127.0.0.1 only, and tokens elsewhere"
            )
        allow_many_connections()
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        config = uvicorn.Config(
            create_app(root, trust=organizations, open_writes=open_writes, host=host, loopback=loopback),
            access_log=verbose,
            log_level="info" if verbose else "warning",
            log_config=None,
            http=Connection,
            loop="asyncio",
            backlog=ACCEPTED_AT_ONCE,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        url = f"http://[{address}]:{bound_port}" if ":" in address else f"http://{address}:{bound_port}"
        trusted = ", ".join(organizations) or "none"
        server = _Server(config, f"kernelpress Hub at {url}  (root {root}; trusted: {trusted})")
        # uvicorn hands a signal on to the handler that was there before it, once it has stopped.
        # Ours makes that a normal return, and works in the moments when uvicorn's is not in place.
        before = {number: signal.signal(number, server.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Server(uvicorn.Server):
    """A server that prints a line once it answers, and that can be told to stop."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        log_exhaustion_once(asyncio.get_running_loop())
        await super().startup(sockets=sockets)
        for listener in sockets or ():
            # The kernel's queue; uvicorn has made it as short as what is accepted at once.
            listener.listen(_QUEUE)
        if not self.should_exit:
            print(self._greeting, flush=True)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    if not 0 <= port <= 65535:
        raise HubError(f"cannot listen on port {port}: ports go from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise HubError(f"cannot listen on {host!r}: it is no address of this machine") from error
    with socket.socket(family, kind, protocol) as listener:
        # A stopped Hub's port can be taken again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_QUEUE)
        except OSError as error:
            advice = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
            raise HubError(f"cannot listen on {host}:{port}: {error.strerror}{advice}") from error
        yield listener
