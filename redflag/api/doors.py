"""The routes that answer: the schema of their requests, and the format of their answers.

All of them send the same judged text: an answer gets the events of one response and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redflag.api.messages_schema import MessagesRequest
from redflag.api.messages_wire import MessagesAnswer
from redflag.api.responses_schema import ResponsesRequest
from redflag.api.responses_wire import ResponsesAnswer
from redflag.api.schema import ChatRequest, CompletionRequest
from redflag.api.wire import Answer
from redflag.guard.response import Response

Body = ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest


@dataclass(frozen=True)
class Door:
    """A route that answers.

    Attributes:
        prefix: Of response ids.
        answer: Body, response and the arguments that every `Answer` has -> the answer.
    """

    request: type[Body]
    prefix: str
    answer: Callable[..., Answer]


def _openai(body: ChatRequest | CompletionRequest, response: Response, **shared: Any) -> Answer:
    return Answer(chat=isinstance(body, ChatRequest), usage=body.wants_usage, **shared)


def _responses(body: ResponsesRequest, response: Response, **shared: Any) -> Answer:
    return ResponsesAnswer(request=body, **shared)


def _messages(body: MessagesRequest, response: Response, **shared: Any) -> Answer:
    return MessagesAnswer(stop_text=lambda: response.text.stop_text, **shared)


DOORS = {
    "/v1/chat/completions": Door(ChatRequest, "chatcmpl-", _openai),
    "/v1/completions": Door(CompletionRequest, "cmpl-", _openai),
    "/v1/responses": Door(ResponsesRequest, "resp_", _responses),
    "/v1/messages": Door(MessagesRequest, "msg_", _messages),
}
