"""Many clients, some of them rude, for minutes: does `redflag serve` leak, hang, or show what was not judged?

    python scripts/bench/soak.py --model runs/nano/model  # 64 clients, 5 minutes, a scripted upstream
    python scripts/bench/soak.py --model runs/nano/model --vllm .vllm/bin/python --kills 2

In front of an upstream of its own (`scripts/bench/soak_upstream.py`), which marks every token that must not be shown,
breaks in several ways, and is killed and started again every 20 seconds. Alarms lead to reflections, so that hidden
streams and resumed ones are among the traffic. With `--vllm` a stock vLLM takes the upstream's place, killed and
started again `--kills` times: no marks there, and what was received is compared with the recorded traces, as in both.

Clients stream or not, leave in the middle, read slowly, call tools, think, ask for two choices, send bodies that are
too long or no UTF-8, conversations of 10,000 messages, flag text in every role (`soak_clients.py`). Every second the
server's memory, file descriptors, sockets and threads are read. Exit status 1: something hung, was shown unjudged, was
cut off without a last chunk, ended otherwise than it had to, or grew. JSON on standard output, a table on standard
error.
"""

from __future__ import annotations

import argparse
import asyncio
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
from soak_clients import LONG, Soak
from soak_report import report, table
from soak_start import free_ports, kill, ready, server_command, start, thinking_model, upstream_command
from soak_upstream import Tongue

from redflag.trace import Done, Halt, Text, Thought, read_traces


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Starts everything, lets it run, stops it; the figures."""
    arguments.model = thinking_model(arguments.model, folder / "model")
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
        thought, text, whole = soak.received.pop(trace.id, ("", None, False))
        if text is None:
            continue
        released: dict[type, list[int]] = {Text: [], Thought: []}
        for event in trace.events:
            if isinstance(event, Text | Thought):
                released[type(event)] += event.token_ids
        shown = soak.tongue.decode(released[Text]) + (trace.end.text if isinstance(trace.end, Halt) else "")
        compared += 1
        # A call is sent once the answer has ended by itself, and not at all in one that has not.
        held = text == "" and shown.startswith("{") and not isinstance(trace.end, Done)
        for received, all_of_it in ((text, shown), (thought, soak.tongue.decode(released[Thought]))):
            # Incomplete characters at the end of what a client saw before it left are no difference.
            same = received == all_of_it if whole else all_of_it.startswith(received.rstrip("\ufffd"))
            if not same and not (held and all_of_it == shown):
                soak.wrong.append(f"{trace.id}: a client read {received!r} and {all_of_it!r} was released")
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
