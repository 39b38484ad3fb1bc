"""What a request tells the in-engine halt: fields out of thresholds, settings out of fields, and what is refused.

Standard library only: the side that sends requests needs no torch, and the engine's front end reads the same settings.

A request carries its settings in vLLM's `extra_args`, over HTTP `vllm_xargs`:

| key | value |
|---|---|
| `redflag_flag_ids` | K token ids; without this key a request is left alone |
| `redflag_thresholds` | K scores, in the order of the ids |
| `redflag_action` | `halt` (default) or `continue`, one word or K: a flag that continues is hidden, and never forced |
| `redflag_run` | steps on end that must reach the threshold; 1 unless given |
| `redflag_ema_decay`, `redflag_ema_prior` | the monitor `ema`, with the numbers of `MonitorConfig` |
| `redflag_warm_up` | first steps that raise no alarm; 0 unless given |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.watching.monitor import AGGREGATIONS, MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

MAX_FLAGS = 16
"""Most flags per request: the engine keeps state of a fixed size for every request slot."""

_PREFIX = "redflag_"
_KEYS = frozenset(
    _PREFIX + name for name in ("flag_ids", "thresholds", "action", "run", "ema_decay", "ema_prior", "warm_up")
)

# Sampling parameters that vLLM applies to the logits before a custom processor sees them (both interfaces), with the
# value that does nothing. Any of them could hide the flag, or raise other tokens above it: the watch would be blind.
_BEFORE = (
    ("logit_bias", None),
    ("allowed_token_ids", None),
    ("bad_words", None),
    ("structured_outputs", None),
    ("trace_decode_token_ids", None),
    ("min_tokens", 0),
)
# The second interface applies penalties first as well; under the first they come after.
_BEFORE_IN_V2 = (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0))


@dataclass(frozen=True)
class HaltSettings:
    """What the engine watches in one response.

    Attributes:
        flag_ids: K token ids, 1 to `MAX_FLAGS`.
        thresholds: K scores at and above which a flag is forced.
        halts: K; False hides the flag without ever forcing it.
        monitor: `max`, `run` or `ema`, with its warm-up.

    Raises:
        RedflagError: For settings that contradict each other or that the engine cannot carry out.
    """

    flag_ids: tuple[int, ...]
    thresholds: tuple[float, ...]
    halts: tuple[bool, ...]
    monitor: MonitorConfig

    def __post_init__(self) -> None:
        ids, count = self.flag_ids, len(self.flag_ids)
        if not 1 <= count <= MAX_FLAGS or len(set(ids)) != count:
            raise RedflagError(
                f"the flag ids are {list(ids)}, which cannot be watched; give 1 to {MAX_FLAGS} different token ids"
            )
        if any(type(i) is not int or i < 0 for i in ids):
            raise RedflagError(f"the flag ids are {list(ids)}, but no token is called that; give whole numbers from 0")
        if len(self.thresholds) != count or len(self.halts) != count:
            raise RedflagError(
                f"{count} flags have {len(self.thresholds)} thresholds and {len(self.halts)} actions, so something "
                "would go unwatched; give one of each per flag"
            )
        for value in self.thresholds:
            if not 0 < value <= math.nextafter(1.0, 2.0):  # false for NaN
                raise RedflagError(
                    f"a threshold is {value!r}, which every score or none would reach; give numbers above 0 and at "
                    "most 1"
                )
        if not AGGREGATIONS[self.monitor.aggregation].in_engine:
            computed = ", ".join(name for name, facts in AGGREGATIONS.items() if facts.in_engine)
            raise RedflagError(
                f"the monitor is {self.monitor.aggregation!r}, which the in-engine halt cannot compute, so its "
                f"thresholds would mean nothing; calibrate with one of {computed}, or measure outside of the engine"
            )

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> HaltSettings | None:
        """Reads the settings of a request.

        Args:
            extra_args: vLLM's `SamplingParams.extra_args`; keys of others are ignored.

        Returns:
            None for a request that has none.

        Raises:
            RedflagError: For a key that is unknown or a value that cannot be.
        """
        args = {key: value for key, value in (extra_args or {}).items() if key.startswith(_PREFIX)}
        if not args:
            return None
        if unknown := sorted(set(args) - _KEYS):
            raise RedflagError(
                f"{unknown[0]} is no setting of the in-engine halt, so what it asks for would not be done; use "
                f"{', '.join(sorted(_KEYS))}"
            )
        ids = _numbers(args, "flag_ids", int)
        asked = args.get("redflag_action", "halt")
        actions = [asked] * len(ids) if isinstance(asked, str) else asked
        if not isinstance(actions, Sequence) or any(action not in ("halt", "continue") for action in actions):
            raise RedflagError(
                f"redflag_action is {asked!r}, so it is open what an alarm leads to; give halt or continue, once or "
                "per flag"
            )
        return cls(
            flag_ids=tuple(ids),
            thresholds=tuple(map(float, _numbers(args, "thresholds", int, float))),
            halts=tuple(action == "halt" for action in actions),
            monitor=_monitor(args),
        )

    def to_args(self) -> dict[str, str | int | float | list[str | int | float]]:
        """The settings as `extra_args`; `parse` reads them back."""
        args: dict[str, str | int | float | list[str | int | float]] = {
            "redflag_flag_ids": list(self.flag_ids),
            "redflag_thresholds": list(self.thresholds),
            "redflag_action": ["halt" if halts else "continue" for halts in self.halts],
        }
        monitor = self.monitor
        if monitor.aggregation == "run":
            args["redflag_run"] = monitor.window
        if monitor.aggregation == "ema":
            args["redflag_ema_decay"], args["redflag_ema_prior"] = monitor.decay, monitor.prior
        if monitor.warm_up:
            args["redflag_warm_up"] = monitor.warm_up
        return args


def request_fields(spec: FlagSpec, thresholds: Thresholds, policy: Policy | None = None) -> dict[str, Any]:
    """What to add to an OpenAI-compatible request so that vLLM itself halts it.

    The engine stops with `finish_reason` "stop" and `stop_reason` = a flag's id (`halted_by`). Every action but
    `continue` is a halt to the engine: what follows from it is decided outside.

    Args:
        spec: The model's flags, with their ids.
        thresholds: One value per category, for raw probabilities, with the monitor `max`, `run` or `ema`.
        policy: Whose actions say which flags halt; without one all do.

    Raises:
        RedflagError: When the engine could not do what the thresholds were calibrated for.

    Example:
        >>> import dataclasses
        >>> spec = FlagSpec(tuple(dataclasses.replace(flag, id=5) for flag in FlagSpec.of("harm").flags))
        >>> fields = request_fields(spec, Thresholds.manual(0.5, spec.categories))
        >>> fields["stop_token_ids"], fields["vllm_xargs"]["redflag_thresholds"]
        ([5], [0.5])
    """
    if set(spec.categories) != set(thresholds.values):
        raise RedflagError(
            f"the flags are {list(spec.categories)} but there are thresholds for {list(thresholds.values)}, so "
            "something would go unwatched; give exactly one threshold per flag"
        )
    if thresholds.logprob_mode != "raw":
        raise RedflagError(
            f"the thresholds belong to {thresholds.logprob_mode!r} probabilities, but the in-engine halt measures raw "
            "ones; calibrate on raw probabilities"
        )
    if policy is not None and policy.prompt is not None:
        raise RedflagError(
            "policy.prompt must be None (got thresholds). The engine has one threshold for every step: judge prompts "
            "in the guard, or leave them out"
        )
    settings = HaltSettings(
        flag_ids=spec.ids,
        thresholds=tuple(thresholds.values[category] for category in spec.categories),
        halts=tuple(policy is None or policy.decide(category) != "continue" for category in spec.categories),
        monitor=thresholds.monitor,
    )
    return {"stop_token_ids": list(spec.ids), "vllm_xargs": settings.to_args()}


def halted_by(stop_reason: object, spec: FlagSpec) -> str | None:
    """The category whose flag stopped a response; None for an ordinary end (`stop_reason` null, a text, another id)."""
    return next((flag.category for flag in spec.flags if flag.id is not None and flag.id == stop_reason), None)


def admit(params: Any, *, penalties_first: bool) -> HaltSettings | None:
    """The settings of a request, once it is sure that the engine can carry them out.

    Args:
        params: vLLM's `SamplingParams`.
        penalties_first: The engine applies penalties before its processors, as the second interface does.

    Returns:
        None for a request that has none; nothing is then demanded of it.

    Raises:
        RedflagError: For settings that cannot be, a flag that would not stop the engine, and a sampling parameter that
            would change the logits before they are measured.
    """
    settings = HaltSettings.parse(params.extra_args)
    if settings is None:
        return None
    if missing := sorted(set(settings.flag_ids) - set(params.stop_token_ids or ())):
        raise RedflagError(
            f"stop_token_ids lacks the flags {missing}, so the engine would write them and go on; list every flag"
        )
    if getattr(params, "include_stop_str_in_output", False):
        raise RedflagError(
            "include_stop_str_in_output is true, so a forced flag would be shown; leave it out of a watched request"
        )
    for name, neutral in _BEFORE + (_BEFORE_IN_V2 if penalties_first else ()):
        value = getattr(params, name, neutral)
        if value is not None and value != neutral and value != [] and value != {}:
            raise RedflagError(
                f"{name} is {value!r}, which changes the logits before the flags are measured, so no threshold would "
                "hold; leave it out of a watched request, or measure outside of the engine"
            )
    return settings


def _monitor(args: Mapping[str, Any]) -> MonitorConfig:
    run, warm_up = args.get("redflag_run", 1), args.get("redflag_warm_up", 0)
    if "redflag_ema_decay" not in args:
        if "redflag_ema_prior" in args:
            raise RedflagError("redflag_ema_prior has no redflag_ema_decay beside it, so it says nothing; give both")
        return MonitorConfig("max" if run == 1 else "run", window=run, warm_up=warm_up)
    if run != 1:
        raise RedflagError(
            f"redflag_run is {run!r} beside redflag_ema_decay, but a response has one monitor; give one of the two"
        )
    defaults = MonitorConfig()
    prior = args.get("redflag_ema_prior", defaults.prior)
    return MonitorConfig("ema", decay=args["redflag_ema_decay"], prior=prior, warm_up=warm_up)


def _numbers(args: Mapping[str, Any], name: str, *kinds: type) -> list[Any]:
    values = args.get(_PREFIX + name)
    # By `type`, not `isinstance`: true is no token id.
    if not isinstance(values, list | tuple) or any(type(value) not in kinds for value in values):
        raise RedflagError(
            f"{_PREFIX}{name} is {values!r}, so the response could not be watched; give a list of numbers, one per flag"
        )
    return list(values)
