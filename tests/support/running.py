"""A server in a thread, over real HTTP, in front of an engine that plays a script."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.backends.turns import Turns
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.metrics import Metrics
from redflag.server.process import Process, bind
from redflag.server.server import Server, build_app
from redflag.trace import Halt, Step, Text, Trace

MODEL = "little"
ROUTES = ("/v1/chat/completions", "/v1/completions")


@dataclass
class Running:
    """A server that runs, and what it has told."""

    url: str
    server: Server
    metrics: Metrics
    process: Process
    traces: list[Trace] = field(default_factory=list)

    def stop(self) -> None:
        """What the process does to open responses when their grace is over."""
        self.process._loop.call_soon_threadsafe(self.server.stop)

    def told(self, count: int = 1, seconds: float = 10.0) -> Trace:
        """Waits for so many responses to be over; the last one's trace."""
        wait_for(lambda: len(self.traces) >= count, seconds)
        assert len(self.traces) == count
        return self.traces[-1]

    def ends(self) -> set[str]:
        """How responses have ended, from the metrics."""
        rows = self.metrics.render()[0].decode().splitlines()
        return {row.split('end="')[1].split('"')[0] for row in rows if row.startswith("redflag_requests_total{")}


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until it holds; fails where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextmanager
def running(guard: Guard, limits: Limits | None = None, grace: float = 5.0, **options) -> Iterator[Running]:
    """A server for this guard, on a free port."""
    metrics = Metrics()
    traces: list[Trace] = []
    app = build_app(guard, limits or Limits(MODEL), metrics=metrics, record=traces.append, **options)
    listening = bind("127.0.0.1", 0, 60.0)
    process = Process(app, app.state.server.stop, grace)
    thread = threading.Thread(target=process.run, args=([listening],), daemon=True)
    thread.start()
    try:
        wait_for(lambda: process.started or not thread.is_alive())
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.server, metrics, process, traces)
    finally:
        process.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server hangs"


def start(*words: str) -> tuple[subprocess.Popen[str], str]:
    """The verb as a user runs it; its address, once it serves."""
    command = [sys.executable, "-m", "redflag.cli", "serve", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "serving" in line and "http://" in line:
            url = line.split(" at ")[1].split("/v1")[0]
            wait_for(partial(_listens, int(url.rpartition(":")[2])))  # the line comes a moment before
            return process, url
    process.wait()
    raise AssertionError("".join(lines))


def _listens(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


class Play:
    """A script for requests that may reflect: the answer, what is thought in between, and how the answer goes on.

    Args:
        answer: Steps of the answer.
        flag_ids: A prompt with one of these is a reflection.
        thought: Steps of a reflection.
        pause: Before which step of the answer the engine is slow, and for how many seconds.
    """

    def __init__(
        self,
        answer: Sequence[Step],
        flag_ids: Iterable[int] = (),
        thought: Sequence[Step] = (),
        pause: tuple[int, float] = (0, 0.0),
    ) -> None:
        self.answer, self.flags, self.thought, self.pause = answer, set(flag_ids), thought, pause
        self.prompt: list[int] = []

    def __call__(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Step]:
        if self.flags.intersection(prompt):
            yield from self.thought
            return
        given = list(prompt[len(self.prompt) :])
        goes_on = list(prompt[: len(self.prompt)]) == self.prompt and given == [
            step.token_id for step in self.answer[: len(given)]
        ]
        if not goes_on:
            self.prompt, given = list(prompt), []
        for index in range(len(given), len(self.answer)):
            if index == self.pause[0]:
                time.sleep(self.pause[1])
            yield self.answer[index]


def engine(script: Play | Sequence[Step], eos_id: int, **options) -> tuple[ScriptedBackend, Turns]:
    """The scripted engine and the queue before it, which a guard of a server takes."""
    waiting = {name: options.pop(name) for name in ("active", "waiting", "buffer") if name in options}
    backend = ScriptedBackend(script, {eos_id}, **options)
    return backend, Turns(backend, **waiting)


def body_of(route: str, **fields) -> dict:
    """A request that asks for something harmless."""
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in route else {"prompt": "hello"}
    return {"model": MODEL, **prompt, **fields}


def chunks_of(data: bytes) -> list[dict]:
    """The chunks of a stream that is complete: every line is understood, and the last one says so."""
    messages = [message for message in data.decode().split("\n\n") if message and not message.startswith(":")]
    assert data.endswith(b"data: [DONE]\n\n") and messages.count("data: [DONE]") == 1, data[-300:]
    assert all(message.startswith("data: ") and "\n" not in message for message in messages)
    return [json.loads(message[6:]) for message in messages[:-1]]


def events_of(data: bytes) -> list[dict]:
    """The typed events of a stream of `/v1/responses` or `/v1/messages`; each is named by its own type."""
    messages = [message for message in data.decode().split("\n\n") if message and not message.startswith(":")]
    assert data.endswith(b"\n\n")
    events = []
    for message in messages:
        name, content = message.split("\n")
        events.append(json.loads(content.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def text_of_events(events: list[dict]) -> str:
    """What a reader puts together."""
    deltas = [
        event["delta"] for event in events if event["type"].endswith(("output_text.delta", "content_block_delta"))
    ]
    return "".join(delta if isinstance(delta, str) else delta.get("text", "") for delta in deltas)


def text_of_chunks(chunks: list[dict]) -> str:
    """What a reader puts together."""
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)


def shown_by(trace: Trace) -> str:
    """What may have left the server, by its own account: released text, and the operator's."""
    return "".join(event.text for event in trace.events if isinstance(event, Text | Halt))
