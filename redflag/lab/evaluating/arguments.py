"""The options of `redflag evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from redflag.bounds import option
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
    output_dir: str = option("runs/evaluation", "Where report and recordings go.")
    train: str | None = option(None, "Rows that the flags were trained on; for baselines.")
    base: str | None = option(None, "The model before training: for keep KL, perplexity and baselines.")
    baselines: list[str] = option([], "Names of baselines, or all.")
    attacks: list[str] = option([], "Names of attacks, or all (those that need no outside model).")
    requests: int = option(40, "Harmful test rows whose requests are attacked with.", least=1)
    judge_rubric: Rubric = option(
        "strongreject", "endpoint: what it is asked; guard: its own chat template asks (Llama Guard and its like)."
    )
    attack_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Attack -> its options, as in JSON; PAIR needs attacker_url and attacker_model, say."},
    )
    baseline_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Baseline -> its options."})
    baseline_rows: int | None = option(None, "Most rows for those baselines that train a whole model.", least=1)
    cascades: list[str] = option([], "'FIRST then SECOND': an alarm of the first method asks the second, or the judge.")
    escalation_share: float = option(
        0.05, "Cascades: share of harmless responses whose first stage may ask.", above=0, below=1
    )
    escalation_weight: float = option(
        0.0, "Cascades: the first stage's share in the verdict (log-odds; CC++: 0.55).", least=0, below=1
    )
    mute_limit: int = option(Policy.mute_limit, "Cascades: tokens after which a score that stays high asks again.")
    max_interventions: int = option(
        Policy.max_interventions, "Cascades: questions in one response; then an alarm halts."
    )
    judge_flops: float | None = option(None, "Cascades: FLOPs of the judge per token that it reads (2 x its weights).")
    target_fpr: float = option(0.01, "Share of harmless responses that may alarm.")
    guarantee: Literal["expected", "high_probability"] = option("expected", "As in `redflag calibrate`.")
    delta: float = option(0.05, "Probability that high_probability may fail.")
    hold_back: int | None = option(
        None, "Tokens held back by the guard that attacks meet; default: what the calibration suggests.", least=0
    )
    tolerance: int = option(2, "Tokens from the onset within which an alarm is on time.", least=0)
    responses: int = option(400, "Responses in the report's viewer.", least=0)
    seed: int = option(0, "Seeds intervals, baselines and attacks.")
