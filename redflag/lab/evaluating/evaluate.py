"""`redflag evaluate`: how well a model flags harm, how early, at what false-alarm rate, under which attacks.

Flag probabilities of the rows and of the attacks' answers are recorded once, without thresholds. Thresholds are then
fitted on the calibration rows and replayed over the test rows and the attempts. Each stage saves its files in the
output folder, and continues from them when the command is repeated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redflag.bounds import check_bounds
from redflag.calibrating.guarantee import check_rates
from redflag.data.rows import Rows, load_rows
from redflag.data.summary import warnings_about
from redflag.errors import RedflagError
from redflag.files import require_writable
from redflag.flags import FlagSpec
from redflag.lab.evaluating.arguments import EvaluateArguments
from redflag.scoring.processes import World
from redflag.watching.monitor import MonitorConfig

if TYPE_CHECKING:
    from redflag.lab.report.evaluation import Evaluation, Rate
    from redflag.lab.report.method import Method

ARGUMENTS = EvaluateArguments
POSITIONAL: str | None = None


def run(arguments: EvaluateArguments) -> int:
    """The verb."""
    report = evaluate(arguments, log=lambda line: print(line, file=sys.stderr, flush=True))
    if report is not None:
        print(headline(report))
        print(f"report: {arguments.output_dir}/report.html (and report.md, report.json)")
    return 0


def evaluate(arguments: EvaluateArguments, log: Callable[[str], None] = lambda line: None) -> Evaluation | None:
    """Measures, and writes `report.html`, `report.md` and `report.json`; `log` gets a line for each stage.

    Returns:
        What `report.json` holds. None in the helping processes of `accelerate launch`, which only score.

    Raises:
        RedflagError: Invalid input, refused before anything is computed where that is possible.
    """
    from redflag.lab import report as reporting
    from redflag.lab.evaluating import cascade, cost, stages, tables
    from redflag.lab.evaluating.rehearsal import rehearse

    check_bounds(arguments)
    reporting.require()
    start = time.monotonic()
    output = Path(arguments.output_dir)
    monitor = arguments.monitor()
    spec = FlagSpec.load(arguments.model)
    paths = {"test": arguments.test, "calibration": arguments.calibration, "train": arguments.train}
    rows = {
        name: load_rows(path, on_bad_row=arguments.on_bad_row, **arguments.row_options())
        for name, path in paths.items()
        if path
    }
    for name, part in rows.items():
        for line in warnings_about(part):
            log(f"{name} rows: {line}")
    warnings = _check(arguments, rows)
    judge = stages.judge_of(arguments) if arguments.attacks else None
    attacks = stages.attacks_of(arguments, rows) if arguments.attacks else []
    names = stages.baselines_of(arguments)
    cascades = cascade.cascades_of(arguments, names, rows)
    require_writable(output, "output_dir")
    output.mkdir(parents=True, exist_ok=True)

    def complete(methods: dict[str, Method], **parts: Any) -> Evaluation:
        title = f"{Path(arguments.model).resolve().name} on {Path(arguments.test).name}"
        made = stages.made(arguments, spec, rows, time.monotonic() - start)
        return reporting.Evaluation(title, methods, made, warnings=list(dict.fromkeys(warnings)), **parts)

    models = stages.Models(arguments)
    if not World.here().rank:
        log("== two rows, to the end")
        rehearse(arguments, models, spec, rows, names, attacks, judge, output, complete)
    recordings = {}
    for split in ("test", "calibration"):
        log(f"== flag probabilities of the {split} rows")
        recorded = stages.record(arguments, models, rows[split], output / split, spec)
        if (counts := recorded.thoughts).any():
            warnings.append(
                f"{int((counts > 0).sum())} of {len(recorded)} {split} responses begin with a thought ({counts.sum()} "
                "tokens): all figures of the flag are of the answers behind them"
            )
        recordings[split] = recorded.part("answer")
    if World.here().rank:
        return None
    fit: dict[str, Any] = {
        "monitor": monitor,
        "target_fpr": arguments.target_fpr,
        "guarantee": arguments.guarantee,
        "delta": arguments.delta,
        "tolerance": arguments.tolerance,
        "seed": arguments.seed,
    }

    def measure(one: cascade.CascadeStage, **about: Any) -> Method:
        return tables.method(one.test, one.calibration, what=one.what, cost=one.cost, **{**fit, **about})

    log("== tables")
    tokens = stages.token_texts(recordings["test"], arguments.model)
    own, reading = cost.passes(arguments, models, rows["test"], spec, output / "passes.json")
    what = "the probability of the flag, as the guard measures it"
    watched = {"flag": cascade.CascadeStage(recordings["test"], recordings["calibration"], reading, what)}
    methods = {"flag": measure(watched["flag"], tokens=tokens)}
    if names:
        log("== baselines")
        for name, baseline in stages.baselines(arguments, names, rows, output / "baselines", log).items():
            assert baseline.calibration is not None
            watched[name] = cascade.CascadeStage(baseline.test, baseline.calibration, baseline.cost, baseline.what)
            ahead = tables.compare_methods(recordings["test"], baseline.test, monitor=monitor, seed=arguments.seed)
            methods[name] = replace(measure(watched[name], kind="baseline"), flag_ahead=ahead)
    for pair in cascades:
        title = " then ".join(pair)
        log(f"== cascade: {title}")
        if left_out := [name for name in pair if name not in (*watched, "judge")]:
            warnings.append(f"the cascade {title} was left out: there is no {left_out[0]}")
            continue
        replayed = cascade.measure(arguments, pair, watched, monitor, rows, output / "cascades")
        # A cascade records verdicts, which no monitor has to smooth.
        method = measure(replayed, kind="cascade", monitor=MonitorConfig())
        same = monitor == MonitorConfig()
        lead = tables.compare_methods(recordings["test"], replayed.test, seed=arguments.seed) if same else None
        methods[title] = replace(method, flag_ahead=lead, cascade=replayed.facts)
    methods = {name: replace(method, compute=cost.relative(method.cost, own)) for name, method in methods.items()}
    language = None
    if arguments.base:
        log("== language beside the base model's")
        language = models.language(rows["test"].rows)
    attacked = stages.Attacked([], None, [])
    if attacks and judge is not None:
        log("== attacks")
        attacked = stages.attack(arguments, models, attacks, judge, rows, output / "attacks", methods["flag"], log)
    for name, method in methods.items():
        warnings += [f"{name}: {note}" for note in method.notes]
    result = complete(methods, language=language, attacks=attacked.lines, judge=attacked.judge, model_pass=own)
    log("== report")
    shown = stages.viewed(arguments, recordings["test"], tokens, methods["flag"])
    reporting.write(result, [*shown, *attacked.shown], output)
    return result


def headline(report: Evaluation) -> str:
    """The report in a few lines."""
    lines = []
    for name, method in report.methods.items():
        pooled, force = method.pooled, method.in_force
        if pooled.auroc is None or pooled.auroc_interval is None:
            continue
        low, high = pooled.auroc_interval
        line = f"{name:<28} AUROC {pooled.auroc:.4f} ({low:.4f} to {high:.4f})"
        if force and force.tpr is not None and force.realised_fpr is not None:
            line += f"   caught {force.tpr:.1%} at {force.realised_fpr:.2%} false alarms"
        lines.append(line)
    for attack in report.attacks or ():
        name = f"{attack.name}: {attack.setting}".rstrip(": ")
        produced, released = _share(attack.harm_produced), _share(attack.harm_released)
        lines.append(f"{name:<48} harm produced {produced:>10}, released {released:>10}")
    return "\n".join([*lines, *(f"note: {warning}" for warning in report.warnings or ())])


def _share(rate: Rate | None) -> str:
    return "not judged" if rate is None or rate.rate is None else f"{rate.rate:.0%}"


def _check(arguments: EvaluateArguments, rows: Mapping[str, Rows]) -> list[str]:
    """Refuses what would make the figures wrong; returns warnings about what makes them weaker."""
    if rows["test"].sha256 == rows["calibration"].sha256:
        raise RedflagError(
            f"calibration must hold other rows than test (got the same in {arguments.calibration} and "
            f"{arguments.test}). Thresholds look better than they are on the rows that set them."
        )
    for option in ("train", "base"):
        if arguments.baselines and not getattr(arguments, option):
            raise RedflagError(
                f"{option} must be given for baselines (got none). They are trained on the flag's rows and read its "
                "base model."
            )
    harmful = sum(row.harmful for row in rows["test"])
    if not harmful or harmful == len(rows["test"]):
        raise RedflagError(
            f"test must hold harmful and harmless rows (got {harmful} harmful ones of {len(rows['test'])} in "
            f"{arguments.test})."
        )
    check_rates(arguments.target_fpr, arguments.guarantee, arguments.delta)
    warnings = []
    groups = {split: {row.group for row in part if row.group} for split, part in rows.items()}
    for split in groups:
        if split != "test" and (both := groups["test"] & groups[split]):
            warnings.append(f"{len(both)} groups have rows among the {split} rows and the test rows: split by group")
    for split, part in rows.items():
        if part.skipped:
            warnings.append(f"{len(part.skipped)} malformed rows of {split} were left out")
    return warnings
