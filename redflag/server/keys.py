"""Clients' keys in a file, each with a policy of its own; read again on SIGHUP.

```yaml
keys:
  - name: support-chat            # in traces and logs, in place of the key
    sha256: 5e88...               # of the key, in hexadecimal; or the key itself: `key: ...`
    factor: 0.5                   # times every threshold: below 1 it alarms earlier
  - name: red-team
    key: a-key-of-16-or-more
    thresholds: {weapons: 0.9}    # in place of the calibrated ones
    action: replace               # actions, replacement and hold_back as the options of `redflag serve`
    actions: {fraud: continue}
    replacement: I had better not say that.
    hold_back: 8
    max_tokens: 256
    default_tokens: 128
```

What is not given is as for everybody. Thresholds that are not the calibrated ones promise no false-alarm rate.
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
    """What holds for the requests that show one key.

    Attributes:
        name: Its name, which is no secret.
        digest: SHA-256 of the key, in hexadecimal.
        thresholds: Where alarms begin.
        policy: What they lead to.
        max_tokens: Most response tokens; None: as for everybody.
        default_tokens: Response tokens where the client asks for no number; None: as for everybody.
    """

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

    def made(self, guard: Guard) -> Key:
        """The key, if the guard can do what it says."""
        if (self.key is None) == (self.sha256 is None):
            raise RedflagError("key or sha256 must be given, one of them")
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
    """The keys of a file, as it was when it was last read and right."""

    def __init__(self, path: str | Path, guard: Guard) -> None:
        """Reads the file.

        Raises:
            RedflagError: It cannot be read, or an entry (named) is wrong.
        """
        self._path = path
        self._guard = guard
        self._keys = read_keys(path, guard)

    def reload(self) -> None:
        """Reads the file again; if it is wrong now, the log says so and nothing changes."""
        try:
            self._keys = read_keys(self._path, self._guard)
        except RedflagError as error:
            _log.error("the keys stay as they were: %s", error)
        else:
            _log.info("read %d keys from %s", len(self._keys), self._path)

    def find(self, given: Sequence[str]) -> Key | None:
        """The key among what a request shows; all are compared, so that the time taken tells nothing."""
        shown = [digest_of(one) for one in given]
        found = None
        for key in self._keys:
            if any([hmac.compare_digest(one, key.digest) for one in shown]):
                found = key
        return found


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
        RedflagError: As `Keys`.
    """
    import yaml

    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RedflagError(f"keys names {path}, which cannot be read ({error.strerror}); check its name") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # What it says of the place is enough: its other words quote the file, and with it keys.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RedflagError(f"keys names {path}{where}, which is not YAML; correct it") from None
    try:
        entries = _File.model_validate(record).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise RedflagError(f"{path}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    made: list[Key] = []
    for number, entry in enumerate(entries):
        try:
            key = entry.made(guard)
        except RedflagError as error:
            raise RedflagError(f"{path}: keys.{number} ({entry.name}): {error}") from error
        if any(key.name == other.name or key.digest == other.digest for other in made):
            raise RedflagError(f"{path}: keys.{number} ({entry.name}) must have a name and a key of its own")
        made.append(key)
    return tuple(made)


def _thresholds(calibrated: Thresholds, factor: float, given: dict[str, float]) -> Thresholds:
    if unknown := sorted(set(given) - set(calibrated.values)):
        raise RedflagError(f"thresholds must be of the categories {', '.join(calibrated.values)} (got {unknown})")
    if factor == 1.0 and not given:
        return calibrated
    values: dict[str, Any] = {name: value * factor for name, value in calibrated.values.items()} | given
    return Thresholds(
        values,
        calibrated.monitor,
        run_id=calibrated.run_id,
        template_hash=calibrated.template_hash,
        logprob_mode=calibrated.logprob_mode,
        thoughts=None if calibrated.thoughts is None else _thresholds(calibrated.thoughts, factor, {}),
        memory=calibrated.memory,
    )
