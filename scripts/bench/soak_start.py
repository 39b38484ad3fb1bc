"""The processes of `scripts/bench/soak.py`: the upstream and `redflag serve`, started and killed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
from soak_upstream import THINKS

ROOT = Path(__file__).resolve().parents[2]
HOLD_BACK = 2
MOST_BODY = 1 << 20


# The roles of nano, a thought between two tokens that it never uses.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' and message['reasoning_content'] %}"
    f"{THINKS[0]}{{{{ message['reasoning_content'] }}}}{THINKS[1]}{{% endif %}}"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    f"{{% if enable_thinking %}}{THINKS[0]}{{% endif %}}{{% endif %}}"
)


def thinking_model(model: str, folder: Path) -> str:
    """A folder like nano's whose chat template has a thinking mode."""
    from transformers import AutoTokenizer

    from redflag.flags import FlagSpec
    from redflag.prompt import template_hash

    folder.mkdir(exist_ok=True)
    for path in Path(model).resolve().iterdir():
        if path.name not in ("chat_template.jinja", "redflag.json", "thresholds.json") and not path.is_dir():
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    spec = FlagSpec.load(model)
    replace(spec, template_hash=template_hash(AutoTokenizer.from_pretrained(folder))).save(folder)
    return str(folder)


def upstream_command(arguments: argparse.Namespace, port: int) -> list[str]:
    """What starts the upstream."""
    if arguments.vllm is None:
        script = str(ROOT / "scripts/bench/soak_upstream.py")
        return [sys.executable, script, "--model", arguments.model, "--port", str(port), "--step", str(arguments.step)]
    module = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model]
    sizes = ["--dtype", arguments.dtype, "--enforce-eager", "--max-model-len", "512", "--disable-uvicorn-access-log"]
    return [*module, *sizes, "--host", "127.0.0.1", "--port", str(port)]


def server_command(arguments: argparse.Namespace, upstream: str, port: int, folder: Path) -> list[str]:
    """What starts redflag."""
    serve = [sys.executable, "-m", "redflag.cli", "serve", "--model", arguments.model, "--upstream", upstream]
    policy = ["--action", "reflect", "--thoughts", "show", "--reflect_words", "yes,no", "--hold_back", str(HOLD_BACK)]
    policy += ["--threshold", str(arguments.threshold)]
    times = ["--request_timeout", str(arguments.request_timeout), "--max_body_bytes", str(MOST_BODY)]
    times += ["--step_timeout", str(arguments.request_timeout / 2)]
    files = ["--record", str(folder / "traces.jsonl"), "--audit", str(folder / "audit.jsonl")]
    return [*serve, "--port", str(port), "--name", "soak", "--closing_text", "", *policy, *times, *files]


async def start(command: list[str], url: str, log: Path) -> subprocess.Popen[bytes]:
    """Starts a process and waits until its address answers."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    # With an arena for each thread, memory that was freed in one is no use to another, and looks as if it were held.
    environment["MALLOC_ARENA_MAX"] = "1"
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as response:
                    if response.status == 200:
                        return process
            await asyncio.sleep(0.2)
    raise SystemExit(f"{command[1:4]} ended with {process.returncode}:\n{log.read_text()[-3000:]}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with those that it started, such as vLLM's engine, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def ready(url: str) -> None:
    """Waits until the server trusts its engine."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(url + "/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.3)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in made:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in made]
