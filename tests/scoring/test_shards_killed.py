"""Real processes that are killed: the same bytes, whatever the moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from redflag.data.rows import write_rows
from redflag.scoring.score import ScoreArguments, run

WORKER = """
import sys, time
from pathlib import Path
from redflag.scoring.shards import write_lines
def lines(start, stop):
    for row in range(start, stop):
        time.sleep(0.004)
        yield f"row {row} " + "x" * (row * 37 % 500)
print(write_lines(Path(sys.argv[1]), 400, lines, chunk=8, fingerprint="f" * 64, patience=20.0))
"""


def test_real_processes_killed_at_random_moments_give_the_same_bytes(tmp_path: Path) -> None:
    output, rng = tmp_path / "out", random.Random(7)
    whole = "".join(f"row {row} {'x' * (row * 37 % 500)}\n" for row in range(400))
    for kill in range(8):
        processes = [started([sys.executable, "-c", WORKER, str(output)], rank) for rank in range(2)]
        if kill < 7:
            time.sleep(rng.uniform(0.2, 0.6))
            processes[rng.randrange(2)].send_signal(signal.SIGKILL)  # the other one goes on for a while, or to the end
            time.sleep(rng.uniform(0.0, 0.3))
            for process in processes:
                process.kill()
        for process in processes:
            process.communicate(timeout=60)
        assert not output.exists() or output.read_text() == whole
        if all(process.returncode == 0 for process in processes):
            break  # what a run that was killed at its very end has left, the next one removes
    assert output.read_text() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def started(command: list[str], rank: int, size: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_some(path: Path, conversation: Any, count: int) -> Path:
    write_rows(path, [conversation("The sea is wide. " * (i * 7 % 5 + 1), id=str(i)) for i in range(count)])
    return path


# The model is loaded once, and each launch forks two processes from there: they are real, and at work at once.
KILLER = """
import json, os, random, sys, time
from pathlib import Path
from redflag.backends import load
from redflag.scoring import score

model, rows, output, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
loaded = load.load_flagged(model, "cpu")
load.load_flagged = lambda *_: loaded
folder, rng = output.with_name(output.name + ".parts"), random.Random(kills)

def forked(rank):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        try:
            score.run(score.ScoreArguments(model=model, input=rows, output=str(output), batch_size=2))
        finally:
            os._exit(0)
    return pid

def there():
    return len(list(folder.glob("?????-*")))

found = []
while not output.exists():
    before, processes = there(), [forked(rank) for rank in range(2)]
    if len(found) < kills:
        aim = before + rng.randrange(4)
        while aim > before and there() < aim:  # otherwise it dies while it begins
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.03))
        victims = rng.choice([[0, 1], [1, 0], [0], [1]])
        for rank in victims:
            os.kill(processes[rank], 9)
        time.sleep(rng.uniform(0.0, 0.03))
        for rank in {0, 1} - set(victims):
            os.kill(processes[rank], 9)
        found.append(there())
    for pid in processes:
        os.waitpid(pid, 0)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_verb_killed_at_random_moments_again_and_again_gives_the_same_bytes(
    model_folder: Path, tmp_path: Path, conversation: Any
) -> None:
    """`REDFLAG_KILLS=20` kills it as often as that."""
    kills = int(os.environ.get("REDFLAG_KILLS", "3"))
    rows = write_some(tmp_path / "rows.jsonl", conversation, kills * 128)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(ScoreArguments(model=str(model_folder), input=str(rows), output=str(one), batch_size=2))
    (tmp_path / "two.jsonl.parts").mkdir()
    (tmp_path / "two.jsonl.parts" / "00000-16-0123456789ab").write_text("of something else")
    killer = [sys.executable, "-c", KILLER, str(model_folder), str(rows), str(two), str(kills)]
    done = subprocess.run(killer, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    there = json.loads(done.stdout.splitlines()[-1])
    print(f"{len(there)} kills; chunks of 16 rows there after each, of {kills * 8}: {there}")
    assert len(there) == kills and there == sorted(there), "it was over too soon, or something was lost"
    assert two.read_bytes() == one.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("two", ".two"))] == ["two.jsonl"]
