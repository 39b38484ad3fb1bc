"""The run of everything that wants a GPU: it ends in time with all that it has started, and says what it left."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2"
PARENT = """
import subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
child.wait()
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import smollm2_gpu

    return smollm2_gpu


def test_a_command_is_stopped_at_the_deadline_with_what_it_has_started(gpu, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    found = gpu.run("one", f"{tmp_path}/parent.py {tmp_path}/pid", tmp_path, time.monotonic() + 3)
    assert found["status"] == "stopped"
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    until = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()
    assert gpu.run("two", "none.py", tmp_path, time.monotonic())["status"] == "not begun"


def test_its_commands_are_commands_of_the_benches_and_the_recipe(gpu, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("{}\n{}\n")
    arguments = Namespace(device="cuda", dtype="bfloat16", output=tmp_path, base=tmp_path)
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in ("run", "table", "variants"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import variants

    assert {*gpu.VARIANTS, *gpu.PUBLISHED} <= set(variants.VARIANTS)
    import stream
    import train

    assert set(gpu.SHAPES) <= set(stream.SHAPES) & set(train.SHAPES)
    commands = {**gpu.measurements(arguments), **gpu.trainings(arguments)}
    assert all((gpu.ROOT / command.split()[0]).is_file() for command in commands.values())
    assert "--rows 2 " in commands["variant-dense"]
