"""The recipe's table: `results.json` and `results.md` from whatever has been scored.

    python recipes/small-real/table.py --output runs/small-real

Every figure is taken on `rows/test.jsonl`, twice: on all of it, and with the harmless answers that refuse left out,
because most public "harmful / harmless" pairs are really "complied / refused".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from redflag.measuring.score import read_scored
from redflag.measuring.summary import summarise
from redflag.watching.monitor import MonitorConfig

MONITORS = {
    "max": MonitorConfig("max"),
    "run of 3": MonitorConfig("run", window=3),
    "run of 16": MonitorConfig("run", window=16),
}
PLACEMENTS = ("first", "insert", "dense")
BASELINES = {"tfidf": "TF-IDF + logistic regression", "probe": "linear probe, last layer"}
SUBSETS = {"all": "All test rows", "no_refusals": "Refusing harmless answers left out"}
RATES = (0.01, 0.05)

Scored = list[dict[str, Any]]


def subset(rows: Scored, name: str) -> Scored:
    """All rows, or those that are no refusals; a set's refusals are counted with the set."""
    kept = [r for r in rows if name == "all" or not r["source"].endswith("/refusal")]
    return [{**r, "source": r["source"].split("/")[0]} for r in kept]


def measure(rows: Scored, config: MonitorConfig) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The figures of one scored file under one monitor.

    Returns:
        Figure -> value, and data set -> `harmful`, `harmless`, `few` and, where both classes are there, `auroc`.
    """
    summary = summarise(rows, target_fprs=RATES, monitor=config)
    overall = summary["overall"]
    figures: dict[str, float] = {"auroc": overall["auroc"]}
    for rate in RATES:
        found = overall["tpr"][f"{rate:g}"]
        figures[f"tpr_at_{rate:g}"] = found["tpr"]
        figures[f"realised_fpr_at_{rate:g}"] = found["realised_fpr"]
    for tokens, value in overall["first"].items():
        # Before its window is full a run has no score, so there is nothing to tell apart.
        if int(tokens) >= config.window:
            figures[f"auroc_first_{tokens}"] = value
    return figures, summary["sources"]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (None for a single one) and the values themselves."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": list(values)}


def method(files: Mapping[str, Path], first_position: bool = False) -> dict[str, Any]:
    """Figures of one method over its seeds.

    Args:
        files: Seed -> scored file.
        first_position: Whether to read position 0 alone as well, the only one that `first` is trained at.
    """
    per_seed = {seed: read_scored(path) for seed, path in files.items()}
    result: dict[str, Any] = {"seeds": list(per_seed)}
    monitors = dict(MONITORS) | ({"position 0": MonitorConfig("max")} if first_position else {})
    for name in SUBSETS:
        result[name] = {"monitors": {}, "sources": {}}
        for label, config in monitors.items():
            measured = []
            for scored in per_seed.values():
                rows = subset(scored, name)
                if label == "position 0":
                    rows = [{**r, "flag_probs": r["flag_probs"][:1]} for r in rows]
                measured.append(measure(rows, config))
            result[name]["monitors"][label] = {
                key: spread([figures[key] for figures, _ in measured])
                for key in measured[0][0]
                if not (label == "position 0" and key.startswith("auroc_first"))
            }
            if label == "max":
                for source, slice_ in measured[0][1].items():
                    entry = {key: slice_[key] for key in ("harmful", "harmless", "few")}
                    if "auroc" in slice_:
                        entry["auroc"] = spread([sources[source]["auroc"] for _, sources in measured])
                    result[name]["sources"][source] = entry
    return result


def language(folders: Sequence[Path]) -> dict[str, Any]:
    """Keep KL (nats per token) and perplexity ratio on harmless rows, from each run's train.json."""
    found: dict[str, list[float]] = {}
    for folder in folders:
        metrics = json.loads((folder / "train.json").read_text(encoding="utf-8"))["metrics"]
        for ours, theirs in (("keep_kl", "eval_keep_kl_harmless"), ("perplexity_ratio", "eval_perplexity_ratio")):
            found.setdefault(ours, []).append(metrics[theirs])
    return {key: spread(values) for key, values in found.items()}


def collect(output: Path) -> dict[str, Any]:
    """Everything that has been scored under `output`."""
    methods: dict[str, Any] = {}
    for placement in PLACEMENTS:
        folders = sorted((output / "models").glob(f"{placement}-*"))
        folders = [folder for folder in folders if (folder / "scored.jsonl").exists()]
        if folders:
            files = {folder.name.rpartition("-")[2]: folder / "scored.jsonl" for folder in folders}
            methods[placement] = method(files, first_position=placement == "first") | {"language": language(folders)}
    for name in BASELINES:
        path = output / "baselines" / f"{name}.jsonl"
        if path.exists():
            methods[name] = method({"0": path})
    rows = {}
    for path in sorted((output / "rows").glob("*.jsonl")):
        rows[path.stem] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    counts = output / "rows" / "counts.json"
    base = output / "base" / "pretrain.json"
    return {
        "methods": methods,
        "rows": rows,
        "counts": json.loads(counts.read_text()) if counts.exists() else None,
        "base": json.loads(base.read_text()) if base.exists() else None,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "scikit-learn")},
    }


def cell(figures: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """`mean ± sd`, or the mean alone where there is a single run."""
    value = figures.get(key)
    if value is None or math.isnan(value["mean"]):
        return "-"
    text = f"{value['mean']:.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:.{digits}f}"


def title(name: str, result: Mapping[str, Any]) -> str:
    """How a method is called in the table."""
    if name in BASELINES:
        return BASELINES[name]
    return f"flag, `{name}` ({len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''})"


def markdown(results: Mapping[str, Any]) -> str:
    """The tables."""
    lines = ["# small-real", ""]
    lines += [
        "Mean ± standard deviation over seeds. The score of a response is the highest its monitor reaches. TPR: at the "
        "threshold whose false-alarm rate is nearest to the asked one without exceeding it (that rate in brackets). "
        '"first k": only the first k tokens are seen. Keep KL in nats per token and perplexity ratio (trained over '
        "reference) on harmless rows. `position 0`: the flag's probability before the first response token alone.",
        "",
    ]
    for name, heading in SUBSETS.items():
        some = next(iter(results["methods"].values()), None)
        if some is None:
            break
        total = [sum(s[k] for s in some[name]["sources"].values()) for k in ("harmful", "harmless")]
        lines += [f"## {heading}: {total[0]} harmful, {total[1]} harmless", ""]
        lines += [
            "| method | monitor | AUROC | TPR at 1% | TPR at 5% | first 8 | first 32 | keep KL | perplexity ratio |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for key, result in results["methods"].items():
            language_ = result.get("language", {})
            for label, figures in result[name]["monitors"].items():
                tprs = [
                    f"{cell(figures, f'tpr_at_{rate:g}')} ({cell(figures, f'realised_fpr_at_{rate:g}').split(' ')[0]})"
                    for rate in RATES
                ]
                lines.append(
                    f"| {title(key, result)} | {label} | {cell(figures, 'auroc')} | {tprs[0]} | {tprs[1]} | "
                    f"{cell(figures, 'auroc_first_8')} | {cell(figures, 'auroc_first_32')} | "
                    f"{cell(language_, 'keep_kl', 4)} | {cell(language_, 'perplexity_ratio', 4)} |"
                )
        lines += [
            "",
            f"AUROC by data set, monitor max, {heading.lower()} (sets with fewer than 20 of a class: few):",
            "",
        ]
        lines += ["| data set | harmful | harmless | " + " | ".join(results["methods"]) + " |"]
        lines += ["|---|---|---|" + "---|" * len(results["methods"])]
        for source in sorted(some[name]["sources"]):
            entry = some[name]["sources"][source]
            if "auroc" not in entry:
                continue
            cells = [cell(r[name]["sources"].get(source, {}), "auroc") for r in results["methods"].values()]
            few = " (few)" if entry["few"] else ""
            lines.append(f"| {source}{few} | {entry['harmful']} | {entry['harmless']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(output: Path) -> None:
    """Writes both files and prints the tables."""
    results = collect(output)
    text = markdown(results)
    for name, content in (("results.json", json.dumps(results, indent=2)), ("results.md", text)):
        temporary = output / f"{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, output / name)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small-real"))
    main(parser.parse_args().output)
