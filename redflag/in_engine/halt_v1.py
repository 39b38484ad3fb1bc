"""The in-engine halt behind vLLM's first interface (`vllm.v1.sample.logits_processor`).

    --logits-processors redflag.in_engine.halt_v1:HaltProcessor

A row of the batch is a request. vLLM reports the changes since the last step (removed, added, moved, in this order),
and the table follows. It calls the processor after allowed tokens, bad words and logit bias and before penalties and
temperature; requests with any of the former are refused, so that the raw logits are measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from redflag.in_engine.halt import IDLE_ROW, HaltTable, initial_row, refuse_speculation
from redflag.in_engine.halt_request import admit

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # Without vLLM the module can still be imported and tested. vLLM itself checks the base class.
    LogitsProcessor = object


@dataclass(eq=False)
class _Request:
    """A watched request. `output` is the engine's own list of its tokens, which grows."""

    row: int
    output: list[int]
    generated: int
    content: list[float]


class HaltProcessor(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Forces a request's flag when its monitored probability reaches the threshold."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request with invalid settings; vLLM answers it with HTTP 400.

        Raises:
            RedflagError: See `redflag.in_engine.halt_request.admit`.
        """
        admit(sampling_params, penalties_first=False)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        refuse_speculation(vllm_config)
        slots = vllm_config.scheduler_config.max_num_seqs
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._table = HaltTable(slots, device, is_pin_memory)
        self._rows_R = torch.arange(slots, device=device)
        self._requests: dict[int, _Request] = {}
        self._unread: list[_Request] = []

    def is_argmax_invariant(self) -> bool:
        """False: otherwise vLLM would skip the processor for greedy batches."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the batch by vLLM's `BatchUpdate`; None: nothing changed. A step without a change costs nothing."""
        rows: dict[int, list[float]] = {}
        self._restart_unread(rows)
        if batch_update:
            for row in batch_update.removed:
                if self._requests.pop(row, None) is not None:
                    rows[row] = IDLE_ROW
            for row, params, _, output in batch_update.added:
                if self._requests.pop(row, None) is not None:
                    rows[row] = IDLE_ROW
                content = initial_row(params, len(output), self._vocab_size, penalties_first=False)
                if content is not None:
                    request = self._requests[row] = _Request(row, output, len(output), content)
                    self._unread.append(request)
                    rows[row] = content
        self._table.write(rows)
        if batch_update and batch_update.moved:
            self._move(batch_update.moved)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Judges one step of the whole batch: float32 logits, one row per request, changed in place and returned."""
        return self._table.apply(logits, self._rows_R[: len(logits)]) if self._requests else logits

    def _restart_unread(self, rows: dict[int, list[float]]) -> None:
        # A long prompt is read in several steps. Each samples a token that is discarded, without notice to processors.
        # The only sign is that the request has no more tokens than when it was added; then the state is reset.
        self._unread = [
            request
            for request in self._unread
            if self._requests.get(request.row) is request and len(request.output) == request.generated
        ]
        for request in self._unread:
            rows[request.row] = request.content

    def _move(self, moved: Any) -> None:
        # Moves are sequential: follow each row's content back to its slot before the first move.
        source: dict[int, int | None] = {}
        for a, b, direction in moved:
            if a not in self._requests and b not in self._requests:
                continue
            of_a, of_b = source.get(a, a), source.get(b, b)
            swap = direction.name == "SWAP"
            source[b], source[a] = of_a, of_b if swap else None
            for row, request in ((b, self._requests.pop(a, None)), (a, self._requests.pop(b, None))):
                if request is not None and (swap or row == b):
                    request.row = row
                    self._requests[row] = request
        self._table.move({row: origin for row, origin in source.items() if origin != row})
