#!/usr/bin/env python3
"""Chooses a monitor and thresholds from recorded responses, without running a model.

    python scripts/tune_thresholds.py calibration.parquet --target-fpr 0.01
    python scripts/tune_thresholds.py calibration.parquet --report test.parquet --target-recall 0.95 --json tuned.json
    python scripts/tune_thresholds.py calibration.parquet --cost-miss 50 --cost-alarm 1 --base-rate 0.01
    python scripts/tune_thresholds.py calibration.parquet --target-fpr 0.01 --aggregations max cusum --write model/

The recording (harmless and harmful responses with their categories and groups) is divided by group: on one part the
monitors are compared by cross-validation, on the other the thresholds of the best are set, so that a choice among many
does not spend the guarantee. What they do is measured on a third part, or on --report, which must share no rows with
the first file; intervals count responses as independent. --write puts `thresholds.json` into the folder of the model
that the recording is of.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from redflag.calibrating import replay, tuning
from redflag.calibrating.build import build_thresholds
from redflag.calibrating.groups import split_groups
from redflag.calibrating.hold_back import HoldBack
from redflag.calibrating.observed import cut_short
from redflag.errors import RedflagError
from redflag.files import atomic_write
from redflag.flags import FlagSpec
from redflag.scoring.recording import Recording, recorded
from redflag.watching.monitor import AGGREGATIONS, MonitorConfig
from redflag.watching.thresholds import Thresholds

FEW = 100


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        found = tune(arguments)
        print(found.pop("text"))
        if arguments.json:
            with atomic_write(arguments.json) as file:
                file.write(json.dumps(found, indent=2, allow_nan=False).encode() + b"\n")
    except RedflagError as error:
        print(f"tune_thresholds: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", help="recording that chooses and sets: .parquet, scored .jsonl")
    parser.add_argument("--report", help="recording that only measures; default: a part of the first")
    goal = parser.add_argument_group("what the thresholds are for (one of these)")
    goal.add_argument("--target-fpr", type=float, metavar="R", help="share of harmless responses that may alarm")
    goal.add_argument("--target-recall", type=float, metavar="R", help="share of harmful responses to be caught")
    goal.add_argument("--cost-miss", type=float, metavar="C", help="cost of a harmful response without an alarm")
    goal.add_argument("--cost-alarm", type=float, metavar="C", help="... of a harmless one with an alarm (default 1)")
    goal.add_argument("--base-rate", type=float, metavar="P", help="... share of harmful responses in use")
    parser.add_argument("--guarantee", choices=["expected", "high_probability"], default="expected")
    parser.add_argument("--delta", type=float, default=0.05, help="probability that high_probability may fail")
    parser.add_argument("--per-category", action="store_true", help="rate or cost of each flag by itself, not of any")
    parser.add_argument("--aggregations", nargs="+", default=["max", "run", "ema", "cusum"], metavar="NAME")
    parser.add_argument("--windows", nargs="+", type=int, default=[2, 3, 5, 8], help="run: consecutive steps")
    parser.add_argument("--decays", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.4], help="ema: weights")
    parser.add_argument("--priors", nargs="+", type=float, default=[0.001, 0.01, 0.1], help="cusum: benign level")
    parser.add_argument("--drifts", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0], help="cusum: nats per step")
    parser.add_argument("--warm-ups", nargs="+", type=int, default=[0], help="first steps that never alarm")
    parser.add_argument("--choose-share", type=float, default=0.5, help="share of the rows that chooses the monitor")
    parser.add_argument("--held-out", type=float, default=0.3, help="share of the others that only measures")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--hold-back-share", type=float, default=0.95, help="as in redflag calibrate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", metavar="MODEL", help="model folder whose thresholds.json is written")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    return parser.parse_args(argv)


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run; the result is JSON, with the printed lines as `text`."""
    begin = time.perf_counter()
    objective = objective_of(arguments)
    configs = tuning.grid(
        arguments.aggregations,
        windows=arguments.windows,
        decays=arguments.decays,
        priors=arguments.priors,
        drifts=arguments.drifts,
        warm_ups=arguments.warm_ups,
    )
    spec = FlagSpec.load(arguments.write) if arguments.write else None
    warnings: list[str] = []
    recording = read(arguments.calibration, spec, warnings)
    report = read(arguments.report, spec, warnings) if arguments.report else None
    if report is not None:
        check_apart(recording, report)
    if all(group is None for group in recording.columns["group"]):
        warnings.append("no row has a group: rows that ask the same thing may be on both sides of every split")
    choice, setting = None, recording
    if len(configs) > 1:
        others, chosen = split_groups(recording.columns["group"], arguments.choose_share, arguments.seed)
        setting = recording.select(others)
        choosing = recording.select(chosen)
        choice = tuning.compare(choosing, configs, objective, parts=arguments.folds, seed=arguments.seed)
        warnings += doubts(choice, objective)
    config = choice.candidates[choice.best].monitor if choice else configs[0]
    thresholds, rates, hold_back = settle(setting, report, config, objective, arguments, spec)
    if rates.harmful < FEW or rates.harmless < FEW:
        warnings.append(
            f"what the thresholds do was measured on {rates.harmless} harmless and {rates.harmful} harmful responses: "
            "read the intervals, not the rates"
        )
    seconds = time.perf_counter() - begin
    if arguments.write:
        thresholds.save(arguments.write)
    rows = {"calibration": count(recording), "set": count(setting), "report": count(report) if report else None}
    found = {
        "format": 1,
        "objective": asdict(objective),
        "seed": arguments.seed,
        "folds": arguments.folds,
        "rows": rows,
        "candidates": [asdict(candidate) for candidate in choice.candidates] if choice else [],
        "chosen": asdict(config),
        "lead_over_first": {"lead": choice.lead, "standard_error": choice.lead_error} if choice else None,
        "thresholds": asdict(thresholds),
        "measured": asdict(rates),
        "warnings": warnings,
        "seconds": round(seconds, 3),
    }
    lines = [f"objective: {objective}"]
    if choice:
        lines += ["", *table(choice, objective), ""]
        lines.append(
            f"chosen: {tuning.describe(config)} of {len(configs)} monitors, by {arguments.folds}-fold cross-validation "
            f"by group on {len(choosing)} responses; thresholds from {len(setting)} others"
        )
    else:
        lines.append(f"monitor: {tuning.describe(config)}, the only one; nothing was chosen")
    lines += [f"threshold of {category}: {value:.6g}" for category, value in thresholds.values.items()]
    where = f"on {arguments.report}" if report else "on rows that had no part in it"
    lines.append(
        f"{where}: false alarms {share(rates.fpr, rates.fpr_interval)} of {rates.harmless}, caught "
        f"{share(rates.tpr, rates.tpr_interval)} of {rates.harmful}, median delay {number(rates.median_delay)} tokens"
    )
    lines += [str(hold_back)] if hold_back else []
    lines += [f"warning: {warning}" for warning in warnings]
    lines += [f"thresholds written to {arguments.write}/thresholds.json"] if arguments.write else []
    lines.append(f"{len(recording.probs):,} steps, {len(configs)} monitors, {seconds:.1f} s")
    return found | {"text": "\n".join(lines)}


def objective_of(arguments: argparse.Namespace) -> tuning.Objective:
    chosen = [name for name in ("target_fpr", "target_recall", "cost_miss") if getattr(arguments, name) is not None]
    if len(chosen) != 1:
        raise RedflagError(
            "exactly one of --target-fpr, --target-recall and --cost-miss (with --base-rate) must be set (got "
            f"{len(chosen)})."
        )
    common = {"guarantee": arguments.guarantee, "delta": arguments.delta, "joint": not arguments.per_category}
    if chosen == ["cost_miss"]:
        if arguments.base_rate is None:
            raise RedflagError(
                "--base-rate must be set with --cost-miss. The average cost depends on the share of harmful responses "
                "where the thresholds will be used."
            )
        alarm = 1.0 if arguments.cost_alarm is None else arguments.cost_alarm
        return tuning.Objective(
            "cost", cost_miss=arguments.cost_miss, cost_alarm=alarm, base_rate=arguments.base_rate, **common
        )
    if arguments.cost_alarm is not None or arguments.base_rate is not None:
        raise RedflagError("--cost-alarm and --base-rate must come with --cost-miss. A target rate has no costs.")
    if chosen == ["target_fpr"]:
        return tuning.Objective("fpr", arguments.target_fpr, **common)
    return tuning.Objective("recall", arguments.target_recall, **common)


def read(path: str, spec: FlagSpec | None, warnings: list[str]) -> Recording:
    """A recording; with a model, one of that model."""
    found = recorded(path, spec) if spec else None
    found = Recording.load(path) if found is None else found
    cut = cut_short(found)
    if cut.any():
        warnings.append(f"{cut.sum()} harmful responses of {path} end before their harm begins and are left out")
    return found.select(~cut) if cut.any() else found


def check_apart(recording: Recording, report: Recording) -> None:
    """Refuses a report on rows that were used to set the thresholds."""
    if recording.categories != report.categories:
        raise RedflagError(
            f"both recordings must be of the same model (got flags {', '.join(recording.categories)} and "
            f"{', '.join(report.categories)})."
        )
    for name in ("id", "group"):
        both = (set(recording.columns[name]) & set(report.columns[name])) - {None}
        if both:
            raise RedflagError(
                f"the recordings must have no {name} in common (got {len(both)}, such as {sorted(both)[0]!r}). The "
                "report would measure thresholds on the rows that set them. Split the rows by group first."
            )


def settle(
    setting: Recording,
    report: Recording | None,
    config: MonitorConfig,
    objective: tuning.Objective,
    arguments: argparse.Namespace,
    spec: FlagSpec | None,
) -> tuple[Thresholds, tuning.Rates, HoldBack | None]:
    """Sets the thresholds of one monitor, and measures them on rows that were not used to set them."""
    everything: list[int] = list(range(len(setting)))
    fit_on, measure_on = everything, everything
    if report is None:
        fit_on, measure_on = split_groups(setting.columns["group"], arguments.held_out, arguments.seed)
    peaks, own = replay.peaks(config, setting), tuning.owners(setting)
    values = tuning.fit(objective, peaks[fit_on], own[fit_on])
    if AGGREGATIONS[config.aggregation].bounded and max(values) > 1.0:
        raise RedflagError(
            f"no threshold of the monitor {tuning.describe(config)!r} meets the objective. Too many harmless responses "
            "reach a score of 1, so the guard could never halt. Relax the objective, or look at those rows."
        )
    if objective.kind == "fpr" and report is None:  # Harmful rows were not used to set the thresholds.
        measure_on = sorted({*measure_on, *np.flatnonzero(own >= 0).tolist()})
    measured = report or setting.select(measure_on)
    rates = tuning.rates(measured, config, values)
    dated, onsets = tuning.dated(measured), measured.columns["onset"]
    meta = setting.meta
    thresholds, hold_back = build_thresholds(
        setting.categories,
        values,
        config,
        measured,
        dated,
        [onsets[i] for i in dated],
        target_fpr=objective.rate if objective.kind == "fpr" else None,
        guarantee=objective.guarantee,
        delta=objective.delta,
        hold_back_share=arguments.hold_back_share,
        joint=objective.joint,
        sample_size=0 if objective.kind == "recall" else int((own[fit_on] == -1).sum()),
        realised_fpr=rates.fpr,
        interval=rates.fpr_interval,
        held_out_size=rates.harmless,
        run_id=spec.run_id if spec else str(meta.get("run_id", "")),
        template_hash=spec.template_hash if spec else str(meta.get("template_hash", "")),
        logprob_mode=str(meta.get("logprob_mode", "raw")),
    )
    return thresholds, rates, hold_back if dated else None


def doubts(choice: tuning.Choice, objective: tuning.Objective) -> list[str]:
    """Warnings about the choice."""
    best, first = choice.candidates[choice.best], choice.candidates[0]
    found = []
    if choice.best and choice.lead < choice.beyond_chance * choice.lead_error:
        found.append(
            f"{tuning.describe(best.monitor)!r} leads {tuning.describe(first.monitor)!r} by {choice.lead:.4f} +- "
            f"{choice.lead_error:.4f}, which the best of {len(choice.candidates)} monitors would by chance: take the "
            "simpler one, or more rows"
        )
    deciding = best.rates.harmless if objective.kind == "recall" else best.rates.harmful
    if deciding < FEW:
        found.append(
            f"a choice among {len(choice.candidates)} monitors rests on {deciding} responses: too few to trust"
        )
    interval = best.rates.fpr_interval
    if objective.kind == "fpr" and objective.joint and interval and interval[0] > objective.rate:
        found.append(
            f"in cross-validation {best.rates.fpr:.4f} of harmless responses alarmed, more than {objective.rate:g}: "
            "are rows that ask the same thing in one group?"
        )
    return found


def table(choice: tuning.Choice, objective: tuning.Objective) -> list[str]:
    """One line per monitor; the chosen one is marked."""
    lost = {"fpr": "missed", "recall": "false alarms", "cost": "cost"}[objective.kind]
    head = ("monitor", lost, "caught", "false alarms [95%]", "median delay")
    rows = [head] + [
        (
            tuning.describe(candidate.monitor) + (" <" if i == choice.best else ""),
            f"{candidate.loss:.4f}",
            share(candidate.rates.tpr, candidate.rates.tpr_interval),
            share(candidate.rates.fpr, candidate.rates.fpr_interval),
            number(candidate.rates.median_delay),
        )
        for i, candidate in enumerate(choice.candidates)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def share(rate: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if rate is None or interval is None else f"{rate:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def count(recording: Recording) -> dict[str, int]:
    harmful = int(recording.harmful.sum())
    return {"harmless": len(recording) - harmful, "harmful": harmful}


if __name__ == "__main__":
    sys.exit(main())
