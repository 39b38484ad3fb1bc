"""Runs attacks, saves every attempt on disk, and resumes interrupted runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.files import keep_json
from redflag.judges import Judge
from redflag.judges.cache import CachedJudge
from redflag.lab.attacks import Attack, Attempt, Target
from redflag.lab.attacks.autorap import AutoRAP
from redflag.lab.attacks.buildup import BuildUp
from redflag.lab.attacks.embedding import EmbeddingAttack
from redflag.lab.attacks.finetune import FineTune
from redflag.lab.attacks.gcg import GCG
from redflag.lab.attacks.judging import Judged, entries, judge_attempts, not_run
from redflag.lab.attacks.pair import pair
from redflag.lab.attacks.prefill import AffirmativeOpening, Prefill
from redflag.lab.attacks.rap import RAP, follow_oracle
from redflag.lab.attacks.sampling import Plain, RepeatedSampling
from redflag.lab.attacks.suppress import LogitBias, SuppressByWords
from redflag.lab.attacks.wrappers import NANO_WRAPPERS, Wrappers
from redflag.progress import Progress

FORMAT = 1
# Attacks that need no outside model, in the order of the table. Their names in results are these.
ATTACKS: dict[str, Callable[..., Attack]] = {
    "none": Plain,
    "prefill": Prefill,
    "opening": AffirmativeOpening,
    "sampling": RepeatedSampling,
    "build-up": BuildUp,
    "wrapper": Wrappers,
    "suppress by words": SuppressByWords,
    "logit bias": LogitBias,
    "RAP": RAP,
    "GCG": partial(GCG, adaptive=False),
    "GCG, adaptive": GCG,
    "embedding": EmbeddingAttack,
    "AutoRAP": AutoRAP,
    "fine-tuning": FineTune,
}
# Rows at a time: None (all) for attacks that train on them, few for those that take long with each.
UNITS: dict[type, int | None] = {AutoRAP: None, FineTune: None, RAP: 8, GCG: 4, EmbeddingAttack: 4}
# Attacks without the guard in their loop: what they send does not depend on its thresholds.
UNGUARDED = (
    *(Plain, Prefill, AffirmativeOpening, RepeatedSampling, BuildUp, Wrappers, SuppressByWords, LogitBias),
    *(GCG, EmbeddingAttack, FineTune),
)
# Attacks that need an outside model, named in their options.
OUTSIDE: dict[str, Callable[..., Attack]] = {"PAIR": pair}
# Options for the nano world, where the longest answer has 90 tokens.
NANO_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"max_new_tokens": 96} for name in ("none", "prefill", "opening", "build-up", "suppress by words")},
    "wrapper": {"max_new_tokens": 96, "wrappers": NANO_WRAPPERS},
    "sampling": {"max_new_tokens": 96, "n": 10},
    "logit bias": {"max_new_tokens": 96, "most": 16},
    "RAP": {"chooser": follow_oracle},
}


def make_attacks(
    names: Sequence[str] = ("all",), options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Attack]:
    """Attacks by name."""
    available = {**ATTACKS, **OUTSIDE}
    selected = list(dict.fromkeys(name for option in names for name in (ATTACKS if option == "all" else (option,))))
    for name in (*selected, *(options or {})):
        if name not in available:
            raise RedflagError(f"attacks must be all, or among {', '.join(available)} (got {name!r}).")
    attacks = []
    for name in selected:
        try:
            attacks.append(available[name](**(options or {}).get(name, {})))
        except TypeError as error:
            raise RedflagError(f"invalid options of the attack {name!r} ({error}).") from error
    return attacks


@dataclass(frozen=True)
class AttackResult:
    """The results of one attack."""

    attack: Attack
    judged: list[Judged]
    entries: list[dict[str, Any]]  # its lines of the attack table
    seconds: float  # of the attempts, all runs together


def run_attacks(
    target: Target,
    attacks: Sequence[Attack],
    rows: Sequence[Row],
    judge: Judge,
    out_dir: str | Path,
    seed: int = 0,
    *,
    unit: int = 64,
    workers: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> list[AttackResult]:
    """Runs the attacks one after the other.

    Each attack's attempts are written to a file `<attack>.jsonl`: its settings, then the attempts, and a line after
    every unit of rows. A killed run loses the current unit, and the next run repeats it: the file is then the same byte
    for byte as without the kill. Verdicts are cached in `verdicts.jsonl`.

    An attack may state how many rows it takes at once (`unit`, None = all, because it learns from them). If the target
    does not meet an attack's requirements, its line in the table says so, and the others run.

    Args:
        target: The model, and the guard with `thresholds` and `policy` under which releases are replayed.

    Raises:
        RedflagError: There are no rows, a row is harmless, or rows or attacks share a name.
    """
    rows = named_rows(rows)
    names = [re.sub(r"[^a-z0-9]+", "-", attack.name.lower()).strip("-") for attack in attacks]
    if len(set(names)) != len(names):
        raise RedflagError(f"each attack must have its own name (got {names}). They would write the same file.")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cached = judge if isinstance(judge, CachedJudge) else CachedJudge(judge, folder / "verdicts.jsonl")
    results = []
    for attack, name in zip(attacks, names, strict=True):
        path = folder / f"{name}.jsonl"
        try:
            attempts, seconds = record(target, attack, rows, path, seed, unit=unit)
        except NotPossibleError as error:
            log(f"{attack.name}: did not run: {error}")
            results.append(AttackResult(attack, [], [not_run(attack, rows, str(error))], 0.0))
            continue
        judged = judge_attempts(attack, attempts, rows, cached, target, workers=workers)
        table = entries(attack, judged, rows, seconds=seconds)
        log(f"{attack.name}: {len(attempts)} attempts in {seconds:.1f} s")
        results.append(AttackResult(attack, judged, table, seconds))
    return results


class NotPossibleError(RedflagError):
    """The target does not meet an attack's requirements."""


def record(
    target: Target, attack: Attack, rows: Sequence[Row], path: Path, seed: int, *, unit: int = 64
) -> tuple[list[Attempt], float]:
    """Makes the attempts that are not yet in the file.

    A file made with other settings, rows or, if the attack meets the guard, thresholds is renamed to
    `<name>.old.jsonl`.

    Args:
        seed: The seed of a unit of rows is derived from this one, the attack's name and the unit's first row.

    Returns:
        All attempts, and the seconds they took.

    Raises:
        NotPossibleError: The attack refused before its first attempt.
    """
    size = getattr(attack, "unit", UNITS.get(type(attack), unit)) or len(rows)
    units = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    head = _head(target, attack, rows, seed, size)
    saved = _read(path, head)
    if saved is None:
        os.replace(path, path.with_suffix(".old.jsonl"))
    attempts, done, end = saved or ([], 0, 0)
    clock = path.with_suffix(".seconds.json")
    seconds = float(json.loads(clock.read_text(encoding="utf-8"))["seconds"]) if done and clock.exists() else 0.0
    if done == len(units):
        return attempts, seconds
    with (
        open(path, "r+b" if end else "wb") as file,
        Progress(attack.name, len(rows), "rows", sum(map(len, units[:done]))) as progress,
    ):
        # Behind the last finished unit a killed run may have left a part of the next one.
        file.truncate(end)
        file.seek(end)
        if not end:
            _write(file, head)
        for number in range(done, len(units)):
            began = time.perf_counter()
            attacked: set[str] = set()
            try:
                for attempt in attack.run(target, units[number], _unit_seed(seed, attack, units[number])):
                    _write(file, vars(attempt))
                    attempts.append(attempt)
                    attacked.add(attempt.request)
                    # The rows of an attempt may have more of them to come, so the unit ends with its last line alone.
                    seen = min(number * size + len(attacked), len(rows) - 1)
                    progress(seen, f"{len(attempts)} attempts")
            except RedflagError as error:
                if attempts or isinstance(error, NotPossibleError):
                    raise
                raise NotPossibleError(str(error)) from error
            seconds += time.perf_counter() - began
            keep_json(clock, {"seconds": seconds})
            _write(file, {"unit": number, "rows": len(units[number])})
            os.fsync(file.fileno())
            progress(sum(map(len, units[: number + 1])), f"{len(attempts)} attempts")
    return attempts, seconds


def named_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with a unique name."""
    named = [row if row.id is not None else replace(row, id=f"row-{index}") for index, row in enumerate(rows)]
    if not named:
        raise RedflagError("there must be harmful rows to attack with (got none).")
    if harmless := [row.id for row in named if not row.harmful]:
        raise RedflagError(f"rows to attack with must be harmful (got the harmless row {harmless[0]!r}).")
    if len({row.id for row in named}) != len(named):
        raise RedflagError("each row must have its own id (got one twice). Their attempts would be mixed up.")
    return named


def _unit_seed(seed: int, attack: Attack, rows: Sequence[Row]) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {attack.name} {rows[0].id}".encode()).digest()[:6], "big")


def _head(target: Target, attack: Attack, rows: Sequence[Row], seed: int, size: int) -> dict[str, Any]:
    """All settings that the attempts depend on, as far as JSON can hold them."""
    thresholds = target.thresholds.to_dict() if target.thresholds else None
    settings = {
        "attack": f"{type(attack).__module__}.{type(attack).__qualname__}",
        "options": {
            key: _digest(value) if isinstance(value, Sequence) and value and isinstance(value[0], Row) else value
            for key, value in vars(attack).items()
            if not key.startswith("_")
        },
        "rows": _digest(rows),
        "seed": seed,
        "unit": size,
        "model": [target.spec.run_id, list(target.spec.ids)],
        "guard": None if isinstance(attack, UNGUARDED) else [thresholds, target.policy],
        "batch_size": target.batch_size,
    }
    text = json.dumps(settings, sort_keys=True, default=_described)
    return {"format": FORMAT, "attack": attack.name, "made_with": json.loads(text)}


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row.to_dict() for row in rows]).encode()).hexdigest()


def _described(value: object) -> Any:
    """A setting of a type that JSON lacks. Different ones may look the same; equal ones never differ."""
    if isinstance(identity := getattr(value, "identity", None), str):
        return identity
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Path):
        return str(value)
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _read(path: Path, head: dict[str, Any]) -> tuple[list[Attempt], int, int] | None:
    """The attempts of finished units, the number of units, and where in the file they end; None: other settings."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0, 0
    attempts: list[Attempt] = []
    unit: list[Attempt] = []
    done = end = position = 0
    for number, line in enumerate(content.splitlines(keepends=True)):
        position += len(line)
        if not line.endswith(b"\n"):  # cut off
            break
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise RedflagError(f"line {number + 1} of {path} must be JSON ({error}). Move the file away.") from error
        if number == 0:
            if entry != head:
                return None
            end = position
        elif "unit" in entry:
            attempts, unit = attempts + unit, []
            done, end = entry["unit"] + 1, position
        else:
            entry["flag_probs"] = [tuple(probs) for probs in entry["flag_probs"]]
            unit.append(Attempt(**entry))
    return attempts, done, end


def _write(file: IO[bytes], entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry).encode() + b"\n")
    file.flush()
