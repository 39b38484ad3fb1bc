"""Everything of SmolLM2 that wants a GPU, in one run of a few minutes: speed, |dp|, variants and seeds of the recipe.

    python recipes/smollm2/rows.py --data DATA --licences open --output runs/smollm2-open
    python scripts/bench/smollm2_gpu.py --minutes 8 --report gpu
    python scripts/bench/smollm2_gpu.py --print    # the commands alone

Measurements come first, one at a time; then the trainings, `--jobs` at once on the one card, the recipe's three seeds
before the variants, all on all rows. What does not fit into `--minutes` is stopped; another run goes on with it.
Under `--report`: each command's output, `done.json` with seconds and exit statuses, and the recipe's tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("smollm2", "1b", "8b")
SEEDS = (0, 1, 2)
MERGED = ROOT / "runs/smollm2-upstream/model"
VARIANTS = ("dense", "commit", "whole", "by-response", "keep-2", "keep-32", "rank-64", "all-weights", "three-passes")
PUBLISHED = ("until", "several", "insert", "first", "rf-at")


def measurements(arguments: argparse.Namespace) -> dict[str, str]:
    """Commands that must have the card for themselves, by name."""
    bench, on = "scripts/bench", f"--device {arguments.device} --dtype {arguments.dtype}"
    found = {f"stream-{shape}": f"{bench}/stream.py --shape {shape} {on} --tokens 128 --pairs 3" for shape in SHAPES}
    for shape in SHAPES:
        sizes = "--batch-size 8 --length 512" if shape == "8b" else "--batch-size 16 --length 512"
        found[f"train-{shape}"] = f"{bench}/train.py --shape {shape} {on} --pairs 2 --steps 6 {sizes}"
    rows = arguments.output / "rows" / "test.jsonl"
    model = "--model runs/smollm2-upstream/model"
    found["dp"] = (
        f"{bench}/dtype.py {model} --rows {rows} --count 200 --begun 200 --device {arguments.device} --vllm ''"
    )
    return found


def trainings(arguments: argparse.Namespace) -> dict[str, str]:
    """Commands that share the card, by name: each is one training with its scoring."""
    recipe, output = "recipes/smollm2", f"--output {arguments.output} --base {arguments.base}"
    count = len((arguments.output / "rows" / "train.jsonl").read_bytes().splitlines())
    found = {}
    for seed in SEEDS:
        options = f"--name fitted --seeds {seed} --stages train score language"
        found[f"fitted-{seed}"] = f"{recipe}/run.py --data none --licences open {output} {options}"
    for name in (*VARIANTS, *PUBLISHED):
        found[f"variant-{name}"] = f"{recipe}/variants.py {output} --rows {count} --names {name}"
    return found


def run(name: str, command: str, report: Path, deadline: float) -> dict[str, object]:
    """Runs one command until the deadline; its output goes to a file of its name."""
    begun = time.monotonic()
    left = deadline - begun
    if left <= 0:
        return {"command": command, "status": "not begun"}
    with (report / f"{name}.log").open("wb") as log:
        words = [sys.executable, "-u", *shlex.split(command)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            status: object = process.wait(left)
        except subprocess.TimeoutExpired:
            status = "stopped"
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.wait()
    print(f"{name}: {status}, {time.monotonic() - begun:.0f} s", flush=True)
    return {"command": command, "status": status, "seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-open"), help="what rows.py made")
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--report", type=Path, default=Path("runs/smollm2-gpu"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=6, help="trainings at once")
    parser.add_argument("--names", nargs="+", help="take these alone")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--print", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    alone, shared = (
        {name: command for name, command in some.items() if arguments.names is None or name in arguments.names}
        for some in (measurements(arguments), trainings(arguments))
    )
    if arguments.print:
        print("\n".join(f"{name}: {command}" for name, command in (alone | shared).items()))
        return
    report, deadline = arguments.report, time.monotonic() + 60 * arguments.minutes
    report.mkdir(parents=True, exist_ok=True)
    if "dp" in alone:
        from redflag.models.named import DEFAULT, model_folder
        from redflag.models.pack import merge_flag

        if not MERGED.exists():
            merge_flag(model_folder(DEFAULT), MERGED)
    done = {name: run(name, command, report, deadline) for name, command in alone.items()}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {name: pool.submit(run, name, command, report, deadline) for name, command in shared.items()}
        done |= {name: future.result() for name, future in running.items()}
    for path in (*arguments.output.glob("variants/*/results.md"), arguments.output / "results.md"):
        if path.exists():
            shutil.copyfile(path, report / f"{path.parent.name}-{path.name}")
    (report / "done.json").write_text(json.dumps(done, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
