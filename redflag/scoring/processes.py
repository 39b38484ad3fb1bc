"""Which of several processes this is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from redflag.errors import RedflagError


@dataclass(frozen=True)
class World:
    """One of several processes; `local_rank` counts those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK, which `accelerate launch` and `torchrun` set.

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
                f"RANK must be below WORLD_SIZE, and both and LOCAL_RANK whole numbers (got {rank!r}, {size!r}, "
                f"{local!r}). Start the processes with `accelerate launch`, or unset these variables."
            )
        return cls(int(rank), int(size), int(local))

    def device(self, name: str) -> str:
        """Replaces "auto" by a GPU for each of several processes."""
        if name != "auto" or self.size == 1:
            return name
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
