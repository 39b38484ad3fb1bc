"""Requests for the in-engine halt: from thresholds to request fields, from fields to settings, and their checks.

Standard library only: the side that sends requests needs no torch, and the engine's front end reads the same settings.

A request carries its settings in vLLM's `extra_args`, over HTTP `vllm_xargs`:

| key | value |
|---|---|
| `redflag_flag_ids` | K token ids; without this key a request is not watched |
| `redflag_thresholds` | K scores, in the order of the ids |
| `redflag_action` | `halt` (default) or `continue`, one word or K: a flag that continues is hidden, and never forced |
| `redflag_run` | consecutive steps that must reach the threshold; default 1 |
| `redflag_ema_decay`, `redflag_ema_prior` | the monitor `ema`, with the numbers of `MonitorConfig` |
| `redflag_warm_up` | first steps that raise no alarm; default 0 |
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
"""Maximum number of flags per request: the engine keeps state of a fixed size for every request slot."""

_PREFIX = "redflag_"
_KEYS = frozenset(
    _PREFIX + name for name in ("flag_ids", "thresholds", "action", "run", "ema_decay", "ema_prior", "warm_up")
)

# Sampling parameters that vLLM applies to the logits before a custom processor sees them (both interfaces), with their
# neutral values. Any of them could hide the flag, or raise other tokens above it.
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
        RedflagError: Settings contradict each other or are not supported.
    """

    flag_ids: tuple[int, ...]
    thresholds: tuple[float, ...]
    halts: tuple[bool, ...]
    monitor: MonitorConfig

    def __post_init__(self) -> None:
        ids, count = self.flag_ids, len(self.flag_ids)
        if not 1 <= count <= MAX_FLAGS or len(set(ids)) != count:
            raise RedflagError(f"flag ids must be 1 to {MAX_FLAGS} different token ids (got {list(ids)}).")
        if any(type(i) is not int or i < 0 for i in ids):
            raise RedflagError(f"flag ids must be whole numbers of at least 0 (got {list(ids)}).")
        if len(self.thresholds) != count or len(self.halts) != count:
            raise RedflagError(
                f"there must be one threshold and one action for each of {count} flags (got {len(self.thresholds)} and "
                f"{len(self.halts)})."
            )
        for value in self.thresholds:
            if not 0 < value <= math.nextafter(1.0, 2.0):  # false for NaN
                raise RedflagError(f"thresholds must be above 0 and at most 1 (got {value!r}).")
        if not AGGREGATIONS[self.monitor.aggregation].in_engine:
            computed = ", ".join(name for name, facts in AGGREGATIONS.items() if facts.in_engine)
            raise RedflagError(
                f"the monitor must be one of {computed} for the in-engine halt (got {self.monitor.aggregation!r}). "
                "Calibrate with one of these, or measure outside of the engine."
            )

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> HaltSettings | None:
        """Reads the settings of a request from vLLM's `SamplingParams.extra_args`, whose other keys are ignored.

        Returns:
            None for a request without settings.

        Raises:
            RedflagError: A key is unknown or a value is invalid.
        """
        args = {key: value for key, value in (extra_args or {}).items() if key.startswith(_PREFIX)}
        if not args:
            return None
        if unknown := sorted(set(args) - _KEYS):
            raise RedflagError(
                f"settings of the in-engine halt must be among {', '.join(sorted(_KEYS))} (got {unknown[0]})."
            )
        ids = _numbers(args, "flag_ids", int)
        action = args.get("redflag_action", "halt")
        actions = [action] * len(ids) if isinstance(action, str) else action
        if not isinstance(actions, Sequence) or any(action not in ("halt", "continue") for action in actions):
            raise RedflagError(f"redflag_action must be halt or continue, once or per flag (got {action!r}).")
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
    """Fields to add to an OpenAI-compatible request so that vLLM itself halts it.

    The engine stops with `finish_reason` "stop" and `stop_reason` = a flag's id (`halted_by`). To the engine every
    action but `continue` is a halt; the rest happens outside.

    Args:
        thresholds: For raw probabilities, with the monitor `max`, `run` or `ema`.
        policy: Its actions say which flags halt; None = all.

    Raises:
        RedflagError: The engine cannot compute what the thresholds were calibrated for.

    Example:
        >>> import dataclasses
        >>> spec = FlagSpec(tuple(dataclasses.replace(flag, id=5) for flag in FlagSpec.of("harm").flags))
        >>> fields = request_fields(spec, Thresholds.manual(0.5, spec.categories))
        >>> fields["stop_token_ids"], fields["vllm_xargs"]["redflag_thresholds"]
        ([5], [0.5])
    """
    if set(spec.categories) != set(thresholds.values):
        raise RedflagError(
            f"thresholds must name exactly the flags {list(spec.categories)} (got {list(thresholds.values)}). A flag "
            "without threshold would go unwatched."
        )
    if thresholds.logprob_mode != "raw":
        raise RedflagError(
            "thresholds for the in-engine halt must be calibrated on raw probabilities (got "
            f"{thresholds.logprob_mode!r})."
        )
    if thresholds.memory is not None:
        raise RedflagError(
            f"memory must be off for the in-engine halt (got {thresholds.memory!r}). The engine knows one response: "
            "watch from outside, or calibrate without memory."
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
    """The settings of a request, checked against its other parameters.

    Args:
        params: vLLM's `SamplingParams`.
        penalties_first: Whether the engine applies penalties before its processors, as the second interface does.

    Returns:
        None for a request without settings, whose other parameters are not checked.

    Raises:
        RedflagError: Settings are invalid, a flag would not stop the engine, or a sampling parameter would change the
            logits before they are measured.
    """
    settings = HaltSettings.parse(params.extra_args)
    if settings is None:
        return None
    if missing := sorted(set(settings.flag_ids) - set(params.stop_token_ids or ())):
        raise RedflagError(f"stop_token_ids must list every flag (missing {missing}). The engine would not stop at it.")
    if getattr(params, "include_stop_str_in_output", False):
        raise RedflagError(
            "include_stop_str_in_output must be false in a watched request. A forced flag would be shown."
        )
    for name, neutral in _BEFORE + (_BEFORE_IN_V2 if penalties_first else ()):
        value = getattr(params, name, neutral)
        if value is not None and value != neutral and value != [] and value != {}:
            raise RedflagError(
                f"{name} must be left out of a watched request (got {value!r}). It changes the logits before the flags "
                "are measured. Leave it out, or measure outside of the engine."
            )
    return settings


def _monitor(args: Mapping[str, Any]) -> MonitorConfig:
    run, warm_up = args.get("redflag_run", 1), args.get("redflag_warm_up", 0)
    if "redflag_ema_decay" not in args:
        if "redflag_ema_prior" in args:
            raise RedflagError("redflag_ema_prior must come with redflag_ema_decay.")
        return MonitorConfig("max" if run == 1 else "run", window=run, warm_up=warm_up)
    if run != 1:
        raise RedflagError(
            f"redflag_run must not come with redflag_ema_decay (got {run!r}). A response has one monitor."
        )
    defaults = MonitorConfig()
    prior = args.get("redflag_ema_prior", defaults.prior)
    return MonitorConfig("ema", decay=args["redflag_ema_decay"], prior=prior, warm_up=warm_up)


def _numbers(args: Mapping[str, Any], name: str, *kinds: type) -> list[Any]:
    values = args.get(_PREFIX + name)
    # By `type`, not `isinstance`: true is not a token id.
    if not isinstance(values, list | tuple) or any(type(value) not in kinds for value in values):
        raise RedflagError(f"{_PREFIX}{name} must be a list of numbers, one per flag (got {values!r}).")
    return list(values)
