"""The server under the application: uvicorn, with a deadline for headers, which it lacks.

A connection that sends nothing, or a header byte a minute, would otherwise be held for ever, and count against the limit of
connections. Rejected: a watchdog over all connections, which needs their protocols' insides too.
"""

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from hardmoe.serving.limits import Limits

_LAST_SECONDS = 1.0
"""For which a connection may bring its first request after the end was asked for; uvicorn's own protocol resets it."""

_SETTLING_SECONDS = 0.05
"""In which connections that the loop has accepted become known to uvicorn."""


class _Protocol(H11Protocol):
    """Closes connections whose headers take too long; `header_seconds` is set by `make_server`."""

    header_seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: Any = None
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        self._expect_headers()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def shutdown(self) -> None:
        """The server ends; of a connection on which nothing was asked yet, the request may be under way, and is waited for."""
        if self.cycle is None and not self.transport.is_closing():
            self.loop.call_later(_LAST_SECONDS, super().shutdown)
        else:
            super().shutdown()

    def _expect_headers(self) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._deadline = self.loop.call_later(self.header_seconds, self._expire, self.cycle)

    def _expire(self, before: Any) -> None:
        self._deadline = None
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Takes whoever stands before the door in before it closes.

    uvicorn's own resets what the kernel holds for it, and what it has only just accepted: most of a busy server's clients.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        loop = asyncio.get_running_loop()
        for listening in sockets or []:
            listening.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted, _ = listening.accept()
                    accepted.setblocking(False)
                    await loop.connect_accepted_socket(self._protocol, accepted)
        for server in self.servers:
            server.close()
        await asyncio.sleep(_SETTLING_SECONDS)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made


def make_server(app: Starlette, limits: Limits, host: str, port: int) -> uvicorn.Server:
    """A server of an application, not started yet."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("Protocol", (_Protocol,), {"header_seconds": limits.body_seconds}),
        log_level="warning",
        ws="none",
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    return _Server(config)
