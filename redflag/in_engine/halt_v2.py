"""The in-engine halt behind vLLM's second interface (`vllm.v1.worker.gpu.sample.logits_processor`).

    --logits-processors redflag.in_engine.halt_v2:HaltProcessor

A row of the batch is not a request: rows are reordered at every step, and `ctx.expanded_idx_mapping` maps them to
slots. Slots are reused, and overwritten in `add_request`. vLLM calls the processor after logit bias, penalties, bad
words and grammar and before temperature; requests with any of the former are refused, so that the raw logits are
measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from redflag.in_engine.halt import IDLE_ROW, HaltTable, initial_row, refuse_speculation
from redflag.in_engine.halt_request import admit

try:
    from vllm.utils.platform_utils import (  # type: ignore[import-not-found, unused-ignore]
        is_pin_memory_available,
    )
    from vllm.v1.worker.gpu.sample.logits_processor import (  # type: ignore[import-not-found, unused-ignore]
        LogitsProcessor,
    )
except ImportError:  # Without vLLM the module can still be imported and tested. vLLM itself checks the base class.
    LogitsProcessor = object

    def is_pin_memory_available() -> bool:
        """Without vLLM, memory is not page-locked."""
        return False


class HaltProcessor(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Forces a request's flag when its monitored probability reaches the threshold."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request with invalid settings; vLLM answers it with HTTP 400.

        Raises:
            RedflagError: See `redflag.in_engine.halt_request.admit`.
        """
        admit(sampling_params, penalties_first=True)

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        """Makes the table, once per engine; `req_states` is vLLM's `LogitsProcRequestState`, and only read."""
        refuse_speculation(vllm_config)
        self._states = req_states
        slots = req_states.max_num_reqs
        self._table = HaltTable(slots, req_states.device, is_pin_memory_available())
        # A copy on the host, to tell without synchronising with the device whether a batch has a watched request.
        self._watched_S = np.zeros(slots, dtype=bool)
        self._staged: dict[int, list[float]] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Overwrites the slot `req_idx`. Returns whether the request is watched."""
        states = self._states
        generated = int(states.prefill_len.np[req_idx]) - int(states.prompt_len.np[req_idx])
        content = initial_row(sampling_params, generated, states.vocab_size, penalties_first=True)
        if content is not None or self._watched_S[req_idx]:
            self._staged[req_idx] = IDLE_ROW if content is None else content
        self._watched_S[req_idx] = content is not None
        return content is not None

    def apply_staged_writes(self) -> None:
        """Sends the slots that changed to the device."""
        self._table.write(self._staged)
        self._staged = {}

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Judges one step of the whole batch: float32 logits, one row per request in any order, changed in place and
        returned; `ctx` is vLLM's `LogitsContext`.
        """
        if not self._watched_S[ctx.idx_mapping_np].any():
            return logits
        slots_R = ctx.expanded_idx_mapping.long()
        # A row whose prompt is not completely read yet samples a token that is discarded.
        live_R = ctx.pos + 1 >= self._states.prefill_len.gpu.index_select(0, slots_R)
        return self._table.apply(logits, slots_R, live_R)
