"""Connections: how many there may be, and how long one may take to say what it wants.

Uvicorn has no such limits: a thousand connections that never finish a request would keep everyone out.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 200
MOST_OF_AN_ADDRESS = 64  # a browser has six for all its tabs
HEADER_SECONDS = 10.0
STALL_SECONDS = 60.0


class LimitedConnection(H11Protocol):
    """A connection that is closed if a request's headers take too long or its body stalls, or if its place is needed.

    Only connections that wait for a part of a request lose their place, so that those who have asked are answered.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place, from another connection if there is none left."""
        super().connection_made(transport)
        self._await_part()
        everyone = [one for one in self.connections if isinstance(one, LimitedConnection)]
        if not self._is_proxy():
            _make_room([one for one in everyone if one._address == self._address], MOST_OF_AN_ADDRESS)
        _make_room(everyone, MOST_CONNECTIONS)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._await_part()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has arrived already."""
        super().on_response_complete()
        self._await_part()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._end_waiting()
        super().connection_lost(exc)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _is_proxy(self) -> bool:
        """Whether many people may share this connection's address."""
        return self.config.proxy_headers and self._address in self.config.forwarded_allow_ips

    def _await_part(self) -> None:
        """Set the time by which the next part of a request must be here, if one is missing."""
        state = self.conn.their_state
        if state is not h11.IDLE:
            self._end_waiting()
        if self._deadline is None and state in (h11.IDLE, h11.SEND_BODY):
            seconds = HEADER_SECONDS if state is h11.IDLE else STALL_SECONDS
            # Closed, not aborted: the end of the last response may still be on its way to a slow reader.
            self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _end_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _make_room(connections: list[LimitedConnection], most: int) -> None:
    """Close connections beyond a number: first those that have waited longest for a request, then the newest."""
    surplus = len(connections) - most
    if surplus <= 0:
        return
    waiting = [(one._deadline.when(), id(one), one) for one in connections if one._deadline is not None]
    for _, _, one in sorted(waiting)[:surplus]:
        one.connections.discard(one)
        one.transport.abort()
