"""The in-engine halt decides for a batch what `Monitor` decides for each row, whatever the engine does to the batch."""

from __future__ import annotations

import dataclasses
import enum
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from redflag.errors import RedflagError
from redflag.in_engine import halt_v1, halt_v2
from redflag.in_engine.halt import IDLE_ROW, HaltTable, closed_row, initial_row, new_row
from redflag.in_engine.halt_request import HaltSettings
from redflag.watching.monitor import Monitor, MonitorConfig

VOCABULARY, SLOTS, INF = 12, 6, math.inf
CPU = torch.device("cpu")


class Direction(enum.Enum):
    """As in vLLM."""

    UNIDIRECTIONAL = 1
    SWAP = 2


@dataclasses.dataclass(eq=False)
class Request:
    """A request as the simulated engines know it, with a `Monitor` as the oracle.

    `prefill_steps` more steps read the prompt; their tokens are thrown away.
    """

    settings: HaltSettings | None
    prefill_steps: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    forced: bool = False

    def __post_init__(self) -> None:
        if self.settings:
            self.monitor = Monitor(self.settings.monitor, len(self.settings.flag_ids))

    @property
    def params(self) -> SimpleNamespace:
        args, stops = (self.settings.to_args(), self.settings.flag_ids) if self.settings else (None, ())
        return SimpleNamespace(extra_args=args, stop_token_ids=list(stops), all_stop_token_ids=set(stops))

    def step(self, raw_V: torch.Tensor, got_V: torch.Tensor) -> None:
        """Compares a row before and after the processor with what a loop over tokens makes of it."""
        if self.settings is None:
            assert torch.equal(got_V, raw_V)
        elif not self.prefill_steps:
            assert torch.equal(got_V, self._wanted(self.settings, raw_V))
        if self.prefill_steps:
            self.prefill_steps -= 1
        else:
            self.output.append(-1)

    def _wanted(self, settings: HaltSettings, raw_V: torch.Tensor) -> torch.Tensor:
        flags = settings.flag_ids
        scores = self.monitor.feed([math.exp(p) for p in torch.log_softmax(raw_V, -1)[list(flags)].tolist()])
        each = zip(flags, scores, settings.thresholds, settings.halts, strict=True)
        crossed = [flag for flag, score, threshold, halts in each if halts and score >= threshold]
        self.forced |= bool(crossed)
        if self.forced:
            wanted_V = torch.full_like(raw_V, -INF)
            wanted_V[crossed[0] if crossed else flags[0]] = 0.0
        else:
            wanted_V = raw_V.clone()
            wanted_V[list(flags)] = -INF
        return wanted_V


class EngineV1:
    """The batch of vLLM's first model runner: new requests fill holes, last rows slide down, rows are swapped."""

    def __init__(self) -> None:
        self.rows: list[Request] = []
        self.processor = halt_v1.HaltProcessor(config(), CPU, False)

    def step(self, leaving: list[int], coming: list[Request], swaps: list[tuple[int, int]], seed: int) -> None:
        rows: list[Request | None] = list(self.rows)
        holes = sorted({i for i in leaving if i < len(rows)})
        for i in holes:
            rows[i] = None
        removed, added, moved = [], [], []
        for request in coming[: SLOTS - len(rows) + len(holes)]:
            i = holes.pop(0) if holes else len(rows)
            rows[i : i + 1] = [request]
            added.append((i, request.params, [], request.output))
        while holes:
            if rows[-1] is None:
                rows.pop()
                removed.append(holes.pop())
            else:
                moved.append((len(rows) - 1, holes[0], Direction.UNIDIRECTIONAL))
                rows[holes.pop(0)] = rows.pop()
        self.rows = [row for row in rows if row is not None]
        for a, b in swaps:
            if a != b and max(a, b) < len(self.rows):
                self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
                moved.append((a, b, Direction.SWAP))
        change = SimpleNamespace(batch_size=len(self.rows), removed=removed, added=added, moved=moved)
        self.processor.update_state(change if removed or added or moved else None)
        raw_RV = random_logits(len(self.rows), seed)
        got_RV = self.processor.apply(raw_RV.clone())
        for request, raw_V, got_V in zip(self.rows, raw_RV, got_RV, strict=True):
            request.step(raw_V, got_V)


class EngineV2:
    """The batch of vLLM's second model runner: slots from a free list, rows in another order at every step."""

    def __init__(self) -> None:
        self.slots: dict[int, Request] = {}
        self.free = list(range(SLOTS))
        self.states = request_states()
        self.processor = halt_v2.HaltProcessor(config(), self.states)

    def step(self, leaving: list[int], coming: list[Request], swaps: list[tuple[int, int]], seed: int) -> None:
        for slot in set(leaving) & set(self.slots):
            del self.slots[slot]
            self.free.append(slot)
        for request in coming[: len(self.free)]:
            slot = self.free.pop()
            self.slots[slot] = request
            self.states.prompt_len.np[slot] = self.states.prefill_len.np[slot] = 10 + slot
            assert self.processor.add_request(slot, request.params) == (request.settings is not None)
        self.processor.apply_staged_writes()
        order = [slot for a, b in swaps for slot in (a, b)]
        batch = sorted(self.slots, key=lambda slot: (order.index(slot) if slot in order else SLOTS, slot))
        raw_RV = random_logits(len(batch), seed)
        pos = [9 + slot - self.slots[slot].prefill_steps + len(self.slots[slot].output) for slot in batch]
        slots_R = torch.tensor(batch, dtype=torch.int32)
        ctx = SimpleNamespace(
            expanded_idx_mapping=slots_R, idx_mapping_np=np.array(batch, dtype=np.int32), pos=torch.tensor(pos)
        )
        got_RV = self.processor.apply(raw_RV.clone(), ctx)
        for slot, raw_V, got_V in zip(batch, raw_RV, got_RV, strict=True):
            self.slots[slot].step(raw_V, got_V)


def config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY),
        **{"speculative_config": None, **more},
    )


def request_states() -> SimpleNamespace:
    lengths = [torch.zeros(SLOTS, dtype=torch.int32) for _ in range(2)]
    prompt, prefill = (SimpleNamespace(np=length.numpy(), gpu=length) for length in lengths)
    return SimpleNamespace(
        device=CPU, max_num_reqs=SLOTS, vocab_size=VOCABULARY, prompt_len=prompt, prefill_len=prefill
    )


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def one(flag: int = 0, threshold: float = 0.5, halts: bool = True, **monitor: Any) -> HaltSettings:
    return HaltSettings((flag,), (threshold,), (halts,), MonitorConfig(**monitor))


def logits_of(*probs: float, flag: int = 0) -> torch.Tensor:
    """One row per probability of the flag; the rest is spread evenly."""
    rows = torch.tensor(probs, dtype=torch.float64)[:, None].expand(-1, VOCABULARY).clone()
    rows[:] = (1.0 - rows) / (VOCABULARY - 1)
    rows[:, flag] = torch.tensor(probs, dtype=torch.float64)
    return rows.log().float()


warm_ups = st.integers(0, 3)
monitors = st.one_of(
    st.builds(MonitorConfig, warm_up=warm_ups),
    st.builds(MonitorConfig, aggregation=st.just("run"), window=st.integers(2, 4), warm_up=warm_ups),
    st.builds(MonitorConfig, st.just("ema"), decay=st.floats(0.1, 1.0), prior=st.floats(0.01, 0.5), warm_up=warm_ups),
)


@st.composite
def watched(draw: st.DrawFn) -> HaltSettings:
    """Settings with 1 to 3 flags, at thresholds that random logits cross now and then."""
    flags = tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3, unique=True)))
    halts, thresholds = (
        tuple(draw(st.lists(values, min_size=len(flags), max_size=len(flags))))
        for values in (st.booleans(), st.floats(0.05, 0.9))
    )
    return HaltSettings(flags, thresholds, halts, draw(monitors))


indices = st.integers(0, SLOTS - 1)
steps = st.tuples(
    st.lists(indices, max_size=3),
    st.lists(st.builds(Request, st.none() | watched(), st.sampled_from([0, 0, 1, 3])), max_size=3),
    st.lists(st.tuples(indices, indices), max_size=3),
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("engine", [EngineV1, EngineV2])
@settings(max_examples=150)
@given(data=st.data())
def test_every_row_is_treated_as_its_own_monitor_says(engine, data):
    simulated = engine()
    for _ in range(data.draw(st.integers(1, 14))):
        simulated.step(*data.draw(steps))


@pytest.mark.parametrize(
    ("case", "logits"),
    {
        "a NaN": [math.nan, 0.0, 0.0],
        "a NaN elsewhere": [0.0, 0.0, math.nan],
        "an infinity": [0.0, INF, 0.0],
        "nothing left": [-INF, -INF, -INF],
        "a flag that somebody hid before": [-INF, 0.0, 0.0],
    }.items(),
)
def test_what_cannot_be_judged_is_forced_and_stays_forced(case, logits):
    table = HaltTable(1, CPU)
    table.write({0: new_row(one(threshold=1.0, halts=False, warm_up=9))})
    for row in (logits, [0.0, 5.0, 5.0]):
        got = table.apply(torch.tensor([row]), torch.tensor([0]))
        assert got.tolist() == [[0.0, -INF, -INF]], case


def test_other_rows_do_not_notice_a_row_that_cannot_be_judged():
    table = HaltTable(3, CPU)
    table.write({0: new_row(one()), 1: new_row(one(1)), 2: IDLE_ROW})
    raw = torch.tensor([[math.nan, 0.0, 0.0], [1.0, 0.0, 1.0], [math.nan, 0.0, 1.0]])
    got = table.apply(raw.clone(), torch.tensor([0, 1, 2]))
    assert got[0].tolist() == [0.0, -INF, -INF] and got[1].tolist() == [1.0, -INF, 1.0]
    assert got[2, 0].isnan() and got[2, 1:].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "monitor",
    [
        {},
        {"warm_up": 4},
        {"aggregation": "run", "window": 3},
        {"aggregation": "run", "window": 3, "warm_up": 4},
        {"aggregation": "ema", "decay": 0.3},
        {"aggregation": "ema", "decay": 0.3, "warm_up": 4},
    ],
)
@settings(max_examples=60)
@given(probs=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=12), at=st.integers(1, 8))
def test_a_request_taken_up_again_alarms_no_later_than_one_that_was_never_put_aside(monitor, probs, at):
    settings_, at = one(threshold=0.4, **monitor), min(at, len(probs) - 1)
    rows = logits_of(*probs)
    alarms = []
    for resumes in (False, True):
        table = HaltTable(1, CPU)
        table.write({0: new_row(settings_)})
        forced = []
        for i, row in enumerate(rows):
            if resumes and i == at and not any(forced):
                table.write({0: new_row(settings_, generated=i)})
            forced.append(table.apply(row[None].clone(), torch.tensor([0]))[0, 0].item() == 0.0)
        alarms.append(forced.index(True) if True in forced else math.inf)
    assert alarms[1] <= alarms[0]


def test_thresholds_and_probabilities_are_compared_without_rounding():
    table = HaltTable(2, CPU)
    raw = random_logits(1, 0)
    p = math.exp(torch.log_softmax(raw, -1)[0, 0].item())
    table.write({0: new_row(one(threshold=p)), 1: new_row(one(threshold=math.nextafter(p, 1.0)))})
    got = table.apply(raw.repeat(2, 1), torch.tensor([0, 1]))
    assert got[:, 0].tolist() == [0.0, -INF]


def test_a_request_that_slipped_past_admission_gets_a_stop_token_and_the_engine_lives():
    for args in ({"redflag_flag_ids": "all"}, one(VOCABULARY).to_args()):
        params = SimpleNamespace(extra_args=args, stop_token_ids=[7, VOCABULARY], all_stop_token_ids={3, 7})
        assert initial_row(params, 0, VOCABULARY, penalties_first=False) == closed_row(3)
    table = HaltTable(1, CPU)
    table.write({0: closed_row(3)})
    for _ in range(3):
        got = table.apply(random_logits(1, 0), torch.tensor([0]))
        assert got[0].argmax().item() == 3 and got[0].isneginf().sum() == VOCABULARY - 1


class NoWaiting(TorchDispatchMode):
    """Counts operations and refuses those whose result the host would have to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        assert not name.startswith(self.WAITING), name
        assert name != "_to_copy" or kwargs.get("device") is None, "a copy to another device"
        if name in ("index", "index_put_", "index_put"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index is read by the host"
        self.count += 1
        return func(*args, **kwargs)


def test_a_step_waits_for_nothing_and_costs_the_same_number_of_operations_whatever_the_batch():
    counts = []
    for rows, watching in ((1, 1), (6, 1), (6, 6)):
        for device in ("cpu", "meta"):  # on "meta" there is no data, so nothing can depend on any
            table = HaltTable(SLOTS, torch.device(device))
            table.write({slot: new_row(one(slot)) for slot in range(watching)})
            logits_RV = random_logits(rows, 0).to(device)
            slots_R = torch.arange(rows, device=device)
            with NoWaiting() as mode:
                table.apply(logits_RV, slots_R, slots_R >= 0)
            counts.append(mode.count)
    assert len(set(counts)) == 1, counts


def test_a_batch_without_settings_is_handed_back_untouched_and_unread():
    first, second = EngineV1(), EngineV2()
    for engine in (first, second):
        engine.step([], [Request(None), Request(None)], [], 0)
    with NoWaiting() as mode:
        logits = torch.full((2, VOCABULARY), math.nan)
        before = mode.count
        first.processor.update_state(None)
        assert first.processor.apply(logits) is logits
        assert second.processor.apply(logits, SimpleNamespace(idx_mapping_np=np.array([5, 4]))) is logits
        assert mode.count == before


def test_speculative_decoding_is_refused_when_the_engine_starts():
    with pytest.raises(RedflagError, match="speculative decoding must be off"):
        halt_v1.HaltProcessor(config(speculative_config=object()), CPU, False)
    with pytest.raises(RedflagError, match="speculative decoding must be off"):
        halt_v2.HaltProcessor(config(speculative_config=object()), request_states())


def test_greedy_batches_are_not_left_out():
    assert halt_v1.HaltProcessor(config(), CPU, False).is_argmax_invariant() is False


def test_half_precision_logits_are_judged_in_float32():
    table = HaltTable(1, CPU)
    table.write({0: new_row(one(threshold=0.3))})
    got = table.apply(logits_of(0.5).bfloat16(), torch.tensor([0]))
    assert got.dtype == torch.bfloat16 and got[0].argmax().item() == 0 and got[0, 1:].isneginf().all()
