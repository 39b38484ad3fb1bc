"""An evaluation of two rows, in seconds: an error that would end it after hours ends it now."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redflag.backends import Sampling
from redflag.data.rows import Row, Rows
from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.flags import FlagSpec
from redflag.lab import report as reporting
from redflag.lab.attacks import Attack, Target, request_of
from redflag.lab.baselines.record_baselines import check_baselines
from redflag.lab.evaluating import stages, tables
from redflag.scoring import score
from redflag.scoring.recording import Recording
from redflag.weights.stamp import model_stamp

if TYPE_CHECKING:
    from redflag.judges import Judge
    from redflag.lab.evaluating.arguments import EvaluateArguments

# Baselines that read hidden states of the base model.
PROBES = ("last-layer probe", "all-layer probe", "token head", "mlp probe")


def rehearse(
    arguments: EvaluateArguments,
    models: stages.Models,
    spec: FlagSpec,
    rows: Mapping[str, Rows],
    names: Sequence[str],
    attacks: Sequence[Attack],
    judge: Judge | None,
    output: Path,
    complete: Callable[..., reporting.Evaluation],
) -> None:
    """Scores, compares, attacks, judges and reports the shortest harmful and the shortest harmless test row.

    Attacks and baselines are not run further: that would take as long for two rows as for many. Done once for a folder,
    unless models, rows or options change.

    Raises:
        RedflagError: Something does not fit, or the judge does not answer.
    """
    from redflag.lab.baselines.hidden import last_layers

    made_of = [
        [model_stamp(folder) for folder in (arguments.model, arguments.base) if folder],
        rows["test"].sha256,
        [list(names), [attack.name for attack in attacks], getattr(judge, "identity", None)],
        [arguments.device, arguments.dtype, arguments.max_length, arguments.baseline_options, spec.run_id],
    ]
    if kept_json(output / "rehearsal.json", made_of=made_of):
        return
    shortest = sorted(rows["test"], key=lambda row: sum(len(turn["content"]) for turn in row.messages))
    two = [next(row for row in shortest if row.harmful == harmful) for harmful in (True, False)]
    if names:
        check_baselines(
            names,
            str(arguments.base),
            arguments.model,
            output,
            device=arguments.device,
            most_rows=arguments.baseline_rows,
            options=arguments.baseline_options,
        )
    if judge is not None:
        _ask(judge, two[0])
    if arguments.base or attacks or not arguments.upstream:
        backend, tokenizer, _ = models.flagged
        scored = list(score.score(backend, tokenizer, spec, two, batch_size=2, max_length=models.limit))
        recording = Recording.of(spec.categories, map(score.as_recorded, scored))
        language = models.language(two) if arguments.base else None
        if arguments.base and any(name in PROBES for name in names):
            last_layers(models.reference, [item.token_ids for item in scored])
        if attacks:
            target = Target(backend, tokenizer, spec, model=backend.model)
            backend.complete([target.prompt_ids(request_of(two[0]))], Sampling(max_new_tokens=2, temperature=0.0))
        flag = tables.method(recording, tokens=[[str(t)] * len(s.token_ids) for t, s in enumerate(scored)], resamples=2)
        traces = stages.viewed(arguments, recording, [["a"] * len(item.token_ids) for item in scored], flag)
        with tempfile.TemporaryDirectory(dir=output, prefix=".trying-") as folder:
            reporting.write(complete({"flag": flag}, language=language, attacks=[]), traces, folder)
    keep_json(output / "rehearsal.json", {"made_of": made_of})


def _ask(judge: Judge, row: Row) -> None:
    """Asks a judge about a harmful row; any verdict will do."""
    try:
        judge(request_of(row), row.response)
    except Exception as error:
        raise RedflagError(
            f"the judge of the attacks must answer (got {type(error).__name__}: {error}). Without it no attack's "
            "answer could be judged: see to it, or leave --attacks out"
        ) from error
