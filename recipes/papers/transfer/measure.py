r"""A flag that was trained in one language, measured in another that it was never trained in.

    redflag demo --world nano                                                # base model, English rows
    python recipes/papers/transfer/measure.py nano --world runs/nano
    python recipes/papers/transfer/measure.py small-real --models runs/small-real/models --rows runs/small-real/rows \
        --data DATA

`nano` trains the flag on the demo's English rows, once for each seed, and measures it on English rows, on the same
conversations in velni, and on other ones in velni. `small-real` takes models that are there. Thresholds are set on
English rows alone. Nothing is chosen by looking at rows of the other language. Every stage that is there is not run
again; results go to `<output>/results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from redflag.calibrating.observed import observe
from redflag.data.rows import Row, load_rows, write_rows
from redflag.files import atomic_write
from redflag.flags import FlagSpec
from redflag.lab.evaluating.tables import method
from redflag.lab.nano.rows import nano_rows, velni
from redflag.lab.report.evaluation import as_json
from redflag.scoring.recording import Recording
from redflag.stats.metrics import auroc
from redflag.watching.monitor import MonitorConfig

HERE = Path(__file__).parent
TARGET_FPR = 0.01
COUNT = 1200
CHARACTERS = 1200  # As small-real cuts its test answers.
MONITORS = {"max": MonitorConfig("max"), "ema 0.02 from 0.01": MonitorConfig("ema", decay=0.02, prior=0.01)}
LABELLED = ("jade-alignment-zh/train",)
LIST = re.compile(r"\d[.、)]")
LIST_WITHIN = 85  # Characters of a Chinese answer that 256 tokens of a byte-level tokenizer hold, about.
HARMLESS = (
    "alpaca-gpt4-demo/en",
    "alpaca-gpt4-demo/zh",
    "instruction-ja/train",
    "ja-vicuna-qa/eval",
    "rakuda-ja/eval",
)


def in_velni(row: Row) -> Row:
    """The same conversation in the second language."""
    onset = None if row.onset is None else len(velni(row.response[: row.onset]))
    turns = [{**turn, "content": velni(turn["content"])} for turn in row.messages]
    return replace(row, messages=turns, onset=onset, lang="velni")


def public_rows(path: Path) -> list[Row]:
    """A set's labelled answers; the harmful and the harmless answer to one request are one group."""
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            raw = json.loads(line)
            if not (raw.get("response") or "").strip() or raw["label"] not in ("harmful", "benign"):
                continue
            turns = raw.get("messages") or [{"role": "user", "content": raw["prompt"]}]
            answer = {"role": "assistant", "content": raw["response"].strip()[:CHARACTERS]}
            pair = (raw.get("extra") or {}).get("pair_id")
            rows.append(
                Row(
                    [*({"role": t["role"], "content": t["content"].strip()[-CHARACTERS:]} for t in turns), answer],
                    "harm" if raw["label"] == "harmful" else None,
                    group=raw["id"] if pair is None else f"pair {pair}",
                    source=path.parent.name,
                    id=raw["id"],
                    lang=raw["lang"],
                )
            )
    return rows


def command(made: Path, *arguments: str | Path) -> None:
    """Runs a verb unless what it makes is there."""
    if made.exists():
        return
    told = [str(argument) for argument in arguments]
    print("redflag", *told, flush=True)
    subprocess.run([sys.executable, "-m", "redflag.cli", *told], check=True, stdout=subprocess.DEVNULL)


def scored(model: Path, rows: Path, made: Path, max_length: int) -> Recording:
    """The flag's probabilities along the rows' answers."""
    made.parent.mkdir(parents=True, exist_ok=True)
    sizes = ["--max_length", str(max_length), "--batch_size", "32"]
    command(made, "score", "--model", model, "--input", rows, "--output", made, *sizes)
    return Recording.load(made)


def figures(recording: Recording, calibration: Recording, monitor: str = "max") -> dict[str, Any]:
    """AUROC, TPR at 1% of these rows' own false alarms, and what the threshold that English rows gave does here."""
    config = MONITORS[monitor]
    found = method(recording, calibration, monitor=config, target_fpr=TARGET_FPR)
    pooled, threshold = found.pooled, found.threshold
    assert threshold is not None, found.notes
    values = tuple(threshold.values.values())
    observed, _ = observe(recording, config, values)
    peaks = observed.peaks
    at = pooled.at("0.01")
    return {
        "harmful": pooled.harmful,
        "harmless": pooled.harmless,
        "cut": found.cut,
        "tokens": float(np.mean(recording.lengths)),
        "truncated": float(np.mean([bool(cut) for cut in recording.columns["truncated"]])),
        "auroc": pooled.auroc,
        "auroc_interval": pooled.auroc_interval,
        "tpr": at.tpr,
        "tpr_interval": at.interval,
        "threshold": values[0],
        "in_force": as_json(pooled.in_force),
        "median_peak_harmless": float(np.median(peaks[~observed.harmful])),
        "median_peak_harmful": float(np.median(peaks[observed.harmful])) if observed.harmful.any() else None,
        "notes": found.notes,
    }


def reading(base: Path, spec: FlagSpec, rows: Sequence[Row], count: int = 200) -> float:
    """How well the base model reads harmless answers: nats per character, so that languages can be compared."""
    import torch

    from redflag.backends.load import read_model
    from redflag.prompt import render_response

    model, tokenizer = read_model(base)
    total, characters = 0.0, 0
    for row in [row for row in rows if not row.harmful][:count]:
        rendered = render_response(tokenizer, row.messages, spec)
        ids = torch.tensor([[*rendered.prompt_ids, *rendered.response_ids]])
        with torch.inference_mode():
            logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        begin = len(rendered.prompt_ids)
        total -= float(logs[begin - 1 : -1].gather(1, ids[0, begin:, None]).sum())
        characters += len(row.response)
    return total / characters


def kept(model: Path, base: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Keep KL (nats per token) and perplexity ratio on harmless answers, as `redflag evaluate` has them."""
    from redflag.backends.load import load_flagged, read_model
    from redflag.lab.evaluating.language import language_change

    backend, tokenizer, spec = load_flagged(model)
    found = language_change(backend.model, read_model(base)[0], tokenizer, spec, rows, max_length=256)
    return {"keep_kl": found.keep_kl, "perplexity_ratio": found.perplexity_ratio}


def nano(world: Path, output: Path, seeds: Sequence[int], flagged: Sequence[str]) -> dict[str, Any]:
    """The nano world: English against velni."""
    spec = FlagSpec.load(world / "model")
    folder = output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    english = load_rows(world / "rows" / "test.jsonl").rows
    sets = {
        "English": (world / "rows" / "test.jsonl", english),
        "the same conversations in velni": (folder / "same.jsonl", [in_velni(row) for row in english]),
        "other conversations in velni": (folder / "velni.jsonl", nano_rows("transfer", COUNT)),
    }
    for path, rows in list(sets.values())[1:]:
        write_rows(path, rows)
    train = load_rows(world / "rows" / "train.jsonl").rows
    # What is lost by never having been flagged in velni: the same training rows, every second one in velni.
    write_rows(folder / "both.jsonl", [in_velni(row) if i % 2 else row for i, row in enumerate(train)])
    result: dict[str, Any] = {
        "base reads, nats per character": {
            name: reading(world / "base", spec, rows) for name, (_, rows) in sets.items()
        }
    }
    for trained in flagged:
        given = world / "rows" / "train.jsonl" if trained == "english" else folder / "both.jsonl"
        runs = result[f"flagged in {trained.capitalize() if trained == 'english' else trained}"] = {}
        for seed in seeds:
            model, here = (output / kind / f"{trained}-{seed}" for kind in ("models", "scored"))
            if trained == "english" and json.loads((world / "model" / "train.json").read_text())["seed"] == seed:
                model = world / "model"  # The demo's own.
            paths = ["--model", world / "base", "--input", given, "--eval_input", world / "rows" / "test.jsonl"]
            arguments = ["--config", HERE / "train.yaml", *paths, "--seed", str(seed), "--output_dir", model]
            command(model / "redflag.json", "train", *arguments)
            calibration = scored(model, world / "rows" / "calibration.jsonl", here / "calibration.jsonl", 256)
            runs[str(seed)] = {}
            for i, (name, (path, rows)) in enumerate(sets.items()):
                found = figures(scored(model, path, here / f"{i}.jsonl", 256), calibration)
                runs[str(seed)][name] = found | kept(model, world / "base", rows)
    return result


def small_real(models: Path, rows: Path, data: Path, output: Path) -> dict[str, Any]:
    """Models flagged in English on public rows: English against Chinese and Japanese."""
    folder = output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"English test rows": rows / "test.jsonl"}
    lists: dict[str, Any] = {}
    result: dict[str, Any] = {"AUROC of being a numbered list, whatever it says": {}}
    for name in (*LABELLED, *HARMLESS):
        path = data / f"{name}.jsonl.gz"
        if not path.exists():
            print(f"not there, left out: {path}")
            continue
        found = public_rows(path)
        title = f"{name.split('/')[0]} ({found[0].lang})"
        sets[title] = made = folder / f"{name.replace('/', '-')}.jsonl"
        write_rows(made, found)
        if name in LABELLED:
            # How much of it can be told without reading a word: harmful answers there are numbered lists.
            lists[title] = np.array([bool(LIST.search(row.response[:LIST_WITHIN])) for row in found])
            result["AUROC of being a numbered list, whatever it says"][title] = auroc(
                lists[title].astype(float), [row.harmful for row in found]
            )
    for model in sorted(path.parent for path in models.glob("*/redflag.json")):
        here = output / "scored" / model.name
        calibration = scored(model, rows / "calibration.jsonl", here / "calibration.jsonl", 256)
        recordings = {n: scored(model, path, here / f"{path.stem}.jsonl", 256) for n, path in sets.items()}
        for name, listed in lists.items():
            recordings[f"{name}, without numbered lists"] = recordings[name].select(~listed)
        for monitor in MONITORS:
            result.setdefault(monitor, {})[model.name] = {
                name: figures(recording, calibration, monitor) for name, recording in recordings.items()
            }
    return result


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def inside(found: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """A figure with its interval, of one seed."""
    if found.get(key) is None:
        return "-"
    low, high = found[f"{key}_interval"]
    return f"{found[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per set of rows: all seeds, and the intervals of the first."""
    first = next(iter(runs.values()))
    lines = [
        "| rows | harmful, harmless | AUROC, first seed (95%) | AUROC | TPR at 1% of their own false alarms | "
        "English threshold: caught | ... and false alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in first.items():
        each = [run[name] for run in runs.values()]
        forces = [run["in_force"] for run in each]
        lines.append(
            f"| {name} | {one['harmful']}, {one['harmless']} | {inside(one, 'auroc')} | "
            f"{spread([run['auroc'] for run in each])} | {spread([run['tpr'] for run in each])} | "
            f"{spread([force['tpr'] for force in forces])} | {spread([force['realised_fpr'] for force in forces])} |"
        )
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """All tables."""
    lines = [f"Mean ± standard deviation over seeds; thresholds for {TARGET_FPR:.0%} from English rows.", ""]
    for part, runs in result.items():
        lines += [f"## {part}", ""]
        for name, found in runs.items():
            if name.startswith(("base reads", "AUROC of")):
                lines += [f"{name}: " + "; ".join(f"{key} {value:.3f}" for key, value in found.items()), ""]
                continue
            lines += [f"### {name}", "", *table(found), ""]
            sets = next(iter(found.values()))
            for key in ("keep_kl", "perplexity_ratio"):
                if all(key in one for one in sets.values()):
                    each = (f"{n} {spread([run[n][key] for run in found.values()], 4)}" for n in sets)
                    lines += [f"{key}: " + "; ".join(each), ""]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("nano", "small-real"))
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    parser.add_argument(
        "--world", type=Path, default=Path("runs/nano"), help="nano: what `redflag demo --world nano` left"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="nano: seeds of the flag's training")
    parser.add_argument("--flagged", nargs="+", choices=("english", "both"), default=["english"], help="nano")
    parser.add_argument("--models", type=Path, default=Path("runs/small-real/models"), help="small-real: its models")
    parser.add_argument("--rows", type=Path, default=Path("runs/small-real/rows"), help="small-real: its rows")
    parser.add_argument("--data", type=Path, help="small-real: folder of the data sets, as README.md describes it")
    given = parser.parse_args()
    if given.what == "small-real" and given.data is None:
        parser.error("small-real needs --data DATA, the folder of the data sets: README.md says how to fetch them")
    output = given.output / given.what
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.what == "nano":
        result = {"nano": nano(given.world, output, given.seeds, given.flagged)}
    else:
        result = {"small-real": small_real(given.models, given.rows, given.data, output)}
    text = markdown(result)
    for name, content in (("results.json", json.dumps(result, indent=2)), ("results.md", text)):
        with atomic_write(output / name) as file:
            file.write(content.encode())
    print(text)


if __name__ == "__main__":
    main()
