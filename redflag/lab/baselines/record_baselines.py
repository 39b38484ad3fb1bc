"""Trains baselines and keeps their recordings, so that a repeat, or a run after a kill, does nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.lab.baselines import Baseline, Cost
from redflag.lab.baselines.hidden import forget
from redflag.lab.baselines.shared import BaselineContext, HiddenFrom, digest
from redflag.scoring.recording import Recording
from redflag.weights.stamp import model_stamp

# Part of every fingerprint: raise it when a baseline is trained or scored in another way than before.
_VERSION = 6

NAMES = (
    "tfidf",
    "last-layer probe",
    "all-layer probe",
    "token head",
    "mlp probe",
    "own words",
    "fixed position",
    "refusal tokens",
    "deep alignment",
    "refusal at every position",
    "stream guard",
)
# Those that train a whole model.
TRAINED = ("fixed position", "refusal tokens", "deep alignment", "refusal at every position")

Missing = tuple[Baseline, Path, str]  # a baseline without results, its folder and fingerprint


class Recorded(NamedTuple):
    """The results of one baseline."""

    test: Recording
    calibration: Recording | None  # None without calibration rows
    what: str  # how it judges, in one sentence
    cost: Cost
    model: Path | None  # folder of the model that was trained for it
    seconds: float  # of training and scoring


def record_baselines(
    names: Sequence[str],
    base_dir: str | Path,
    model_dir: str | Path | None,
    train: Sequence[Row],
    test: Sequence[Row],
    calibration: Sequence[Row],
    out_dir: str | Path,
    *,
    seed: int = 0,
    max_length: int | None = None,
    batch_size: int = 32,
    hidden_from: HiddenFrom = "reference",
    device: str = "cpu",
    most_rows: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    hidden_dir: str | Path | None = None,
    bf16: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Recorded]:
    """Trains and scores baselines that are not there yet, one folder each under `out_dir`.

    Args:
        names: Some of `NAMES`, in the order of the result.
        base_dir: The model before it got its flags.
        model_dir: The flagged model, for its tokenizer (and its hidden states); None = the base model's.
        train: The rows that the flag was trained on.
        calibration: Rows to be scored for thresholds; no baseline is trained on them; may be empty.
        out_dir: Holds `<name>/test.parquet`, `<name>/calibration.parquet`, `<name>/baseline.json`.
        max_length: Maximum tokens of prompt and response, as for the flag; default: the model's context.
        hidden_from: Whose hidden states the probes read: the `reference`'s (as CC++) or the `flagged` model's.
        most_rows: Maximum number of rows to train baselines on that train a whole model (`TRAINED`); drawn by seed, and
            stated in their `what`.
        options: Name -> keyword arguments of that baseline's function or class; `{"token head": {"backbone": "tuned"}}`
            fine-tunes a copy of the base model with the head.
        hidden_dir: Keeps the training rows' hidden states (at most `hidden.MOST_DISK` bytes), which do not depend on
            the seed, for another call; None = they lie in `out_dir/hidden` and are deleted at the end.
        bf16: Whether a model that is only read runs under bfloat16 autocast: faster if the processor supports it.
        log: Callback for lines of progress.

    Returns:
        Name -> results. A baseline whose model is missing (`stream guard` without a folder) is left out and logged.

    Raises:
        RedflagError: A name or option is unknown, rows cannot be used, or a folder lacks something.

    Example:
        ```python
        results = record_baselines(["tfidf", "mlp probe"], "base", "model", train, test, calibration, "runs/baselines")
        print(results["tfidf"].test.steps(0)[:, 0], results["tfidf"].cost)
        ```
    """
    from redflag.lab.baselines.probes import Probe

    options = options or {}
    for name in (*names, *options):
        if name not in NAMES:
            raise RedflagError(f"baselines must be among {', '.join(NAMES)} (got {name!r}).")
    out = Path(out_dir)
    context = BaselineContext(
        Path(base_dir),
        None if model_dir is None else Path(model_dir),
        out / "hidden" if hidden_dir is None else Path(hidden_dir),
        seed,
        max_length,
        batch_size,
        hidden_from,
        device,
        bf16,
    )
    rows = {"train": train, "test": test, "calibration": calibration}
    digests = {split: digest([row.to_dict() for row in some]) for split, some in rows.items()}
    models = [model_stamp(folder) for folder in (context.base, context.model) if folder is not None]
    results: dict[str, Recorded] = {}
    missing: dict[str, Missing] = {}
    for name in names:
        settings = _options(name, options, most_rows)
        # A guard's weights are part of what its scores come from.
        stamps = [*models, *([model_stamp(settings["path"])] if settings.get("path") else [])]
        key = [_VERSION, name, digests, stamps, seed, max_length, hidden_from, settings, *(["bf16"] if bf16 else [])]
        folder = out / name.replace(" ", "-")
        recorded = _load(folder, digest(key), bool(calibration))
        if recorded is not None:
            log(f"{name}: there already, {folder}")
            results[name] = recorded
            continue
        baseline = _build(name, context, settings, folder)
        if baseline is None:
            log(f"{name}: left out, no folder of its model was given (options: path)")
            continue
        missing[name] = baseline, folder, digest(key)
    # Probes read the model's states in one pass, when the first of them is wanted.
    probes = [name for name, (baseline, _, _) in missing.items() if isinstance(baseline, Probe)]
    for name in missing:
        if name in results:
            continue
        together = probes if name in probes else [name]
        log(f"{', '.join(together)}: training on {len(train)} rows")
        results |= _record({one: missing[one] for one in together}, rows)
        for one in together:
            log(f"{one}: {results[one].seconds:.0f} s, {missing[one][1]}")
    if hidden_dir is None:
        forget(context)
    return {name: results[name] for name in names if name in results}


def check_baselines(
    names: Sequence[str],
    base_dir: str | Path,
    model_dir: str | Path,
    folder: str | Path,
    *,
    device: str = "cpu",
    most_rows: int | None = None,
    options: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuses before other work what `record_baselines` would refuse; nothing is written to `folder`.

    Raises:
        RedflagError: An option is unknown, or a folder lacks something.
    """
    context = BaselineContext(Path(base_dir), Path(model_dir), Path(folder), device=device)
    for name in names:
        _build(name, context, _options(name, options, most_rows), Path(folder))


def _options(name: str, options: Mapping[str, Mapping[str, Any]], most_rows: int | None) -> dict[str, Any]:
    settings = dict(options.get(name, {}))
    if name in TRAINED or settings.get("backbone") == "tuned":
        settings.setdefault("most_rows", most_rows)
    return settings


def _build(name: str, context: BaselineContext, options: dict[str, Any], folder: Path) -> Baseline | None:
    """The baseline of that name; its module is loaded only now."""
    from redflag.lab.baselines import own_words, probes, refusing, stream_guard, tfidf, trained
    from redflag.lab.baselines.tuning import Tuning

    model = folder / "model"
    builders: dict[str, Callable[..., Baseline | None]] = {
        "tfidf": partial(tfidf.TfidfBaseline, context),
        "last-layer probe": partial(probes.last_layer_probe, context),
        "all-layer probe": partial(probes.all_layer_probe, context),
        "token head": partial(_token_head, context),
        "mlp probe": partial(probes.mlp_probe, context),
        "own words": partial(own_words.OwnWords, context),
        "fixed position": partial(trained.fixed_position, context, model),
        "refusal tokens": partial(refusing.refusal_tokens, context, model),
        "deep alignment": partial(refusing.deep_alignment, context, model),
        "refusal at every position": partial(refusing.refusal_everywhere, context, model),
        "stream guard": partial(stream_guard.stream_guard, context),
    }
    try:
        # From a file of settings they come as mappings.
        for key, kind in (("fitting", probes.Fitting), ("tuning", Tuning)):
            if isinstance(options.get(key), dict):
                options[key] = kind(**options[key])
        return builders[name](**options)
    except TypeError as error:
        raise RedflagError(f"invalid options of the baseline {name!r} ({error}).") from error


def _token_head(
    context: BaselineContext, *, backbone: Literal["frozen", "tuned"] = "frozen", **options: Any
) -> Baseline:
    """The token head on the base model as it is, or on a copy that is fine-tuned with it."""
    from redflag.lab.baselines import probes, token_classifier

    if backbone not in ("frozen", "tuned"):
        raise RedflagError(f"backbone must be frozen or tuned (got {backbone!r}).")
    kind = token_classifier.TokenClassifier if backbone == "tuned" else probes.token_head
    return kind(context, **options)


def _record(missing: Mapping[str, Missing], rows: Mapping[str, Sequence[Row]]) -> dict[str, Recorded]:
    """Trains and scores one baseline, or several probes in one pass over each set of rows."""
    from redflag.lab.baselines.probes import Probe, read_together, score_together

    begun = time.perf_counter()
    baselines = [baseline for baseline, _, _ in missing.values()]
    probes = [baseline for baseline in baselines if isinstance(baseline, Probe)]
    for _, folder, _ in missing.values():
        # Results of an earlier run with other settings must not be mistaken for this one's.
        (folder / "baseline.json").unlink(missing_ok=True)
    if probes:
        read_together(probes, rows["train"])
    fitting = []
    for baseline in baselines:
        started = time.perf_counter()
        baseline.fit(rows["train"])
        fitting.append(time.perf_counter() - started)
    recordings: dict[str, list[Recording]] = {}
    for split in ("test", "calibration"):
        if rows[split] or split == "test":
            together = score_together(probes, rows[split]) if probes else None
            recordings[split] = together or [one.score(rows[split]) for one in baselines]
    # A pass that several share is counted in each of them.
    shared = time.perf_counter() - begun - sum(fitting)
    result = {}
    for number, (name, (baseline, folder, fingerprint)) in enumerate(missing.items()):
        model: Path | None = getattr(baseline, "model", None)
        for split, recorded in recordings.items():
            recorded[number].save(folder / f"{split}.parquet")
        result[name] = Recorded(
            recordings["test"][number],
            recordings["calibration"][number] if "calibration" in recordings else None,
            baseline.what,
            baseline.cost(),
            model,
            shared + fitting[number],
        )
        record = {
            "format": 1,
            "fingerprint": fingerprint,
            "name": baseline.name,
            "what": result[name].what,
            "cost": asdict(result[name].cost),
            "model": None if model is None else str(model),
            "seconds": result[name].seconds,
        }
        keep_json(folder / "baseline.json", record, indent=2)
    return result


def _load(folder: Path, fingerprint: str, calibrated: bool) -> Recorded | None:
    """The results of an earlier run with the same inputs."""
    record = kept_json(folder / "baseline.json", fingerprint=fingerprint)
    if record is None:
        return None
    try:
        model = None if record["model"] is None else Path(record["model"])
        if model is not None and not model.exists():
            return None
        return Recorded(
            Recording.load(folder / "test.parquet"),
            Recording.load(folder / "calibration.parquet") if calibrated else None,
            record["what"],
            Cost(**record["cost"]),
            model,
            record["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing or incomplete
        return None
