"""A response on its way out: as server-sent events, or in one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from redflag.errors import RedflagError
from redflag.server.access import Limits
from redflag.server.api_errors import ApiError, error_response, late, refused_by_engine, stopping, unavailable
from redflag.server.exchange import Exchange
from redflag.server.wire import Answer, operator_view


class EventStream(EventSourceResponse):
    """A response as server-sent events. The status is sent with the first of them, so that it can still be an error."""

    def __init__(
        self, exchange: Exchange, answer: Answer, view: bool, headers: Mapping[str, str], limits: Limits
    ) -> None:
        self._exchange = exchange
        self._extra = headers
        self._error: ApiError | None = None
        self._detail: dict[str, Any] = {}
        self._closing = False
        super().__init__(
            self._chunks(answer, view), headers=headers, ping=limits.ping, send_timeout=limits.send_timeout, sep="\n"
        )

    async def _chunks(self, answer: Answer, view: bool) -> AsyncIterator[bytes]:
        exchange = self._exchange
        opening = answer.opening()
        try:
            while not answer.over:
                text = answer.push(await exchange.next())
                if text:
                    yield opening + answer.chunk(text)
                    opening = b""
        except RedflagError as error:
            self._error = refused_by_engine(error, answer.param)
            return
        trace = exchange.response.trace
        seen = operator_view(trace) if view else None
        if answer.failed and not exchange.committed:
            self._error, self._detail = _fault(exchange, answer), answer.failure(seen)
        else:
            self._closing = True
            if answer.failed:
                yield answer.breaking(_fault(exchange, answer).body(), seen)
            else:
                yield opening + answer.closing(trace.generated, seen)
        exchange.delivered = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        closed = False

        async def deferred(message: Message) -> None:
            nonlocal start, closed
            if message["type"] == "http.response.start":
                start = message
                return
            if self._error is not None:
                if not message.get("more_body"):  # Nothing has been sent: the error takes the stream's place.
                    await error_response(self._error, self._extra, self._detail)(scope, receive, send)
                return
            if closed and message.get("more_body"):
                return  # a ping that comes after the last chunk
            closed = self._closing
            if start is not None:
                head, start = start, None
                self._exchange.committed = True
                await send(head)
            await send(message)

        try:
            with suppress(SendTimeoutError):  # The client took nothing for too long: the connection is given up.
                await super().__call__(scope, receive, deferred)
        finally:
            await self._exchange.close()


async def whole(
    request: Request, exchange: Exchange, answer: Answer, view: bool, headers: Mapping[str, str]
) -> Response:
    """The response in one piece; a client that leaves meanwhile stops it."""
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(lambda task: None if task.cancelled() else exchange.leave())
    try:
        while not answer.over:
            answer.push(await exchange.next())
    except RedflagError as error:
        raise refused_by_engine(error, answer.param) from error
    except ConnectionAbortedError:
        return Response(status_code=499)  # Nobody reads it.
    finally:
        gone.cancel()
    exchange.delivered = True
    trace = exchange.response.trace
    seen = operator_view(trace) if view else None
    if answer.failed:
        return error_response(_fault(exchange, answer), headers, answer.failure(seen))
    # In ASCII, as the chunks of a stream: an operator's text may hold what no other encoding takes.
    body = json.dumps(answer.body(trace.generated, seen))
    return Response(body, media_type="application/json", headers=dict(headers))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fault(exchange: Exchange, answer: Answer) -> ApiError:
    """What a client is told of a response that broke."""
    kind = stopping if exchange.stopped else late if exchange.late else unavailable
    return kind(shown=exchange.committed and bool(answer.text))
