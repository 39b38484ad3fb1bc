"""The command `serve`: an OpenAI-compatible server with watched answers, for a local model or an upstream."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from redflag.bounds import check_bounds, option
from redflag.errors import RedflagError
from redflag.guard.options import GuardOptions, PolicyOptions
from redflag.trace import Trace, write_traces

if TYPE_CHECKING:
    from redflag.backends import Backend
    from redflag.backends.remote import RemoteBackend
    from redflag.guard.guard import Guard
    from redflag.server.access import Limits
    from redflag.server.metrics import Metrics

_log = logging.getLogger(__name__)

API_KEYS = "REDFLAG_API_KEYS"
OPERATOR_KEY = "REDFLAG_OPERATOR_KEY"
_PROBED_AGAIN = 60.0  # seconds


@dataclass(kw_only=True)
class ServeArguments(GuardOptions):
    """Options of `redflag serve`. Keys are in the environment: `REDFLAG_API_KEYS` (comma-separated),
    `REDFLAG_OPERATOR_KEY`."""

    step_timeout: float = option(60.0, "upstream: seconds without a token after which it counts as lost.", above=0)
    keys: str | None = option(None, "YAML of keys with policies; read again on SIGHUP.")
    name: str | None = option(None, "The model's name; default: the upstream's or folder's.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8080, "Port to listen on; 0 takes a free one.")
    active: int = option(4, "Responses that a local model writes at once, in turns.")
    waiting: int = option(64, "Responses that wait for it; more are refused (429).")
    max_open: int = option(1024, "Open requests; more are refused (429).", least=1)
    max_body_bytes: int = option(4 << 20, "Longest request body (413).", least=1)
    max_tokens: int = option(4096, "Maximum of response tokens.", least=1)
    over_limit: Literal["clip", "refuse"] = option(
        "clip", "If a request asks for more: clip the answer, or refuse (400)."
    )
    unknown_fields: Literal["ignore", "refuse"] = option(
        "ignore", "Request fields that change no token: ignore (named in X-Ignored-Params), or refuse (400)."
    )
    allow_origins: str | None = option(None, "Web pages that may send requests (CORS): comma-separated origins, or *.")
    moderations: Literal["operator", "all"] = option(
        "operator", "Who may use /v1/moderations: the operator, or all clients."
    )
    default_tokens: int = option(1024, "max_tokens of requests without one.", least=1)
    prefill: bool = option(False, "Let clients write the beginning of the response.")
    max_choices: int = option(4, "Maximum of answers per request: prompts x n.", least=1)
    logprobs: bool = option(False, "Let clients ask for log-probabilities of shown tokens.")
    closing_text: str = option(
        " [The answer was stopped here by a safety check.]",
        "Appended to a chat's answer that is halted after some text; '' adds nothing.",
    )
    test_halt: bool = option(False, "Let the operator test a halt: X-Redflag-Test: halt, or halt-at-once.")
    halts_allowed: int | None = option(
        None, "Refuse (403) a conversation or end user after this many halts; default: never.", least=1
    )
    halts_forgotten: float = option(3600.0, "Seconds without a halt after which --halts_allowed counts from 0 again.")
    tool_format: Literal["auto", "hermes", "llama", "mistral", "harmony", "json", "off"] = option(
        "auto", "How the model calls tools; auto reads its template, off refuses tools."
    )
    body_timeout: float = option(30.0, "Seconds for a request body to arrive.", above=0)
    request_timeout: float = option(600.0, "Seconds for a whole response.", above=0)
    send_timeout: float = option(60.0, "Seconds for a client to read data.", above=0)
    ping: float = option(15.0, "Seconds between keep-alive comments of a stream.", above=0)
    grace: float = option(30.0, "Seconds that open responses have at shutdown.")
    audit: str | None = option(None, "Append overridden alarms and near misses to this audit log.")
    record: str | None = option(None, "Append the traces (numbers only) to this JSONL file.")
    playground: bool = option(False, "A page at / to try the guard (operator key).")
    json_logs: bool = option(False, "Log lines as JSON.")
    telemetry: bool = option(False, "Send OpenTelemetry spans (set by OTEL_* variables).")


ARGUMENTS = (ServeArguments, PolicyOptions)
POSITIONAL = None


def run(arguments: ServeArguments, policy: PolicyOptions) -> int:
    """Serves until SIGINT or SIGTERM.

    Raises:
        RedflagError: An option is invalid, or the watch cannot be attached: nothing was served.
    """
    try:
        from redflag.server import log
        from redflag.server.audit_log import AuditLog, check_system
        from redflag.server.exchange import Readiness
        from redflag.server.keys import Keys
        from redflag.server.metrics import Metrics
        from redflag.server.process import Process, bind, raise_file_limit
        from redflag.server.server import build_app
        from redflag.server.telemetry import Telemetry
    except ImportError as error:
        raise RedflagError(
            f"{error.name} is not installed, which the server needs: run `pip install redflag-llm[serve]`"
        ) from error

    log.setup(arguments.json_logs)
    limits = limits_of(arguments, os.environ)
    metrics, telemetry = Metrics(), Telemetry(arguments.telemetry)
    if arguments.audit is not None:
        check_system()
    raise_file_limit(2 * arguments.max_open)
    with bind(arguments.host, arguments.port, arguments.send_timeout) as listening:
        guard, probe = attach(arguments, policy, metrics)
        if arguments.name is None and arguments.upstream is not None:
            # Clients of the upstream use the model's name there.
            limits = replace(limits, name=cast("RemoteBackend", guard.backend).model or limits.name)
        if arguments.keys is not None:
            limits = replace(limits, keys=Keys(arguments.keys, guard))
        audit = None
        if arguments.audit is not None:
            audit = AuditLog(arguments.audit, guard.thresholds.values, on_failure=metrics.audit_failed)
        # Only an upstream can be restarted with other options.
        readiness = Readiness(probe, again=_PROBED_AGAIN if arguments.upstream is not None else None)
        readiness.trust()  # `attach` has just probed it
        app = build_app(
            guard,
            limits,
            metrics=metrics,
            readiness=readiness,
            audit=audit,
            telemetry=telemetry,
            record=recorder(arguments.record),
            playground=arguments.playground,
        )
        host, port = listening.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        _log.info("serving %s at %s", limits.name, where, extra={"model": limits.name, "url": where})
        if arguments.playground:
            tell_of_playground(where.removesuffix("v1"), limits)
        reload = limits.keys.reload if limits.keys is not None else None
        Process(app, app.state.server.stop, arguments.grace, reload).run(sockets=[listening])
    return 0


def limits_of(arguments: ServeArguments, environment: Mapping[str, str]) -> Limits:
    """The limits, from the options and the environment's keys.

    Raises:
        RedflagError: An option is out of bounds, or a key is too short.
    """
    from redflag.server.access import Limits
    from redflag.server.keys import SHORTEST_KEY

    check_bounds(arguments)
    keys = tuple(key.strip() for key in environment.get(API_KEYS, "").split(",") if key.strip())
    operator = environment.get(OPERATOR_KEY) or None
    for variable, key in (*((API_KEYS, key) for key in keys), (OPERATOR_KEY, operator)):
        if key is not None and len(key) < SHORTEST_KEY:
            raise RedflagError(
                f"keys in {variable} must have at least {SHORTEST_KEY} characters (got {len(key)}). Shorter keys can "
                "be guessed."
            )
    if arguments.playground and operator is None and arguments.host not in ("localhost", "127.0.0.1", "::1"):
        raise RedflagError(
            f"host must be 127.0.0.1 if the playground is on and there is no operator key (got {arguments.host!r}). "
            f"Everybody who can open the page reads flag probabilities. Set {OPERATOR_KEY}."
        )
    others: dict[str, Any] = {"api_keys": keys, "keys": None, "operator_key": operator}
    options: dict[str, Any] = {
        item.name: getattr(arguments, item.name) for item in fields(Limits) if item.name not in others
    }
    options["name"] = arguments.name or Path(arguments.model).resolve().name
    options["allow_origins"] = origins_of(arguments.allow_origins)
    return Limits(**options, **others)


def tell_of_playground(where: str, limits: Limits) -> None:
    """Logs the page's address, and a warning if no key protects what it shows."""
    _log.info("the playground is at %s", where, extra={"url": where})
    if limits.operator_key is None:
        _log.warning(
            "the playground shows flag probabilities and thresholds to everybody who can reach %s, since there is no "
            "operator key; set %s, or restrict access",
            where,
            OPERATOR_KEY,
        )


def origins_of(text: str | None) -> tuple[str, ...]:
    """Splits a comma-separated list of origins.

    Raises:
        RedflagError: One isn't an origin, so no browser would send it.

    Example:
        >>> origins_of("https://chat.example.org, app://obsidian.md")
        ('https://chat.example.org', 'app://obsidian.md')
    """
    origins = tuple(origin.strip() for origin in (text or "").split(",") if origin.strip())
    for origin in origins:
        scheme, separator, host = origin.partition("://")
        if origin not in ("*", "null") and not (scheme and separator and host and "/" not in host):
            raise RedflagError(
                f"allow_origins must be origins such as https://chat.example.org, or * (got {origin!r}). Browsers send "
                "scheme, host and port, without a path or a slash at the end."
            )
    return origins


def attach(
    arguments: ServeArguments, options: PolicyOptions, metrics: Metrics
) -> tuple[Guard, Callable[[], Awaitable[None]]]:
    """The guard, whose engine was probed, and the probe.

    Raises:
        RedflagError: There are no flags or thresholds, or the engine does not measure them.
    """
    from redflag.backends.open import for_event_loop

    guard = arguments.open_guard(options.policy(), options.second_judge(), step_timeout=arguments.step_timeout)
    guard.backend, probe = for_event_loop(cast("Backend", guard.backend), arguments.active, arguments.waiting)
    if (depth := getattr(guard.backend, "depth", None)) is not None:
        metrics.watch_queue(depth)
    return guard, probe


def recorder(path: str | None) -> Callable[[Trace], None] | None:
    """Appends traces to a file, if one is given.

    Raises:
        RedflagError: The file cannot be written.
    """
    if path is None:
        return None
    write_traces(path, [], append=True)

    def record(trace: Trace) -> None:
        try:
            write_traces(path, [trace], append=True)
        except RedflagError as error:  # a full disk must not end the service
            _log.error("%s", error)

    return record
