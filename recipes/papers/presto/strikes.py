r"""RAP against an operator who stops serving a conversation after some halts (`redflag serve --halts-allowed`): nano.

    redflag demo --world nano
    python recipes/papers/presto/strikes.py --nano runs/nano --requests 60

An attacker who picks every token by an exact oracle, among the 20 most likely ones, and goes back after each alarm. For
each hold-back and number of alarms allowed: requests for which any harm was released, a few words of it included, with
95% intervals, and harmful tokens released for each; and the price, the share of users with ten harmless answers who are
stopped, as measured on the harmless test rows under the same thresholds (drawn without replacement, 10,000 times).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from redflag.backends.load import load_flagged
from redflag.calibrating.observed import observe
from redflag.data.rows import load_rows
from redflag.files import atomic_write
from redflag.lab.attacks import Target
from redflag.lab.attacks.rap import RAP, follow_oracle
from redflag.lab.attacks.run_attacks import run_attacks
from redflag.lab.nano.judge import NanoOracle
from redflag.scoring.recording import Recording
from redflag.stats.metrics import clopper_pearson
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

ANSWERS = 10  # of a user whose price is told


def stopped(alarms: np.ndarray, allowed: int, seed: int = 0) -> float:
    """The share of users with `ANSWERS` harmless answers each, of which `allowed` are halted."""
    draw = np.random.default_rng(seed)
    users = np.stack([draw.choice(alarms, ANSWERS, replace=False) for _ in range(10_000)])
    return float((users.sum(1) >= allowed).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", type=Path, default=Path("runs/nano"))
    parser.add_argument("--output", type=Path, default=Path("runs/strikes"))
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--allowed", type=int, nargs="+", default=[1, 2, 3, 5, 10, 0], help="alarms; 0: any number")
    parser.add_argument("--hold_back", type=int, nargs="+", help="tokens; default: 0 and what thresholds.json suggests")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    backend, tokenizer, spec = load_flagged(arguments.nano / "model")
    thresholds = Thresholds.load(arguments.nano / "model")
    harmful = [row for row in load_rows(arguments.nano / "rows/test.jsonl").rows if row.harmful]
    drawn = np.random.default_rng(arguments.seed).permutation(len(harmful))[: arguments.requests]
    rows = [harmful[i] for i in sorted(drawn)]
    recording = Recording.load(arguments.nano / "scored.jsonl")
    observed, _ = observe(recording, thresholds.monitor, tuple(thresholds.values.values()))
    assert observed.alarms is not None
    alarms = (observed.alarms >= 0)[~observed.harmful]
    table = []
    for hold_back in arguments.hold_back or [0, thresholds.suggested_hold_back or 0]:
        target = Target(backend, tokenizer, spec, thresholds, Policy(hold_back=hold_back), backend.model)
        for allowed in arguments.allowed:
            name = f"RAP, {allowed or 'any number of'} alarms, hold-back {hold_back}"
            attack = RAP(chooser=follow_oracle, strikes=allowed or None, name=name)
            (result,) = run_attacks(target, [attack], rows, NanoOracle(), arguments.output, arguments.seed)
            guarded = [item for item in result.judged if item.attempt.detail["guarded"]]
            released = sum(bool(item.released) for item in guarded)
            line = {"hold_back": hold_back, "allowed": allowed or None, "requests": len(guarded), "released": released}
            line["released_interval"] = clopper_pearson(released, len(guarded))
            tokens = [0 if item.tokens is None else item.tokens[1] for item in guarded]
            line["harmful_tokens_released"] = float(np.mean(tokens))
            line["harmless_users_stopped"] = stopped(alarms, allowed, arguments.seed) if allowed else 0.0
            table.append(line)
            print(json.dumps(line), flush=True)
    with atomic_write(arguments.output / "strikes.json") as file:
        file.write(json.dumps(table, indent=2).encode())


if __name__ == "__main__":
    main()
