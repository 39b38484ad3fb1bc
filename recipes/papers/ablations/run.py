"""Trains and measures every variant of the comparison; a stage whose output is there is not run again.

    redflag demo --world nano                             # rows and base model
    python recipes/papers/ablations/run.py  # nano: about 1.5 hours on one quiet core; --seeds 0: 40 minutes
    python recipes/papers/ablations/run.py --small_real runs/small-real --stages small-real table

Every stage is a command of its own, printed before it runs, with its log under `<output>/logs/`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PAPERS, RECIPES = HERE.parent, HERE.parents[1]
STAGES = ("prepare", "flags", "systems", "attacks", "small-real", "table")
ATTACKS = ("none", "prefill", "RAP")
BASELINES = ("tfidf", "last-layer probe", "all-layer probe", "token head", "mlp probe")

# As `redflag demo --world nano` trains its flags, the same for all variants: they differ in what they are named for.
COMMON = (
    "--learning_rate 5e-3 --per_device_train_batch_size 8 --per_device_eval_batch_size 32 --max_length 256 "
    "--train_sampling_strategy group_by_length --save_strategy no --logging_steps 50 --report_to none "
    "--dataloader_pin_memory false --disable_tqdm true"
)
THREE_TERMS = f"--config {PAPERS / 'red-flag-tokens' / 'train.yaml'}"
FIRST = f"{THREE_TERMS} --placement first --keep_coef 1 --after_coef 0 --benign_coef 0"
PRESTO = f"--config {PAPERS / 'presto' / 'train.yaml'} --full false"
# Refusals behind harmful beginnings cannot be learnt while the harmful rows' own continuations are kept there.
LOOSE = f"{PRESTO} --keep_coef 0 --benign_coef 4"
KEPT = f"{PRESTO} --keep_coef 4"
# The published ball; steps are fewer and longer, so that as wide a shift is reached in 192 coordinates as in 4,096.
# Half the rows, because each batch costs several more passes.
ADVERSARY = (
    "--adversarial_coef 1 --adversarial_steps 5 --adversarial_step_size 1e-3 --adversarial_radius 0.05 --max_rows 2500"
)
FLAGS = {
    "dense": "--placement dense --flag_coef 1 --keep_coef 4",
    "until": THREE_TERMS,
    "insert": f"{THREE_TERMS} --placement insert",
    "several": f"{THREE_TERMS} --insertions 3",
    "first": FIRST,
    "refusal-token": "--placement first --answer_coef 1 --answers harmless --keep_coef 4",
    "until-gently": f"{THREE_TERMS} --learning_rate 1e-3 --per_device_train_batch_size 16",
    "rf-at": f"{THREE_TERMS} {ADVERSARY}",
}
# The base model gets a flag that nothing is taught, so that it can be attacked as the others are.
SYSTEMS = {
    "base": "--learning_rate 0 --max_steps 1",
    "aligned": f"{LOOSE} --presto_coef 0 --flag_coef 0",
    "aligned-presto": f"{LOOSE} --flag_coef 0",
    "flag-aligned-presto": LOOSE,
    "aligned-kept": f"{KEPT} --presto_coef 0 --flag_coef 0",
    "aligned-presto-kept": f"{KEPT} --flag_coef 0",
    "flag-aligned-presto-kept": KEPT,
}
FLAGGED_SYSTEMS = ("dense", "flag-aligned-presto", "flag-aligned-presto-kept")
# In small-real onsets are unknown, and all weights are trained: its own file has the rest.
THREE_TERMS_THERE = "--flag_coef 2 --peak_coef 0 --benign_coef 1 --after_coef 1 --keep_coef 0"
SMALL_REAL = {
    "until": f"--placement until {THREE_TERMS_THERE}",
    "insert": f"--placement insert {THREE_TERMS_THERE}",
    "first": "--placement first --flag_coef 2 --peak_coef 0 --keep_coef 1",
}


class StageError(RuntimeError):
    """A stage's command failed."""


def stage(name: str, output: Path, made: Path, command: Sequence[str]) -> None:
    """Runs a command unless what it makes is there.

    Raises:
        StageError: The command failed; its log is named, and the end of it quoted.
    """
    if made.exists():
        print(f"{name}: there already, {made}", flush=True)
        return
    log = output / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {name}: {shlex.join(command[1:])}", flush=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment()).returncode
    if code or not made.exists():
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise StageError(f"{name} failed with status {code}; {log} ends:\n{end}")
    print(f"{time.strftime('%H:%M:%S')} {name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def environment() -> dict[str, str]:
    """The processes' environment: offline and, with glibc, memory that is kept, not given back at every step."""
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if platform.libc_ver()[0] == "glibc":
        variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(1 << 28)}
    return dict(os.environ) | variables


class Nano:
    """The stages in the nano world."""

    def __init__(self, world: Path, output: Path, requests: int) -> None:
        self.world, self.output, self.requests = world, output, requests
        self.rows, self.base = world / "rows", world / "base"
        self.verb = [sys.executable, "-u", "-m", "redflag.cli"]

    def prepare(self) -> None:
        """The rows that `redflag demo --world nano` does not make."""
        paths = ["--rows", str(self.rows), "--base", str(self.base), "--output", str(self.output / "rows")]
        command = [sys.executable, str(HERE / "prepare.py"), *paths]
        stage("prepare", self.output, self.output / "rows" / "attacked.jsonl", command)

    def train(self, name: str, seed: int) -> Path:
        """Trains a variant; the base is the same for every seed."""
        options = (FLAGS | SYSTEMS)[name]
        aligned = "presto" in options
        source = self.output / "rows" / "aligned.jsonl" if aligned else self.rows / "train.jsonl"
        model = self.output / "models" / f"{name}-{seed}"
        paths = ["--model", str(self.base), "--input", str(source), "--output_dir", str(model)]
        paths += ["--eval_input", str(self.output / "rows" / "eval.jsonl"), "--seed", str(seed)]
        # What is given last counts.
        command = [*self.verb, "train", *paths, *COMMON.split(), *options.split()]
        stage(f"train-{name}-{seed}", self.output, model / "redflag.json", command)
        return model

    def evaluate(self, name: str, seed: int) -> None:
        """Detection, delay and language on the test rows; `dense` brings the baselines, which take the same seed."""
        folder = self.output / "evaluations" / f"{name}-{seed}"
        model, calibration = self.train(name, seed), self.rows / "calibration.jsonl"
        command = self._evaluate(model, self.rows / "test.jsonl", calibration, folder, seed)
        if name == "dense":
            command += ["--train", str(self.rows / "train.jsonl"), "--baselines", *BASELINES]
        stage(f"evaluate-{name}-{seed}", self.output, folder / "report.json", command)

    def attack(self, name: str, seed: int) -> None:
        """Attacks with the same requests for every variant and seed."""
        folder = self.output / "attacks" / f"{name}-{seed}"
        # Thresholds of a flag that was taught nothing mean nothing: few rows do.
        few = self.output / "rows" / "eval.jsonl"
        calibration = self.rows / "calibration.jsonl" if name in FLAGGED_SYSTEMS else few
        test = self.output / "rows" / "attacked.jsonl"
        command = self._evaluate(self.train(name, seed), test, calibration, folder, 0)
        command += ["--attacks", *ATTACKS, "--judge", "oracle", "--requests", str(self.requests), "--hold_back", "4"]
        stage(f"attack-{name}-{seed}", self.output, folder / "report.json", command)

    def _evaluate(self, model: Path, test: Path, calibration: Path, folder: Path, seed: int) -> list[str]:
        paths = ["--model", str(model), "--base", str(self.base), "--test", str(test), "--output_dir", str(folder)]
        paths += ["--calibration", str(calibration)]
        return [*self.verb, "evaluate", *paths, *f"--target_fpr 0.01 --batch_size 32 --seed {seed}".split()]


def small_real(folder: Path, output: Path, seeds: Sequence[int]) -> None:
    """Other recipes of the flag on the rows and the base model of `recipes/small-real`, trained and scored as there."""
    verb = [sys.executable, "-u", "-m", "redflag.cli"]
    for seed in seeds:
        for name, options in SMALL_REAL.items():
            model = output / "small-real" / f"{name}-{seed}"
            command = [*verb, "train", "--config", str(RECIPES / "small-real" / "train.yaml"), "--seed", str(seed)]
            command += ["--model", str(folder / "base"), "--input", str(folder / "rows" / "train.jsonl")]
            command += ["--eval_input", str(folder / "rows" / "keep.jsonl"), "--output_dir", str(model)]
            stage(f"small-real-{name}-{seed}", output, model / "redflag.json", [*command, *options.split()])
            paths = ["--model", str(model), "--input", str(folder / "rows" / "test.jsonl"), "--max_length", "256"]
            command = [*verb, "score", *paths, "--output", str(model / "test.jsonl")]
            stage(f"small-real-score-{name}-{seed}", output, model / "test.jsonl", command)


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/nano"), help="what `redflag demo --world nano` made")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument(
        "--small-real", "--small_real", type=Path, default=Path("runs/small-real"), help="what its recipe made"
    )
    parser.add_argument("--small-real-seeds", "--small_real_seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(FLAGS), default=list(FLAGS), help="flags to train")
    parser.add_argument("--requests", type=int, default=60, help="harmful requests that are attacked with")
    usual = [name for name in STAGES if name != "small-real"]
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=usual)
    given = parser.parse_args()
    nano = Nano(given.world, given.output, given.requests)
    if "prepare" in given.stages:
        nano.prepare()
    # Seed by seed, so that an interrupted run leaves whole comparisons.
    for seed in given.seeds:
        if "flags" in given.stages:
            for name in given.variants:
                nano.evaluate(name, seed)
        # The base model knows no seed, and what keeping all rows does shows with one.
        systems = [name for name in ("dense", *SYSTEMS) if not seed or (name != "base" and not name.endswith("-kept"))]
        if "systems" in given.stages:
            for name in (name for name in systems if name in FLAGGED_SYSTEMS):
                nano.evaluate(name, seed)
        if "attacks" in given.stages:
            for name in systems:
                nano.attack(name, seed)
    if "small-real" in given.stages:
        small_real(given.small_real, given.output, given.small_real_seeds)
    if "table" in given.stages:
        paths = ["--output", str(given.output), "--small_real", str(given.small_real)]
        subprocess.run([sys.executable, str(HERE / "table.py"), *paths], env=environment(), check=True)


if __name__ == "__main__":
    try:
        main()
    except StageError as error:
        sys.exit(str(error))
