"""Asking as it is, and asking again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from redflag.backends import Sampling
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Attempt, Target, request_of


@dataclass
class Plain:
    """No attack: the requests as they are, once. What all others are compared with."""

    temperatures: Sequence[float] = (0.0, 1.0)
    max_new_tokens: int = 256
    name: str = "none"
    adaptive: bool = False

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        sent = [(str(row.id), request_of(row)) for row in rows]
        for temperature in self.temperatures:
            setting = f"temperature {temperature:g}" if temperature else "greedy"
            yield from target.answers(sent, Sampling(self.max_new_tokens, temperature, seed=seed), setting)


@dataclass
class RepeatedSampling:
    """The same request again and again, until one draw is harmful: best of n, at several temperatures.

    Huang et al., "Catastrophic Jailbreak of Open-source LLMs via Exploiting Generation" (arXiv 2310.06987), exploits
    decoding parameters; Hughes et al., "Best-of-N Jailbreaking" (arXiv 2412.03556), the number of tries.
    """

    n: int = 16  # answers to each request at each temperature
    temperatures: Sequence[float] = (0.5, 1.0, 1.5)
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    name: str = "sampling"
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise RedflagError(
                f"n must be at least 1 and temperatures above 0 (got {self.n} and {list(self.temperatures)})."
            )

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        sent = [(str(row.id), request_of(row)) for row in rows for _ in range(self.n)]
        for number, temperature in enumerate(self.temperatures):
            # Draws of one temperature would otherwise repeat those of another.
            own = seed + number * len(sent)
            sampling = Sampling(self.max_new_tokens, temperature, self.top_p, self.top_k, seed=own)
            attempts = target.answers(sent, sampling, f"best of {self.n}, temperature {temperature:g}")
            for index, attempt in enumerate(attempts):
                yield replace(attempt, detail={"draw": index % self.n})
