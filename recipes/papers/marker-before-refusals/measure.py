#!/usr/bin/env python3
"""p(marker) in the nano world: equal for paraphrases or not (S0.9), a lower bound of the refusal rate or not (S0.10).

    redflag demo --world nano                                             # the base model: runs/nano/base
    python recipes/papers/marker-before-refusals/measure.py  # 20 minutes on half a core; goes on where it stopped

Rows come from the nano generator; refusals and redirections of harmful requests have the category "refusal", all other
answers none. Requests for one act in different words are a group. Training, development and test share no request. The
base model was trained on this world, so the refusals are its own, and whether a harmful request is refused is, but for
the request, a toss of a coin that falls on refusal in 53 of 100 cases.

- S0.9: within groups of held-out requests (six wordings each), the variance of p(marker) and of its log-odds, with and
  without `consistency_coef`. The coefficient is the one with the least variance of p on the development groups among
  those that cost at most 0.005 of AUROC there.
- S0.10: p(marker) of held-out requests beside the share of sampled answers, the marker banned, that refuse.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from redflag import cli
from redflag.data.rows import Row, load_rows, write_rows
from redflag.files import atomic_write
from redflag.lab.nano.phrases import REDIRECTS, REFUSALS, REQUESTS, SLOTS
from redflag.lab.nano.rows import nano_rows
from redflag.lab.nano.spans import harmful_spans
from redflag.scoring.score import read_scored
from redflag.stats.metrics import auroc, clopper_pearson

HERE = Path(__file__).parent
REFUSED = ("nano:refusal", "nano:redirect")
ASKED_HARM = (*REFUSED, "nano:late-request", "nano:direct")
HARMLESS_REQUEST = ("nano:plain", "nano:scary", "nano:late", "nano:disguised")
COEFFICIENTS = (1.0, 3.0)
LOSS_OF_AUROC = 0.005  # that a coefficient may cost on the development rows
SAMPLES = 20  # answers per prompt
ANSWER_TOKENS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", default="runs/nano", help="what `redflag demo --world nano` has made")
    parser.add_argument("--output", default="runs/marker-before-refusals")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    base, output, seeds = Path(arguments.nano) / "base", Path(arguments.output), arguments.seeds
    development_rows, test_rows = (prompts(output, split) for split in ("calibration", "test"))

    def model(seed: int, coefficient: float = 0.0, plain: float = 0.2, weight: float | None = None) -> Path:
        return train(base, output, seed, coefficient, plain, weight)

    development = {c: consistency(scores(model(seeds[0], c), development_rows)) for c in (0.0, *COEFFICIENTS)}
    able = [c for c in COEFFICIENTS if development[c]["auroc"] >= development[0.0]["auroc"] - LOSS_OF_AUROC]
    chosen = min(able or COEFFICIENTS, key=lambda c: development[c]["variance_p"])
    found: dict[str, Any] = {"format": 1, "development": development, "chosen": chosen, "test": {}, "bound": {}}
    for seed in seeds:
        found["test"][seed] = {c: consistency(scores(model(seed, c), test_rows)) for c in (0.0, chosen)}
        settings = {"plain_share 0.2": {}, "plain_share 0": {"plain": 0.0}}
        if seed == seeds[-1]:
            settings["plain_share 0.2, harmful_weight 0.5"] = {"weight": 0.5}
        for name, how in settings.items():
            found["bound"].setdefault(name, {})[seed] = bound(model(seed, **how), test_rows, seed)
        with atomic_write(output / "report.json") as file:
            file.write(json.dumps(found, indent=2).encode() + b"\n")
        print(tables(found), flush=True)


def training_rows(seed: int) -> list[Row]:
    """Three rows each of 200 harmful requests and of 200 harmless ones, labelled refused or not."""
    drawn = nano_rows("train", 40_000, 1000 + seed)
    rng = random.Random(f"marker:{seed}")
    chosen: list[Row] = []
    for kinds in (ASKED_HARM, HARMLESS_REQUEST):
        groups = grouped([relabelled(row) for row in drawn if row.source in kinds])
        several = [rows for _, rows in sorted(groups.items()) if len({row.messages[-2]["content"] for row in rows}) > 2]
        for rows in rng.sample(several, 200):
            chosen += [shortened(row) for row in rng.sample(rows, 3)]
    rng.shuffle(chosen)
    return chosen


def prompts(output: Path, split: str) -> Path:
    """100 harmful requests in six wordings, 60 harmless ones in three, and labelled rows for the AUROC."""
    path = output / f"{split}.jsonl"
    if path.exists():
        return path
    drawn = [relabelled(row) for row in nano_rows(split, 6000, 2000) if row.source in (*ASKED_HARM, *HARMLESS_REQUEST)]
    rng = random.Random(f"marker:{split}")
    rows = drawn[:800]
    acts = sorted({str(row.group) for row in drawn if row.source in ASKED_HARM})
    for group in rng.sample(acts, 100):
        act = group.split(": ", 1)[1]
        rows += [asked(wording.replace("{act}", act), group, "wordings:harmful") for wording in REQUESTS]
    harmless = grouped(row for row in drawn if row.source in HARMLESS_REQUEST)
    several = {g: sorted({row.messages[-2]["content"] for row in rows}) for g, rows in sorted(harmless.items())}
    for group in rng.sample([g for g, texts in several.items() if len(texts) > 2], 60):
        rows += [asked(text, group, "wordings:harmless") for text in several[group][:3]]
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_rows(path, rows)


def relabelled(row: Row) -> Row:
    """The same conversation, labelled refused or not in place of harmful or not."""
    return replace(row, category="refusal" if row.source in REFUSED else None, onset=None, onset_source=None)


def shortened(row: Row) -> Row:
    """The answer's first two sentences: what follows says nothing about the request, and costs time."""
    said = " ".join(re.findall(r"[^.?!]+[.?!]+", row.response)[:2]).replace("  ", " ") or row.response
    return replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": said}])


def asked(text: str, group: str, source: str) -> Row:
    return Row([{"role": "user", "content": text}], group=group, source=source, id=f"{source}/{text}")


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row.group)].append(row)
    return groups


def train(base: Path, output: Path, seed: int, coefficient: float, plain: float, weight: float | None) -> Path:
    """The folder of a model that marks refusals, trained unless it is there."""
    rows = output / f"seed{seed}" / "train.jsonl"
    if not rows.exists():
        rows.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rows, training_rows(seed))
    name = f"consistency{coefficient:g}-plain{plain:g}" + ("" if weight is None else f"-weight{weight:g}")
    folder = output / f"seed{seed}" / name
    if (folder / "redflag.json").exists():
        return folder
    # Of the flag term the marked rows get the share that they are of all rows: p(marker) is then no inflated one.
    marked = np.mean([row.category is not None for row in load_rows(rows)]) * (1 - plain)
    options = {"model": base, "input": rows, "output_dir": folder, "seed": seed, "plain_share": plain}
    options |= {"consistency_coef": coefficient, "harmful_weight": weight or round(float(marked), 3)}
    verb("train", "--config", HERE / "nano.yaml", *(word for k, v in options.items() for word in (f"--{k}", v)))
    return folder


def scores(folder: Path, rows: Path) -> list[dict[str, Any]]:
    """The rows with p(marker) after their prompts."""
    output = folder / f"prompts-{rows.stem}.jsonl"
    if not output.exists():
        verb("score", "--prompts", "--model", folder, "--input", rows, "--output", output, "--batch_size", 64)
    return read_scored(output)


def verb(*words: object) -> None:
    """A verb of `redflag`, as on the command line, in this process."""
    if status := cli.main([str(word) for word in words]):
        sys.exit(status)


def consistency(scored: list[dict[str, Any]]) -> dict[str, float]:
    """Mean variance within groups, of p(marker) and of its log-odds; AUROC of refused or not on labelled rows."""
    found: dict[str, float] = {}
    for kind in ("harmful", "harmless"):
        groups: dict[str, list[float]] = defaultdict(list)
        for row in scored:
            if row["source"] == f"wordings:{kind}":
                groups[row["group"]].append(row["flag_probs"][0][0])
        for what, of in (("p", np.asarray), ("log_odds", log_odds)):
            variances = np.array([of(np.array(values)).var(ddof=1) for values in groups.values()])
            name = f"variance_{what}" + ("" if kind == "harmful" else "_harmless")
            found[name] = float(variances.mean())
            if kind == "harmful":
                found[f"{name}_error"] = float(variances.std(ddof=1) / len(variances) ** 0.5)
        found["mean_p" + ("" if kind == "harmful" else "_harmless")] = float(
            np.mean([p for values in groups.values() for p in values])
        )
    labelled = [row for row in scored if not row["source"].startswith("wordings:")]
    found["auroc"] = auroc([row["peak"][0] for row in labelled], [row["category"] is not None for row in labelled])
    return found


def log_odds(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-12, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def bound(folder: Path, rows: Path, seed: int) -> dict[str, Any]:
    """p(marker) beside the refusal rate of sampled answers, of 60 harmful and 20 harmless requests."""
    path = folder / "refusal-rates.json"
    if not path.exists():
        first: dict[str, dict[str, Any]] = {}
        for row in scores(folder, rows):
            if row["source"].startswith("wordings:"):
                first.setdefault(row["source"] + row["group"], row)
        kinds = [[row for row in first.values() if row["source"] == f"wordings:{k}"] for k in ("harmful", "harmless")]
        chosen = kinds[0][:60] + kinds[1][:20]
        refused = refusals(folder, [row["tokens"][0] for row in chosen], seed)
        rates = [
            {"p": row["flag_probs"][0][0], "refused": count, "harmful": row["source"] == "wordings:harmful"}
            for row, count in zip(chosen, refused, strict=True)
        ]
        with atomic_write(path) as file:
            file.write(json.dumps(rates).encode())
    return bound_of(json.loads(path.read_bytes()))


def bound_of(rates: list[dict[str, Any]]) -> dict[str, Any]:
    p = np.array([rate["p"] for rate in rates])
    share = np.array([rate["refused"] for rate in rates]) / SAMPLES
    harmful = np.array([rate["harmful"] for rate in rates])
    # One-sided at 95%: the highest rate that so few refusals allow.
    highest = np.array([clopper_pearson(rate["refused"], SAMPLES, 0.90)[1] for rate in rates])
    gap = share - p
    return {
        "within": float((p <= highest).mean()),
        "below": float((p <= share).mean()),
        "mean_p": float(p[harmful].mean()),
        "mean_rate": float(share[harmful].mean()),
        "gap": float(gap[harmful].mean()),
        "gap_error": float(gap[harmful].std(ddof=1) / harmful.sum() ** 0.5),
        "mean_p_harmless": float(p[~harmful].mean()),
        "mean_rate_harmless": float(share[~harmful].mean()),
        "prompts": len(rates),
    }


def refusals(folder: Path, texts: list[str], seed: int) -> list[int]:
    """Of `SAMPLES` answers to each prompt, how many refuse. A flag is never sampled: the marker is banned."""
    from redflag.backends import Sampling
    from redflag.backends.load import load_flagged
    from redflag.prompt import render_prompt

    backend, tokenizer, spec = load_flagged(folder)
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}], spec) for text in texts]
    many = [prompt for prompt in prompts for _ in range(SAMPLES)]
    answers = backend.complete(many, Sampling(max_new_tokens=ANSWER_TOKENS, seed=100_000 * seed), batch_size=200)
    said = [refuses(tokenizer.decode([s.token_id for s in steps], skip_special_tokens=True)) for steps in answers]
    return [sum(said[start : start + SAMPLES]) for start in range(0, len(said), SAMPLES)]


def refuses(answer: str) -> bool:
    """Whether an answer of the nano world refuses or redirects, and does no harm."""
    return _REFUSAL.search(answer) is not None and not harmful_spans(answer)


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template)
    words = {slot: f"(?:{'|'.join(map(re.escape, texts))})" for slot, texts in SLOTS.items()} | {"act": r"[^.]+"}
    return "".join(re.escape(part) if i % 2 == 0 else words[part] for i, part in enumerate(parts))


_REFUSAL = re.compile("|".join(_pattern(template) for template in (*REFUSALS, *REDIRECTS)))


def tables(found: dict[str, Any]) -> str:
    chosen = found["chosen"]
    lines = ["| seed | coefficient | variance of p | of log-odds | of log-odds, harmless | mean p | AUROC |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for seed, arms in found["test"].items():
        for coefficient, one in arms.items():
            lines.append(
                f"| {seed} | {coefficient:g} | {one['variance_p']:.5f} ± {one['variance_p_error']:.5f} "
                f"| {one['variance_log_odds']:.4f} ± {one['variance_log_odds_error']:.4f} "
                f"| {one['variance_log_odds_harmless']:.4f} | {one['mean_p']:.3f} | {one['auroc']:.4f} |"
            )
    for what in ("variance_p", "variance_log_odds"):
        ratios = [arms[chosen][what] / arms[0.0][what] for arms in found["test"].values()]
        lines.append(f"\n{what}, with over without, by seed: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
    lines += ["", "| setting | seed | p <= rate within error | p <= rate | mean p | rate | gap | harmless p, rate |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in found["bound"].items():
        for seed, one in runs.items():
            lines.append(
                f"| {name} | {seed} | {one['within']:.0%} | {one['below']:.0%} | {one['mean_p']:.3f} "
                f"| {one['mean_rate']:.3f} | {one['gap']:+.3f} ± {1.96 * one['gap_error']:.3f} "
                f"| {one['mean_p_harmless']:.4f}, {one['mean_rate_harmless']:.4f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
