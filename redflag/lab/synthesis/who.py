"""Whom the verb asks: the writing model and the judges, from the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from redflag.backends.outbound import key_in
from redflag.errors import RedflagError
from redflag.judges import Judge
from redflag.lab.synthesis.pace import Pace
from redflag.lab.synthesis.questions import Model

JudgeKind = Literal["none", "oracle", "endpoint", "model"]


def writer(
    model: str | None,
    url: str | None,
    *,
    key_env: str | None = None,
    concurrency: int = 8,
    per_minute: float | None = None,
    timeout: float = 120.0,
    retries: int = 5,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 16,
) -> Model:
    """The model that writes: behind an address, or in this process.

    Args:
        model: Its name at the address; without one a folder or hub name.
        url: An OpenAI-compatible server; None: this process.
        key_env: Environment variable with the API key.
        concurrency: Most requests at a time.
        per_minute: Most requests per minute.
        timeout: Seconds for one request.
        retries: Further tries of a question.
        options: Further fields of every request.
        device: Where a local model runs.
        dtype: The type of its weights.
        batch_size: Prompts that it completes side by side.

    Raises:
        RedflagError: Nobody is named, or whoever is named cannot be asked.
    """
    if not model:
        raise RedflagError("nobody is named who writes: give --model FOLDER, or --url ADDRESS and --model NAME")
    if url is None:
        from redflag.lab.synthesis.local import load_local

        return load_local(model, device=device, dtype=dtype, batch_size=batch_size)
    from redflag.lab.synthesis.endpoint import Endpoint

    return Endpoint(
        url,
        model,
        api_key=key_in(key_env, "key_env"),
        concurrency=concurrency,
        pace=Pace(per_minute),
        timeout=timeout,
        retries=retries,
        options=options,
    )


def judge_of(
    kind: JudgeKind,
    url: str | None = None,
    name: str | None = None,
    *,
    key_env: str | None = None,
    guard: bool = False,
    max_tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    device: str = "auto",
) -> Judge | None:
    """A judge; None for `none`.

    Args:
        kind: `oracle` is the nano world's, `endpoint` a server, `model` a guard model in this process.
        url: The server's address.
        name: The model's name there, or its folder.
        key_env: Environment variable with the API key.
        guard: The server runs a guard model whose chat template is its rubric (`unsafe`, `safe`).
        max_tokens: Most tokens of its answer; None: those of an answer without thoughts.
        options: Further fields of the request.
        headers: Sent with every request.
        device: Where a model in this process runs.

    Raises:
        RedflagError: Something is missing, or it cannot be used.
    """
    if kind == "none":
        return None
    if kind == "oracle":
        from redflag.lab.nano.judge import NanoOracle

        return NanoOracle()
    if not name or (kind == "endpoint" and not url):
        raise RedflagError(f"the judge is {kind}, which needs its name{' and its address' * (kind == 'endpoint')}")
    if kind == "model":
        from redflag.judges.model import ModelJudge

        return ModelJudge(name, device=device)
    from redflag.judges.endpoint import EndpointJudge

    asked: dict[str, Any] = {"yes": "unsafe", "no": "safe", "chat": True} if guard else {}
    if max_tokens is not None:
        asked["max_tokens"] = max_tokens
    key = key_in(key_env, "judge_key_env")
    return EndpointJudge(
        str(url), name, api_key=key, timeout=60.0, retries=4, options=options, headers=headers, **asked
    )
