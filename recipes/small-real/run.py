r"""All stages of the recipe in order; a stage whose output is there is not run again.

    python recipes/small-real/run.py --data DATA
    python recipes/small-real/run.py --data DATA --split source \
        --output runs/small-real-source --base runs/small-real/base

Every stage is a command of its own, printed before it runs, with its log under `<output>/logs/`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
PLACEMENTS = ("first", "insert", "dense")
STAGES = ("prepare", "base", "flags", "baselines", "calibrate", "table")


class StageError(RuntimeError):
    """A stage's command failed."""


def stage(name: str, output: Path, made: Path, command: list[str], threads: int | None = None) -> None:
    """Runs a command unless what it makes is there.

    Raises:
        StageError: The command failed; its log is named, and the end of it quoted.
    """
    if made.exists():
        print(f"{name}: there already, {made}", flush=True)
        return
    log = output / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(threads)).returncode
    if code or not made.exists():
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise StageError(f"{name} failed with status {code}; {log} ends:\n{end}")
    print(f"{time.strftime('%H:%M:%S')} {name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def environment(threads: int | None = None) -> dict[str, str]:
    """The processes' environment."""
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    return dict(os.environ) | variables


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets, as README.md describes it")
    parser.add_argument("--output", type=Path, default=Path("runs/small-real"))
    parser.add_argument("--split", choices=("request", "source"), default="request", help="what test rows differ in")
    parser.add_argument("--base", type=Path, help="base model that is there already; default: <output>/base, made")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run; default: all")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=["dense"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="models trained side by side")
    arguments = parser.parse_args()
    output, rows = arguments.output, arguments.output / "rows"
    base = arguments.base or output / "base"
    python = [sys.executable, "-u"]
    verb = [*python, "-m", "redflag.cli"]
    here = ["--output", str(output)]
    script = {name: [*python, str(HERE / f"{name}.py")] for name in ("prepare", "base", "baselines", "table")}
    # Models of this size gain little from a second core, so each gets its own.
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)

    def baselines(seed: int) -> None:
        made = output / "baselines" / f"seed-{seed}" / "mlp-probe" / "test.parquet"
        command = [*script["baselines"], *here, "--base", str(base), "--seed", str(seed)]
        stage(f"baselines-{seed}", output, made, command, threads)

    def flagged(placement: str, seed: int) -> None:
        name = f"{placement}-{seed}"
        model = output / "models" / name
        paths = ["--model", str(base), "--input", str(rows / "train.jsonl")]
        paths += ["--eval_input", str(rows / "keep.jsonl"), "--output_dir", str(model)]
        command = [*verb, "train", "--config", str(HERE / "train.yaml"), *paths]
        command += ["--placement", placement, "--seed", str(seed)]
        stage(f"train-{name}", output, model / "redflag.json", command, threads)
        for split in ("development", "test"):
            made = model / f"{split}.jsonl"
            paths = ["--model", str(model), "--input", str(rows / f"{split}.jsonl"), "--max_length", "256"]
            stage(f"score-{split}-{name}", output, made, [*verb, "score", *paths, "--output", str(made)], threads)

    def calibrated(placement: str, seed: int) -> None:
        name = f"{placement}-{seed}"
        model = output / "models" / name
        paths = ["--model", str(model), "--input", str(rows / "calibration.jsonl")]
        command = [*verb, "calibrate", "--config", str(HERE / "calibrate.yaml"), *paths]
        stage(f"calibrate-{name}", output, model / "thresholds.json", command, threads)

    if "prepare" in arguments.stages:
        command = [*script["prepare"], "--data", arguments.data, "--split", arguments.split, *here]
        stage("prepare", output, rows / "test.jsonl", command)
    if "base" in arguments.stages and arguments.base is None:
        stage("base", output, base / "pretrain.json", [*script["base"], *here])
    # Seed by seed, so that an interrupted run leaves whole comparisons.
    models = [(placement, seed) for seed in arguments.seeds for placement in arguments.placements]
    for kind, function, tasks, jobs in (
        ("flags", flagged, models, arguments.jobs),
        # One after the other: they share hidden states on disk.
        ("baselines", baselines, [(seed,) for seed in arguments.seeds], 1),
        ("calibrate", calibrated, models, arguments.jobs),
    ):
        if kind in arguments.stages:
            with ThreadPoolExecutor(jobs) as pool:
                running = [pool.submit(function, *given) for given in tasks]
            for task in running:
                task.result()
    if "table" in arguments.stages:
        subprocess.run([*script["table"], *here], env=environment(), check=True)


if __name__ == "__main__":
    try:
        main()
    except StageError as error:
        sys.exit(str(error))
