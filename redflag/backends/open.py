"""Chooses the engine that measures the flags: a model in this process, or servers. No other module chooses.

Verbs and `Guard` call it with a folder and optional addresses. A further engine needs its own module, a branch here and
its options.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redflag.backends import AsyncBackend, Backend, ChatInput, Sampling
from redflag.bounds import option
from redflag.errors import RedflagError
from redflag.flags import FILE, FlagSpec, attach
from redflag.outbound import extra_headers, key_in
from redflag.prompt import render_prompt

if TYPE_CHECKING:
    from redflag.backends.hf import HFBackend
    from redflag.backends.upstreams import Upstreams


@dataclass(kw_only=True)
class UpstreamOptions:
    """Options for requests to the servers given as `upstream`; several verbs share them."""

    upstream_model: str | None = option(None, "upstream: the model's name there; default: its first.")
    upstream_key_env: str | None = option(None, "upstream: environment variable with its API key.")
    upstream_headers: dict[str, str] | None = option(
        None, "upstream: further headers, as JSON; ${NAME} is an environment variable."
    )

    def upstream_options(self) -> dict[str, Any]:
        """The options as arguments of `redflag.backends.remote.RemoteBackend`.

        Raises:
            RedflagError: An environment variable is not set, or a header is invalid.
        """
        return {
            "model": self.upstream_model,
            "api_key": key_in(self.upstream_key_env),
            "headers": extra_headers(self.upstream_headers, "upstream_headers"),
        }


def open_backend(
    directory: str | Path,
    upstream: str | None = None,
    *,
    device: str | None = "auto",
    dtype: Any = "auto",
    earlier: bool = False,
    **served: Any,
) -> tuple[Backend, Any, FlagSpec]:
    """Opens a backend that streams a flagged model's responses, and checks that it measures the flags.

    Args:
        directory: Folder written by `redflag train`; with `upstream` no weights are read.
        upstream: The server that runs the model; None = this process.
        device: Of a model in this process, as for `redflag.backends.load.load_flagged`; likewise `dtype`.
        earlier: Whether earlier answers of a conversation shall be measured (`Sampling.earlier`).
        **served: Options of `redflag.backends.remote.RemoteBackend`.

    Returns:
        Backend, tokenizer and flags.

    Raises:
        RedflagError: Files are missing or do not match, or the server does not measure the flags.
    """
    from redflag.backends.load import load_flagged, load_tokenizer

    if upstream is None:
        _refuse(served)
        return load_flagged(directory, device, dtype)
    from redflag.backends.remote import RemoteBackend
    from redflag.backends.remote_handshake import handshake
    from redflag.backends.remote_score import RememberingBackend

    tokenizer, spec, eos_ids = load_tokenizer(directory)
    backend = (RememberingBackend if earlier else RemoteBackend)(upstream, spec.ids, eos_ids, **served)
    if backend.route == "chat":
        turns = ({"role": "user", "content": "Hello."},)
        handshake(backend, chat=(ChatInput(turns), render_prompt(tokenizer, turns, spec)))
    else:
        handshake(backend)
    if isinstance(backend, RememberingBackend):
        backend.prepare()
    return backend, tokenizer, spec


def open_scorer(
    directory: str | Path,
    upstreams: Sequence[str] = (),
    *,
    device: str | None = "auto",
    dtype: Any = "auto",
    **served: Any,
) -> tuple[HFBackend | Upstreams, Any, FlagSpec]:
    """Opens a scorer of given responses: a model in this process, or any number of servers, to be closed.

    Arguments, result and errors are those of `open_backend`.
    """
    from redflag.backends.load import load_flagged, load_tokenizer

    if not upstreams:
        _refuse(served)
        return load_flagged(directory, device, dtype)
    from redflag.backends.upstreams import Upstreams

    tokenizer, spec, eos_ids = load_tokenizer(directory)
    return Upstreams(upstreams, spec, eos_ids, **served), tokenizer, spec


def open_writer(name: str | Path, *, device: str | None = "auto", dtype: Any = "auto") -> tuple[Backend, Any, FlagSpec]:
    """Opens a backend that completes texts: a model from a folder or the hub, flagged or not.

    Raises:
        RedflagError: The model does not load, or the device cannot be used.
    """
    from redflag.backends.hf import HFBackend
    from redflag.backends.load import load_flagged, read_model, to_device

    if (Path(name) / FILE).exists():
        return load_flagged(name, device, dtype)
    model, tokenizer = read_model(name, dtype)
    # The backend's contract requires a flag; this one is untrained, and never chosen.
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    return HFBackend(to_device(model, device), tokenizer, spec), tokenizer, spec


def event_loop_scorer(backend: AsyncBackend) -> Callable[[Sequence[int], Sequence[int]], Awaitable[Any]]:
    """A function that scores given responses with a server's engine, as made by `for_event_loop`.

    Returns:
        A function of prompt ids and T response ids that gives T x K flag probabilities; it raises what
        `redflag.backends.turns.Turns.score` or `redflag.backends.remote_score.score_response` does.
    """
    from redflag.backends.remote import RemoteBackend

    if not isinstance(backend, RemoteBackend):
        return getattr(backend, "score", None) or _no_scores
    from redflag.backends.remote_score import ServedScores

    return ServedScores(backend).score


async def _no_scores(prompt: Sequence[int], response: Sequence[int]) -> Any:
    raise RedflagError("scoring given responses is not supported by this engine.")


def _refuse(served: Mapping[str, Any]) -> None:
    if served:
        raise RedflagError(
            f"{', '.join(served)} must come with upstream. They are options of requests to a server. Give the server's "
            "address, or leave them out."
        )


def for_event_loop(backend: Backend, active: int, waiting: int) -> tuple[AsyncBackend, Callable[[], Awaitable[None]]]:
    """A backend for a server's event loop, and a function that checks again, later, that it measures.

    `active` and `waiting` as for `redflag.backends.turns.Turns`, for an engine in this process.
    """
    from redflag.backends.remote import RemoteBackend
    from redflag.backends.turns import Turns

    if isinstance(backend, RemoteBackend):
        from redflag.backends.remote_handshake import shake_hands

        return backend, partial(shake_hands, backend)
    turns = Turns(backend, active, waiting)

    async def step() -> None:
        steps = turns.astream([min(turns.eos_ids)], Sampling(max_new_tokens=1, temperature=0.0))
        try:
            async for _ in steps:
                return
        finally:
            await steps.aclose()
        raise ConnectionError("the engine gave no step")

    return turns, step
