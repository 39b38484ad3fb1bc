"""Which of several processes this is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from redflag.errors import RedflagError


@dataclass(frozen=True)
class World:
    """Which of how many processes this is.

    Attributes:
        rank: 0 to size - 1.
        size: Number of processes.
        local_rank: The same among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> World:
        """As `accelerate launch` and `torchrun` say it: RANK, WORLD_SIZE, LOCAL_RANK.

        Raises:
            RedflagError: They contradict each other.

        Example:
            >>> World.here({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
            World(rank=1, size=4, local_rank=1)
        """
        rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        local = environment.get("LOCAL_RANK", rank)
        if not (rank.isdecimal() and size.isdecimal() and local.isdecimal() and int(rank) < int(size)):
            raise RedflagError(
                f"RANK is {rank!r}, WORLD_SIZE {size!r} and LOCAL_RANK {local!r}, which is no place among processes: "
                "start them with `accelerate launch`, or unset these variables"
            )
        return cls(int(rank), int(size), int(local))

    def device(self, asked: str) -> str:
        """The device for a process that was asked to choose: of several processes each takes a GPU of its own."""
        if asked != "auto" or self.size == 1:
            return asked
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
