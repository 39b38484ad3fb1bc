"""The same request for tools and thoughts at each of the three doors, and what of the answer a client would act on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from running import MODEL, Running, chunks_of, events_of
from tool_server import ASK, CLIENT, TOOL

DOORS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
FUNCTION = TOOL["function"]
TOOLS = {
    "/v1/chat/completions": TOOL,
    "/v1/responses": {"type": "function", **FUNCTION},
    "/v1/messages": {
        "name": FUNCTION["name"],
        "description": FUNCTION["description"],
        "input_schema": FUNCTION["parameters"],
    },
}
THINK: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"chat_template_kwargs": {"enable_thinking": True}},
    "/v1/responses": {"reasoning": {"effort": "medium"}},
    "/v1/messages": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
}
NO_THOUGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"chat_template_kwargs": {"enable_thinking": False}},
    "/v1/responses": {"reasoning": {"effort": "none"}},
    "/v1/messages": {"thinking": {"type": "disabled"}},
}
ALONE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"parallel_tool_calls": False},
    "/v1/responses": {"parallel_tool_calls": False},
    "/v1/messages": {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
}


def choice(door: str, wanted: str) -> dict[str, Any]:
    """`tool_choice` for `auto`, `none`, `required`, or the name of a function."""
    if door == "/v1/messages":
        kinds = {"auto": "auto", "none": "none", "required": "any"}
        return {"tool_choice": {"type": kinds[wanted]} if wanted in kinds else {"type": "tool", "name": wanted}}
    if wanted in ("auto", "none", "required"):
        return {"tool_choice": wanted}
    named = {"name": wanted}
    return {"tool_choice": {"type": "function", **({"function": named} if "chat" in door else named)}}


def turns(door: str, *others: Any) -> dict[str, Any]:
    """The question, and what came after it in the shape of the door."""
    return {"input" if "responses" in door else "messages": [ASK, *others]}


def ask(server: Running, door: str, stream: bool = False, *, tools: Any = None, **fields: Any) -> httpx.Response:
    """One request, with the tool unless there are others."""
    body = {"model": MODEL, "stream": stream, "tools": [TOOLS[door]] if tools is None else tools, **turns(door)}
    if door == "/v1/messages":
        body["max_tokens"] = 256
    return CLIENT.post(server.url + door, json={**body, **fields})


@dataclass
class Read:
    """What a client makes of an answer.

    Attributes:
        thought: The text of the thought.
        text: The text of the answer.
        calls: (name, arguments) of each call, however it came.
        how: `done`, `calls`, `length`, `halted` or `fault`.
        turn: The answer as it is sent back, where it was whole: a list of turns or items.
    """

    thought: str = ""
    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    how: str = ""
    turn: list[Any] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def read(door: str, response: httpx.Response, stream: bool) -> Read:
    """Reads an answer, whole or streamed; a stream says the same in its pieces and in what they make."""
    if response.status_code >= 500:
        return Read(how="fault")
    assert response.status_code == 200, response.content
    of = {"/v1/chat/completions": _chat, "/v1/responses": _responses, "/v1/messages": _messages}
    return of[door](response, stream)


def _add(made: Read, name: str, arguments: Any, identity: str) -> None:
    made.calls.append((name, json.loads(arguments) if isinstance(arguments, str) else arguments))
    made.ids.append(identity)


def _chat(response: httpx.Response, stream: bool) -> Read:
    made = Read()
    if stream:
        chunks = chunks_of(response.content)
        if "error" in chunks[-1]:
            made.how = "fault"
        choices = [one for chunk in chunks for one in chunk.get("choices", ())]
    else:
        choices = response.json()["choices"]
        made.turn = [choices[0]["message"]]
    for one in choices:
        said = one.get("delta") or one.get("message") or {}
        made.text += said.get("content") or ""
        made.thought += said.get("reasoning_content") or ""
        for call in said.get("tool_calls") or ():
            _add(made, call["function"]["name"], call["function"]["arguments"], call["id"])
        ends = {"stop": "done", "tool_calls": "calls", "length": "length", "content_filter": "halted", None: made.how}
        made.how = ends[one["finish_reason"]]
    return made


def _responses(response: httpx.Response, stream: bool) -> Read:
    made = Read()
    body = response.json() if not stream else {}
    if stream:
        events = events_of(response.content)
        body = events[-1]["response"]
        made.text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        made.thought = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta")
        begun = {e["item"]["id"]: e["item"] for e in events if e["type"] == "response.output_item.added"}
        for event in events:
            if event["type"] == "response.function_call_arguments.delta":
                _add(made, begun[event["item_id"]]["name"], event["delta"], begun[event["item_id"]]["call_id"])
        done = [(e["output_index"], e["item"]) for e in events if e["type"] == "response.output_item.done"]
        assert body["status"] == "failed" or done == list(enumerate(body["output"]))
        assert [call for call in made.ids] == [item["call_id"] for item in body["output"] if "call_id" in item]
    else:
        for item in body["output"]:
            if item["type"] == "function_call":
                _add(made, item["name"], item["arguments"], item["call_id"])
            else:
                text = "".join(part.get("text", "") for part in item["content"])
                made.thought += text if item["type"] == "reasoning" else ""
                made.text += text if item["type"] == "message" else ""
    made.turn = body["output"]
    reason = (body["incomplete_details"] or {}).get("reason")
    ended = {"completed": "calls" if made.calls else "done", "failed": "fault"}
    made.how = ended.get(body["status"]) or {"content_filter": "halted", "max_output_tokens": "length"}[reason]
    return made


def _messages(response: httpx.Response, stream: bool) -> Read:
    made = Read()
    if stream:
        events = events_of(response.content)
        blocks: list[dict[str, Any]] = []
        reason = None
        for event in events:
            if event["type"] == "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"]})
            elif event["type"] == "content_block_delta":
                delta, block = event["delta"], blocks[event["index"]]
                assert event["index"] == len(blocks) - 1
                if delta["type"] == "input_json_delta":
                    block["input"] = json.loads(delta["partial_json"])
                else:
                    kind = delta["type"].removesuffix("_delta")
                    block[kind] += delta[kind]
            elif event["type"] == "message_delta":
                reason = event["delta"]["stop_reason"]
        made.how = "fault" if events[-1]["type"] == "error" else ""
    else:
        body = response.json()
        blocks, reason = body["content"], body["stop_reason"]
        made.turn = [{"role": "assistant", "content": blocks}]
    for block in blocks:
        if block["type"] == "tool_use":
            _add(made, block["name"], block["input"], block["id"])
        else:
            made.thought += block.get("thinking", "")
            made.text += block.get("text", "")
    ends = {"end_turn": "done", "tool_use": "calls", "max_tokens": "length", "refusal": "halted", None: "fault"}
    made.how = ends[reason]
    return made


def result(door: str, identity: str, text: str) -> dict[str, Any]:
    """The turn or item with a call's result."""
    if "chat" in door:
        return {"role": "tool", "tool_call_id": identity, "content": text}
    if "responses" in door:
        return {"type": "function_call_output", "call_id": identity, "output": text}
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": identity, "content": text}]}
