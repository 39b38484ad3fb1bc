"""Thresholds for a target false-alarm rate per response: `redflag.calibrate` and the verb `redflag calibrate`.

Harmless responses are folded through the monitor that will watch the stream (`redflag.calibrating.replay`, equal to it
bit by bit); their peaks set the thresholds (the mathematics and its proofs are in `redflag.calibrating.guarantee`). A
part of the responses is held out, by group, and only measures what rate the thresholds realise: the thresholds in force
come from the calibration part alone, so that the reported rate is an honest one. Harmful responses with a known onset
show how late alarms come, and with that how long tokens should be held back (`redflag.calibrating.hold_back`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from redflag.bounds import check_bounds
from redflag.calibrating import replay
from redflag.calibrating.arguments import CalibrateArguments
from redflag.calibrating.build import build_thresholds
from redflag.calibrating.calibration import Calibration
from redflag.calibrating.groups import split_groups
from redflag.calibrating.guarantee import Guarantee, fit_thresholds, required
from redflag.calibrating.measured import Measured, factors_of, of_recording, of_responses, of_thoughts, remembered
from redflag.calibrating.run_model import record_prompts, record_responses
from redflag.data.rows import load_rows
from redflag.data.summary import report_rows
from redflag.errors import RedflagError
from redflag.files import require_writable
from redflag.flags import FlagSpec
from redflag.models.named import model_folder
from redflag.scoring.recording import Recording, recorded
from redflag.scoring.scored import Probs
from redflag.stats.metrics import clopper_pearson
from redflag.watching.memory import Memory
from redflag.watching.monitor import AGGREGATIONS, MonitorConfig
from redflag.watching.thresholds import PROMPT_THRESHOLDS_FILE, THRESHOLDS_FILE, check_memory

# What other modules import from here.
__all__ = ["CalibrateArguments", "Calibration"]

ARGUMENTS = CalibrateArguments
POSITIONAL: str | None = None


def run(arguments: CalibrateArguments) -> int:
    """The verb."""
    print(calibrate_model(arguments))
    print(f"thresholds written to {arguments.model}/{_file(arguments)}")
    return 0


def calibrate(
    harmless: Sequence[Any] | Recording | str | Path,
    spec: FlagSpec | None = None,
    *,
    rows: str | Path | None = None,
    **options: Any,
) -> Calibration:
    """Sets thresholds: of a flagged model's folder by a file of rows, or from measured probabilities.

    Args:
        harmless: The folder, where `thresholds.json` is written; or as for `calibrate_responses`.
        spec: As for `calibrate_responses`; for a folder None.
        rows: For a folder, conversations as `redflag score` reads them.
        **options: The options of `redflag calibrate`, fields of `CalibrateArguments`; or of `calibrate_responses`.

    Raises:
        RedflagError: Rows or options are invalid, or there are too few rows.

    Example:
        ```python
        calibrate("flagged", rows="harmless.jsonl", target_fpr=0.01)
        ```
    """
    if isinstance(harmless, str | Path):
        if rows is None or spec is not None:
            raise RedflagError("rows must be given with a model's folder, without spec: the folder holds its flags.")
        return calibrate_model(CalibrateArguments(model=str(harmless), input=str(rows), **options))
    if rows is not None or spec is None:
        raise RedflagError("spec must be given with measured responses, without rows: they are measured already.")
    return calibrate_responses(harmless, spec, **options)


def calibrate_model(arguments: CalibrateArguments) -> Calibration:
    """Measures and calibrates a folder. All possible checks come before the model runs."""
    check_bounds(arguments)
    arguments = replace(arguments, model=model_folder(arguments.model))
    monitor = _first_step(arguments) if arguments.prompts else arguments.monitor()
    memory = _memory(arguments, monitor)
    spec = FlagSpec.load(arguments.model)
    require_writable(f"{arguments.model}/{_file(arguments)}", "model", file=True)
    recording = recorded(arguments.input, spec)
    earlier: list[list[Probs]] | None = None
    if recording is not None and memory is not None:
        raise RedflagError(
            f"memory must be off with a recording, which does not hold earlier answers (got {memory!r}). Give the "
            "conversations."
        )
    if recording is None:
        options = arguments.row_options() | ({"unanswered": "keep"} if arguments.prompts else {})
        rows = load_rows(arguments.input, on_bad_row=arguments.on_bad_row, **options)
        report_rows(rows)
        harmless = [row for row in rows if not row.harmful]
        fit_on, _ = split_groups([row.group for row in harmless], arguments.held_out, arguments.seed)
        spread = len(spec.categories) if arguments.joint else 1
        _check_size(len(fit_on), len(harmless), arguments.target_fpr, arguments.guarantee, arguments.delta, spread)
        ordered = harmless + [row for row in rows if row.harmful]
        if arguments.prompts:
            recording = record_prompts(arguments, ordered)
        else:
            recording, earlier = record_responses(arguments, ordered, memory is not None)
    same = ("target_fpr", "guarantee", "delta", "joint", "hold_back_share", "held_out", "seed")
    result = calibrate_responses(
        recording,
        spec,
        **{name: getattr(arguments, name) for name in same},
        monitor=monitor,
        logprob_mode=recording.meta.get("logprob_mode", "raw"),
        memory=memory,
        earlier=earlier,
    )
    result.thresholds.save(arguments.model, _file(arguments))
    return result


def _file(arguments: CalibrateArguments) -> str:
    return PROMPT_THRESHOLDS_FILE if arguments.prompts else THRESHOLDS_FILE


def _first_step(arguments: CalibrateArguments) -> MonitorConfig:
    """The monitor of prompts, which have one step."""
    if arguments.monitor() != MonitorConfig():
        raise RedflagError(
            "aggregation and the monitor's other options must be left out with prompts. A prompt has one step, before "
            "the answer, and its probability is the score."
        )
    return MonitorConfig("first")


def _memory(arguments: CalibrateArguments, monitor: MonitorConfig) -> Memory | None:
    memory = arguments.remembered()
    if memory is None or not memory.weight:
        return None
    if arguments.prompts:
        raise RedflagError(f"memory must be off with prompts, which are judged by themselves (got {memory!r}).")
    check_memory(memory, monitor)
    return memory


def calibrate_responses(
    harmless: Sequence[Any] | Recording,
    spec: FlagSpec,
    *,
    target_fpr: float = 0.01,
    guarantee: Guarantee = "expected",
    delta: float = 0.05,
    joint: bool = True,
    monitor: MonitorConfig | None = None,
    harmful: Sequence[Any] = (),
    onsets: Sequence[int | None] | None = None,
    hold_back_share: float = 0.95,
    groups: Sequence[str | None] | None = None,
    held_out: float = 0.3,
    seed: int = 0,
    logprob_mode: str = "raw",
    memory: Memory | None = None,
    earlier: Sequence[Sequence[Any]] | None = None,
) -> Calibration:
    """Sets thresholds from the flag probabilities of harmless responses.

    If a recording has thoughts, they get thresholds of their own, from the same share of the rows; the monitor restarts
    at the answer. The rate holds for each part: a response with a thought can alarm in both.

    Args:
        harmless: Per response, T x K flag probabilities of all steps that a guard would have judged, as in a trace, or
            `flag_probs` + `tail_probs` of a scored row. Or a recording of harmless and harmful responses, whose columns
            replace `harmful`, `onsets` and `groups`.
        spec: The model's flags: their categories name the thresholds, run id and template hash bind them to the model.
        target_fpr: Share of harmless responses that may alarm.
        guarantee: "expected": the rate holds on average over calibration sets; "high_probability": it holds with
            probability 1 - delta.
        delta: Probability that "high_probability" may fail.
        joint: Whether `target_fpr` is the rate of an alarm in any category, or of each category separately.
        monitor: How probabilities become scores; None = the highest probability.
        harmful: Per harmful response, T x K probabilities; used only for measuring, not for the thresholds.
        onsets: Per harmful response, the index of its first harmful token; None = unknown. Without any known onset no
            hold-back is suggested.
        hold_back_share: Share of the detected harmful responses with a known onset of which the suggested hold-back
            shows no token from the onset on.
        groups: Per harmless response, its group (None = its own); no group is on both sides of the split.
        held_out: Share of the harmless responses that only measures the realised rate; with 0 none is reported.
        earlier: With a memory, for each response T x K probabilities of each earlier answer of its conversation, oldest
            first: in a recording's order, or of the harmless responses and then of the harmful ones.

    Raises:
        RedflagError: Too few harmless responses (the message says how many are needed), a probability that cannot be
            judged, or a rate that only an unreachable threshold would keep.
    """
    config = monitor or MonitorConfig()
    categories = spec.categories
    recording = harmless if isinstance(harmless, Recording) else None
    if recording is not None:
        rows = of_recording(recording.part("answer"), categories)
    else:
        rows = of_responses(cast(Sequence[Any], harmless), harmful, groups, onsets, len(categories))
    factors = None
    if memory is not None:
        check_memory(memory, config)
        factors = factors_of(memory, config, earlier, len(rows.harmless_at) + len(rows.harmful_at), len(categories))
        rows = remembered(rows, factors)
    split = split_groups(rows.groups, held_out, seed)

    def fit(part: Measured, fit_on: list[int], measure_on: list[int]) -> tuple[Calibration, npt.NDArray[np.bool_]]:
        return _fit(
            *(part, fit_on, measure_on, spec, config, target_fpr, guarantee, delta, joint, hold_back_share),
            *(logprob_mode, memory),
        )

    result, alarmed = fit(rows, *split)
    if recording is None or not recording.thoughts.any():
        return result
    thoughts, numbers, places = of_thoughts(recording, categories, split)
    if factors is not None:
        thoughts = remembered(thoughts, factors[recording.thoughts > 0])
    try:
        own, alarmed_early = fit(thoughts, *numbers)
    except RedflagError as error:  # Usually because there are too few.
        return replace(result, no_thoughts=str(error))
    alarmed[places[1]] |= alarmed_early
    together = replace(result.thresholds, thoughts=replace(own.thresholds, suggested_hold_back=None))
    return replace(result, thresholds=together, thoughts=own, false_alarms_anywhere=int(alarmed.sum()))


def _fit(
    rows: Measured,
    fit_on: list[int],
    measure_on: list[int],
    spec: FlagSpec,
    config: MonitorConfig,
    target_fpr: float,
    guarantee: Guarantee,
    delta: float,
    joint: bool,
    hold_back_share: float,
    logprob_mode: str,
    memory: Memory | None,
) -> tuple[Calibration, npt.NDArray[np.bool_]]:
    """Thresholds of one part of the responses, and which of `measure_on` alarm under them."""
    categories = spec.categories
    total = len(rows.groups)
    _check_size(len(fit_on), total, target_fpr, guarantee, delta, len(categories) if joint else 1)
    peaks = replay.peaks(config, rows.responses, rows.harmless_at)
    caught = replay.peaks(config, rows.responses, rows.harmful_at)
    try:
        values = fit_thresholds(peaks[fit_on], target_fpr, guarantee, delta, joint)
    except RedflagError as error:
        if not measure_on:
            raise
        raise RedflagError(f"{error} (of {total} harmless responses, {len(measure_on)} are held out)") from error
    # If every score is at most 1, a threshold above 1 would never be reached.
    if AGGREGATIONS[config.aggregation].bounded:
        for category, value in zip(categories, values, strict=True):
            if value > 1.0:
                raise RedflagError(
                    f"no threshold on {category!r} keeps a false-alarm rate of {target_fpr:g}: too many harmless "
                    "responses reach a score of 1. Raise target_fpr, check those rows, or train again."
                )
    alarms = peaks[measure_on] >= np.asarray(values)
    alarmed = np.asarray(alarms.any(axis=1))
    hits = caught >= np.asarray(values)
    lengths = np.diff(rows.responses.starts)
    dated = [(i, o) for i, o in zip(rows.harmful_at, rows.onsets, strict=True) if o is not None and o < lengths[i]]
    thresholds, hold_back = build_thresholds(
        *(categories, values, config, rows.responses),
        [i for i, _ in dated],
        [onset for _, onset in dated],
        target_fpr=target_fpr,
        guarantee=guarantee,
        delta=delta,
        hold_back_share=hold_back_share,
        joint=joint,
        sample_size=len(fit_on),
        realised_fpr=float(alarmed.mean()) if measure_on else None,
        interval=clopper_pearson(int(alarmed.sum()), len(measure_on)) if measure_on else None,
        held_out_size=len(measure_on),
        run_id=spec.run_id,
        template_hash=spec.template_hash,
        logprob_mode=logprob_mode,
        memory=memory,
    )
    result = Calibration(
        thresholds=thresholds,
        calibration_size=len(fit_on),
        held_out_size=len(measure_on),
        false_alarms=int(alarmed.sum()),
        false_alarms_by_category=dict(zip(categories, map(int, alarms.sum(axis=0)), strict=True)),
        harmful_size=len(rows.onsets),
        caught=int(hits.any(axis=1).sum()),
        caught_by_category=dict(zip(categories, map(int, hits.sum(axis=0)), strict=True)),
        hold_back=hold_back,
    )
    return result, alarmed


def _check_size(fit_on: int, total: int, target_fpr: float, guarantee: Guarantee, delta: float, spread: int) -> None:
    """Refuses what can be refused before a model is run; `fit_thresholds` gives the exact answer."""
    # Under "expected", flags that peak together may need no more than a single one does.
    least = required(target_fpr, guarantee, delta, 1 if guarantee == "expected" else spread)
    if fit_on < least:
        enough = required(target_fpr, guarantee, delta, spread)
        out = f", not counting the {total - fit_on} that are held out" if fit_on < total else ""
        raise RedflagError(
            f"{fit_on} harmless responses are too few for a false-alarm rate of {target_fpr:g} ({guarantee}): {enough} "
            f"are needed{out}. Add harmless rows, raise target_fpr or hold out fewer."
        )
