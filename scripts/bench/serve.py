"""What redflag costs in front of a stock vLLM: throughput and inter-token latency with and without it, in one run.

    python scripts/bench/serve.py                                     # 0.1b, random weights, 1, 16 and 64 streams
    python scripts/bench/serve.py --model runs/nano/model             # the nano model instead
    python scripts/bench/serve.py --shape 8b --vllm .venv-vllm/bin/python --vllm-arguments "--dtype bfloat16"

Settings, asked for the same prompts, in an order that turns round from round to round:

- `plain`: vLLM alone, an ordinary streamed completion;
- `watched`: vLLM alone, with the fields that redflag adds to a request (log-probabilities of the flag, token ids, ban):
  what the engine pays for measuring;
- `redflag`: `redflag serve --upstream` in front of it, with a threshold that nothing reaches;
- `in-engine`: a second vLLM with the logits processor of `redflag.in_engine.halt_v1`, plain requests with its settings;
- `plain-chat`, `redflag-chat`: chat completions of vLLM alone, and of `redflag serve --upstream_route chat` in front of
  it; compared with each other. The model needs a chat template.

The load generator is a process of its own. A round is `--tokens` tokens for each of the streams; the first round of
every setting warms up and does not count. CPU seconds are those of all processes of an engine, of redflag and of the
generator: on a machine with fewer cores than busy processes they compete, and redflag's share is taken from the engine.
Ratios are within a round, so that a machine that slows down slows all settings; how much of the machine other processes
used is said beside them, and `--quiet` repeats rounds that they have disturbed. Prints a table to standard error and
JSON to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("plain", "watched", "redflag", "in-engine", "plain-chat", "redflag-chat")
STREAMS = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a flagged folder; default: random weights of --shape")
    parser.add_argument("--shape", default="0.1b", choices=["tiny", "0.1b", "0.5b", "1b", "8b"])
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--tokens", type=int, default=64, help="response tokens of each stream")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument(
        "--quiet", type=float, default=1.0, help="repeat rounds in which others use more of the machine"
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS[:4]), choices=SETTINGS)
    parser.add_argument("--vllm", default=str(ROOT / ".vllm/bin/python"), help="Python of vLLM's environment")
    parser.add_argument("--vllm-arguments", default="--dtype float32 --enforce-eager --max-model-len 512")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(asyncio.run(load(json.loads(arguments.load)))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped too
    with ExitStack() as stack:
        model = arguments.model
        if model is None:
            model = stack.enter_context(tempfile.TemporaryDirectory(prefix="redflag-bench-"))
            write_model(arguments.shape, Path(model))
        result = measure(arguments, Path(model), stack)
    print(json.dumps(result))


def measure(arguments: argparse.Namespace, model: Path, stack: ExitStack) -> dict[str, Any]:
    """All settings at all numbers of streams."""
    servers, urls = start(arguments, model, stack)
    bodies = {setting: body(setting, model, arguments) for setting in arguments.settings}
    result: dict[str, Any] = {
        "model": arguments.model or arguments.shape,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "streams": {},
    }
    for streams in arguments.streams:
        runs: dict[str, list[dict[str, Any]]] = {setting: [] for setting in arguments.settings}
        number = disturbed = 0
        while len(runs[arguments.settings[0]]) < arguments.rounds:
            order = arguments.settings if number % 2 else arguments.settings[::-1]
            found: dict[str, dict[str, Any]] = {}
            for setting in order:
                run = one_run(urls[setting], bodies[setting], setting.endswith("chat"), streams, number, servers)
                if run["errors"]:
                    sys.exit(f"{setting}, {streams} streams, round {number}: {run['errors'][:3]}\n{tails(servers)}")
                found[setting] = run
            number += 1
            if number == 1:
                continue
            if max(run["others"] for run in found.values()) > arguments.quiet and disturbed < 20 * arguments.rounds:
                disturbed += 1
                continue
            for setting, run in found.items():
                runs[setting].append(run)
        result["streams"][streams] = summarise(runs) | {"disturbed_rounds": disturbed}
        print(table(streams, result["streams"][streams]), file=sys.stderr, flush=True)
    return result


def start(arguments: argparse.Namespace, model: Path, stack: ExitStack) -> tuple[dict[str, Server], dict[str, str]]:
    """The servers that the settings need, and where each setting is asked."""
    python, more = arguments.vllm, shlex.split(arguments.vllm_arguments)
    servers: dict[str, Server] = {}
    urls: dict[str, str] = {}
    engine = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "bench"]
    quiet = ["--host", "127.0.0.1", "--disable-uvicorn-access-log", *more]
    if set(arguments.settings) - {"in-engine"}:
        servers["engine"] = stack.enter_context(serve([*engine, *quiet], "/health"))
        urls |= dict.fromkeys(("plain", "watched", "plain-chat"), servers["engine"].url)
    if "in-engine" in arguments.settings:
        processor = ["--logits-processors", "redflag.in_engine.halt_v1:HaltProcessor"]
        servers["engine with halt"] = stack.enter_context(serve([*engine, *quiet, *processor], "/health"))
        urls["in-engine"] = servers["engine with halt"].url
    for setting, route in (("redflag", "completions"), ("redflag-chat", "chat")):
        if setting in arguments.settings:
            command = [sys.executable, "-m", "redflag.cli", "serve", "--model", str(model), "--upstream", urls["plain"]]
            command += ["--upstream_route", route]
            command += ["--name", "bench", "--threshold", "1.0", "--host", "127.0.0.1"]
            servers[setting] = stack.enter_context(serve(command, "/ready"))
            urls[setting] = servers[setting].url
    return servers, urls


def body(setting: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all requests of a setting have in common."""
    from redflag.backends.load import load_tokenizer
    from redflag.in_engine.halt_request import request_fields
    from redflag.watching.thresholds import Thresholds

    _, spec, _ = load_tokenizer(model)
    common = {
        "model": "bench",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": arguments.tokens,
        "temperature": 1.0,
    }
    if setting == "watched":
        common |= {
            "logprobs": len(spec.ids),
            "logprob_token_ids": list(spec.ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "logit_bias": {str(i): -100 for i in spec.ids},
        }
    if setting == "in-engine":
        thresholds = Thresholds.manual(1.0, spec.categories)
        common |= request_fields(spec, thresholds)
    return common


def one_run(
    url: str, common: dict[str, Any], chat: bool, streams: int, number: int, servers: dict[str, Server]
) -> dict[str, Any]:
    """One round, by a process of its own."""
    job = json.dumps(
        {
            "url": f"{url}/v1/{'chat/' * chat}completions",
            "common": common,
            "chat": chat,
            "streams": streams,
            "number": number,
            "servers": {name: server.process.pid for name, server in servers.items()},
        }
    )
    done = subprocess.run([sys.executable, __file__, "--load", job], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the load generator failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


async def load(job: dict[str, Any]) -> dict[str, Any]:
    """Opens all streams at once and reads them to their ends."""
    import aiohttp
    import psutil

    gaps: list[float] = []
    firsts: list[float] = []
    errors: list[str] = []
    tokens = 0

    async def one(session: aiohttp.ClientSession, index: int) -> None:
        nonlocal tokens
        sent = time.perf_counter()
        # No seed: vLLM's CPU build ends when a seeded request's prompt is read in pieces.
        text = f"tell me something {index} " * 4
        asked = {"messages": [{"role": "user", "content": text}]} if job["chat"] else {"prompt": text}
        request = {**job["common"], **asked}
        async with session.post(job["url"], json=request) as response:
            if response.status != 200:
                errors.append(f"{response.status}: {(await response.text())[:300]}")
                return
            last, usage = None, None
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                if b'"completion_tokens"' in line:
                    usage = json.loads(line[6:])["usage"]
                    continue
                if b"content_filter" in line:
                    errors.append(f"stream {index} was halted: {line.decode()}")
                    return
                if last is None:
                    firsts.append(now - sent)
                else:
                    gaps.append(now - last)
                last = now
        if not usage:
            errors.append(f"stream {index} ended without its usage")
            return
        tokens += usage["completion_tokens"]

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        machine = sum(psutil.cpu_times()[:3])
        cpu = {"generator": time.process_time()} | {name: cpu_seconds(pid) for name, pid in job["servers"].items()}
        start = time.perf_counter()
        await asyncio.gather(*(one(session, index) for index in range(job["streams"])))
        seconds = time.perf_counter() - start
        used = {"generator": time.process_time() - cpu["generator"]}
        used |= {name: cpu_seconds(pid) - cpu[name] for name, pid in job["servers"].items()}
        machine = sum(psutil.cpu_times()[:3]) - machine
    gaps.sort()
    firsts.sort()
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_ms": 1000 * statistics.median(firsts or [0.0]),
        "first_p95_ms": 1000 * percentile(firsts, 0.95),
        "p50_ms": 1000 * percentile(gaps, 0.50),
        "p95_ms": 1000 * percentile(gaps, 0.95),
        "p99_ms": 1000 * percentile(gaps, 0.99),
        "cpu_s": used,
        "others": max(0.0, machine - sum(used.values())) / (seconds * (os.cpu_count() or 1)),
        "errors": errors,
    }


def percentile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the plain run of the same round with their spread."""
    result: dict[str, Any] = {}
    for setting, rounds in runs.items():
        summary: dict[str, Any] = {
            name: round(statistics.median(run[name] for run in rounds), 2)
            for name in ("tokens_per_s", "first_ms", "first_p95_ms", "p50_ms", "p95_ms", "p99_ms", "others")
        }
        tokens = sum(run["tokens"] for run in rounds)
        summary["cpu_us_per_token"] = {
            name: round(1e6 * sum(run["cpu_s"][name] for run in rounds) / tokens) for name in rounds[0]["cpu_s"]
        }
        alone = "plain-chat" if setting.endswith("chat") else "plain"
        if setting != alone and alone in runs:
            pairs = zip(rounds, runs[alone], strict=True)
            ratios = [run["tokens_per_s"] / plain["tokens_per_s"] for run, plain in pairs]
            summary["throughput_ratio"] = {
                "median": round(statistics.median(ratios), 4),
                "spread": [round(min(ratios), 4), round(max(ratios), 4)],
            }
        result[setting] = summary
    return result


def table(streams: int, summary: dict[str, Any]) -> str:
    """One block of text for one number of streams."""
    lines = [
        f"{streams} streams    tokens/s   of plain (spread)         first ms     p95  next ms     p95      p99  "
        "CPU us per token",
    ]
    for setting, row in summary.items():
        if setting == "disturbed_rounds":
            continue
        ratio = row.get("throughput_ratio")
        of_plain = f"{ratio['median']:.3f} ({ratio['spread'][0]:.3f} to {ratio['spread'][1]:.3f})" if ratio else "-"
        cpu = ", ".join(f"{name} {value}" for name, value in row["cpu_us_per_token"].items() if value)
        cpu += f"; others {100 * row['others']:.0f}% of the machine"
        lines.append(
            f"{setting:<12} {row['tokens_per_s']:9.1f}   {of_plain:<24} {row['first_ms']:9.1f} "
            f"{row['first_p95_ms']:7.1f}  {row['p50_ms']:7.2f} {row['p95_ms']:7.2f} {row['p99_ms']:8.2f}  {cpu}"
        )
    return "\n".join(lines)


def write_model(shape: str, folder: Path) -> None:
    """A flagged model with random weights; speed does not depend on what they say."""
    import stream
    import torch

    from redflag.flags import Flag, FlagSpec

    stream.SHAPES["0.1b"] = (576, 12, 9, 3, 1536, 49_152, True)
    model = stream.build_model(shape, torch.float32, "cpu")
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokenizer = stream.build_tokenizer(vocabulary)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    FlagSpec((Flag("harm", "<|flag|>", id=vocabulary - 1),)).save(folder)


class Server(NamedTuple):
    """A server that runs."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


@contextmanager
def serve(command: list[str], ready: str) -> Iterator[Server]:
    """Runs a server on a free port; it is there once `ready` answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        server = Server(process, f"http://127.0.0.1:{port}", Path(log.name))
        try:
            while True:
                if process.poll() is not None:
                    sys.exit(f"{' '.join(command[:4])} ended:\n{tails({'': server})}")
                try:
                    urllib.request.urlopen(server.url + ready, timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    time.sleep(0.5)
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def tails(servers: dict[str, Server]) -> str:
    """The ends of what servers have logged."""
    return "\n".join(
        f"--- {name}\n{server.log.read_text(errors='replace')[-2000:]}" for name, server in servers.items()
    )


def cpu_seconds(pid: int) -> float:
    """Of a process and its children."""
    import psutil

    root = psutil.Process(pid)
    return sum(sum(part.cpu_times()[:2]) for part in (root, *root.children(recursive=True)))


if __name__ == "__main__":
    main()
