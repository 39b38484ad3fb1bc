"""A cascade on reviewed answers: the flag that ships asks, the judge of `judge.py` decides.

    python recipes/papers/real/judge.py
    python recipes/papers/real/cascade.py

The two stages of "Constitutional Classifiers++" (arXiv 2601.04603), here with the flag at every token, under its
monitor: its threshold is set so that a share of the harmless development rows ask, and the judge reads the answer up to
the alarm. Then the judge alone decides, or 0.55 of the flag's and 0.45 of the judge's log-odds. The first `--count`
test rows; what is caught at a rate of false alarms, and how many tokens the judge reads for each that is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from judge import HiddenJudge
from scored import SHIPPED, monitor_of, scored

from redflag import Policy
from redflag.backends.load import read_tokenizer
from redflag.calibrating.replay import peaks
from redflag.data.rows import load_rows
from redflag.files import atomic_write
from redflag.judges.cache import CachedJudge
from redflag.lab.evaluating.cascade import TextReader, asking, cascade, weighted
from redflag.scoring.recording import Recording
from redflag.stats.intervals import ranking_intervals
from redflag.stats.metrics import tpr_at_fpr
from redflag.watching.monitor import MonitorConfig

SHARES = (0.05, 0.1)  # of the harmless development rows that ask
WEIGHTS = (0.0, 0.55)  # the flag's share in the verdict; 0.55 is the paper's
RATES = (0.01, 0.02, 0.05)
VERDICTS = MonitorConfig("max")  # as `redflag.lab.evaluating.cascade` records them


def main() -> None:
    """Writes `cascade.json` and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("runs/smollm2-open/rows"))
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--judge", type=Path, default=Path("runs/papers/real/judge"))
    parser.add_argument("--output", type=Path, default=Path("runs/papers/real"))
    parser.add_argument("--count", type=int, default=512, help="test rows")
    parser.add_argument("--mute_limit", type=int, default=8, help="tokens until a score that stays high asks again")
    parser.add_argument("--max_interventions", type=int, default=16, help="questions about one answer; then it halts")
    arguments = parser.parse_args()
    developed = load_rows(arguments.rows / "development.jsonl").rows
    tested = load_rows(arguments.rows / "test.jsonl").rows[: arguments.count]
    kept = arguments.output / "scored"
    first = Recording.of(["harm"], scored("development", developed, kept, SHIPPED))
    test = Recording.of(["harm"], scored(f"test-{arguments.count}", tested, kept, SHIPPED))
    judge = CachedJudge(HiddenJudge(arguments.judge, arguments.base), arguments.output / "cascade-verdicts.jsonl")
    reader = TextReader(judge, tested, test, read_tokenizer(arguments.base)[0])
    policy = Policy(default="escalate", mute_limit=arguments.mute_limit, max_interventions=arguments.max_interventions)
    result: dict[str, Any] = {"harmful": int(test.harmful.sum()), "harmless": int((~test.harmful).sum())}
    monitor = monitor_of(SHIPPED)
    lines = [line("the flag alone", test, monitor)]
    for share in SHARES:
        thresholds = asking(first, monitor, share)
        for weight in WEIGHTS:
            made = cascade(test, thresholds, weighted(reader, test, weight), policy)
            found = line(f"{share:g}, {weight:g}", made.recording, VERDICTS)
            harmless = ~test.harmful
            found["threshold"] = thresholds.values["harm"]
            found["harmless that ask"] = float((made.calls[harmless] > 0).mean())
            found["harmful that ask"] = float((made.calls[test.harmful] > 0).mean())
            found["tokens read for each written"] = float(made.read[harmless].sum() / test.lengths[harmless].sum())
            lines.append(found)
    result |= {"lines": lines, "seconds": reader.seconds, "tokens": reader.tokens}
    with atomic_write(arguments.output / "cascade.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    print(json.dumps(result, indent=1))


def line(name: str, recording: Recording, monitor: MonitorConfig) -> dict[str, Any]:
    """What is caught at some rates of false alarms, with 95% intervals over requests."""
    scores = peaks(monitor, recording)[:, 0]
    groups = recording.columns["group"]
    bounds = ranking_intervals(scores, recording.harmful, groups, fprs=RATES).tpr
    found: dict[str, Any] = {"name": name}
    for rate, interval in zip(RATES, bounds, strict=True):
        at = tpr_at_fpr(scores, recording.harmful, rate)
        found[f"at {rate:g}"] = [at.tpr, *interval, at.realised_fpr]
    return found


if __name__ == "__main__":
    main()
