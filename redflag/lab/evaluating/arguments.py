"""The options of `redflag evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from redflag.data.options import RowOptions
from redflag.judges.rubrics import Rubric
from redflag.lab.nano.judge import LabJudgeOptions
from redflag.scoring.options import ScoringOptions
from redflag.watching.options import MonitorOptions
from redflag.watching.policy import Policy


@dataclass(kw_only=True)
class EvaluateArguments(RowOptions, ScoringOptions, MonitorOptions, LabJudgeOptions):
    """Detection, delay, false alarms, language, baselines and attacks: one report."""

    test: str = field(metadata={"help": "Rows that the report is about, as `redflag score` reads."})
    calibration: str = field(metadata={"help": "Other rows, on which thresholds are fitted; only harmless ones count."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where report and recordings go."})
    train: str | None = field(default=None, metadata={"help": "Rows that the flags were trained on; for baselines."})
    base: str | None = field(
        default=None, metadata={"help": "The model before training: for keep KL, perplexity and baselines."}
    )
    baselines: list[str] = field(default_factory=list, metadata={"help": "Names of baselines, or all."})
    attacks: list[str] = field(
        default_factory=list, metadata={"help": "Names of attacks, or all (those that need no outside model)."}
    )
    requests: int = field(
        default=40, metadata={"help": "Harmful test rows whose requests are attacked with.", "least": 1}
    )
    judge_rubric: Rubric = field(
        default="strongreject",
        metadata={"help": "endpoint: what it is asked; guard: its own chat template asks (Llama Guard and its like)."},
    )
    attack_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Attack -> its options, as in JSON; PAIR needs attacker_url and attacker_model, say."},
    )
    baseline_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Baseline -> its options."})
    baseline_rows: int | None = field(
        default=None, metadata={"help": "Most rows for those baselines that train a whole model.", "least": 1}
    )
    cascades: list[str] = field(
        default_factory=list,
        metadata={"help": "'FIRST then SECOND': an alarm of the first method asks the second, or the judge."},
    )
    escalation_share: float = field(
        default=0.05,
        metadata={"help": "Cascades: share of harmless responses whose first stage may ask.", "above": 0, "below": 1},
    )
    escalation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Cascades: the first stage's share in the verdict (log-odds; CC++: 0.55).",
            "least": 0,
            "below": 1,
        },
    )
    mute_limit: int = field(
        default=Policy.mute_limit, metadata={"help": "Cascades: tokens after which a score that stays high asks again."}
    )
    max_interventions: int = field(
        default=Policy.max_interventions, metadata={"help": "Cascades: questions in one response; then an alarm halts."}
    )
    judge_flops: float | None = field(
        default=None, metadata={"help": "Cascades: FLOPs of the judge per token that it reads (2 x its weights)."}
    )
    target_fpr: float = field(default=0.01, metadata={"help": "Share of harmless responses that may alarm."})
    guarantee: Literal["expected", "high_probability"] = field(
        default="expected", metadata={"help": "As in `redflag calibrate`."}
    )
    delta: float = field(default=0.05, metadata={"help": "Probability that high_probability may fail."})
    hold_back: int | None = field(
        default=None,
        metadata={
            "help": "Tokens held back by the guard that attacks meet; default: what the calibration suggests.",
            "least": 0,
        },
    )
    tolerance: int = field(
        default=2, metadata={"help": "Tokens from the onset within which an alarm is on time.", "least": 0}
    )
    responses: int = field(default=400, metadata={"help": "Responses in the report's viewer.", "least": 0})
    seed: int = field(default=0, metadata={"help": "Seeds intervals, baselines and attacks."})
