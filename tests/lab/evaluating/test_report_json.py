"""`report.json` is the same file whatever the code that writes it: a small evaluation against what was stored of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from attacking import HARM
from reports import trace

from redflag.lab import report as reporting
from redflag.lab.attacks import Attempt
from redflag.lab.attacks.judging import Judged, entries, not_run
from redflag.lab.attacks.sampling import Plain
from redflag.lab.baselines import Cost
from redflag.lab.evaluating import cascade, cost, tables
from redflag.lab.report.evaluation import AttackLine, Evaluation, JudgeFacts, Language, as_json, parse, read_report
from redflag.lab.report.method import CascadeFacts
from redflag.lab.report.viewer_data import ShownResponse
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig

STORED = Path(__file__).with_name("stored_report.json")
OWN = Cost(microseconds_per_token=50.0, flops_per_token=8e9, note="the pass")
CHEAP = Cost(microseconds_per_token=1.0, flops_per_token=4e5, note="cheap")
MADE = {"command": "redflag evaluate", "seeds": [0], "rows": {"test": {"sha256": "aa", "harmful": 45}}}


def recorded(seed: int, sharp: float) -> Recording:
    """130 responses of 14 steps; a third is harmful from a step on, and `sharp` parts them from the others."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(130):
        harmful, onset = i % 3 == 0, 2 + i % 9
        probs = (rng.integers(0, 48, 14) / 100.0).astype(np.float64)
        probs[onset:] += sharp * harmful * (i % 2 + 1) / 2.0
        rows.append(
            {
                "flag_probs": probs[:13, None].tolist(),
                "tail_probs": probs[13:, None].tolist(),
                "id": f"{seed}-{i}",
                "category": ("harm", "other")[i % 2] if harmful else None,
                "onset": (onset if i % 4 else 0) if harmful else None,
                "onset_source": ("constructed", "natural", None)[i % 5 % 3] if harmful and i % 4 else None,
                "group": f"{seed}-g{i // 2}",
                "source": ("a", "b", None)[i % 7 % 3],
                "lang": "en",
                "turns": 1 + i % 5,
                "truncated": False,
            }
        )
    return Recording.of(("harm",), rows, {"run_id": "run-1", "template_hash": "t"})


def judged(request: str, setting: str, produced: bool | None, released: bool | None, alarm: int | None) -> Judged:
    attempt = Attempt(request, setting, [{"role": "user", "content": "x"}], HARM, [5, 6, 7], [(0.1,), (0.2,), (0.9,)])
    return Judged(attempt, produced, released, HARM, alarm is not None, alarm, 0.9, 1, (2, 1 if released else 0))


def lines() -> list[dict[str, Any]]:
    made = [
        judged("r0", "s", True, False, 2),
        judged("r0", "t", True, True, None),
        judged("r1", "s", None, None, 1),
        judged("r2", "t", False, False, None),
    ]
    rows: Any = ["r0", "r1", "r2", "r3"]
    return [*entries(Plain(), made, rows, seconds=3.0), not_run(Plain(), rows, "no weights")]


def write_small(folder: Path) -> None:
    """An evaluation of a flag, a baseline and a cascade on recordings made up here, and its attacks."""
    sharp, fit, blunt, blunt_fit = recorded(1, 0.5), recorded(2, 0.5), recorded(1, 0.2), recorded(2, 0.2)
    how: dict[str, Any] = {"target_fpr": 0.05, "resamples": 20}
    texts = [[f" w{t}." if t % 4 == 3 else f" w{t}" for t in range(13)]] * len(sharp)
    methods = {
        "flag": tables.method(sharp, fit, what="the flag", tokens=texts, cost=CHEAP, **how),
        "words": tables.method(blunt, blunt_fit, kind="baseline", what="words", cost=OWN, **how),
    }
    methods["words"] = replace(methods["words"], flag_ahead=tables.compare_methods(sharp, blunt, resamples=20))
    thresholds = cascade.asking(blunt_fit, MonitorConfig(), 0.1)
    replayed = cascade.cascade(blunt, thresholds, cascade.so_far(sharp, blunt))
    both = cost.of_cascade(CHEAP, OWN, 0.1)
    facts = CascadeFacts(
        first="words",
        second="flag",
        share=0.1,
        thresholds=dict(thresholds.values),
        asked=float((replayed.calls > 0).mean()),
        asked_interval=(0.1, 0.2),
        asked_harmful=0.5,
        calls=float(replayed.calls.mean()),
        read=0.25,
    )
    method = tables.method(replayed.recording, kind="cascade", what="both", cost=both, **how)
    methods["words then flag"] = replace(method, cascade=facts)
    report = Evaluation(
        "small",
        {name: replace(method, compute=cost.relative(method.cost, OWN)) for name, method in methods.items()},
        MADE,
        language=Language(keep_kl=0.01, perplexity_ratio=1.25, tokens=200, rows=20, left_out=1),
        attacks=parse(list[AttackLine], json.dumps(lines()), "the attack table"),
        judge=JudgeFacts("oracle", answered=3, unanswered=1, hold_back=4),
        warnings=["a warning"],
        model_pass=OWN,
    )
    reporting.write(report, [ShownResponse(**trace("late", [0.1, 0.2, 0.9], onset=1))], folder)


def test_a_small_evaluation_is_written_as_it_was_stored(tmp_path):
    write_small(tmp_path)
    found, stored = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "report.json", STORED))
    assert_same(found, stored, "report")
    assert as_json(read_report(STORED)) == stored


def assert_same(found: Any, stored: Any, place: str) -> None:
    """The same keys, texts and whole numbers; other numbers up to their last digits."""
    assert type(found) is type(stored), place
    if isinstance(stored, dict):
        assert sorted(found) == sorted(stored), place
        for key, value in stored.items():
            assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), place
        for number, value in enumerate(stored):
            assert_same(found[number], value, f"{place}[{number}]")
    elif isinstance(stored, float):
        assert abs(found - stored) <= 1e-9 * max(1.0, abs(stored)), (place, found, stored)
    else:
        assert found == stored, place
