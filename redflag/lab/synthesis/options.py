"""Options of a synthesis: how much is generated, and by which writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redflag.bounds import check_bounds, option
from redflag.errors import RedflagError
from redflag.lab.synthesis.onset import Search
from redflag.lab.synthesis.questions import Writer
from redflag.outbound import key_in


@dataclass(kw_only=True)
class Settings:
    """Counts and sampling settings; recorded in synthesize.json."""

    requests: int = option(100, "Requests of all classes, before filtering.", least=1)
    answers: int = option(1, "Answers per request.", least=1)
    temperatures: list[float] = option([0.7, 1.0], "Used in turn.")
    max_tokens: int = option(512, "Maximum tokens of an answer.", least=1)
    paraphrases: int = option(0, "Paraphrases of each request.", least=0)
    languages: list[str] = option([], "Languages to translate everything into.")
    wrapped: float = option(0.0, "Share repeated in a jailbreak wrapper.", least=0, most=1)
    typos: float = option(0.0, "Share repeated with typing errors.", least=0, most=1)
    near: float = option(0.8, "Similarity from which texts count as equal.", above=0, most=1)
    shortest: int = option(8, "Minimum length of an answer, characters.")
    longest: int = option(20_000, "Maximum length of an answer, characters.")
    search: Search = option("first", "Onsets: every sentence, or halving (if harm is never taken back).")
    lang: str = option("en", "Language of the constitution.")
    seed: int = option(0, "Same seed, same questions.")
    workers: int = option(8, "Threads that ask the judge.", least=1)

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.temperatures or not all(0 <= value < float("inf") for value in self.temperatures):
            raise RedflagError(f"temperatures must be one or more numbers from 0 (got {self.temperatures}).")


@dataclass(kw_only=True)
class WriterOptions:
    """The model that writes: behind a URL, or in this process."""

    model: str | None = option(None, "Writer: folder or hub name, or name at url.")
    url: str | None = option(None, "OpenAI-compatible server that runs it (http://HOST/v1).")
    key_env: str | None = option(None, "... environment variable with its API key.")
    concurrency: int = option(8, "... maximum concurrent requests.")
    requests_per_minute: float | None = option(None, "... maximum requests per minute.")
    timeout: float = option(120.0, "... seconds for one request.")
    retries: int = option(5, "... further tries when it is lost, busy or fails.")
    options: dict[str, Any] | None = option(None, "... further fields of every request.")
    device: str = option("auto", "Where local models run: auto, cpu, cuda, ...")
    dtype: str = option("auto", "Their weights: auto, float32, bfloat16.")
    batch_size: int = option(16, "Prompts per batch of a local model.")

    def open_writer(self) -> Writer:
        """Loads the model, or prepares requests to its server.

        Raises:
            RedflagError: No writer is named, or it cannot be used.
        """
        if not self.model:
            raise RedflagError("a writer must be named. Add --model FOLDER, or --url ADDRESS and --model NAME.")
        if self.url is None:
            from redflag.lab.synthesis.local import load_local

            return load_local(self.model, device=self.device, dtype=self.dtype, batch_size=self.batch_size)
        from redflag.lab.synthesis.remote_writer import Pace, RemoteWriter

        return RemoteWriter(
            self.url,
            self.model,
            api_key=key_in(self.key_env, "key_env"),
            concurrency=self.concurrency,
            pace=Pace(self.requests_per_minute),
            timeout=self.timeout,
            retries=self.retries,
            options=self.options,
        )
