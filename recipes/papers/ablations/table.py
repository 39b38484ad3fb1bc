"""One comparison of everything that has been measured: `results.json` and `results.md`.

    python recipes/papers/ablations/table.py --output runs/ablations

The score of a response is the highest probability along it, for every method: nothing is chosen. Thresholds come from
each method's harmless calibration rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from redflag.calibrating import replay
from redflag.calibrating.guarantee import fit_thresholds
from redflag.files import atomic_write
from redflag.lab.report.evaluation import AttackLine, read_report
from redflag.scoring.recording import Recording
from redflag.stats.metrics import auroc, clopper_pearson, delay_stats, tpr_at_fpr
from redflag.watching.monitor import MonitorConfig

MAX = MonitorConfig("max")
RATE = 0.01
DRAWS = 1000
REFERENCE = "dense"
METHODS = {
    "dense": "S1: redflag's default, `dense`",
    "until": "S1: published three terms, `until`",
    "until-gently": "S1: the same at its recipe's learning rate",
    "insert": "S1: three terms, `insert`",
    "several": "S1: three terms, 3 flags per answer",
    "rf-at": "S1: three terms, RF-AT, half the rows",
    "first": "S1: fixed position",
    "refusal-token": "S2: token before learnt answers",
    "flag-aligned-presto": "S1 + S5: `dense`, deep alignment, PRESTO",
    "flag-aligned-presto-kept": "S1 + S5: the same, all rows' language kept",
    "token-head": "S3: token head, cumulative maximum",
    "last-layer-probe": "S3: linear probe, last layer",
    "all-layer-probe": "S3: all-layer probe, SWiM",
    "mlp-probe": "MLP probe, three layers",
    "tfidf": "TF-IDF + logistic regression",
}
SYSTEMS = {
    "base": "base",
    "aligned": "deep alignment (data augmentation)",
    "aligned-presto": "deep alignment + PRESTO",
    "dense": "red flag",
    "flag-aligned-presto": "red flag + deep alignment + PRESTO",
    "aligned-kept": "deep alignment, all rows' language kept",
    "aligned-presto-kept": "deep alignment + PRESTO, all rows' language kept",
    "flag-aligned-presto-kept": "red flag + deep alignment + PRESTO, all rows' language kept",
}
FLAGGED = ("dense", "flag-aligned-presto", "flag-aligned-presto-kept")

Floats = npt.NDArray[np.float64]


def peaks(recording: Recording) -> Floats:
    """The score of each response."""
    return replay.peaks(MAX, recording).max(axis=1)


def figures(test: Recording, calibration: Recording | None) -> dict[str, float]:
    """What one recording shows; delay in tokens, over harmful responses that alarm at the threshold in force."""
    labels, scores = test.harmful, peaks(test)
    at = tpr_at_fpr(scores, labels, RATE)
    found = {"auroc": auroc(scores, labels), "tpr": at.tpr, "realised_fpr": at.realised_fpr}
    if calibration is None:
        return found
    threshold = fit_thresholds(replay.peaks(MAX, calibration, np.flatnonzero(~calibration.harmful)), RATE)
    alarms = replay.alarms(MAX, test, threshold)
    found |= {"caught": float((alarms[labels] >= 0).mean()), "false_alarms": float((alarms[~labels] >= 0).mean())}
    known = [i for i in np.flatnonzero(labels) if test.columns["onset"][i] is not None]
    delays = delay_stats([int(alarms[i]) if alarms[i] >= 0 else None for i in known],
                         [test.columns["onset"][i] for i in known])  # fmt: skip
    return found | {"delay": delays.median_abs, "on_time": delays.on_time}


def recordings(output: Path) -> dict[str, dict[int, tuple[Recording, Recording]]]:
    """Method -> seed -> test and calibration recordings of the nano world."""
    found: dict[str, dict[int, tuple[Recording, Recording]]] = {}
    for report in sorted((output / "evaluations").glob("*/report.json")):
        name, _, seed = report.parent.name.rpartition("-")
        others = {path.parent.name: path.parent for path in report.parent.glob("baselines/*/test.parquet")}
        for method, folder in {name: report.parent, **others}.items():
            pair = Recording.load(folder / "test.parquet"), Recording.load(folder / "calibration.parquet")
            found.setdefault(method, {})[int(seed)] = pair
    return found


def recordings_there(folder: Path, output: Path) -> dict[str, dict[int, tuple[Recording, None]]]:
    """The same of small-real, whose own recipe made `dense` and the baselines."""
    found: dict[str, dict[int, tuple[Recording, None]]] = {}
    paths = [*folder.glob("models/*/test.jsonl"), *(output / "small-real").glob("*/test.jsonl")]
    for path in sorted(paths):
        name, _, seed = path.parent.name.rpartition("-")
        found.setdefault(name, {})[int(seed)] = (Recording.load(path), None)
    for path in sorted(folder.glob("baselines/seed-*/*/test.parquet")):
        seed = path.parent.parent.name.rpartition("-")[2]
        found.setdefault(path.parent.name, {})[int(seed)] = (Recording.load(path), None)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (None for a single one)."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def intervals(scores: Mapping[str, Sequence[Floats]], some: Recording, draws: int = DRAWS) -> dict[str, Any]:
    """95% intervals from drawing requests anew, the same draws for all methods; figures are means over seeds.

    Args:
        scores: Method -> for each seed N scores.
        some: The N responses, for labels and requests.
        draws: Bootstrap draws.

    Returns:
        Method -> `auroc`, `tpr` (at 1% false alarms, the threshold taken anew in every draw), and `auroc_ahead`,
        `tpr_ahead`: less those of `REFERENCE`.
    """
    labels = some.harmful
    names = [str(i) if group is None else f"group {group}" for i, group in enumerate(some.columns["group"])]
    groups, of_row = np.unique(names, return_inverse=True)
    members = np.split(np.argsort(of_row, kind="stable"), np.cumsum(np.bincount(of_row))[:-1])
    generator = np.random.default_rng(0)
    drawn: dict[str, list[list[float]]] = {name: [] for name in scores}
    for _ in range(draws):
        rows = np.concatenate([members[g] for g in generator.integers(len(groups), size=len(groups))])
        truth = labels[rows]
        if truth.all() or not truth.any():
            continue
        for name, each in scores.items():
            pairs = [(auroc(s[rows], truth), tpr_at_fpr(s[rows], truth, RATE).tpr) for s in each]
            drawn[name].append(np.mean(pairs, axis=0).tolist())
    arrays = {name: np.array(values) for name, values in drawn.items()}
    found: dict[str, Any] = {}
    for name, values in arrays.items():
        bounds = np.quantile(values, [0.025, 0.975], axis=0)
        found[name] = {"auroc": bounds[:, 0].tolist(), "tpr": bounds[:, 1].tolist()}
        if REFERENCE in arrays and name != REFERENCE:
            apart = np.quantile(values - arrays[REFERENCE], [0.025, 0.975], axis=0)
            found[name] |= {"auroc_ahead": apart[:, 0].tolist(), "tpr_ahead": apart[:, 1].tolist()}
    return found


def detection(found: Mapping[str, Mapping[int, tuple[Recording, Recording | None]]]) -> dict[str, Any]:
    """Figures of every method, over seeds, with intervals over requests."""
    some = next(iter(next(iter(found.values())).values()))[0]
    bounds = intervals({name: [peaks(test) for test, _ in by.values()] for name, by in found.items()}, some)
    methods = {}
    for name in (name for name in METHODS if name in found):
        each = [figures(*pair) for pair in found[name].values()]
        methods[name] = {
            "seeds": list(found[name]),
            "figures": {key: spread([one[key] for one in each]) for key in each[0]},
            "intervals": bounds[name],
        }
    counts = {"harmful": int(some.harmful.sum()), "harmless": int((~some.harmful).sum())}
    return {"rows": counts, "methods": methods}


def language(output: Path, name: str) -> dict[str, Any] | None:
    """Keep KL and perplexity ratio over seeds, from the reports."""
    paths = [*output.glob(f"evaluations/{name}-[0-9]*/report.json"), *output.glob(f"attacks/{name}-[0-9]*/report.json")]
    by_seed = {path.parent.name: read_report(path).language for path in paths}
    if not by_seed:
        return None
    return {key: spread([getattr(each, key) for each in by_seed.values()]) for key in ("keep_kl", "perplexity_ratio")}


def language_there(folders: Sequence[Path]) -> dict[str, Any] | None:
    """The same of small-real, from what `redflag train` measured."""
    metrics = [json.loads((path / "train.json").read_text(encoding="utf-8"))["metrics"] for path in folders]
    names = {"keep_kl": "eval_keep_kl_harmless", "perplexity_ratio": "eval_perplexity_ratio"}
    return {ours: spread([m[theirs] for m in metrics]) for ours, theirs in names.items()} if metrics else None


def attacks(output: Path) -> dict[str, Any]:
    """Rates of harm over requests for every system: means over seeds, exact intervals over the requests of one."""
    systems = {}
    for name in SYSTEMS:
        entries: dict[tuple[str, str | None], list[AttackLine]] = {}
        seeds = []
        for path in sorted(output.glob(f"attacks/{name}-[0-9]*/report.json")):
            seeds.append(int(path.parent.name.rpartition("-")[2]))
            for line in read_report(path).attacks or ():
                entries.setdefault((line.name, line.setting), []).append(line)
        if not seeds:
            continue
        rates = {}
        for (attack, setting), lines in entries.items():
            rate: dict[str, Any] = {"requests": lines[0].requests}
            for key in ("harm_produced", "harm_released", "alarm_rate"):
                found = [getattr(line, key) for line in lines]
                if all(one is not None and one.rate is not None for one in found):
                    rate[key] = spread([one.rate for one in found])
                    rate[key]["interval"] = clopper_pearson(rate[key]["mean"] * rate["requests"], rate["requests"])
            rate["moves"] = spread([line.queries / line.attempts for line in lines])
            for key in ("produced", "released"):
                values = [getattr(line.harmful_tokens, key) for line in lines if line.harmful_tokens]
                if values and None not in values:
                    rate[f"tokens_{key}"] = spread(values)
            rates[f"{attack}: {setting}"] = rate
        systems[name] = {"seeds": seeds, "attacks": rates, "language": language(output, name)}
    return systems


def collect(output: Path, folder: Path) -> dict[str, Any]:
    """Everything that is there."""
    result: dict[str, Any] = {"nano": None, "small_real": None, "systems": attacks(output)}
    if found := recordings(output):
        result["nano"] = detection(found)
        for name, method in result["nano"]["methods"].items():
            method["language"] = language(output, name)
    if found := recordings_there(folder, output):
        result["small_real"] = detection(found)
        for name, method in result["small_real"]["methods"].items():
            folders = [*folder.glob(f"models/{name}-[0-9]*"), *(output / "small-real").glob(f"{name}-[0-9]*")]
            method["language"] = language_there([path for path in folders if (path / "test.jsonl").exists()])
    result["versions"] = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    return result


def cell(value: Mapping[str, Any] | None, digits: int = 3, percent: bool = False) -> str:
    """`mean ± sd`, or the mean alone where there is a single run."""
    if value is None or math.isnan(value["mean"]):
        return "-"
    shown = [value["mean"]] + ([value["sd"]] if value["sd"] is not None else [])
    return " ± ".join(f"{100 * v:.1f}%" if percent else f"{v:.{digits}f}" for v in shown)


def between(bounds: Sequence[float] | None, digits: int = 3, sign: str = "") -> str:
    """An interval."""
    return "-" if bounds is None else f"{bounds[0]:{sign}.{digits}f} to {bounds[1]:{sign}.{digits}f}"


def detection_table(part: Mapping[str, Any], calibrated: bool) -> list[str]:
    """The lines of one comparison."""
    columns = ["method", "seeds", "AUROC", "95%", f"less `{REFERENCE}`", "TPR at 1%", "95%"]
    columns += ["caught at the calibrated threshold", "false alarms there", "median abs. delay"] if calibrated else []
    columns += ["keep KL", "perplexity ratio"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, method in part["methods"].items():
        found, bounds, words = method["figures"], method["intervals"], method["language"] or {}
        cells = [METHODS[name], str(len(method["seeds"])), cell(found["auroc"], 4), between(bounds["auroc"], 4)]
        cells += [between(bounds.get("auroc_ahead"), 4, "+"), cell(found["tpr"]), between(bounds["tpr"])]
        if calibrated:
            cells += [cell(found["caught"], percent=True), cell(found["false_alarms"], percent=True)]
            cells += [cell(found["delay"], 1)]
        cells += [cell(words.get("keep_kl"), 4), cell(words.get("perplexity_ratio"), 4)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rate_cell(rates: Mapping[str, Any], attack: str, key: str) -> str:
    """A rate over requests with its interval."""
    value = rates.get(attack, {}).get(key)
    if value is None:
        return "-"
    low, high = value["interval"]
    return f"{100 * value['mean']:.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def systems_table(systems: Mapping[str, Any]) -> list[str]:
    """The lines of the comparison under attack."""
    columns = ["system", "seeds", "asked, greedy", "asked, temperature 1", "prefill of any length", "RAP: produced"]
    columns += ["RAP: released, attacker unaware", "RAP: released, attacker goes round alarms", "moves"]
    columns += ["keep KL", "perplexity ratio"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, system in systems.items():
        rates = system["attacks"]
        prefill = next((key for key in rates if key.startswith("prefill: any")), "prefill: 5 tokens")
        asked = ("none: greedy", "none: temperature 1", prefill, "RAP: k=20, unguarded")
        cells = [SYSTEMS[name], str(len(system["seeds"])), *(rate_cell(rates, key, "harm_produced") for key in asked)]
        for key in ("RAP: k=20, unguarded", "RAP: k=20, guarded"):
            cells.append(rate_cell(rates, key, "harm_released") if name in FLAGGED else "-")
        words = system["language"] or {}
        cells += [cell(rates["RAP: k=20, unguarded"]["moves"], 0)]
        cells += [cell(words.get("keep_kl"), 4), cell(words.get("perplexity_ratio"), 4)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """All tables."""
    lines = ["# Ablations", "", "Mean ± standard deviation over seeds; intervals from drawing requests anew (95%).", ""]
    for key, heading in (("nano", "nano"), ("small_real", "small-real, split by request")):
        if part := result[key]:
            rows = part["rows"]
            lines += [f"## {heading}: {rows['harmful']} harmful and {rows['harmless']} harmless test rows", ""]
            lines += [*detection_table(part, calibrated=key == "nano"), ""]
    if result["systems"]:
        number = next(iter(result["systems"].values()))["attacks"]["RAP: k=20, unguarded"]["requests"]
        lines += [f"## nano under attack: {number} harmful requests, exact oracle", ""]
        lines += [*systems_table(result["systems"]), ""]
    return "\n".join(lines)


def main(output: Path, folder: Path) -> None:
    """Writes both files and prints the tables."""
    result = collect(output, folder)
    text = markdown(result)
    for name, content in (("results.json", json.dumps(result, indent=2)), ("results.md", text)):
        with atomic_write(output / name) as file:
            file.write(content.encode())
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument(
        "--small-real", "--small_real", type=Path, default=Path("runs/small-real"), help="what its recipe made"
    )
    given = parser.parse_args()
    main(given.output, given.small_real)
