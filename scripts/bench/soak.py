"""Many clients, some of them rude, for minutes: does `redflag serve` leak, hang, or show what was not judged?

    python scripts/bench/soak.py --model runs/nano/model  # 64 clients, 5 minutes, a scripted upstream
    python scripts/bench/soak.py --model runs/nano/model --vllm .vllm/bin/python --kills 2

In front of an upstream of its own (`scripts/bench/soak_upstream.py`), which marks every token that must not be shown,
breaks in several ways, and is killed and started again every 20 seconds. Alarms lead to reflections, so that hidden
streams and resumed ones are among the traffic. With `--vllm` a stock vLLM takes the upstream's place, killed and
started again `--kills` times: no marks there, and what was received is compared with the recorded traces, as in both.

Clients stream or not, leave in the middle, read slowly, send bodies that are too long or no UTF-8, conversations of
10,000 messages, flag text in every role. Every second the server's memory, file descriptors, sockets and threads are
read. Exit status 1: something hung, was shown unjudged, was cut off without a last chunk, ended otherwise than it had
to, or grew. JSON on standard output, a table on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from soak_report import report, table
from soak_start import HOLD_BACK, MOST_BODY, free_ports, kill, ready, server_command, start, upstream_command
from soak_upstream import MARKED, Case, Tongue

from redflag.trace import Halt, Text, read_traces

ROUTES = ("/v1/chat/completions", "/v1/completions")
LONG = "10,000 messages"
KINDS = {
    "stream": 50,
    "whole": 15,
    "leave": 18,
    "leave whole": 5,
    "slow": 4,
    "flag text": 4,
    "too long": 1.5,
    "not utf-8": 1.5,
    "refused": 1,
    LONG: 0.3,
}


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, url: str, tongue: Tongue, arguments: argparse.Namespace) -> None:
        self.url, self.tongue, self.scripted = url, tongue, arguments.vllm is None
        self.tokens, self.hang = arguments.tokens, arguments.request_timeout + 25.0
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.received: dict[str, tuple[str, bool]] = {}  # response -> its text, and whether it is all of it
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
                outcome = await self._ask(session, kind, number, begun)
        except TimeoutError:
            outcome = "hang"
            self.wrong.append(f"{kind} case-{number}: no end within {self.hang:g} s")
        except (aiohttp.ClientError, ConnectionError) as error:
            outcome = "cut"
            self.wrong.append(f"{kind} case-{number}: {type(error).__name__}: {error}")
        self.counts[f"{kind}: {outcome}"] += 1
        if outcome in ("status 429", "status 503"):
            await asyncio.sleep(1.0)  # as Retry-After says

    async def _ask(self, session: aiohttp.ClientSession, kind: str, number: int, begun: float) -> str:
        route = random.choice(ROUTES)
        streamed = kind in ("stream", "leave", "slow") or (kind == "flag text" and random.random() < 0.5)
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
                    return "was done before"
                except TimeoutError:
                    return "left"
            async with session.post(self.url + route, data=data) as response:
                return await self._read(response, kind, number, begun, streamed)

    def _body(self, route: str, kind: str, number: int) -> dict[str, Any]:
        ask = f"please tell case-{number}"
        fields: dict[str, Any] = {"model": "soak", "max_tokens": self.tokens, "temperature": 1.0, "seed": number}
        flag = self.tongue.flag_text if kind == "flag text" else ""
        if kind == "refused":
            fields |= random.choice([{"n": 2}, {"logprobs": 5}, {"tools": [{}]}, {"temperature": "hot"}])
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
    ) -> str:
        refused = {"too long": 413, "not utf-8": 400, "refused": 400}.get(kind)
        if refused is not None or response.status != 200:
            error = (await response.json())["error"]
            # Where nothing was sent, what breaks is an error; a full or restarting server says so.
            allowed = {refused} if refused is not None else {429, 503, 504}
            if not self.scripted and kind == LONG:
                allowed |= {400}  # more than the context of a small model
            if response.status not in allowed:
                self.wrong.append(f"{kind} case-{number}: status {response.status}: {error}")
            return f"status {response.status}"
        name = response.headers["x-request-id"]
        if not streamed:
            body = json.loads(await response.read())
            choice = body["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            return self._judge(kind, number, begun, name, text, body, whole=True)
        text, last, left = "", {}, kind == "leave" and random.randint(0, 30)
        chunks = 0
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                return self._judge(kind, number, begun, name, text, last, whole=True)
            last = json.loads(line[6:])
            if "error" in last:
                continue
            choice = last["choices"][0]
            text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
            chunks += 1
            if kind == "slow":
                await asyncio.sleep(0.25)
            if kind == "leave" and chunks > left:
                response.close()
                return self._judge(kind, number, begun, name, text, last, whole=False)
        self.wrong.append(f"{kind} case-{number}: the stream ended without [DONE] after {text[-80:]!r}")
        return "cut"

    def _judge(
        self, kind: str, number: int, begun: float, name: str, text: str, last: dict[str, Any], *, whole: bool
    ) -> str:
        """What a response that was begun has come to; whether it had to."""
        self.received[name] = (text, whole)
        if self.scripted and MARKED.search(text):
            self.wrong.append(f"{kind} case-{number}: UNJUDGED TEXT {text!r}")
        if not whole:
            return "left"
        said = last.get("redflag") or {}
        found = {"halted": "halted", "fault": "fault"}.get(said.get("verdict"), "done")
        reason = None if "error" in last else last["choices"][0]["finish_reason"]
        expected = {"halted": ("content_filter",), "fault": (None,)}.get(found, ("stop", "length"))
        if reason not in expected[: 1 if self.scripted else None] or ("error" in last) != (found == "fault"):
            self.wrong.append(f"{kind} case-{number}: finish_reason {reason} with {said}")
        if self.scripted and not self._disturbed(begun):
            case = Case.of(number)
            outcome, tokens = case.outcome(HOLD_BACK)
            # Steps that arrive together with what is broken may be lost with it.
            early = found == "fault" and case.breaks and self.tongue.text(number, case.length).startswith(text)
            if (found, text) != (outcome, self.tongue.text(number, tokens)) and not early:
                self.wrong.append(f"{kind} case-{number}: {found} after {text!r}, not {outcome} after {tokens} tokens")
        return found

    def _disturbed(self, begun: float) -> bool:
        now = time.monotonic()
        return any(start <= now and begun <= end for start, end in self.down)


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Starts everything, lets it run, stops it; the figures."""
    tongue = Tongue(arguments.model)
    ports = free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    scripted = arguments.vllm is None
    upstream = await start(upstream_command(arguments, ports[0]), urls[0] + "/v1/models", folder / "upstream.log")
    server: subprocess.Popen[bytes] | None = None
    try:
        server = await start(
            server_command(arguments, urls[0], ports[1], folder), urls[1] + "/ready", folder / "server.log"
        )
        soak = Soak(urls[1], tongue, arguments)
        samples: list[dict[str, float]] = []
        process = psutil.Process(server.pid)
        fresh = read(process, time.monotonic())
        async with aiohttp.ClientSession() as session:
            for _ in range(4):  # What they leave of the allocator's memory is there from the beginning.
                await soak.ask(session, LONG)
        begun = time.monotonic()
        until = begun + arguments.seconds
        sampling = asyncio.create_task(sample(process, samples, begun))
        sessions = [
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=force_close))
            for force_close in (False, True)
        ]
        clients = [asyncio.create_task(soak.client(sessions[i % 2], until)) for i in range(arguments.clients)]
        pause = 20.0 if scripted else arguments.seconds / (arguments.kills + 1)
        while time.monotonic() < until - 15 if scripted else len(soak.down) < arguments.kills:
            await asyncio.sleep(pause)
            since = time.monotonic()
            soak.down.append((since - 0.1, float("inf")))
            kill(upstream)
            await asyncio.sleep(random.uniform(0.2, 2.0))
            upstream = await start(
                upstream_command(arguments, ports[0]), urls[0] + "/v1/models", folder / "upstream.log"
            )
            await ready(urls[1])
            soak.down[-1] = (since - 0.1, time.monotonic() + 0.1)
        await asyncio.gather(*clients)
        for session in sessions:
            await session.close()
        await asyncio.sleep(8)
        sampling.cancel()
        after = read(process, begun)
        await ready(urls[1])
        async with aiohttp.ClientSession() as session, session.get(urls[1] + "/metrics") as response:
            metrics = await response.text()
    finally:
        for running in (server, upstream):
            if running is not None:
                running.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(20)
                kill(running)
    compared = compare(soak, folder / "traces.jsonl")
    return report(
        soak.wrong,
        soak.counts,
        samples,
        fresh,
        after,
        metrics,
        seconds=arguments.seconds,
        clients=arguments.clients,
        upstream="scripted" if scripted else "vllm",
        kills=len(soak.down),
        seconds_away=[round(end - since, 1) for since, end in soak.down],
        responses_compared_with_traces=compared,
    )


def compare(soak: Soak, record: Path) -> int:
    """Every text that was received against the trace: the tokens that were released, and no others."""
    compared = 0
    for trace in read_traces(record):
        text, whole = soak.received.pop(trace.id, (None, False))
        if text is None:
            continue
        released = [token_id for event in trace.events if isinstance(event, Text) for token_id in event.token_ids]
        shown = soak.tongue.tokenizer.decode(released, skip_special_tokens=True)
        shown += trace.end.text if isinstance(trace.end, Halt) else ""
        compared += 1
        # Incomplete characters at the end of what a client saw before it left are no difference.
        if (shown != text) if whole else not shown.startswith(text.rstrip("\ufffd")):
            soak.wrong.append(f"{trace.id}: a client read {text!r} and {shown!r} was released")
    if soak.received:
        soak.wrong.append(f"{len(soak.received)} responses have no trace")
    return compared


async def sample(process: psutil.Process, samples: list[dict[str, float]], begun: float) -> None:
    """Reads the server's figures every second."""
    while True:
        samples.append(read(process, begun))
        await asyncio.sleep(1.0)


def read(process: psutil.Process, begun: float) -> dict[str, float]:
    """The server's figures now."""
    with process.oneshot():
        return {
            "t": round(time.monotonic() - begun, 1),
            "rss_mb": round(process.memory_info().rss / 2**20, 1),
            "fds": process.num_fds(),
            "sockets": len(process.net_connections("tcp")),
            "threads": process.num_threads(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a flagged folder, such as that of `redflag demo --world nano`")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--step", type=float, default=0.05, help="seconds per token of the scripted upstream")
    parser.add_argument("--vllm", help="Python of an environment with vLLM: take it as the upstream")
    parser.add_argument("--kills", type=int, default=0, help="how often a vLLM is killed and started again")
    parser.add_argument("--dtype", default="float32", help="the type of a vLLM's weights")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens of an answer")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--request-timeout", type=float, default=20.0, help="seconds until the server gives up")
    parser.add_argument("--folder", help="where logs and traces are kept; default: nowhere")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="redflag-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        figures = asyncio.run(run(arguments, folder))
    print(json.dumps(figures))
    print(table(figures), file=sys.stderr)
    sys.exit(1 if figures["wrong_count"] else 0)


if __name__ == "__main__":
    main()
