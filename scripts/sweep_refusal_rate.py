#!/usr/bin/env python3
"""How the alarm rate of sets of responses moves with the threshold, a bias on the flag's logit, or a temperature.

    python scripts/sweep_refusal_rate.py test.parquet --by source
    python scripts/sweep_refusal_rate.py test.parquet --by category --flag weapons --thresholds model/
    python scripts/sweep_refusal_rate.py test.parquet --over bias --threshold 0.5 --values -4 -2 0 2 4 --json sweep.json
    python scripts/sweep_refusal_rate.py test.parquet --first-step --plot sweep.png
    python scripts/sweep_refusal_rate.py test.parquet --rule threshold --selected fraud theft --by category
    python scripts/sweep_refusal_rate.py test.parquet --rule compare --respond respond --over bias
    python scripts/sweep_refusal_rate.py test.parquet --rule threshold --over temperature --threshold 0.9

Each harmless and harmful part of each set has a column. A bias of b nats on a flag's logit makes its probability p
into sigmoid(logit(p) + b), each flag by itself; it is computed from the recorded p, so no model is run.
--first-step looks at the step before the first token alone, each flag by itself.

--rule decides there as refusal tokens do (Jain et al., "Refusal Tokens", arXiv 2412.06748; see
redflag/watching/first_token.py): the likeliest category alone, by its threshold or against responding, and the alarm
rate is the refusal rate. Bias and temperature then act on the softmax of flags and all ordinary tokens together; the
temperature of a whole vocabulary would need logits that no recording keeps. --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from redflag.calibrating import replay
from redflag.calibrating.tuning import describe
from redflag.errors import RedflagError
from redflag.files import atomic_write
from redflag.scoring.recording import Recording
from redflag.stats.metrics import clopper_pearson
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.monitor import AGGREGATIONS, MonitorConfig
from redflag.watching.thresholds import Thresholds

COLUMNS = ("source", "category", "lang", "turns", "onset_source")
FEW = 50


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        found = sweep(arguments)
        print(table(found))
        if arguments.json:
            with atomic_write(arguments.json) as file:
                file.write(json.dumps(found, indent=2, allow_nan=False).encode() + b"\n")
        if arguments.plot:
            plot(found, arguments.plot)
    except RedflagError as error:
        print(f"sweep_refusal_rate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help=".parquet, scored .jsonl or traces .jsonl")
    parser.add_argument("--over", choices=["threshold", "bias", "temperature"], default="threshold")
    parser.add_argument("--values", nargs="+", type=float, help="values to sweep; default: chosen for you")
    parser.add_argument("--by", nargs="+", choices=COLUMNS, default=[], help="a set for each value of these")
    parser.add_argument("--sets", nargs="+", default=[], metavar="COLUMN=VALUE", help="these sets only")
    parser.add_argument("--flag", help="the flag that is varied; default: all")
    parser.add_argument("--thresholds", metavar="MODEL", help="folder with thresholds.json: monitor and thresholds")
    parser.add_argument("--threshold", type=float, help="threshold of all flags while something else varies")
    parser.add_argument("--aggregation", choices=list(AGGREGATIONS), default="max")
    parser.add_argument("--window", type=int, default=MonitorConfig.window)
    parser.add_argument("--decay", type=float, default=MonitorConfig.decay)
    parser.add_argument("--prior", type=float, default=MonitorConfig.prior)
    parser.add_argument("--drift", type=float, default=MonitorConfig.drift)
    parser.add_argument("--warm-up", type=int, default=MonitorConfig.warm_up)
    parser.add_argument("--first-step", action="store_true", help="judge only the first step")
    parser.add_argument(
        "--rule", choices=["threshold", "compare"], help="decide as refusal tokens do, at the first step"
    )
    parser.add_argument("--selected", nargs="+", help="--rule: categories that thresholds decide on; default: all")
    parser.add_argument("--respond", metavar="CATEGORY", help="--rule: the flag that says respond, if there is one")
    parser.add_argument("--temperature", type=float, default=1.0, help="--rule: fixed while something else varies")
    parser.add_argument("--json", metavar="FILE", help="write rates and intervals as JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a picture (.png, .svg, .pdf)")
    return parser.parse_args(argv)


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alarm rate of every set at every value."""
    recording = Recording.load(arguments.recording)
    categories = recording.categories
    config, limits = watched(arguments, categories)
    moved = np.ones(len(categories), dtype=bool)
    if arguments.flag is not None:
        if arguments.flag not in categories:
            raise RedflagError(f"--flag must be one of {', '.join(categories)} (got {arguments.flag!r}).")
        moved = np.array([category == arguments.flag for category in categories])
    responses: replay.Responses = recording
    if arguments.first_step:
        begins = recording.starts[:-1][np.diff(recording.starts) > 0]
        counts = np.minimum(np.diff(recording.starts), 1)
        responses = replay.Steps(recording.probs[begins], np.concatenate([[0], np.cumsum(counts)]))
    if not all(map(math.isfinite, arguments.values or [])):
        raise RedflagError(f"--values must be finite numbers (got {arguments.values}).")
    sets = members(arguments, recording)
    alarmed: list[npt.NDArray[np.bool_]]
    if arguments.rule is not None:
        values, limits, alarmed = ruled(arguments, recording, limits, moved)
    elif arguments.over == "temperature" or arguments.selected or arguments.respond or arguments.temperature != 1.0:
        raise RedflagError(
            "--temperature, --selected and --respond must come with --rule threshold or compare. They belong to the "
            "rule of refusal tokens."
        )
    elif arguments.over == "bias":
        if limits is None:
            raise RedflagError(
                "--thresholds or --threshold must be set with --over bias. A bias moves probabilities past a threshold."
            )
        values = sorted(arguments.values or []) or [float(b) for b in range(-6, 7)]
        tables = (replay.peaks(config, biased(responses, value, moved)) for value in values)
        alarmed = [np.asarray(peaks >= limits, dtype=np.bool_) for peaks in tables]
    else:
        if arguments.threshold is not None:
            raise RedflagError("--threshold must not be set with --over threshold. Use --values.")
        peaks = replay.peaks(config, responses)
        values = sorted(arguments.values or []) or spread(peaks[:, moved])
        if limits is None:
            # The flags that stand still have no threshold: they do not count.
            limits = np.full(len(categories), math.inf)
        alarmed = [np.asarray(peaks >= np.where(moved, value, limits), dtype=np.bool_) for value in values]
    rates = {
        name: [rate(hits[chosen].any(axis=1)) | {"by_flag": hits[chosen].mean(axis=0).tolist()} for hits in alarmed]
        for name, chosen in sets.items()
    }
    return {
        "format": 1,
        "recording": arguments.recording,
        "over": arguments.over,
        "values": values,
        "flags": list(categories),
        "moved": [category for category, moves in zip(categories, moved, strict=True) if moves],
        "monitor": asdict(config),
        "first_step": arguments.first_step or arguments.rule is not None,
        "rule": arguments.rule,
        "thresholds": [None if math.isinf(limit) else float(limit) for limit in limits],
        "sets": {name: {"responses": len(chosen), "rates": rates[name]} for name, chosen in sets.items()},
        "note": "each flag by itself; --rule decides between them"
        if arguments.rule is None
        else "the likeliest category decides; bias and temperature act on flags and ordinary tokens as classes",
    }


def ruled(
    arguments: argparse.Namespace,
    recording: Recording,
    limits: npt.NDArray[np.float64] | None,
    moved: npt.NDArray[np.bool_],
) -> tuple[list[float], npt.NDArray[np.float64], list[npt.NDArray[np.bool_]]]:
    """The rule of refusal tokens at each value: the values, the thresholds that stand still, and N x K decisions."""
    names = recording.categories
    compare = arguments.rule == "compare"
    if compare and (arguments.over == "threshold" or limits is not None):
        raise RedflagError("--rule compare must come without a threshold, and with --over bias or temperature.")
    if not compare and arguments.over != "threshold" and limits is None:
        raise RedflagError(f"--thresholds or --threshold must be set with --over {arguments.over}.")
    if not compare and arguments.over == "threshold" and arguments.threshold is not None:
        raise RedflagError("--threshold must not be set with --over threshold. Use --values.")
    if arguments.over == "temperature" and arguments.temperature != 1.0:
        raise RedflagError("--temperature must not be set with --over temperature. Use --values.")
    moved &= np.array([name != arguments.respond for name in names])
    if limits is None:
        limits = np.full(len(names), math.inf)
    steps = np.diff(recording.starts) > 0
    probs = [
        dict(zip(names, map(float, row), strict=True)) for row in recording.probs[recording.starts[:-1][steps]].tolist()
    ]
    chosen = [name for name, moves in zip(names, moved, strict=True) if moves]
    if not chosen:
        raise RedflagError(f"--flag must not be the --respond flag (got {arguments.flag!r}), which refuses nothing.")
    standard = {
        "bias": [float(b) for b in range(-6, 7)],
        "temperature": [0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0],
        "threshold": spread(np.array([[p[name] for name in chosen] for p in probs]).reshape(-1, max(1, len(chosen)))),
    }
    values = sorted(arguments.values or []) or standard[arguments.over]
    alarmed = []
    for value in values:
        rule = FirstTokenRule(
            compare=compare,
            selected=None if arguments.selected is None else tuple(arguments.selected),
            respond=arguments.respond,
            temperature=value if arguments.over == "temperature" else arguments.temperature,
            bias=dict.fromkeys(chosen, value) if arguments.over == "bias" else {},
        )
        rule.check(Thresholds.manual(0.5, names, MonitorConfig("first")))
        now = np.where(moved, value, limits) if arguments.over == "threshold" else limits
        by_name = dict(zip(names, map(float, now), strict=True))
        decided = [rule.decide(p, by_name).category for p in probs]
        hits = np.zeros((len(recording), len(names)), dtype=bool)
        hits[np.flatnonzero(steps)] = np.array([[name == d for name in names] for d in decided]).reshape(-1, len(names))
        alarmed.append(hits)
    return values, limits, alarmed


def watched(
    arguments: argparse.Namespace, categories: tuple[str, ...]
) -> tuple[MonitorConfig, npt.NDArray[np.float64] | None]:
    """The monitor, and the thresholds that stand still; None if there are none."""
    if arguments.thresholds is not None:
        if arguments.threshold is not None:
            raise RedflagError("--thresholds and --threshold must not both be set.")
        found = Thresholds.load(arguments.thresholds)
        if sorted(found.values) != sorted(categories):
            raise RedflagError(
                f"{arguments.thresholds} must have thresholds of the recording's flags {', '.join(categories)} (got "
                f"{', '.join(found.values)}). Give the folder of the model that was recorded."
            )
        return found.monitor, np.array([found.values[category] for category in categories])
    names = ("aggregation", "window", "decay", "prior", "drift", "warm_up")
    config = MonitorConfig(**{name: getattr(arguments, name) for name in names})
    return config, None if arguments.threshold is None else np.full(len(categories), arguments.threshold)


def biased(responses: replay.Responses, bias: float, moved: npt.NDArray[np.bool_]) -> replay.Steps:
    """sigmoid(logit(p) + bias) of the moved flags, without a logarithm that 0 or 1 would break."""
    probs = responses.probs.astype(np.float64)
    part = probs[:, moved]
    # Of e^b and e^-b the one that is at most 1, and above 0: nothing overflows, and certainty stays certain.
    up, down = (math.exp(max(-700.0, min(0.0, b))) for b in (bias, -bias))
    probs[:, moved] = part * up / (part * up + (1.0 - part) * down)
    return replay.Steps(probs, responses.starts)


def members(arguments: argparse.Namespace, recording: Recording) -> dict[str, npt.NDArray[np.int64]]:
    """Name of a set -> its responses; harmless and harmful ones apart."""
    wanted: list[tuple[str, Any]] = []
    for text in arguments.sets:
        column, _, value = text.partition("=")
        if column not in COLUMNS or not value:
            raise RedflagError(f"--sets must be COLUMN=VALUE with one of {', '.join(COLUMNS)} (got {text!r}).")
        wanted.append((column, value))
    for column in arguments.by:
        present = dict.fromkeys(value for value in recording.columns[column] if value is not None)
        wanted += [(column, str(value)) for value in present]
    harmful = recording.harmful
    kinds = (("harmless", ~harmful), ("harmful", harmful))
    found = {} if arguments.sets else {kind: np.flatnonzero(mask) for kind, mask in kinds}
    for column, value in wanted:
        inside = np.array([str(other) == value for other in recording.columns[column]], dtype=bool)
        if not inside.any():
            raise RedflagError(f"some response of {arguments.recording} must have {column} {value!r} (got none).")
        for kind, mask in kinds:
            name = f"{column}={value}" + ("" if column == "category" else f" {kind}")
            found[name] = np.flatnonzero(inside & mask)
    found = {name: chosen for name, chosen in found.items() if len(chosen)}
    if not found:
        raise RedflagError(f"{arguments.recording} must hold responses (got none).")
    return found


def spread(peaks: npt.NDArray[np.float64]) -> list[float]:
    """A dozen thresholds, from one that most responses reach to one that few do."""
    shares = [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]
    found = np.quantile(peaks.max(axis=1), shares) if len(peaks) else np.array([0.5])
    rounded = {float(f"{value:.4g}") for value in found if value > 0.0}
    return sorted(rounded) or [0.5]


def rate(alarmed: npt.ArrayLike) -> dict[str, Any]:
    hits = np.asarray(alarmed, dtype=np.bool_)
    return {
        "alarms": int(hits.sum()),
        "rate": float(hits.mean()),
        "interval": clopper_pearson(int(hits.sum()), len(hits)),
    }


def table(found: dict[str, Any]) -> str:
    """A row per set, a column per value."""
    rows = [[found["over"], "responses", *(f"{value:g}" for value in found["values"])]]
    for name, part in found["sets"].items():
        rows.append([name, str(part["responses"]), *(f"{point['rate']:.3f}" for point in part["rates"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    where = (
        "at the first step" if found["first_step"] else f"by the monitor {describe(MonitorConfig(**found['monitor']))}"
    )
    lines.append(f"share of responses that alarm {where}; moved: {', '.join(found['moved'])}")
    few = [name for name, part in found["sets"].items() if part["responses"] < FEW]
    if few:
        lines.append(f"fewer than {FEW} responses: {', '.join(few)}; see the intervals (--json)")
    lines.append(found["note"])
    return "\n".join(lines)


def plot(found: dict[str, Any], path: str) -> None:
    """A line per set; without matplotlib only a word that there is none."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found]
    except ImportError:
        print("no picture: matplotlib is not installed; `pip install matplotlib` and repeat", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=found["over"], ylabel="share of responses that alarm", ylim=(-0.02, 1.02))
    for name, part in found["sets"].items():
        low, high = zip(*(point["interval"] for point in part["rates"]), strict=True)
        axes.plot(found["values"], [point["rate"] for point in part["rates"]], marker="o", markersize=3, label=name)
        axes.fill_between(found["values"], low, high, alpha=0.15)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RedflagError(
            f"{path} cannot be written ({error}). Give a name that ends in .png, .svg or .pdf."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
