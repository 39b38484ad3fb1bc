"""The HTTP server's process: socket, file limit, signals and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from redflag.errors import RedflagError

_log = logging.getLogger(__name__)


class _Protocol(HttpToolsProtocol):
    """uvicorn's faster parser, which sends all streams in chunks. HTTP/1.0 (nginx's default for upstreams) has none
    (RFC 9112, 6.1), so its connections are handed to uvicorn's other parser."""

    _begun = False

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            if data.partition(b"\r\n")[0].endswith(b" HTTP/1.0"):
                self._hand_over(data)
                return
        super().data_received(data)

    def _hand_over(self, data: bytes) -> None:
        self.connections.discard(self)
        other = H11Protocol(self.config, self.server_state, self.app_state, self.loop)
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)


class Process(uvicorn.Server):
    """Runs an application until SIGINT or SIGTERM, and then until its open responses are over.

    After `grace` seconds they are ended with their last chunk. A second SIGINT does not wait.
    """

    def __init__(
        self, app: ASGIApp, stop: Callable[[], None], grace: float, reload: Callable[[], None] | None = None
    ) -> None:
        """`stop` ends all open responses; `reload` is called on SIGHUP, if the system has that."""
        # Streams end with a last chunk of their own; sse-starlette would cut them off.
        AppStatus.disable_automatic_graceful_drain()
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(grace) + 15,
            )
        )
        self._stop = stop
        self._grace = grace
        self._reload = reload
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Also registers `reload`."""
        self._loop = asyncio.get_running_loop()
        hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
        if self._reload is not None and hang_up is not None:
            self._loop.add_signal_handler(hang_up, self._reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Also schedules `stop`."""
        if self._loop is not None and not self.should_exit:
            self._loop.call_soon_threadsafe(self._loop.call_later, self._grace, self._stop)
        super().handle_exit(sig, frame)


def bind(host: str, port: int, send_timeout: float) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is found before a model is loaded.

    Raises:
        RedflagError: The address is taken, invalid, or not this machine's.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # on Windows two servers could then share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # A closed connection stays in memory while its client reads nothing; the kernel drops it after this time.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_timeout * 1000))
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise RedflagError(f"cannot listen on {host} port {port} ({reason}). Free it or choose another.") from error
    return bound


def raise_file_limit(needed: int) -> None:
    """Raises the process's limit of open files to the system's; warns if fewer than `needed` are allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports infinity as the hard limit but refuses it; it accepts 10240.
    for limit in (hard, 65536, 10240):
        if soft == resource.RLIM_INFINITY or (limit != hard and limit <= soft):
            break
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            break
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        _log.warning(
            "the system allows this process %d open files, and max_open may need %d: above that, connections fail; "
            "raise the limit (ulimit -n) or lower max_open",
            soft,
            needed,
        )
