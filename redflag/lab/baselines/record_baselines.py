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
from redflag.lab.baselines.bench import Bench, HiddenFrom, digest, model_stamp
from redflag.lab.baselines.hidden import forget
from redflag.scoring.recording import Recording

# Part of every fingerprint: to be raised when a baseline is trained or scored in another way than before.
_VERSION = 5

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


class Recorded(NamedTuple):
    """What there is of one baseline.

    Attributes:
        test: Recording of the test rows.
        calibration: Recording of the calibration rows; None where none were given.
        what: How it judges, in one sentence.
        cost: What it costs per token.
        model: Folder of the model that was trained for it; None where there is none.
        seconds: Time that training and scoring took.
    """

    test: Recording
    calibration: Recording | None
    what: str
    cost: Cost
    model: Path | None
    seconds: float


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
    say: Callable[[str], None] = print,
) -> dict[str, Recorded]:
    """Trains and scores baselines that are not there yet, one folder each under `out_dir`.

    Args:
        names: Some of `NAMES`, in the order in which they are wanted.
        base_dir: The model before it got its flags.
        model_dir: The flagged model, for its tokenizer (and its hidden states); None: the base model's.
        train: The rows that the flag was trained on.
        test: Rows to be scored.
        calibration: Rows to be scored for thresholds; no baseline is trained on them; may be empty.
        out_dir: Holds `<name>/test.parquet`, `<name>/calibration.parquet`, `<name>/baseline.json`.
        seed: Seeds everything that is drawn.
        max_length: Most tokens of prompt and response, as for the flag; default: the model's context.
        batch_size: Conversations per forward pass.
        hidden_from: Whose hidden states the probes read: the `reference`'s (as CC++) or the `flagged` model's.
        device: Where models run; "auto" is the first GPU where there is one.
        most_rows: Most rows that the baselines train on which train a whole model (`TRAINED`);
            drawn by seed, and said in their `what`. None: all of them.
        options: Name -> keyword arguments of that baseline's function or class; `{"token head": {"backbone": "tuned"}}`
            fine-tunes a copy of the base model with the head.
        hidden_dir: Keeps the training rows' hidden states (at most `hidden.MOST_DISK` bytes), which do not depend on
            the seed, for another call; None: they lie in `out_dir/hidden` and are dropped at the end.
        bf16: Whether a model that is only read runs under bfloat16 autocast: faster where the processor has it.
        say: Is told what is done.

    Returns:
        Name -> what there is. A baseline whose model is not at hand (`stream guard` without a folder) is left out, and
        that is said.

    Raises:
        RedflagError: A name or option is unknown, rows cannot be used, or a folder lacks something.

    Example:
        ```python
        found = record_baselines(["tfidf", "mlp probe"], "base", "model", train, test, calibration, "runs/baselines")
        print(found["tfidf"].test.steps(0)[:, 0], found["tfidf"].cost)
        ```
    """
    from redflag.lab.baselines.probes import Probe

    options = options or {}
    for name in (*names, *options):
        if name not in NAMES:
            raise RedflagError(f"there is no baseline {name!r}: choose from {', '.join(NAMES)}")
    out = Path(out_dir)
    bench = Bench(
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
    models = [model_stamp(folder) for folder in (bench.base, bench.model) if folder is not None]
    result: dict[str, Recorded] = {}
    missing: dict[str, tuple[Baseline, Path, str]] = {}
    for name in names:
        given = _options(name, options, most_rows)
        # A guard's weights are part of what its scores come from.
        stamps = [*models, *([model_stamp(given["path"])] if given.get("path") else [])]
        key = [_VERSION, name, digests, stamps, seed, max_length, hidden_from, given, *(["bf16"] if bf16 else [])]
        folder = out / name.replace(" ", "-")
        found = _found(folder, digest(key), bool(calibration))
        if found is not None:
            say(f"{name}: there already, {folder}")
            result[name] = found
            continue
        baseline = _build(name, bench, given, folder)
        if baseline is None:
            say(f"{name}: left out, no folder of its model was given (options: path)")
            continue
        missing[name] = baseline, folder, digest(key)
    # Probes read the model's states in one pass, when the first of them is wanted.
    probes = [name for name, (baseline, _, _) in missing.items() if isinstance(baseline, Probe)]
    for name in missing:
        if name in result:
            continue
        together = probes if name in probes else [name]
        say(f"{', '.join(together)}: training on {len(train)} rows")
        result |= _record({one: missing[one] for one in together}, rows)
        for one in together:
            say(f"{one}: {result[one].seconds:.0f} s, {missing[one][1]}")
    if hidden_dir is None:
        forget(bench)
    return {name: result[name] for name in names if name in result}


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
    """Sets each baseline up and drops it, so that what `record_baselines` would refuse is refused before other work.

    Args:
        names: As in `record_baselines`, like the others.
        folder: Nothing is written there.

    Raises:
        RedflagError: An option is unknown, or a folder lacks something.
    """
    bench = Bench(Path(base_dir), Path(model_dir), Path(folder), device=device)
    for name in names:
        _build(name, bench, _options(name, options, most_rows), Path(folder))


def _options(name: str, options: Mapping[str, Mapping[str, Any]], most_rows: int | None) -> dict[str, Any]:
    given = dict(options.get(name, {}))
    if name in TRAINED or given.get("backbone") == "tuned":
        given.setdefault("most_rows", most_rows)
    return given


def _build(name: str, bench: Bench, options: dict[str, Any], folder: Path) -> Baseline | None:
    """The baseline of that name; its module is loaded only now."""
    from redflag.lab.baselines import fixed, own_words, probes, refusing, stream_guard, tfidf
    from redflag.lab.baselines.tuning import Tuning

    model = folder / "model"
    builders: dict[str, Callable[..., Baseline | None]] = {
        "tfidf": partial(tfidf.TfidfBaseline, bench),
        "last-layer probe": partial(probes.last_layer_probe, bench),
        "all-layer probe": partial(probes.all_layer_probe, bench),
        "token head": partial(_token_head, bench),
        "mlp probe": partial(probes.mlp_probe, bench),
        "own words": partial(own_words.OwnWords, bench),
        "fixed position": partial(fixed.FixedPosition, bench, model),
        "refusal tokens": partial(refusing.refusal_tokens, bench, model),
        "deep alignment": partial(refusing.deep_alignment, bench, model),
        "refusal at every position": partial(refusing.refusal_everywhere, bench, model),
        "stream guard": partial(stream_guard.stream_guard, bench),
    }
    try:
        # From a file of settings they come as mappings.
        for key, kind in (("fitting", probes.Fitting), ("tuning", Tuning)):
            if isinstance(options.get(key), dict):
                options[key] = kind(**options[key])
        return builders[name](**options)
    except TypeError as error:
        raise RedflagError(f"the options {options} do not fit the baseline {name!r} ({error}): mend them") from error


def _token_head(bench: Bench, *, backbone: Literal["frozen", "tuned"] = "frozen", **options: Any) -> Baseline:
    """The token head on the base model as it is, or on a copy that is fine-tuned with it."""
    from redflag.lab.baselines import probes, token_classifier

    if backbone not in ("frozen", "tuned"):
        raise RedflagError(f"backbone is {backbone!r}: the model under a token head is frozen or tuned, say which")
    return (
        token_classifier.TokenClassifier(bench, **options)
        if backbone == "tuned"
        else probes.token_head(bench, **options)
    )


def _record(
    missing: Mapping[str, tuple[Baseline, Path, str]], rows: Mapping[str, Sequence[Row]]
) -> dict[str, Recorded]:
    """Trains and scores one baseline, or several probes in one pass over each set of rows."""
    from redflag.lab.baselines.probes import Probe, read_together, score_together

    begun = time.perf_counter()
    baselines = [baseline for baseline, _, _ in missing.values()]
    probes = [baseline for baseline in baselines if isinstance(baseline, Probe)]
    for _, folder, _ in missing.values():
        # What an earlier run with other settings left is not to be mistaken for this one's.
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
            recordings[split] = (
                score_together(probes, rows[split]) if probes else [one.score(rows[split]) for one in baselines]
            )
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


def _found(folder: Path, fingerprint: str, calibrated: bool) -> Recorded | None:
    """What an earlier run left, if it was made from the same things."""
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
    except (OSError, ValueError, KeyError, TypeError):  # Not there, or not whole: made anew.
        return None
