"""`redflag demo`: watches a real model and trains a flag, in minutes on two CPU cores.

*Watch* streams answers of SmolLM2-135M with the flag that ships with redflag (`redflag/lab/demo_watch.py`). *Teach*
trains a flag on the starter rows, which ship too, calibrates it, and compares it with the untrained flag on held-out
rows. Finished stages are saved in the output folder and skipped the next time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from redflag.bounds import option
from redflag.calibrating import calibrate
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.files import atomic_write, keep_json
from redflag.lab.nano import demo as nano
from redflag.lab.stages import UNATTENDED, Stages, quiet
from redflag.models.named import DEFAULT, SHIPPED, cache_folder, model_folder
from redflag.scoring import score
from redflag.terminal.paint import wants_colour

STARTER = SHIPPED[DEFAULT].parent / "starter.jsonl.gz"
PARTS = ("train", "calibration", "test")
TARGET_FPR = 0.05
# Some twenty steps: a minute or two.
TRAINING: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_length": 160,
    "learning_rate": 2e-3,
    "keep_coef": 8.0,
    "train_sampling_strategy": "group_by_length",
}
LORA_R = 8


@dataclass
class DemoArguments(nano.DemoArguments):
    """A real model watched and a flag trained; or a small world with everything made here."""

    output_dir: str = option("", "Where everything goes; default: runs/demo, or runs/nano.")
    world: Literal["smollm2", "nano"] = option(
        "smollm2", "smollm2: SmolLM2-135M and its flag; nano: a generated world, nothing fetched."
    )
    skip: list[str] = option([], "smollm2: what is left out, watch or teach.")


ARGUMENTS = DemoArguments
POSITIONAL: str | None = None


def run(arguments: DemoArguments) -> int:
    """The verb."""
    if arguments.world == "nano":
        if arguments.skip:
            raise RedflagError("skip must come with the world smollm2 (got nano). Leave it out")
        return nano.run(dataclasses.replace(arguments, output_dir=arguments.output_dir or "runs/nano"))
    for name in ("size", "per_category", "reflect"):
        if getattr(arguments, name) != getattr(nano.DemoArguments, name):
            raise RedflagError(f"{name} must come with --world nano (got world smollm2). Leave it out")
    if unknown := set(arguments.skip) - {"watch", "teach"}:
        raise RedflagError(f"skip must be watch or teach (got {sorted(unknown)[0]})")
    nano.check(arguments)
    output = Path(arguments.output_dir or "runs/demo")
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def log(line: str) -> None:
        print(line, flush=True)

    with quiet():
        if "watch" not in arguments.skip:
            watch(output, wants_colour(arguments.color), log)
        if "teach" not in arguments.skip:
            log("\n" + table(teach(output, arguments.seed, log)))
    if figures := recorded():
        log(figures)
    log(where(output, arguments.skip))
    log(f"\n{time.monotonic() - start:.0f} s in all; the same command again skips what is done")
    return 0


def watch(output: Path, coloured: bool, log: Callable[[str], None]) -> None:
    """Streams the answers, or prints those of an earlier run."""
    from redflag.lab.demo_watch import CASES, streams

    folder = Path(model_folder(DEFAULT))
    printed = output / ("watch.ansi" if coloured else "watch.txt")
    settings: dict[str, Any] = {name: _digest(folder / name) for name in ("redflag.json", "thresholds.json")}
    settings["cases"] = [dataclasses.astuple(case) for case in CASES]

    def stream() -> None:
        shown: list[str] = []

        def write(text: str) -> None:
            shown.append(text)
            print(text, end="", flush=True)

        streams(folder, coloured, write)
        with atomic_write(printed) as file:
            file.write("".join(shown).encode())

    if not Stages(output / f"{printed.name}.json", log).run("watch", settings, [printed], stream):
        log(printed.read_text(encoding="utf-8"))


def teach(output: Path, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """A flag before and after its training, calibrated and measured in the same way.

    Returns:
        `before` and `after` (as `redflag.calibrating.summary.summarise`), `keep_kl` (nats per harmless
        token) and `seconds` by stage.
    """
    base = model_folder(DEFAULT, flagged=False)
    stages = Stages(output / "stages.json", log)
    rows = {part: output / "rows" / f"{part}.jsonl" for part in PARTS}

    def write() -> None:
        starter = load_rows(STARTER).rows
        for part, path in rows.items():
            write_rows(path, [row for row in starter if (row.id or "").startswith(f"{part}-")])

    stages.run("starter rows", {"sha256": _digest(STARTER)}, rows.values(), write)
    settings = {"seed": seed, "training": TRAINING, "lora_r": LORA_R, "base": _digest(Path(base) / "config.json")}
    result: dict[str, Any] = {}
    for name, about, make in (
        ("before", "a flag before its training", partial(untrained, base)),
        ("after", "the same flag trained: 20 steps on 160 rows", partial(trained, base, rows=rows, seed=seed)),
    ):
        folder, scored = output / name, output / f"{name}.jsonl"
        stages.run(about, {"name": name, **settings}, [folder / "redflag.json"], partial(make, folder))
        calibration = calibrate.CalibrateArguments(
            model=str(folder), input=str(rows["calibration"]), target_fpr=TARGET_FPR, held_out=0.0
        )
        thresholds = folder / "thresholds.json"
        stages.run(f"{name}: thresholds", {"target": TARGET_FPR}, [thresholds], partial(calibrate.run, calibration))
        scoring = score.ScoreArguments(model=str(folder), input=str(rows["test"]), output=str(scored))
        stages.run(f"{name}: held-out rows", {}, [scored], partial(score.run, scoring))
        result[name] = nano.scored_summary(folder, scored)
    metrics = json.loads((output / "after" / "train.json").read_text(encoding="utf-8"))["metrics"]
    result |= {"keep_kl": metrics["eval_keep_kl_harmless"], "seconds": stages.seconds}
    keep_json(output / "results.json", result, indent=2)
    return result


def untrained(base: str, folder: Path) -> None:
    """Saves the base with a flag that was never trained, as an adapter that changes nothing."""
    from peft import get_peft_model

    from redflag.backends.load import read_model
    from redflag.flags import FlagSpec, attach
    from redflag.prompt import template_hash
    from redflag.training.adapter import lora_config
    from redflag.training.saving import save

    shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = read_model(base)
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    model = get_peft_model(model, lora_config(model, spec, 1))
    save(model, tokenizer, spec, folder, merge=False, result={"arguments": {"model": base}})


def trained(base: str, folder: Path, rows: dict[str, Path], seed: int) -> None:
    """Trains the flag."""
    from redflag.training import train
    from redflag.training.trainer import RedFlagConfig

    shutil.rmtree(folder, ignore_errors=True)
    arguments = train.TrainArguments(base, str(rows["train"]), eval_input=str(rows["test"]), lora_r=LORA_R, merge=False)
    config = RedFlagConfig(output_dir=str(folder), seed=seed, logging_steps=5, **TRAINING, **UNATTENDED)
    train.run(arguments, config)


def table(result: dict[str, Any]) -> str:
    """Before and after, side by side."""
    sides = [result["before"], result["after"]]
    counts = sides[0]["counts"]

    def line(name: str, values: list[str]) -> str:
        return f"  {name:<42}{values[0]:>12}{values[1]:>12}"

    force = [side["in_force"] for side in sides]
    lines = [
        f"Held-out starter rows: {counts['harmful']} harmful, {counts['harmless']} harmless. They are easy: templates",
        "of the same kind as the rows that were learnt. What a flag is worth is measured on other people's texts.",
        line("", ["untrained", "trained"]),
        line("AUROC of the answer's peak", [f"{side['overall']['auroc']:.3f}" for side in sides]),
        line(f"caught, threshold for {TARGET_FPR:.0%} false alarms", [f"{each['tpr']:.0%}" for each in force]),
        line("false alarms of that threshold", [f"{each['realised_fpr']:.0%}" for each in force]),
        line("keep KL, nats per harmless token", ["0", f"{result['keep_kl']:.4f}"]),
    ]
    return "\n".join(lines)


def recorded(folder: Path | None = None) -> str:
    """The figures of the shipped flag, from the file beside it, as text; "" without that file."""
    folder = folder or SHIPPED[DEFAULT]
    try:
        record = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    lines = ["", f"The flag that ships, as recorded when it was made ({record['about']}; nothing of it was run here):"]
    width = max(len(name) for name in record["figures"])
    return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in record["figures"].items())])


def where(output: Path, skipped: list[str]) -> str:
    """Where the files are, and what to do next."""
    lines = [""]
    if "teach" not in skipped:
        lines += [
            f"  {output}/after/          the flag trained here: adapter, redflag.json, thresholds.json, train.json",
            f"  {output}/rows/           its rows",
            f"  {output}/after.jsonl     p(flag) of the held-out rows, token by token",
            f"  {output}/results.json    the table above and more",
        ]
    lines += [f"  {cache_folder() / DEFAULT}/    the model, and the flag that ships", "", "Try next:"]
    lines.append(f"  redflag chat --model {DEFAULT}")
    if "teach" not in skipped:
        lines.append(f"  redflag show {output}/after.jsonl --limit 3")
    lines.append(f"  redflag serve --model {DEFAULT} --port 8080")
    return "\n".join(lines)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
