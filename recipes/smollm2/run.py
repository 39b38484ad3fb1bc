r"""All stages of the recipe in order; a stage whose output is there is not run again.

    scripts/fetch-smollm2
    python recipes/smollm2/run.py --data DATA
    python recipes/smollm2/run.py --data DATA --licences open --output runs/smollm2-open

Every stage is a command of its own, printed before it runs, with its log under `<output>/logs/`. `--stages` takes some,
`--seeds` several; `--train "--peak_coef 0.5" --name peak` trains and scores a variant beside the recipe's.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "small-real"))
from run import StageError, stage  # noqa: E402

STAGES = ("rows", "train", "score", "baselines", "calibrate", "language", "table")
SCORED = ("development", "test", "disagreed", "plain")
# What is made by one command: probes read the model together. The words of the model do not depend on a seed.
BASELINES = {
    "tfidf": ("tfidf",),
    "probes": ("last-layer probe", "all-layer probe", "mlp probe", "token head"),
    "own-words": ("own words",),
}
MAX_LENGTH = "448"  # Tokens of prompt and answer that are read: all of a row but the longest prompts' fronts.


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets, as recipes/small-real/README.md has it")
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"), help="the folder of scripts/fetch-smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--licences", choices=("open", "all"), default="all", help="open: MIT, Apache, BSD only")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--name", default="dense", help="what the models are called: models/NAME-SEED")
    parser.add_argument("--train", default="", help='more options of `redflag train`, as one word: "--peak_coef 0.5"')
    arguments = parser.parse_args()
    output, rows = arguments.output, arguments.output / "rows"
    python = [sys.executable, "-u"]
    verb = [*python, "-m", "redflag.cli"]
    here = ["--output", str(output)]

    if "rows" in arguments.stages:
        command = [*python, str(HERE / "rows.py"), "--data", arguments.data, "--licences", arguments.licences, *here]
        stage("rows", output, rows / "counts.json", command)
    for seed in arguments.seeds:
        name = f"{arguments.name}-{seed}"
        model = output / "models" / name
        if "train" in arguments.stages:
            paths = ["--model", str(arguments.base), "--input", str(rows / "train.jsonl"), "--output_dir", str(model)]
            paths += ["--reference_cache", str(output / "reference")]  # 0.5 GB, for all seeds
            # Goes on from the last checkpoint of a run that was cut short.
            command = [*verb, "train", "--config", str(HERE / "train.yaml"), *paths, "--seed", str(seed), "--resume"]
            stage(f"train-{name}", output, model / "redflag.json", [*command, *shlex.split(arguments.train)])
        for split in SCORED if "score" in arguments.stages else ():
            made = model / f"{split}.jsonl"
            paths = ["--model", str(model), "--input", str(rows / f"{split}.jsonl"), "--max_length", MAX_LENGTH]
            stage(f"score-{split}-{name}", output, made, [*verb, "score", *paths, "--output", str(made)])
        if "calibrate" in arguments.stages:
            paths = ["--model", str(model), "--input", str(rows / "calibration.jsonl"), "--max_length", MAX_LENGTH]
            command = [*verb, "calibrate", "--config", str(HERE / "calibrate.yaml"), *paths]
            stage(f"calibrate-{name}", output, model / "thresholds.json", command)
        for key, names in BASELINES.items() if "baselines" in arguments.stages else ():
            if key != "own-words" or seed == arguments.seeds[0]:
                made = output / "baselines" / f"seed-{seed}" / names[-1].replace(" ", "-") / "test.parquet"
                command = [*python, str(HERE / "baselines.py"), *here, "--base", str(arguments.base), "--names", *names]
                stage(f"baselines-{key}-{seed}", output, made, [*command, "--seed", str(seed)])
        if "language" in arguments.stages:
            made = model / "language.json"
            command = [*python, str(HERE / "language.py"), "--model", str(model), "--base", str(arguments.base)]
            stage(f"language-{name}", output, made, [*command, "--rows", str(rows / "keep.jsonl")])
    if "table" in arguments.stages:
        subprocess.run([*python, str(HERE / "table.py"), *here], check=True)


if __name__ == "__main__":
    try:
        main()
    except StageError as error:
        sys.exit(str(error))
