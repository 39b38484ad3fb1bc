"""`redflag synthesize`: a constitution -> rows; or onsets, or forecasts, for existing rows.

All answers and verdicts are cached in the output folder (`answers.jsonl`, `verdicts.jsonl`), so that an interrupted
command continues where it stopped, and one repeated with a larger number requests only the difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from redflag.bounds import option
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.files import atomic_write, require_writable
from redflag.judges import Judge
from redflag.judges.cache import CachedJudge
from redflag.judges.options import JudgeKind
from redflag.lab.nano.judge import LabJudgeOptions
from redflag.lab.synthesis.constitution import load_constitution
from redflag.lab.synthesis.cost import allow, estimate
from redflag.lab.synthesis.forecast import forecast, write_forecasts
from redflag.lab.synthesis.onset import agreement, find_onsets, with_onsets
from redflag.lab.synthesis.options import Settings, WriterOptions
from redflag.lab.synthesis.pipeline import OnProgress, is_held_out, synthesize
from redflag.lab.synthesis.questions import CachedWriter
from redflag.progress import Progress


@dataclass(kw_only=True)
class SynthesizeArguments(Settings, WriterOptions, LabJudgeOptions):
    """Rows from a constitution; or onsets or forecasts for given rows."""

    output_dir: str = field(metadata={"help": "Folder for rows, cached answers, verdicts and synthesize.json."})
    constitution: str | None = option(None, "YAML file of harmful and harmless classes.")
    onsets: str | None = option(None, "Rows to find onsets in, in place of a constitution -> rows.jsonl.")
    forecasts: str | None = option(None, "Rows to forecast, in place of a constitution -> forecasts.jsonl.")
    judge_guard: bool = option(False, "endpoint: as judge_rubric guard.")
    second_judge: Literal[JudgeKind, "oracle"] = option("none", "onsets: a second judge, to measure agreement.")
    second_judge_url: str | None = option(None, "... as judge_url.")
    second_judge_name: str | None = option(None, "... as judge_name.")
    second_judge_guard: bool = option(False, "... as judge_guard.")
    held_out: float = option(0.2, "Share of the requests kept apart, in calibration.jsonl.", least=0, below=1)
    samples: int = option(8, "forecasts: continuations of each prefix.")
    positions: int = option(8, "forecasts: maximum places in a response.")
    yes: bool = option(False, "Start without asking, whatever the estimate.")
    max_requests: int | None = option(None, "Start if it takes at most this many requests.")
    max_cost: float | None = option(None, "Start if it costs at most this; needs prices.")
    price_in: float | None = option(None, "Price of a million tokens of questions.")
    price_out: float | None = option(None, "Price of a million tokens of answers.")


ARGUMENTS = SynthesizeArguments
POSITIONAL: str | None = None


def run(arguments: SynthesizeArguments) -> int:
    """The verb."""
    inputs = [name for name in ("constitution", "onsets", "forecasts") if getattr(arguments, name)]
    if len(inputs) != 1:
        raise RedflagError(
            "exactly one of --constitution, --onsets and --forecasts must be set "
            f"(got {' and '.join(inputs) or 'none'})."
        )
    output = Path(arguments.output_dir)
    if output.exists() and not output.is_dir():
        raise RedflagError(f"output_dir must be a folder ({output} is a file).")
    require_writable(output, "output_dir")
    source = getattr(arguments, inputs[0])
    if inputs[0] != "constitution" and Path(source).resolve().parent == output.resolve():
        raise RedflagError(f"output_dir must not hold the input {source}, which could be overwritten.")
    {"constitution": _generate, "onsets": _label, "forecasts": _forecast}[inputs[0]](arguments, output)
    return 0


def _generate(arguments: SynthesizeArguments, output: Path) -> None:
    constitution = load_constitution(str(arguments.constitution))
    expected = estimate(
        constitution,
        arguments,
        judged=arguments.judge != "none",
        price_in=arguments.price_in,
        price_out=arguments.price_out,
    )
    print(f"{constitution.name}: {expected}", file=sys.stderr)
    allow(expected, yes=arguments.yes, max_requests=arguments.max_requests, max_cost=arguments.max_cost)
    judge = _judge(arguments, output)
    writer = _writer(arguments, output)
    if len(writer):
        print(f"{len(writer)} answers are cached", file=sys.stderr)
    with _progress() as on_progress:
        result = synthesize(constitution, writer, judge, arguments, on_progress)
    held_out = [row for row in result.rows if is_held_out(row, arguments.held_out)]
    training = [row for row in result.rows if not is_held_out(row, arguments.held_out)]
    files = {}
    for name, rows in (("rows.jsonl", training), ("calibration.jsonl", held_out)):
        path = write_rows(output / name, rows)
        files[name] = {"rows": len(rows), "harmful": sum(row.harmful for row in rows), "sha256": _sha256(path)}
    report = {
        "constitution": constitution.name,
        "sha256": _sha256(Path(str(arguments.constitution))),
        "categories": list(constitution.categories),
        "model": arguments.model,
        "judge": getattr(judge, "identity", None),
        "settings": {option.name: getattr(arguments, option.name) for option in fields(Settings)},
        "files": files,
        "sources": dict(sorted(Counter(str(row.source) for row in result.rows).items())),
        "dropped": dict(sorted(result.dropped.items())),
        "without_onset": result.without_onset,
        "asked": {"requests": writer.asked, "tokens_in": writer.tokens_in, "tokens_out": writer.tokens_out},
    }
    _write_json(output / "synthesize.json", report)
    for reason, count in result.dropped.most_common():
        print(f"left out: {reason}: {count}", file=sys.stderr)
    if result.without_onset:
        print(
            f"{result.without_onset} harmful rows have no onset and count as harmful from their first character"
            + ("" if judge else ": name a judge to find onsets"),
            file=sys.stderr,
        )
    for name, file in files.items():
        print(f"{file['rows']} rows ({file['harmful']} harmful): {output / name}")
    print(f"redflag train --input {output / 'rows.jsonl'} --categories {' '.join(constitution.categories)} ...")


def _label(arguments: SynthesizeArguments, output: Path) -> None:
    rows = load_rows(str(arguments.onsets)).rows
    judge = _judge(arguments, output)
    if judge is None:
        raise RedflagError("judge must be set to find onsets. Add --judge.")
    second = LabJudgeOptions(
        judge=arguments.second_judge,
        judge_url=arguments.second_judge_url,
        judge_name=arguments.second_judge_name,
        judge_rubric="guard" if arguments.second_judge_guard else "short",
    ).open_judge(device=arguments.device)
    # Verdicts on harmless rows are needed only to compare two judges.
    selected = rows if second is not None else [row for row in rows if row.harmful]
    search: dict[str, Any] = {"search": arguments.search, "workers": arguments.workers}
    with Progress("onsets", len(selected), "rows") as progress:
        onsets = find_onsets(judge, selected, **search, on_progress=lambda done, total: progress(done))
    labelled = {id(old): new for old, new in zip(selected, with_onsets(selected, onsets), strict=True)}
    write_rows(output / "rows.jsonl", [labelled.get(id(row), row) for row in rows])
    harmful = [onset for row, onset in zip(selected, onsets, strict=True) if row.harmful]
    report: dict[str, Any] = {
        "input": str(arguments.onsets),
        "judge": getattr(judge, "identity", None),
        "search": arguments.search,
        "harmful": len(harmful),
        "labelled": sum(onset is not None and onset.harmful for onset in harmful),
        "no_harm_found": sum(onset is not None and not onset.harmful for onset in harmful),
        "unanswered": sum(onset is None for onset in harmful),
        "questions": sum(onset.questions for onset in onsets if onset is not None),
    }
    if second is not None:
        cached = CachedJudge(second, output / "verdicts.jsonl")
        with Progress("onsets of the second judge", len(selected), "rows") as progress:
            others = find_onsets(cached, selected, **search, on_progress=lambda done, total: progress(done))
        report["second_judge"] = getattr(second, "identity", None)
        report["agreement"] = dataclasses.asdict(agreement(onsets, others))
    _write_json(output / "onsets.json", report)
    print(
        f"{report['labelled']} of {len(harmful)} harmful rows have an onset now ({report['no_harm_found']} without harm"
        f", {report['unanswered']} unanswered): {output / 'rows.jsonl'}"
    )
    if "agreement" in report:
        print(", ".join(f"{key} {_number(value)}" for key, value in report["agreement"].items()))


def _forecast(arguments: SynthesizeArguments, output: Path) -> None:
    rows = load_rows(str(arguments.forecasts)).rows
    most = len(rows) * arguments.positions * arguments.samples
    print(f"at most {most:,} continuations, each of which is judged", file=sys.stderr)
    if not arguments.yes and (arguments.max_requests is None or most > arguments.max_requests):
        raise RedflagError(
            f"this would take up to {most:,} requests. No request was sent. Run the command again with --yes, or raise "
            "--max-requests."
        )
    judge = _judge(arguments, output)
    if judge is None:
        raise RedflagError("judge must be set to make forecasts. Add --judge.")
    with _progress() as on_progress:
        points = forecast(
            rows,
            _writer(arguments, output),
            judge,
            samples=arguments.samples,
            positions=arguments.positions,
            temperature=arguments.temperatures[-1],
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
            workers=arguments.workers,
            on_progress=on_progress,
        )
    path = write_forecasts(output / "forecasts.jsonl", rows, points)
    print(f"{sum(map(len, points))} forecasts along {len(rows)} rows: {path}")


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Shows the progress of the current step; the next one begins when it is named."""
    step: Progress | None = None

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal step
        if step is None or step.what != what:
            if step is not None:
                step.close()
            step = Progress(what, total, "done", begin=done - 1)
        step(done)

    try:
        yield on_progress
    finally:
        if step is not None:
            step.close()


def _judge(arguments: SynthesizeArguments, output: Path) -> Judge | None:
    options = dataclasses.replace(arguments, judge_rubric="guard") if arguments.judge_guard else arguments
    judge = options.open_judge(device=arguments.device)
    return None if judge is None else CachedJudge(judge, output / "verdicts.jsonl")


def _writer(arguments: SynthesizeArguments, output: Path) -> CachedWriter:
    return CachedWriter(arguments.open_writer(), output / "answers.jsonl")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
