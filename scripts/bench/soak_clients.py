"""The clients of `scripts/bench/soak.py`: what they ask, how they read, and whether what they saw had to be so."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from soak_start import HOLD_BACK, MOST_BODY
from soak_upstream import MARKED, TOOL, Case, Tongue

ROUTES = ("/v1/chat/completions", "/v1/completions")
LONG = "10,000 messages"
KINDS = {
    "stream": 40,
    "whole": 12,
    "leave": 16,
    "leave whole": 5,
    "tools": 10,
    "thoughts": 8,
    "two choices": 6,
    "slow": 4,
    "flag text": 4,
    "too long": 1.5,
    "not utf-8": 1.5,
    "refused": 1,
    LONG: 0.3,
}
CHATS = ("tools", "thoughts", "two choices")  # that `/v1/chat/completions` alone can do
TOOLS = [{"type": "function", "function": {"name": TOOL, "parameters": {"type": "object", "properties": {}}}}]


@dataclass
class Seen:
    """What a client has read of one choice; `last` is the body or the chunk that says how it ended."""

    text: str = ""
    thought: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def take(self, part: dict[str, Any]) -> None:
        """Reads a message, or a delta."""
        self.text += part.get("content") or ""
        self.thought += part.get("reasoning_content") or ""
        for number, call in enumerate(part.get("tool_calls") or ()):
            at = call.get("index", number)
            self.calls += [{"name": "", "arguments": ""} for _ in range(at + 1 - len(self.calls))]
            for key in self.calls[at]:
                self.calls[at][key] += call["function"].get(key) or ""

    @property
    def written(self) -> str:
        """The text as the model wrote it: an upstream that calls a tool writes nothing else."""
        return self.text + "".join(f'{{"name": "{c["name"]}", "arguments": {c["arguments"]}}}' for c in self.calls)


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, url: str, tongue: Tongue, arguments: argparse.Namespace) -> None:
        self.url, self.tongue, self.scripted = url, tongue, arguments.vllm is None
        self.tokens, self.hang = arguments.tokens, arguments.request_timeout + 25.0
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.received: dict[str, tuple[str, str, bool]] = {}  # response -> its thought, its text, whether that is all
        self.numbers = iter(range(random.randrange(10**8), 10**9))
        self.down: list[tuple[float, float]] = []  # when the upstream was away
        self.long = asyncio.Lock()

    async def client(self, session: aiohttp.ClientSession, until: float) -> None:
        """One client, request after request."""
        while time.monotonic() < until:
            kind = random.choices(list(KINDS), list(KINDS.values()))[0]
            if kind != LONG or not self.long.locked():
                await self.ask(session, kind)

    async def ask(self, session: aiohttp.ClientSession, kind: str) -> None:
        """One request."""
        number, begun = next(self.numbers), time.monotonic()
        try:
            # A slow reader takes its own time on top.
            async with asyncio.timeout(self.hang + (60 if kind == "slow" else 0)):
                outcomes = await self._ask(session, kind, number, begun)
        except TimeoutError:
            outcomes = ["hang"]
            self.wrong.append(f"{kind} case-{number}: no end within {self.hang:g} s")
        except (aiohttp.ClientError, ConnectionError) as error:
            outcomes = ["cut"]
            self.wrong.append(f"{kind} case-{number}: {type(error).__name__}: {error}")
        self.counts.update(f"{kind}: {outcome}" for outcome in outcomes)
        if outcomes[0] in ("status 429", "status 503"):
            await asyncio.sleep(1.0)  # as Retry-After says

    async def _ask(self, session: aiohttp.ClientSession, kind: str, number: int, begun: float) -> list[str]:
        route = ROUTES[0] if kind in CHATS else random.choice(ROUTES)
        often = 0.5 if kind in (*CHATS, "flag text") else 0.0
        streamed = kind in ("stream", "leave", "slow") or random.random() < often
        body: Any = self._body(route, kind, number) | {"stream": streamed}
        if kind == "too long":
            body["user"] = "x" * (2 * MOST_BODY)
        data = json.dumps(body).encode()
        if kind == "not utf-8":
            data = data.replace(b"case-", b"\xff\xfe")
        guarded = self.long if kind == LONG else contextlib.nullcontext()
        async with guarded:
            if kind == "leave whole":
                try:
                    async with asyncio.timeout(random.uniform(0.0, 1.5)):
                        async with session.post(self.url + route, data=data) as response:
                            await response.read()
                    return ["was done before"]
                except TimeoutError:
                    return ["left"]
            async with session.post(self.url + route, data=data) as response:
                return await self._read(response, kind, number, begun, streamed)

    def _body(self, route: str, kind: str, number: int) -> dict[str, Any]:
        ask = f"please {'call' if kind == 'tools' else 'tell'} case-{number}"
        fields: dict[str, Any] = {"model": "soak", "max_tokens": self.tokens, "temperature": 1.0, "seed": number}
        flag = self.tongue.flag_text if kind == "flag text" else ""
        if kind == "refused":
            fields |= random.choice([{"n": 9}, {"logprobs": 5}, {"tools": [{}]}, {"temperature": "hot"}])
        if kind == "tools":
            fields |= {"tools": TOOLS}
        if kind == "thoughts":
            fields |= {"chat_template_kwargs": {"enable_thinking": True}}
        if kind == "two choices":
            fields |= {"n": 2}
        if "chat" not in route and kind != LONG:
            return {**fields, "prompt": f"{flag}{ask}"}
        messages = [{"role": "user", "content": ask}]
        if flag:
            roles = ("system", "user", "assistant")
            messages = [{"role": role, "content": f"{flag} so {flag}"} for role in roles] + [
                {"role": "user", "content": f"{flag} {ask}"}
            ]
        if kind == LONG:
            turns = [{"role": role, "content": "and?"} for role in ("user", "assistant")]
            messages = turns * 5_000 + messages
        return {**fields, "messages": messages} if "chat" in route else {**fields, "prompt": ask * 2_000}

    async def _read(
        self, response: aiohttp.ClientResponse, kind: str, number: int, begun: float, streamed: bool
    ) -> list[str]:
        refused = {"too long": 413, "not utf-8": 400, "refused": 400}.get(kind)
        if refused is not None or response.status != 200:
            error = (await response.json())["error"]
            # Where nothing was sent, what breaks is an error; a full or restarting server says so.
            allowed = {refused} if refused is not None else {429, 503, 504}
            if not self.scripted and kind in (LONG, "thoughts"):
                allowed |= {400}  # more than the context of a small model; a template without a thinking mode
            if response.status not in allowed:
                self.wrong.append(f"{kind} case-{number}: status {response.status}: {error}")
            return [f"status {response.status}"]
        name = response.headers["x-request-id"]
        choices = [Seen() for _ in range(2 if kind == "two choices" else 1)]
        if not streamed:
            body = json.loads(await response.read())
            for seen, choice in zip(choices, body["choices"], strict=True):
                seen.take(choice["message"] if "message" in choice else {"content": choice["text"]})
                # Of several choices each has its own `redflag`; that of the body is the first halted one's.
                seen.last = choice if len(choices) > 1 else body | choice
                seen.reason = choice["finish_reason"]
            return self._judge(kind, number, begun, name, choices, whole=True)
        left, chunks = kind == "leave" and random.randint(0, 30), 0
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                return self._judge(kind, number, begun, name, choices, whole=True)
            chunk = json.loads(line[6:])
            if "error" in chunk:
                for seen in choices:
                    seen.last = seen.last if seen.reason else chunk
                continue
            choice = chunk["choices"][0]
            seen = choices[choice["index"]]
            seen.take(choice["delta"] if "delta" in choice else {"content": choice["text"]})
            if choice["finish_reason"] is not None:
                seen.reason, seen.last = choice["finish_reason"], chunk | choice
            chunks += 1
            if kind == "slow":
                await asyncio.sleep(0.25)
            if kind == "leave" and chunks > left:
                response.close()
                return self._judge(kind, number, begun, name, choices, whole=False)
        self.wrong.append(f"{kind} case-{number}: the stream ended without [DONE] after {choices[0].text[-80:]!r}")
        return ["cut"]

    def _judge(self, kind: str, number: int, begun: float, name: str, choices: list[Seen], *, whole: bool) -> list[str]:
        """What the choices of a response that was begun have come to; whether they had to."""
        outcomes = []
        # What breaks one of several choices ends them all, with steps on their way that were released already.
        complete = whole and not (len(choices) > 1 and any("error" in seen.last for seen in choices))
        for index, seen in enumerate(choices):
            self.received[f"{name}-{index}" if index else name] = (seen.thought, seen.written, complete)
            if self.scripted and MARKED.search(seen.thought + seen.written):
                self.wrong.append(f"{kind} case-{number}: UNJUDGED TEXT {seen}")
            outcomes.append(self._outcome(kind, number, begun, seen) if whole else "left")
        return outcomes

    def _outcome(self, kind: str, number: int, begun: float, seen: Seen) -> str:
        detail = seen.last.get("redflag") or {}
        outcome = {"halted": "halted", "fault": "fault"}.get(detail.get("verdict"), "done")
        reason = None if "error" in seen.last else seen.reason
        expected = {"halted": ("content_filter",), "fault": (None,)}.get(outcome, ("stop", "length", "tool_calls"))
        if kind == "tools" and outcome == "done" and self.scripted:
            expected = ("tool_calls",)
        # An upstream that was started again begins the script of a resumed answer anew, and may reach the limit.
        to_its_end = self.scripted and not self._disturbed(begun)
        if reason not in expected[: 1 if to_its_end else None] or ("error" in seen.last) != (outcome == "fault"):
            self.wrong.append(f"{kind} case-{number}: finish_reason {reason} with {detail}")
        if seen.calls and outcome != "done":
            self.wrong.append(f"{kind} case-{number}: {outcome}, and yet it has calls: {seen.calls}")
        if to_its_end:
            script = self.tongue.script(number, kind == "tools", kind == "thoughts")
            case = Case.of(number, len(script))
            ends, tokens = case.outcome(HOLD_BACK, script.index(self.tongue.closes) + 1 if kind == "thoughts" else 0)
            thought, text = self.tongue.parts(script[:tokens], kind == "thoughts")
            if kind == "tools" and ends != "done":
                text = ""  # What may be a call is held until the end.
            # Steps that arrive together with what is broken may be lost with it.
            parts = self.tongue.parts(script, kind == "thoughts")
            early = outcome == "fault" and case.breaks
            early &= parts[0].startswith(seen.thought) and parts[1].startswith(seen.text)
            if (outcome, seen.thought, seen.written) != (ends, thought, text) and not early:
                self.wrong.append(f"{kind} case-{number}: {outcome} after {seen}, not {ends} after {tokens} tokens")
        return outcome

    def _disturbed(self, begun: float) -> bool:
        now = time.monotonic()
        return any(start <= now and begun <= end for start, end in self.down)
