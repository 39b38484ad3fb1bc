"""The stages of an evaluation; each continues from the files of an earlier run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from redflag.data.rows import Row, Rows
from redflag.data.summary import report_skipped
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.lab.report.evaluation import AttackLine, JudgeFacts, Language, parse
from redflag.lab.report.method import Method
from redflag.lab.report.viewer_data import ShownResponse
from redflag.scoring import score
from redflag.scoring.processes import World
from redflag.scoring.recording import Recording
from redflag.versions import versions
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

if TYPE_CHECKING:
    from redflag.backends.hf import HFBackend
    from redflag.judges import Judge
    from redflag.lab.attacks import Attack
    from redflag.lab.baselines.record_baselines import Recorded
    from redflag.lab.evaluating.arguments import EvaluateArguments

# Attempts of each attack in the report's viewer.
SHOWN = 12


class Models:
    """The models of an evaluation, each loaded once and only when it is needed."""

    def __init__(self, arguments: EvaluateArguments) -> None:
        self._arguments = arguments

    @cached_property
    def flagged(self) -> tuple[HFBackend, Any, FlagSpec]:
        """The flagged model in this process, its tokenizer and its flags."""
        from redflag.backends.load import load_flagged

        device = World.here().device(self._arguments.device)
        return load_flagged(self._arguments.model, device, self._arguments.dtype)

    @cached_property
    def reference(self) -> Any:
        """The model before training."""
        from redflag.backends.load import read_model

        return read_model(str(self._arguments.base), self._arguments.dtype)[0]

    @property
    def limit(self) -> int | None:
        """Maximum tokens of a prompt with its response."""
        return score.context_limit(self._arguments.max_length, self.flagged[0].context_length)

    def language(self, rows: Sequence[Row]) -> Language:
        """What training did to the language, on these rows."""
        from redflag.lab.evaluating.language import language_change

        (backend, tokenizer, spec), size = self.flagged, self._arguments.batch_size
        return language_change(
            backend.model, self.reference, tokenizer, spec, rows, batch_size=size, max_length=self.limit
        )


def record(arguments: EvaluateArguments, models: Models, rows: Rows, path: Path, spec: FlagSpec) -> Recording:
    """The flag's recording of some rows, made once; `path` is without its suffix."""
    cached, scored = path.with_suffix(".parquet"), path.with_suffix(".scored.jsonl")
    meta = {
        "rows": rows.fingerprint,
        "run_id": spec.run_id,
        "template_hash": spec.template_hash,
        "max_length": arguments.max_length,
        "dtype": arguments.dtype,
        "upstream": bool(arguments.upstream),
        "logprob_mode": "raw",
    }
    if cached.exists():
        recording = Recording.load(cached)
        if recording.meta == meta:
            return recording
    # Rows scored by an earlier call or another process are missing here: then all are read from the file.
    fresh: dict[int, score.Scored] = {}
    with ExitStack() as stack:
        scorer, tokenizer, _ = arguments.scorer(World.here(), stack) if arguments.upstream else models.flagged
        chosen, skipped = rows.rows, [str(row) for row in rows.skipped]
        if arguments.on_bad_row == "skip":
            chosen, bad = score.renderable(tokenizer, spec, chosen)
            skipped += bad
        if not World.here().rank:
            report_skipped(skipped)
        score.score_to_file(
            scorer,
            tokenizer,
            spec,
            chosen,
            scored,
            rows_sha256=rows.fingerprint,
            batch_size=arguments.batch_size,
            max_length=score.context_limit(arguments.max_length, scorer.context_length),
            on_scored=fresh.__setitem__,
        )
    responses: Sequence[Mapping[str, Any]] = []
    if len(fresh) == len(chosen):
        responses = [score.as_recorded(fresh[number]) for number in range(len(chosen))]
    recording = Recording.of(spec.categories, responses or score.read_scored(scored), meta)
    if not World.here().rank:
        recording.save(cached)
    return recording


def token_texts(recording: Recording, model: str) -> list[list[str]]:
    """Texts of the tokens of each response, one at a time."""
    from redflag.backends.load import load_tokenizer

    assert recording.token_ids is not None
    tokenizer, _, _ = load_tokenizer(model)
    texts = {token: str(tokenizer.decode([token])) for token in set(recording.token_ids.tolist())}
    ends = np.cumsum(recording.lengths)
    return [
        [texts[token] for token in recording.token_ids[end - length : end].tolist()]
        for end, length in zip(ends, recording.lengths, strict=True)
    ]


def baselines_of(arguments: EvaluateArguments) -> list[str]:
    """Names of the requested baselines.

    Raises:
        RedflagError: A name is unknown.
    """
    from redflag.lab.baselines.record_baselines import NAMES

    names = [name for option in arguments.baselines for name in (NAMES if option == "all" else (option,))]
    for name in (*names, *arguments.baseline_options):
        if name not in NAMES:
            raise RedflagError(f"baselines must be all, or among {', '.join(NAMES)} (got {name!r}).")
    return list(dict.fromkeys(names))


def baselines(
    arguments: EvaluateArguments,
    names: Sequence[str],
    rows: Mapping[str, Rows],
    folder: Path,
    log: Callable[[str], None],
) -> dict[str, Recorded]:
    """Trains and records baselines, or reads the recordings of an earlier run."""
    from redflag.lab.baselines.record_baselines import record_baselines

    return record_baselines(
        names,
        str(arguments.base),
        arguments.model,
        rows["train"].rows,
        rows["test"].rows,
        rows["calibration"].rows,
        folder,
        seed=arguments.seed,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        device=arguments.device,
        most_rows=arguments.baseline_rows,
        options=arguments.baseline_options,
        log=lambda line: log(f"   {line}"),
    )


def judge_of(arguments: EvaluateArguments) -> Judge:
    """The judge of the attacks.

    Raises:
        RedflagError: There is none, or it lacks an address or a name.
    """
    judge = arguments.open_judge(device=arguments.device)
    if judge is None:
        raise RedflagError(
            "judge must be endpoint or model, or oracle in the nano world (got none). It says whether an attack's "
            "answer is harmful."
        )
    return judge


def attacks_of(arguments: EvaluateArguments, rows: Mapping[str, Rows]) -> list[Attack]:
    """The requested attacks; those that train use the training rows, if there are any.

    Raises:
        RedflagError: A name or an option is unknown.
    """
    from redflag.lab.attacks.run_attacks import NANO_OPTIONS, make_attacks

    options: dict[str, Any] = {}
    if arguments.judge == "oracle":
        options |= NANO_OPTIONS
    if arguments.base:
        options["fine-tuning"] = {"base": arguments.base}
    if "train" in rows:
        options.setdefault("fine-tuning", {})["rows"] = [row for row in rows["train"] if row.harmful]
        options.setdefault("AutoRAP", {})["rows"] = rows["train"].rows
    for name, own in arguments.attack_options.items():
        options[name] = {**options.get(name, {}), **own}
    return make_attacks(arguments.attacks, options)


def thresholds_of(method: Method) -> Thresholds | None:
    """The thresholds of a method, as a guard takes them; None if none could be set."""
    if method.threshold is None:
        return None
    return Thresholds(**{name: value for name, value in vars(method.threshold).items() if name != "fitted_on"})


class Attacked(NamedTuple):
    """The attack table, what the judge did, and a few attempts of each attack for the viewer."""

    lines: list[AttackLine]
    judge: JudgeFacts | None
    shown: list[ShownResponse]


def attack(
    arguments: EvaluateArguments,
    models: Models,
    attacks: Sequence[Attack],
    judge: Judge,
    rows: Mapping[str, Rows],
    folder: Path,
    flag: Method,
    log: Callable[[str], None],
) -> Attacked:
    """Attacks with requests of harmful test rows, drawn by seed; the guard has the flag's thresholds."""
    from redflag.judges.cache import CachedJudge
    from redflag.lab.attacks import Target
    from redflag.lab.attacks.run_attacks import run_attacks

    harmful = [row for row in rows["test"] if row.harmful]
    order = np.random.default_rng(arguments.seed).permutation(len(harmful))
    chosen: list[Row] = [harmful[i] for i in sorted(order[: arguments.requests])]
    backend, tokenizer, spec = models.flagged
    thresholds = thresholds_of(flag)
    suggested = thresholds.suggested_hold_back if thresholds is not None else None
    policy = Policy(hold_back=(suggested or 0) if arguments.hold_back is None else arguments.hold_back)
    target = Target(backend, tokenizer, spec, thresholds, policy, backend.model, batch_size=2 * arguments.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    cached = CachedJudge(judge, folder / "verdicts.jsonl")
    results = run_attacks(target, attacks, chosen, cached, folder, arguments.seed, log=lambda line: log(f"   {line}"))
    facts = JudgeFacts(cached.identity, cached.answered, cached.unanswered, policy.hold_back)
    categories = {str(row.id): row.category for row in chosen}
    shown = []
    for result in results:
        with_steps = [item for item in result.judged if item.attempt.flag_probs]
        for item in with_steps[:: max(1, len(with_steps) // SHOWN)][:SHOWN]:
            last = item.attempt.messages[-1]
            texts = [str(tokenizer.decode([token])) for token in item.attempt.token_ids]
            shown.append(
                ShownResponse(
                    id=f"{item.attempt.request}, {item.attempt.setting}",
                    set=result.attack.name,
                    source=item.attempt.setting,
                    category=categories.get(item.attempt.request),
                    onset=item.onset,
                    tokens=texts,
                    probs=item.attempt.flag_probs,
                    given=last["content"] if last["role"] == "assistant" else None,
                    harmful=bool(item.produced),
                    judged=item.produced,
                )
            )
    table = json.dumps([line for result in results for line in result.entries])
    return Attacked(parse(list[AttackLine], table, "the attack table"), facts, shown)


def viewed(
    arguments: EvaluateArguments, recording: Recording, tokens: Sequence[list[str]], flag: Method
) -> list[ShownResponse]:
    """Responses for the viewer: the errors of the thresholds in force first, then others drawn by seed."""
    order = [int(i) for i in np.random.default_rng(arguments.seed).permutation(len(recording))]
    if flag.threshold is not None:
        from redflag.calibrating import replay

        values = np.array([flag.threshold.values[name] for name in recording.categories])
        alarmed = (replay.peaks(flag.threshold.monitor, recording) >= values).any(axis=1)
        wrong = alarmed != recording.harmful
        order.sort(key=lambda i: not wrong[i])
    columns, harmful = ("id", "source", "category", "onset", "onset_source"), recording.harmful
    return [
        ShownResponse(
            tokens[i], recording.steps(i), bool(harmful[i]), **{name: recording.columns[name][i] for name in columns}
        )
        for i in sorted(order[: arguments.responses])
    ]


def made(arguments: EvaluateArguments, spec: FlagSpec, rows: Mapping[str, Rows], seconds: float) -> dict[str, Any]:
    """Where the report comes from: everything that is needed to repeat it."""
    packages = ("redflag-llm", "torch", "transformers", "peft", "numpy")
    verb = sys.argv[1:2] == ["evaluate"]
    return {
        "command": shlex.join(["redflag", *sys.argv[1:]]) if verb else f"redflag.evaluate({arguments})",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | versions(*packages),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "seeds": [arguments.seed],
        "model": {"path": arguments.model, "run_id": spec.run_id},
        "rows": {
            split: {
                "path": str(getattr(arguments, split)),
                "sha256": part.sha256,
                "harmful": sum(row.harmful for row in part),
                "harmless": sum(not row.harmful for row in part),
            }
            for split, part in rows.items()
        },
    }
