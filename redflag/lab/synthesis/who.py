"""Opens the writer named by command-line options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redflag.errors import RedflagError
from redflag.lab.synthesis.pace import Pace
from redflag.lab.synthesis.questions import Model
from redflag.outbound import key_in


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
        model: Its name at the address; without an address a folder or hub name.
        url: An OpenAI-compatible server; None = this process.
        key_env: Environment variable with the API key.
        concurrency: Maximum number of concurrent requests.
        per_minute: Maximum number of requests per minute.
        timeout: Seconds for one request.
        retries: Further tries of a question.
        options: Further fields of every request.
        device: Device of a local model.
        dtype: The type of its weights.
        batch_size: Prompts per batch of a local model.

    Raises:
        RedflagError: No writer is named, or it cannot be reached.
    """
    if not model:
        raise RedflagError("a writer must be named. Add --model FOLDER, or --url ADDRESS and --model NAME.")
    if url is None:
        from redflag.lab.synthesis.local import load_local

        return load_local(model, device=device, dtype=dtype, batch_size=batch_size)
    from redflag.lab.synthesis.remote_writer import Endpoint

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
