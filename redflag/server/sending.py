"""Sends a response, or several choices of one request, as server-sent events or in one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import anyio
from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from redflag.api.api_errors import ApiError, error_response, late, refused_by_engine, stopping, unavailable
from redflag.api.operator_view import operator_view
from redflag.api.wire import Answer, ending, together
from redflag.errors import RedflagError
from redflag.server.access import Limits
from redflag.server.exchange import CLOSING, Exchange
from redflag.trace import Thought

Part = tuple[Exchange, Answer]
"""One of a request's choices, and its answer."""


class EventStream(EventSourceResponse):
    """Server-sent events. The status is sent with the first of them, so until then it can become an error.

    Several choices are interleaved; a fault of one ends all of them with the same error.
    """

    def __init__(self, parts: Sequence[Part], view: bool, headers: Mapping[str, str], limits: Limits) -> None:
        self._parts = parts
        self._extra = headers
        self._error: ApiError | None = None
        self._detail: dict[str, Any] = {}
        self._closing = False
        super().__init__(
            self._chunks(view), headers=headers, ping=limits.ping, send_timeout=limits.send_timeout, sep="\n"
        )

    async def _chunks(self, view: bool) -> AsyncIterator[bytes]:
        parts = self._parts
        try:
            async with aclosing(_merged([_choice(part, view) for part in parts])) as pieces:
                async for piece in pieces:
                    yield piece
        except _BrokenError:
            pass
        except RedflagError as error:
            self._error = refused_by_engine(error, parts[0][1].param)
            return
        self._closing = True
        broken = next((part for part in parts if part[1].failed), None)
        if broken is None:
            yield ending([answer for _, answer in parts])
        else:
            exchange, answer = broken
            seen, fault = _seen(exchange, view), _fault(exchange, any(answer.text for _, answer in parts))
            if exchange.committed:
                yield answer.breaking(fault.body(), seen)
            else:
                self._error, self._detail, self._closing = fault, answer.failure(seen), False
        for exchange, answer in parts:
            exchange.delivered = answer.over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        closed = False

        async def deferred(message: Message) -> None:
            nonlocal start, closed
            if message["type"] == "http.response.start":
                start = message
                return
            if self._error is not None:
                if not message.get("more_body"):  # Nothing was sent: the error takes the stream's place.
                    await error_response(self._error, scope["path"], self._extra, self._detail)(scope, receive, send)
                return
            if closed and message.get("more_body"):
                return  # a ping after the last chunk
            closed = self._closing
            if start is not None:
                head, start = start, None
                for exchange, _ in self._parts:
                    exchange.committed = True
                await send(head)
            await send(message)

        try:
            with suppress(SendTimeoutError):  # The client read nothing for too long.
                await super().__call__(scope, receive, deferred)
        finally:
            await close(self._parts)


async def whole(request: Request, parts: Sequence[Part], view: bool, headers: Mapping[str, str]) -> Response:
    """The response in one piece; it is stopped if the client disconnects."""
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(lambda task: None if task.cancelled() else _leave(parts))
    try:
        async with aclosing(_merged([_events(part) for part in parts])) as events:
            async for _ in events:
                pass
    except _BrokenError:
        pass
    except RedflagError as error:
        raise refused_by_engine(error, parts[0][1].param) from error
    except ConnectionAbortedError:
        return Response(status_code=499)  # The client has disconnected.
    finally:
        gone.cancel()
    for exchange, answer in parts:
        exchange.delivered = answer.over
    for exchange, answer in parts:
        if answer.failed:
            detail = answer.failure(_seen(exchange, view))
            return error_response(_fault(exchange, False), request.url.path, headers, detail)
    choices = [(answer, exchange.response.trace.generated, _seen(exchange, view)) for exchange, answer in parts]
    # In ASCII, as the chunks of a stream, since an operator's text may have half a surrogate pair.
    answer, generated, seen = choices[0]
    body = json.dumps(answer.body(generated, seen) if len(choices) == 1 else together(choices))
    return Response(body, media_type="application/json", headers=dict(headers))


def _leave(parts: Sequence[Part]) -> None:
    for exchange, _ in parts:
        exchange.stop("disconnected")


async def close(parts: Sequence[Part]) -> None:
    for exchange, _ in parts:
        await exchange.close()


class _BrokenError(Exception):
    """One of the choices has failed; its answer says so."""


async def _choice(part: Part, view: bool) -> AsyncGenerator[bytes, None]:
    """The chunks of one choice; raises `_BrokenError` in place of the last one after a fault."""
    exchange, answer = part
    opening = answer.opening()
    while not answer.over:
        event = await exchange.next()
        text = answer.push(event)
        if isinstance(event, Thought) and event.text:
            yield opening + answer.thought_chunk(event.text)
            opening = b""
        if text:
            yield opening + answer.chunk(text)
            opening = b""
    if answer.failed:
        raise _BrokenError
    answer.thought_tokens = exchange.response.trace.thought_tokens
    yield opening + answer.last(exchange.response.trace.generated, _seen(exchange, view))


async def _events(part: Part) -> AsyncGenerator[bytes, None]:
    """As `_choice`, but sends nothing before the end."""
    exchange, answer = part
    while not answer.over:
        answer.push(await exchange.next())
    if answer.failed:
        raise _BrokenError
    answer.thought_tokens = exchange.response.trace.thought_tokens
    yield b""


async def _merged(streams: Sequence[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """Interleaves the chunks of several choices, until all are over or one fails.

    Each has a task of its own, since engines identify a response by its task.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield piece
        return
    ready: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(len(streams))

    async def carry(stream: AsyncGenerator[bytes, None]) -> None:
        error: Exception | None = None
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await ready.put(piece)
        except Exception as raised:
            error = raised
        await ready.put(error)

    tasks = [asyncio.ensure_future(carry(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        # Shielded: what a task holds can only be closed once the task is over.
        with anyio.move_on_after(CLOSING, shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fault(exchange: Exchange, shown: bool) -> ApiError:
    kind = {"stopped": stopping, "timeout": late}.get(exchange.cut, unavailable)
    return kind(shown=exchange.committed and shown)


def _seen(exchange: Exchange, view: bool) -> dict[str, Any] | None:
    return operator_view(exchange.response.trace) if view else None
