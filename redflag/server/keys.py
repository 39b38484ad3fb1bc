"""Clients' keys in a YAML file, each with a policy of its own; read again on SIGHUP. Format: docs/clients.md, "Keys".

Settings that an entry leaves out are the server's. Changed thresholds have no promised false-alarm rate.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

SHORTEST_KEY = 16

_log = logging.getLogger(__name__)
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Key:
    """Settings for the requests with one key; `digest` is its SHA-256 in hexadecimal, None is the server's setting."""

    name: str
    digest: str
    thresholds: Thresholds
    policy: Policy
    max_tokens: int | None = None
    default_tokens: int | None = None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(min_length=1, max_length=64)]
    key: Annotated[str, Field(min_length=SHORTEST_KEY)] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    thresholds: dict[str, float] = {}
    action: str | None = None
    actions: dict[str, str] = {}
    replacement: str | None = None
    hold_back: int | None = None
    max_tokens: _Count | None = None
    default_tokens: _Count | None = None

    def checked(self, guard: Guard) -> Key:
        """The key, checked by the guard."""
        if (self.key is None) == (self.sha256 is None):
            raise RedflagError("exactly one of key and sha256 must be given")
        thresholds = _thresholds(guard.thresholds, self.factor, self.thresholds)
        changes: dict[str, Any] = {"default": self.action, "replacement": self.replacement, "hold_back": self.hold_back}
        policy = replace(
            guard.policy,
            actions={**guard.policy.actions, **self.actions},
            prompt=None if guard.policy.prompt is None else _thresholds(guard.policy.prompt, self.factor, {}),
            **{name: value for name, value in changes.items() if value is not None},
        )
        guard.check(policy, thresholds)
        digest = self.sha256 or digest_of(self.key or "")
        return Key(self.name, digest, thresholds, policy, self.max_tokens, self.default_tokens)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    keys: Annotated[list[_Entry], Field(min_length=1)]


class Keys:
    """The keys of a file, as of the last time that it was valid."""

    def __init__(self, path: str | Path, guard: Guard) -> None:
        """Reads the file; errors as `read_keys`."""
        self._path = path
        self._guard = guard
        self._keys = read_keys(path, guard)

    def reload(self) -> None:
        """Reads the file again; if it is invalid, logs that and changes nothing."""
        try:
            self._keys = read_keys(self._path, self._guard)
        except RedflagError as error:
            _log.error("the keys are unchanged: %s", error)
        else:
            _log.info("read %d keys from %s", len(self._keys), self._path)

    def find(self, sent: Sequence[str]) -> Key | None:
        """The key that a request sent; all are compared, so that the time taken tells nothing."""
        digests = [digest_of(one) for one in sent]
        matches = [key for key in self._keys if any([hmac.compare_digest(one, key.digest) for one in digests])]
        return matches[-1] if matches else None


def digest_of(key: str) -> str:
    """SHA-256 in hexadecimal.

    Example:
        >>> digest_of("a-key-of-16-or-more")[:12]
        'f545fe63f098'
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: str | Path, guard: Guard) -> tuple[Key, ...]:
    """Reads and checks a file of keys.

    Raises:
        RedflagError: It cannot be read, or an entry (named) is invalid.
    """
    import yaml

    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RedflagError(f"keys must be a readable file (got {path}: {error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # Only the place: the error's text quotes the file, and with it keys.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RedflagError(f"keys must be a YAML file (got {path}{where})") from None
    try:
        entries = _File.model_validate(record).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise RedflagError(f"{path}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    keys: list[Key] = []
    for number, entry in enumerate(entries):
        try:
            key = entry.checked(guard)
        except RedflagError as error:
            raise RedflagError(f"{path}: keys.{number} ({entry.name}): {error}") from error
        if any(key.name == other.name or key.digest == other.digest for other in keys):
            raise RedflagError(f"{path}: keys.{number} ({entry.name}) must have a name and a key of its own")
        keys.append(key)
    return tuple(keys)


def _thresholds(calibrated: Thresholds, factor: float, others: dict[str, float]) -> Thresholds:
    if unknown := sorted(set(others) - set(calibrated.values)):
        raise RedflagError(f"thresholds must be of the categories {', '.join(calibrated.values)} (got {unknown})")
    if factor == 1.0 and not others:
        return calibrated
    values: dict[str, Any] = {name: value * factor for name, value in calibrated.values.items()} | others
    return Thresholds(
        values,
        calibrated.monitor,
        run_id=calibrated.run_id,
        template_hash=calibrated.template_hash,
        logprob_mode=calibrated.logprob_mode,
        thoughts=None if calibrated.thoughts is None else _thresholds(calibrated.thoughts, factor, {}),
        memory=calibrated.memory,
    )
