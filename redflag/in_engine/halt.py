"""The in-engine halt: the monitor as tensor arithmetic over a whole batch, and the flag forced when it alarms.

An engine that calls `HaltTable.apply` on its logits at every step, before choosing tokens, stops by itself: when the
score of a flag reaches its threshold, every other logit of that row becomes -inf, so the flag is chosen, and as a stop
token it ends the response. At all other steps the flags are -inf, so none is ever chosen.

One formula covers the monitors `max`, `run` and `ema` of `redflag.watching.monitor`, with p the K probabilities of a
step:

    score  = (1 - decay) score + decay p          decay = 1 for max and run: then score = p
    streak = streak + 1 where score >= threshold, else 0
    alarm  = streak >= run, after the warm-up     run = 1 for max and ema

`run` needs no window: the minimum of the last n probabilities reaches a threshold exactly if n consecutive ones do.
Scores are float64, as in `Monitor`, and p is the exponential of the log-softmax that engines report as a raw
log-probability, so engine and guard decide alike.

Everything that depends on a row is data on the device. There is no loop over rows, and nothing is copied to the host:
`apply` runs the same few kernels for every batch. Shapes: R rows, V vocabulary, K = `MAX_FLAGS`, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from redflag.errors import RedflagError
from redflag.in_engine.halt_request import MAX_FLAGS, HaltSettings, admit

# Columns of the table: settings first, then state, so that one write per step updates the state.
_ACTIVE, _RUN, _DECAY, _WARM_UP = range(4)
_IDS = slice(4, 4 + MAX_FLAGS)
_THRESHOLDS = slice(_IDS.stop, _IDS.stop + MAX_FLAGS)
_LATCHED = _THRESHOLDS.stop
_STEPS = _LATCHED + 1
_SCORES = slice(_STEPS + 1, _STEPS + 1 + MAX_FLAGS)
_STREAKS = slice(_SCORES.stop, _SCORES.stop + MAX_FLAGS)
_COLUMNS = _STREAKS.stop
_STATE = _LATCHED
_WIDTHS = [1, 1, 1, 1, *(MAX_FLAGS,) * 2, 1, 1, *(MAX_FLAGS,) * 2]

IDLE_ROW: list[float] = [0.0] * _COLUMNS
"""A slot whose request is not watched: its logits are unchanged."""


class HaltTable:
    """Settings and state of every request slot of an engine, in one tensor on its device.

    It lives as long as the engine's sampler and never grows: (slots + 1) x 70 float64 numbers, about 0.6 MB for 1,024
    slots. The caller says which slot a row of logits belongs to and overwrites a slot when its request changes.

    Example:
        >>> from redflag.watching.monitor import MonitorConfig
        >>> table = HaltTable(slots=2, device=torch.device("cpu"))
        >>> settings = HaltSettings((0,), (0.5,), (True,), MonitorConfig())
        >>> table.write({1: new_row(settings)})
        >>> logits_RV = torch.tensor([[0.0, 2.0, 1.0], [9.0, 2.0, 1.0]])
        >>> table.apply(logits_RV, torch.tensor([0, 1]))   # slot 0 is idle; slot 1 is forced to token 0
        tensor([[0., 2., 1.],
                [0., -inf, -inf]])
    """

    def __init__(self, slots: int, device: torch.device, pin_memory: bool = False) -> None:
        """Makes all S slots idle; `pin_memory` stages writes in page-locked memory, so that copies are asynchronous."""
        self._device, self._pin_memory = device, pin_memory
        # One extra slot stays idle, as a source for `move`. float64 holds ids and counts exactly.
        self._table_SC = torch.zeros(slots + 1, _COLUMNS, dtype=torch.float64, device=device)

    def write(self, rows: Mapping[int, Sequence[float]]) -> None:
        """Overwrites slots: slot -> result of `new_row`, or `IDLE_ROW`."""
        if rows:
            values = self._upload(list(rows.values()), torch.float64)
            self._table_SC.index_copy_(0, self._upload(list(rows), torch.int64), values)

    def move(self, source: Mapping[int, int | None]) -> None:
        """Copies slots onto others, all at the same time.

        `source` maps a slot to the one whose content it takes; None makes it idle.
        """
        if source:
            idle = len(self._table_SC) - 1
            origins = self._upload([idle if slot is None else slot for slot in source.values()], torch.int64)
            targets = self._upload(list(source), torch.int64)
            self._table_SC.index_copy_(0, targets, self._table_SC.index_select(0, origins))

    def apply(self, logits_RV: torch.Tensor, slots_R: torch.Tensor, live_R: torch.Tensor | None = None) -> torch.Tensor:
        """Measures the flags, hides them, and forces one where its response must halt.

        A row whose logits cannot be normalised (NaN, +inf), or in which a flag is -inf already and thus cannot be
        measured, is forced too. A row that was forced once stays forced, should the engine continue.

        Args:
            logits_RV: Logits of the next token, before temperature; changed in place.
            slots_R: int64, the slot of every row, each at most once.
            live_R: bool, False for rows whose token the engine will discard (a prompt that is read in several steps);
                they are judged, but the state is not updated. None = all rows are live.

        Returns:
            `logits_RV`.
        """
        table_RC = self._table_SC.index_select(0, slots_R)
        active_R1, run_R1, decay_R1, warm_up_R1, ids_RK, thresholds_RK, latched_R1, steps_R1, scores_RK, streaks_RK = (
            table_RC.split_with_sizes(_WIDTHS, 1)
        )
        ids_RK = ids_RK.long()
        logprobs_RK = torch.log_softmax(logits_RV, -1, dtype=torch.float32).gather(1, ids_RK)

        # (1 - decay) score + decay p; exactly p where decay is 1.
        scores_RK = torch.lerp(scores_RK, logprobs_RK.double().exp_(), decay_R1)
        streaks_RK = (streaks_RK + 1.0).mul_(scores_RK >= thresholds_RK)
        steps_R1 = steps_R1 + 1.0
        crossed_RK = (streaks_RK >= run_R1).logical_and_(steps_R1 > warm_up_R1)
        judged_R1 = (logprobs_RK > -torch.inf).all(-1, keepdim=True)  # false for NaN
        forced_R1 = crossed_RK.any(-1, keepdim=True).logical_or_(latched_R1).logical_or_(~judged_R1)
        forced_R1 = forced_R1.logical_and_(active_R1)

        state_RC = torch.cat([forced_R1, steps_R1, scores_RK, streaks_RK], dim=1)
        if live_R is not None:
            state_RC = torch.where(live_R[:, None], state_RC, table_RC[:, _STATE:])
        self._table_SC[:, _STATE:].index_copy_(0, slots_R, state_RC)

        # The first flag that crossed, or simply the first. By id, since short lists are padded with their first flag.
        chosen_R1 = ids_RK.gather(1, crossed_RK.view(torch.uint8).argmax(-1, keepdim=True))
        hidden_RK = torch.where((ids_RK == chosen_R1).logical_and_(forced_R1), 0.0, -torch.inf).to(logits_RV.dtype)
        hidden_RK = torch.where(active_R1 > 0.0, hidden_RK, logits_RV.gather(1, ids_RK))
        return logits_RV.masked_fill_(forced_R1, -torch.inf).scatter_(1, ids_RK, hidden_RK)

    def _upload(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        # A new buffer each time: the next write must not change a copy that is still in progress.
        staged = torch.tensor(values, dtype=dtype, pin_memory=self._pin_memory)
        return staged.to(self._device, non_blocking=True)


def new_row(settings: HaltSettings, generated: int = 0) -> list[float]:
    """A slot's content before its next step.

    `generated` is the number of tokens that the response has already, when an engine resumes a preempted request. The
    monitor's state is lost; the score then starts as high as it can be without an alarm, so that it is never below the
    true one.
    """
    config, flags = settings.monitor, len(settings.flag_ids)
    run = config.window if config.aggregation == "run" else 1
    if generated:
        scores = [1.0 if generated <= config.warm_up else min(value, 1.0) for value in settings.thresholds]
    else:
        scores = [config.prior] * flags
    thresholds = [
        value if halts else torch.inf for value, halts in zip(settings.thresholds, settings.halts, strict=True)
    ]
    row = list(IDLE_ROW)
    row[_ACTIVE], row[_RUN], row[_WARM_UP] = 1.0, float(run), float(config.warm_up)
    row[_DECAY] = config.decay if config.aggregation == "ema" else 1.0
    row[_IDS] = _padded(map(float, settings.flag_ids))
    row[_THRESHOLDS] = _padded(thresholds)
    row[_SCORES] = _padded(scores)
    row[_STEPS] = float(generated)
    row[_STREAKS] = _padded([float(min(generated, run - 1))] * flags)
    return row


def closed_row(token_id: int) -> list[float]:
    """The content of a slot in which one token is forced at every step."""
    row = list(IDLE_ROW)
    row[_ACTIVE] = row[_LATCHED] = 1.0
    row[_IDS] = [float(token_id)] * MAX_FLAGS
    row[_THRESHOLDS] = [torch.inf] * MAX_FLAGS
    return row


def initial_row(params: Any, generated: int, vocab_size: int, *, penalties_first: bool) -> list[float] | None:
    """A slot's content for a request (vLLM's `SamplingParams`) that enters the batch; None when it is not watched.

    It never raises: an error here would crash the engine with all its requests. A request that cannot be watched, which
    admission should have refused, gets a stop token at once.

    Args:
        generated: Number of tokens that the response has already.
        vocab_size: V; larger ids would corrupt memory.
        penalties_first: As for `redflag.in_engine.halt_request.admit`.
    """
    try:
        settings = admit(params, penalties_first=penalties_first)
        if settings is None:
            return None
        if max(settings.flag_ids) < vocab_size:
            return new_row(settings, generated)
    except RedflagError:
        pass
    stops = (*getattr(params, "all_stop_token_ids", ()), *(params.stop_token_ids or ()))
    return closed_row(min((i for i in stops if 0 <= i < vocab_size), default=0))


def refuse_speculation(vllm_config: Any) -> None:
    """Refuses an engine that drafts tokens ahead.

    Raises:
        RedflagError: With speculative decoding on: a step would have several rows, some of them thrown away later.
    """
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise RedflagError(
            "speculative decoding must be off. A step would judge tokens that may never be part of the response. Start "
            "the engine without it, or measure outside of the engine."
        )


def _padded(values: Any) -> list[float]:
    # Padded with the first flag instead of another token: writing its value twice is harmless.
    values = list(values)
    return values + values[:1] * (MAX_FLAGS - len(values))
