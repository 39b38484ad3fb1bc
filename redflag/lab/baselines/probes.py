"""Probes: small functions of a model's hidden states, which the model computes anyway.

`last_layer_probe`, `all_layer_probe` (CC++), `token_head` (constitutional classifiers) and `mlp_probe` differ in the
layers they read, in their loss and in how they smooth; the rest is one training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.baselines import Cost
from redflag.lab.baselines.hidden import Hidden, View, hidden_states, keep, passing, side_by_side
from redflag.lab.baselines.probe_data import Labels, balance_of, divided, onset_of, scale_of
from redflag.lab.baselines.probe_losses import Reading, ema, softmax_weighted, token_bce, towards_maximum
from redflag.lab.baselines.shared import BaselineContext, Floats, Read, Timing, drawn_batches
from redflag.progress import Progress
from redflag.scoring.recording import Recording

# Numbers: a gigabyte of float32.
_IN_MEMORY = 250_000_000


@dataclass(frozen=True)
class Fitting:
    """How a probe is trained.

    With L-BFGS on all rows at once, on the loss as it is at the beginning, with Adam, or with the one after the other.
    """

    lbfgs: int = 0  # iterations of L-BFGS before the first pass; 0: none
    l2: float = 1e-4  # penalty of L-BFGS on the squared weights
    passes: int = 6  # passes of Adam over the rows, the rate falling to zero along a cosine; 0: none
    rows: int = 32  # responses per step
    learning_rate: float = 3e-3  # rate at the beginning, for standardised inputs
    weight_decay: float = 0.1  # as in AdamW
    validation: float = 0.1  # share of the training rows' groups that only choose the pass; 0 takes the last pass


class Batch(NamedTuple):
    """Some responses, padded: `inputs` B x T x D, standardised; `labels` and `weights` B x T; `harmful` B.

    `smooth`: whether the inputs are means over the probe's window already.
    """

    inputs: Tensor
    mask: Tensor
    labels: Tensor
    weights: Tensor
    harmful: Tensor
    smooth: bool


class _Rows(NamedTuple):
    reads: Sequence[Read]
    hidden: Hidden
    balance: tuple[float, float]  # weights of harmless and harmful steps


Loss = Callable[[Tensor, Batch, float], Tensor]


@dataclass
class Probe:
    """A probe of any kind; see the functions below for those there are."""

    name: str
    what: str
    context: BaselineContext
    layers: tuple[int, ...]  # which hidden states are read, 0 the embedding's output
    width: int  # units of the hidden layer; 0: the probe is linear
    loss: Loss  # loss of (logits B x T, batch, share of the training done)
    labels: Labels  # harmful from the `onset` on, where it is known, or throughout the `response`
    fitting: Fitting  # how it is trained
    decay: float | None  # weight of the newest logit in the moving average that is recorded; None: logits as they are
    view: View  # what is kept of the training rows where not everything fits on disk
    start: float = 0.0
    net: Any = None
    timing: Timing = field(default_factory=Timing)
    _scale: tuple[Tensor, Tensor] = field(default=(torch.zeros(0), torch.zeros(0)), repr=False)

    def fit(self, train: Sequence[Row]) -> None:
        """Trains on the hidden states of these rows."""
        reads = self.context.read(train)
        if len({read.row.harmful for read in reads}) < 2:
            raise RedflagError(
                f"the training rows of {self.name!r} must be of both kinds (got {len(reads)} that are all harmful or "
                "all harmless)."
            )
        hidden = hidden_states(self.context, reads, self.view)
        total = sum(len(read.judged_ids) for read in reads)
        if len(hidden.steps) < total:
            self.what += f" Fitted on {len(hidden.steps):,} of {total:,} steps, drawn."
        self._scale = scale_of(hidden, self.layers)
        generator = torch.Generator().manual_seed(self.context.seed)
        self.net = _net(len(self._scale[0]), self.width, generator)
        rows = _Rows(reads, hidden, balance_of(reads, self.labels, hidden))
        if self.fitting.lbfgs:
            self._solve(rows)
        used = [i for i in range(len(reads)) if hidden.count(i)]
        if self.fitting.passes:
            used = self._descend(rows, generator)
        if self.decay is not None:
            # The average starts where harmless text lies; started at the first logit it would follow that one's noise.
            harmless = [i for i in used if not reads[i].row.harmful][:300]
            states = torch.from_numpy(hidden.of(harmless, self.layers))
            self.start = float(np.median(self._logits(states)))

    def _solve(self, rows: _Rows) -> None:
        """L-BFGS; the rows are read again in each iteration if they would take more than a gigabyte."""
        hidden = rows.hidden
        order = sorted((i for i in range(len(rows.reads)) if hidden.count(i)), key=hidden.count)
        parts = [order[first : first + 64] for first in range(0, len(order), 64)]
        small = len(hidden.states) * len(self._scale[0]) <= _IN_MEMORY
        batches = [self._batch(rows, part) for part in parts] if small else None
        total = len(hidden.states)
        optimizer = torch.optim.LBFGS(self.net.parameters(), max_iter=self.fitting.lbfgs, line_search_fn="strong_wolfe")
        # The line search may take a quarter more evaluations than there are iterations, as torch has it.
        progress, done = Progress(f"fitting {self.name}", self.fitting.lbfgs * 5 // 4, "evaluations at most"), 0

        def closure() -> float:
            nonlocal done
            progress(done)
            done += 1
            optimizer.zero_grad()
            penalty = self.fitting.l2 * sum(p.square().sum() for p in self.net.parameters() if p.dim() > 1)
            penalty.backward()
            value = float(penalty.detach())
            for number, part in enumerate(parts):
                batch = batches[number] if batches is not None else self._batch(rows, part)
                loss = self.loss(self.net(batch.inputs)[..., 0], batch, 0.0) * (int(batch.mask.sum()) / total)
                loss.backward()
                value += float(loss.detach())
            return value

        with progress:
            optimizer.step(closure)

    def _descend(self, rows: _Rows, generator: torch.Generator) -> list[int]:
        """Adam; the pass with the least loss on the held-out groups wins. Returns the rows trained on."""
        parts = divided(rows.reads, self.fitting.validation, self.context.seed)
        used, held_out = ([i for i in part if rows.hidden.count(i)] for part in parts)
        lengths = [len(rows.reads[i].judged_ids) for i in used]
        steps = self.fitting.passes * -(-len(used) // self.fitting.rows)
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=self.fitting.learning_rate, weight_decay=self.fitting.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best: tuple[float, dict[str, Tensor]] | None = None
        done = 0
        with Progress(f"fitting {self.name}", steps, "steps") as progress:
            for _ in range(self.fitting.passes):
                for picks in drawn_batches(lengths, self.fitting.rows, generator):
                    batch = self._batch(rows, [used[i] for i in picks])
                    optimizer.zero_grad()
                    self.loss(self.net(batch.inputs)[..., 0], batch, done / steps).backward()
                    optimizer.step()
                    schedule.step()
                    done += 1
                    progress(done)
                if held_out:
                    loss = self._mean_loss(rows, held_out)
                    if best is None or loss < best[0]:
                        best = loss, {name: value.clone() for name, value in self.net.state_dict().items()}
        if best is not None:
            self.net.load_state_dict(best[1])
        return used

    def score(self, rows: Sequence[Row]) -> Recording:
        return score_together([self], rows)[0]

    def judged(self, states: npt.NDArray[np.float16]) -> Floats:
        """Probabilities of one response's steps, from its hidden states T x (L + 1) x H."""
        assert self.net is not None, "fit comes before score"
        logits = self._logits(torch.from_numpy(side_by_side(states, self.layers)))
        with self.timing.measuring(0):
            return _sigmoid(logits if self.decay is None else ema(logits, self.decay, self.start))

    def cost(self) -> Cost:
        inputs = len(self.layers) * self.context.config.hidden_size
        flops = 2 * inputs if not self.width else 2 * self.width * (inputs + 1)
        return self.context.cost(
            self.timing, flops, "on top of the model's own forward pass, whose hidden states it reads"
        )

    def _logits(self, states: Tensor) -> npt.NDArray[Any]:
        mean, scale = self._scale
        with torch.inference_mode(), self.timing.measuring(len(states)):
            logits: npt.NDArray[Any] = self.net((states - mean) * scale)[..., 0].numpy()
        return logits

    def _batch(self, rows: _Rows, picks: Sequence[int]) -> Batch:
        reads, hidden, balance = rows
        mean, scale = self._scale
        states = (torch.from_numpy(hidden.of(picks, self.layers)) - mean) * scale
        counts = [hidden.count(i) for i in picks]
        inputs = torch.nn.utils.rnn.pad_sequence(list(states.split(counts)), batch_first=True)
        each = [torch.from_numpy(hidden.steps[hidden.starts[i] : hidden.starts[i + 1]]) for i in picks]
        steps = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
        mask = torch.arange(inputs.shape[1])[None] < torch.tensor(counts)[:, None]
        onsets = torch.tensor([onset_of(reads[i], self.labels) for i in picks])
        labels = steps >= onsets[:, None]
        weights = torch.where(labels, balance[1], balance[0])
        harmful = torch.tensor([float(reads[i].row.harmful) for i in picks])
        return Batch(inputs, mask, labels.float(), weights, harmful, hidden.view.window > 1)

    @torch.no_grad()
    def _mean_loss(self, rows: _Rows, picks: Sequence[int]) -> float:
        total = 0.0
        for first in range(0, len(picks), self.fitting.rows):
            some = picks[first : first + self.fitting.rows]
            batch = self._batch(rows, some)
            total += float(self.loss(self.net(batch.inputs)[..., 0], batch, 1.0)) * len(some)
        return total / len(picks)


def read_together(probes: Sequence[Probe], train: Sequence[Row]) -> None:
    """Reads what these probes of one context are fitted on in one pass, so that none has to read it by itself."""
    context = probes[0].context
    keep(context, context.read(train), [probe.view for probe in probes])


def score_together(probes: Sequence[Probe], rows: Sequence[Row]) -> list[Recording]:
    """Scores by several probes of one context in one pass over the rows, keeping no states; see `Baseline.score`."""
    context = probes[0].context
    reads = context.read(rows)
    probs: list[list[Floats]] = [[np.zeros(0, np.float32)] * len(reads) for _ in probes]
    for i, states in passing(context, reads, f"scoring {', '.join(probe.name for probe in probes)}"):
        for number, probe in enumerate(probes):
            probs[number][i] = probe.judged(states)
    return [context.record(reads, one, probe.name) for one, probe in zip(probs, probes, strict=True)]


def last_layer_probe(context: BaselineContext, *, labels: Labels = "onset", fitting: Fitting | None = None) -> Probe:
    """A linear probe on the last hidden state, binary cross-entropy at every step, both classes weighing the same."""
    what = (
        f"Linear probe on the last hidden state of {_whose(context)}, cross-entropy at every step; "
        f"{_labelled(labels)}; trained on the same rows as the flag."
    )
    last, fitting = (context.config.num_hidden_layers,), fitting or Fitting(lbfgs=60, passes=0)
    return Probe("last-layer probe", what, context, last, 0, _at_every_step, labels, fitting, None, _tapped(context))


def all_layer_probe(
    context: BaselineContext,
    *,
    window: int = 16,
    temperature: float = 1.0,
    reading: Reading = "sum",
    fitting: Fitting | None = None,
) -> Probe:
    """The linear probe of CC++ (arXiv 2601.04603): all layers side by side, SWiM, softmax-weighted loss, EMA.

    Which activations the paper reads is not stated; here it is the residual stream after the embedding and every layer.
    `window` is the paper's M, the steps that training averages over, `temperature` its tau.
    """

    def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
        averaged = 1 if batch.smooth else window
        each = softmax_weighted(logits, batch.mask, batch.harmful, averaged, temperature, reading)
        # Labels are those of whole responses: the first step's weight is the response's.
        return (each * batch.weights[:, 0]).mean()

    decay = 2 / (window + 1)
    what = (
        f"CC++ probe: linear on the hidden states of all layers of {_whose(context)}, mean of {window} logits and "
        f"softmax-weighted loss (tau {temperature:g}, {reading}) in training, moving average ({decay:.3f}, from the "
        "median harmless logit) when scoring; labels of whole responses; trained on the same rows as the flag."
    )
    layers = tuple(range(context.config.num_hidden_layers + 1))
    fitting = fitting or Fitting(learning_rate=1e-2)
    view = View(layers, window)
    return Probe("all-layer probe", what, context, layers, 0, loss, "response", fitting, decay, view)


def token_head(context: BaselineContext, *, fitting: Fitting | None = None) -> Probe:
    """The token head of constitutional classifiers (arXiv 2501.18837): linear, from per-token to cumulative maximum.

    The predictor that is trained moves from the step's own logit to the greatest one so far, linearly over training.
    What is recorded is the step's own; a monitor that takes the maximum makes the cumulative one of it.
    """

    def loss(logits: Tensor, batch: Batch, done: float) -> Tensor:
        return token_bce(towards_maximum(logits, done), batch.labels, batch.mask, batch.weights)

    what = (
        f"Token head: linear on the last hidden state of {_whose(context)}, cross-entropy at every step with the "
        "response's label, from each step's logit to the cumulative maximum in the course of training; trained on the "
        "same rows as the flag."
    )
    last, fitting = (context.config.num_hidden_layers,), fitting or Fitting(lbfgs=60, learning_rate=1e-2)
    return Probe("token head", what, context, last, 0, loss, "response", fitting, None, _tapped(context))


def mlp_probe(
    context: BaselineContext, *, width: int = 128, labels: Labels = "onset", fitting: Fitting | None = None
) -> Probe:
    """A small multi-layer perceptron on three tapped layers: a third and two thirds of the way, and the last."""
    count, taps = context.config.num_hidden_layers, _tapped(context).layers
    what = (
        f"MLP probe: {width} units on the hidden states behind layers {', '.join(map(str, taps))} of {count} of "
        f"{_whose(context)}, cross-entropy at every step; {_labelled(labels)}; trained on the same rows as the flag."
    )
    fitting = fitting or Fitting()
    return Probe("mlp probe", what, context, taps, width, _at_every_step, labels, fitting, None, _tapped(context))


def _tapped(context: BaselineContext) -> View:
    """What all probes but the all-layer one read: one view for them all, whichever of them are wanted."""
    count = context.config.num_hidden_layers
    return View(tuple(sorted({max(1, round(count / 3)), max(1, round(2 * count / 3)), count})))


def _at_every_step(logits: Tensor, batch: Batch, done: float) -> Tensor:
    return token_bce(logits, batch.labels, batch.mask, batch.weights)


def _whose(context: BaselineContext) -> str:
    return "the reference model" if context.hidden_from == "reference" else "the flagged model"


def _labelled(labels: Labels) -> str:
    return "steps before a known onset are harmless" if labels == "onset" else "labels of whole responses"


def _net(inputs: int, width: int, generator: torch.Generator) -> torch.nn.Module:
    """A linear function that starts at zero, or one hidden layer."""
    if not width:
        line = torch.nn.Linear(inputs, 1)
        torch.nn.init.zeros_(line.weight)
        torch.nn.init.zeros_(line.bias)
        return line
    layers = torch.nn.Linear(inputs, width), torch.nn.Linear(width, 1)
    for layer in layers:
        bound = layer.in_features**-0.5
        torch.nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])


def _sigmoid(logits: npt.NDArray[Any]) -> Floats:
    return (1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -80, 80)))).astype(np.float32)
