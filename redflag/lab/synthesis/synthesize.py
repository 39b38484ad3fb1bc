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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redflag.bounds import check_bounds
from redflag.data.rows import Row, load_rows, write_rows
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
from redflag.lab.synthesis.pipeline import OnProgress, Settings, is_held_out, synthesize
from redflag.lab.synthesis.questions import KeptAnswers
from redflag.lab.synthesis.who import writer
from redflag.progress import Progress


@dataclass(kw_only=True)
class SynthesizeArguments(LabJudgeOptions):
    """Rows from a constitution; or onsets or forecasts for given rows."""

    output_dir: str = field(metadata={"help": "Folder for rows, cached answers, verdicts and synthesize.json."})
    constitution: str | None = field(default=None, metadata={"help": "YAML file of harmful and harmless classes."})
    onsets: str | None = field(
        default=None, metadata={"help": "Rows to find onsets in, in place of a constitution -> rows.jsonl."}
    )
    forecasts: str | None = field(
        default=None, metadata={"help": "Rows to forecast, in place of a constitution -> forecasts.jsonl."}
    )

    model: str | None = field(default=None, metadata={"help": "Writer: folder or hub name, or name at url."})
    url: str | None = field(default=None, metadata={"help": "OpenAI-compatible server that runs it (http://HOST/v1)."})
    key_env: str | None = field(default=None, metadata={"help": "... environment variable with its API key."})
    concurrency: int = field(default=8, metadata={"help": "... most requests at a time."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "... most requests per minute."})
    timeout: float = field(default=120.0, metadata={"help": "... seconds for one request."})
    retries: int = field(default=5, metadata={"help": "... further tries when it is lost, busy or fails."})
    options: dict[str, Any] | None = field(default=None, metadata={"help": "... further fields of every request."})
    device: str = field(default="auto", metadata={"help": "Where local models run: auto, cpu, cuda, ..."})
    dtype: str = field(default="auto", metadata={"help": "Their weights: auto, float32, bfloat16."})
    batch_size: int = field(default=16, metadata={"help": "Prompts that a local model completes side by side."})

    judge_guard: bool = field(default=False, metadata={"help": "endpoint: as judge_rubric guard."})
    second_judge: Literal[JudgeKind, "oracle"] = field(
        default="none", metadata={"help": "onsets: a second judge, to measure how far the two agree."}
    )
    second_judge_url: str | None = field(default=None, metadata={"help": "... as judge_url."})
    second_judge_name: str | None = field(default=None, metadata={"help": "... as judge_name."})
    second_judge_guard: bool = field(default=False, metadata={"help": "... as judge_guard."})
    search: Literal["first", "bisect"] = field(
        default="first",
        metadata={"help": "Onsets: every sentence, or halving (if harm is never taken back)."},
    )

    requests: int = field(default=100, metadata={"help": "Requests of all classes together."})
    answers: int = field(default=1, metadata={"help": "Answers to each."})
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0], metadata={"help": "Taken in turn."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer."})
    paraphrases: int = field(default=0, metadata={"help": "Paraphrases of each request."})
    languages: list[str] = field(default_factory=list, metadata={"help": "Languages to translate everything into."})
    wrapped: float = field(default=0.0, metadata={"help": "Share that is repeated in a jailbreak wrapper."})
    typos: float = field(default=0.0, metadata={"help": "Share that is repeated with typing errors."})
    near: float = field(default=0.8, metadata={"help": "Similarity from which texts count as the same."})
    lang: str = field(default="en", metadata={"help": "Language of the constitution."})
    held_out: float = field(
        default=0.2,
        metadata={"help": "Share of the requests kept apart, in calibration.jsonl.", "least": 0, "below": 1},
    )
    samples: int = field(default=8, metadata={"help": "forecasts: continuations of each prefix."})
    positions: int = field(default=8, metadata={"help": "forecasts: most places in a response."})
    seed: int = field(default=0, metadata={"help": "Same seed, same questions."})
    workers: int = field(default=8, metadata={"help": "Threads that ask the judge."})

    yes: bool = field(default=False, metadata={"help": "Begin, whatever it takes."})
    max_requests: int | None = field(default=None, metadata={"help": "Start if it takes at most this many requests."})
    max_cost: float | None = field(default=None, metadata={"help": "Begin if it costs at most so much; needs prices."})
    price_in: float | None = field(default=None, metadata={"help": "Price of a million tokens of questions."})
    price_out: float | None = field(default=None, metadata={"help": "Price of a million tokens of answers."})


ARGUMENTS = SynthesizeArguments
POSITIONAL: str | None = None


def run(arguments: SynthesizeArguments) -> int:
    """The verb."""
    check_bounds(arguments)
    given = [name for name in ("constitution", "onsets", "forecasts") if getattr(arguments, name)]
    if len(given) != 1:
        raise RedflagError(
            f"{' and '.join(given) or 'nothing'} is given to work on: name one of --constitution, --onsets, --forecasts"
        )
    output = Path(arguments.output_dir)
    if output.exists() and not output.is_dir():
        raise RedflagError(f"output_dir must be a folder ({output} is a file).")
    require_writable(output, "output_dir")
    source = getattr(arguments, given[0])
    if given[0] != "constitution" and Path(source).resolve().parent == output.resolve():
        raise RedflagError(f"output_dir must not hold the input {source}, which could be overwritten.")
    {"constitution": _make, "onsets": _label, "forecasts": _forecast}[given[0]](arguments, output)
    return 0


def _make(arguments: SynthesizeArguments, output: Path) -> None:
    constitution = load_constitution(str(arguments.constitution))
    settings = _settings(arguments)
    expected = estimate(
        constitution,
        settings,
        judged=arguments.judge != "none",
        price_in=arguments.price_in,
        price_out=arguments.price_out,
    )
    print(f"{constitution.name}: {expected}", file=sys.stderr)
    allow(expected, yes=arguments.yes, max_requests=arguments.max_requests, max_cost=arguments.max_cost)
    judge = _judge(arguments, output)
    model = _writer(arguments, output)
    if len(model):
        print(f"{len(model)} answers are kept from before", file=sys.stderr)
    with _progress() as on_progress:
        result = synthesize(constitution, model, judge, settings, on_progress)
    held_out = [row for row in result.rows if is_held_out(row, arguments.held_out)]
    training = [row for row in result.rows if not is_held_out(row, arguments.held_out)]
    files = {}
    for name, rows in (("rows.jsonl", training), ("calibration.jsonl", held_out)):
        path = write_rows(output / name, rows)
        files[name] = {
            "rows": len(rows),
            "harmful": sum(row.harmful for row in rows),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    report = {
        "constitution": constitution.name,
        "sha256": hashlib.sha256(Path(str(arguments.constitution)).read_bytes()).hexdigest(),
        "categories": list(constitution.categories),
        "model": arguments.model,
        "judge": getattr(judge, "identity", None),
        "settings": dataclasses.asdict(settings),
        "files": files,
        "sources": dict(sorted(Counter(str(row.source) for row in result.rows).items())),
        "dropped": dict(sorted(result.dropped.items())),
        "without_onset": result.without_onset,
        "asked": {"requests": model.asked, "tokens_in": model.tokens_in, "tokens_out": model.tokens_out},
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
    # A verdict on harmless rows is needed where two judges are compared, and nowhere else.
    chosen = rows if second is not None else [row for row in rows if row.harmful]
    asking: dict[str, Any] = {"search": arguments.search, "workers": arguments.workers}
    with Progress("onsets", len(chosen), "rows") as progress:
        found = find_onsets(judge, chosen, **asking, on_progress=lambda done, total: progress(done))
    labelled = iter(with_onsets(chosen, found))
    kept = {id(row) for row in chosen}
    write_rows(output / "rows.jsonl", [next(labelled) if id(row) in kept else row for row in rows])
    harmful = [onset for row, onset in zip(chosen, found, strict=True) if row.harmful]
    report: dict[str, Any] = {
        "input": str(arguments.onsets),
        "judge": getattr(judge, "identity", None),
        "search": arguments.search,
        "harmful": len(harmful),
        "labelled": sum(onset is not None and onset.harmful for onset in harmful),
        "no_harm_found": sum(onset is not None and not onset.harmful for onset in harmful),
        "unanswered": sum(onset is None for onset in harmful),
        "questions": sum(onset.questions for onset in found if onset is not None),
    }
    if second is not None:
        cached = CachedJudge(second, output / "verdicts.jsonl")
        with Progress("onsets of the second judge", len(chosen), "rows") as progress:
            other = find_onsets(cached, chosen, **asking, on_progress=lambda done, total: progress(done))
        report["second_judge"] = getattr(second, "identity", None)
        report["agreement"] = dataclasses.asdict(agreement(found, other))
    _write_json(output / "onsets.json", report)
    print(
        f"{report['labelled']} of {len(harmful)} harmful rows have an onset now ({report['no_harm_found']} without harm"
        f", {report['unanswered']} unanswered): {output / 'rows.jsonl'}"
    )
    if "agreement" in report:
        print(", ".join(f"{key} {_number(value)}" for key, value in report["agreement"].items()))


def _forecast(arguments: SynthesizeArguments, output: Path) -> None:
    rows: Sequence[Row] = load_rows(str(arguments.forecasts)).rows
    most = len(rows) * arguments.positions * arguments.samples
    print(f"at most {most:,} continuations, each of which is judged", file=sys.stderr)
    if not arguments.yes and (arguments.max_requests is None or most > arguments.max_requests):
        raise RedflagError(
            f"this would take up to {most:,} requests; nothing was asked: give the command again with --yes, or a "
            "higher --max-requests"
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
            temperature=arguments.temperatures[-1] if arguments.temperatures else 1.0,
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
            workers=arguments.workers,
            on_progress=on_progress,
        )
    path = write_forecasts(output / "forecasts.jsonl", rows, points)
    print(f"{sum(map(len, points))} forecasts along {len(rows)} rows: {path}")


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Shows how far a step is; the next one begins when it is named."""
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


def _settings(arguments: SynthesizeArguments) -> Settings:
    given: dict[str, Any] = {
        option.name: value
        for option in dataclasses.fields(Settings)
        if (value := getattr(arguments, option.name, None)) is not None
    }
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Settings(**given)


def _judge(arguments: SynthesizeArguments, output: Path) -> Judge | None:
    options = dataclasses.replace(arguments, judge_rubric="guard") if arguments.judge_guard else arguments
    judge = options.open_judge(device=arguments.device)
    return None if judge is None else CachedJudge(judge, output / "verdicts.jsonl")


def _writer(arguments: SynthesizeArguments, output: Path) -> KeptAnswers:
    model = writer(
        arguments.model,
        arguments.url,
        key_env=arguments.key_env,
        concurrency=arguments.concurrency,
        per_minute=arguments.requests_per_minute,
        timeout=arguments.timeout,
        retries=arguments.retries,
        options=arguments.options,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
    )
    return KeptAnswers(model, output / "answers.jsonl")


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
