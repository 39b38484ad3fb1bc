"""The other way to a vLLM: `/v1/chat/completions`, where the server renders the conversation itself.

Steps are judged by their ids as ever. The ids of the prompt come back with the first chunk and have to be redflag's own
rendering: where they differ, a user's text may have become a control token, and the request is refused before its
first token. Reflections and what follows them go on by ids, over `/v1/completions`.

Tools are shown by the server's template and never called by the server: `tool_choice` is `none`, which a vLLM takes
without a parser of its own, and calls are read from the judged text as on the other way.

Written against vLLM 0.32 (`vllm/entrypoints/openai/chat_completion`). A chunk reads

    {"choices": [{"index": 0, "delta": {"content": " cat"}, "finish_reason": null, "token_ids": [667], "logprobs":
      {"content": [{"token": "token_id:667", "logprob": -7.88, "top_logprobs": [{"token": "token_id:5", ...}]}]}}]}

and the first one has no token, but `prompt_token_ids` beside `choices`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redflag.backends import ChatInput
from redflag.backends.remote_wire import StreamReader
from redflag.chat_template import SWITCHES
from redflag.errors import RedflagError
from redflag.trace import Step


def chat_body(body: dict[str, Any], chat: ChatInput) -> dict[str, Any]:
    """The body of a request to `/v1/completions` as one to `/v1/chat/completions`."""
    request = {name: value for name, value in body.items() if name not in ("prompt", "logprobs")}
    tools = {"tools": [dict(tool) for tool in chat.tools], "tool_choice": "none"} if chat.tools else {}
    return {
        **request,
        **tools,
        "chat_template_kwargs": SWITCHES[chat.thinking],  # as `redflag.chat_template` renders
        "messages": [_turn(message) for message in chat.messages],
        "logprobs": True,
        "top_logprobs": 0,
        "include_reasoning": True,  # without it a reasoning parser would leave out its tokens' log-probabilities
    }


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as the API has it: arguments as JSON text, a thought under vLLM's name too."""
    turn = dict(message)
    if "reasoning_content" in turn:
        turn["reasoning"] = turn["reasoning_content"]
    if turn.get("tool_calls"):
        turn["tool_calls"] = [{**call, "function": _function(call["function"])} for call in turn["tool_calls"]]
    return turn


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": text}


class ChatReader(StreamReader):
    """A `StreamReader` for chunks of a chat."""

    _prompt_seen = False

    def _choices(self, chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
        ids = chunk.get("prompt_token_ids")
        if ids is not None:
            self._prompt_seen = True
            if ids != self._prompt:
                raise PromptMismatchError(self._prompt, ids)
        return [_as_completion(choice) for choice in chunk["choices"]]

    def _steps(self, choice: dict[str, Any], steps: list[Step]) -> None:
        if not self._prompt_seen and (choice.get("token_ids") or choice.get("logprobs")):
            raise ConnectionError("the server sent a token before the prompt's ids (return_token_ids), so it is unread")
        super()._steps(choice, steps)


class PromptMismatchError(RedflagError):
    """The server rendered a conversation to other ids than redflag."""

    def __init__(self, own: list[int], other: Any) -> None:
        others = other if isinstance(other, list) else []
        same = next((i for i, pair in enumerate(zip(own, others, strict=False)) if pair[0] != pair[1]), None)
        where = min(len(own), len(others)) if same is None else same
        super().__init__(
            f"The conversation must become the same prompt here and in the upstream server (got {len(own)} and "
            f"{len(others)} tokens, which differ from token {where} on). A message that spells a control token is one "
            "reason, another chat template there the other, or a server that leaves tools out. Leave the control token "
            "out, or use upstream_route completions."
        )


def _as_completion(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice of a chat in the shape of one of `/v1/completions`; its text is made from ids here, and left out."""
    logprobs = choice.get("logprobs")
    completion = {**choice, "text": "", "logprobs": None}
    if choice.get("finish_reason") == "tool_calls":
        completion["finish_reason"] = "stop"
    if logprobs and logprobs.get("content"):
        content = logprobs["content"]
        tops = [{top["token"]: top["logprob"] for top in item["top_logprobs"]} for item in content]
        completion["logprobs"] = {
            "tokens": [item["token"] for item in content],
            "top_logprobs": tops,
            "token_logprobs": [item["logprob"] for item in content],
        }
    elif any((choice.get("delta") or {}).get(name) for name in ("content", "reasoning", "tool_calls")):
        completion["text"] = "..."  # without tokens, which is refused
    return completion
