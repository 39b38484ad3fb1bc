"""Hidden states of training rows, read in one pass for all probes and stored on at most `MOST_DISK` bytes of disk.

Rows that are only scored pass by and leave nothing (`passing`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.lab.baselines.shared import BaselineContext, Read, digest
from redflag.progress import Progress
from redflag.weights.stamp import model_stamp

# Bytes of disk for all probes of one comparison: every layer of every step if they fit, else half of it for each view.
MOST_DISK = 2_000_000_000
_RECORDED_EVERY = 64  # rows of a pass, so that another run goes on from there
# Numbers alive at one time in a forward pass: 256 MB of float32.
_AT_ONCE = 64_000_000
_HALF_MAX = 65504.0

Steps = npt.NDArray[np.int64]


class View(NamedTuple):
    """What a probe reads of the model in training."""

    layers: tuple[int, ...]  # which hidden states, 0 the embedding's output
    window: int = 1  # steps over which its training averages the logits


class Hidden(NamedTuple):
    """Hidden states of N responses at S steps in all."""

    # S x L x H, float16, on disk: the layers of `view`, at the position where the step's token is predicted (the last
    # layer behind the final norm), each the mean over the last `view.window` steps. A linear probe's logit of the mean
    # is the mean of its logits
    states: npt.NDArray[np.float16]
    starts: Steps  # N + 1 offsets: response i has the steps `starts[i]` to `starts[i + 1]`; none where it was not drawn
    steps: Steps  # S, the index of each step in its response
    view: View  # what was kept. With a window of 1 that is every layer of every step, or some steps of some layers

    def of(self, rows: Sequence[int], layers: Sequence[int]) -> npt.NDArray[np.float32]:
        """Steps of these responses end to end, the layers' states side by side: s x (layers * H)."""
        return np.concatenate([self.between(self.starts[i], self.starts[i + 1], layers) for i in rows])

    def between(self, first: int, last: int, layers: Sequence[int]) -> npt.NDArray[np.float32]:
        """The steps `first` to `last`, as `of` gives them."""
        return side_by_side(self.states[first:last], [self.view.layers.index(layer) for layer in layers])

    def count(self, row: int) -> int:
        """Steps of a response."""
        return int(self.starts[row + 1] - self.starts[row])


def side_by_side(states: npt.NDArray[Any], layers: Sequence[int]) -> npt.NDArray[np.float32]:
    """S x L x H -> S x (layers * H), float32."""
    chosen = states if list(layers) == list(range(states.shape[1])) else states[:, layers]
    return chosen.astype(np.float32).reshape(len(states), -1)


def hidden_states(context: BaselineContext, reads: Sequence[Read], view: View | None = None) -> Hidden:
    """Hidden states of these rows, from disk when they are there."""
    view = view or View(_all_layers(context))
    keep(context, reads, [view])
    store = _Store.of(context, reads, view)
    return Hidden(np.load(store.path, mmap_mode="r"), store.starts, np.concatenate(store.steps), store.view)


def keep(context: BaselineContext, reads: Sequence[Read], views: Sequence[View]) -> None:
    """Writes what is not yet on disk of these views, in one pass over the rows; states of other rows are dropped.

    Where every layer of every step takes more than `MOST_DISK`, each view gets half of that: its layers alone, at steps
    that are drawn (`drawn_steps`), the same for every seed. A pass that was killed is continued. One run at a time in a
    folder.

    Raises:
        RedflagError: The disk space cannot be had.
    """
    stores = {store.path: store for store in (_Store.of(context, reads, view) for view in views)}
    missing = [store for path, store in stores.items() if not path.exists()]
    if not missing:
        return
    record = _begun(context, stores, missing, digest([len(reads), context.batch_size]))
    done = kept_json(record, fingerprint=record.stem)
    begin = 0 if done is None else int(done["rows"])
    written = [_opened(context, store, new=begin == 0) for store in missing]
    for count, (i, states) in enumerate(passing(context, reads, "reading hidden states", begin), begin + 1):
        for store, target in zip(missing, written, strict=True):
            target[store.starts[i] : store.starts[i + 1]] = _seen(states, store.steps[i], store.view)
        if count % _RECORDED_EVERY == 0:
            for target in written:
                target.flush()
            keep_json(record, {"format": 1, "fingerprint": record.stem, "rows": count})
    for store, target in zip(missing, written, strict=True):
        target.flush()
        os.replace(store.partial, store.path)
    record.unlink(missing_ok=True)


def forget(context: BaselineContext) -> None:
    """Deletes all hidden states of this context from disk, those of a killed run included."""
    for path in _files(context):
        path.unlink()


def passing(
    context: BaselineContext, reads: Sequence[Read], what: str, begin: int = 0
) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
    """Each row's index and hidden states, T x (L + 1) x H, in an order that suits the model; nothing is stored."""
    import torch

    from redflag.backends.load import read_model

    model, _ = read_model(context.hidden_folder, torch.float32 if context.device == "cpu" else "auto")
    model = model.to(context.device).eval()
    lengths = [len(read.prompt_ids) + len(read.judged_ids) for read in reads]
    layers, width = context.config.num_hidden_layers + 1, context.config.hidden_size
    batches = _batches(lengths, max(1, _AT_ONCE // (layers * width)), context.batch_size)
    order = [i for picks in batches for i in picks][begin:]
    left = set(order)
    done, total = 0, sum(lengths[i] for i in order)
    with Progress(what, total, "tokens") as progress:
        for picks in batches:
            if left.isdisjoint(picks):
                continue
            with torch.autocast(torch.device(context.device).type, torch.bfloat16, enabled=context.bf16):
                # The last token is never read from: nothing is predicted after it.
                layers_BTLH = last_layers(model, [(reads[i].prompt_ids + reads[i].judged_ids)[:-1] for i in picks])
            halves = layers_BTLH.float().clamp(-_HALF_MAX, _HALF_MAX).half().cpu().numpy()
            for i, one in zip(picks, halves, strict=True):
                if i in left:
                    first = len(reads[i].prompt_ids) - 1
                    yield i, one[first : first + len(reads[i].judged_ids)]
                    done += lengths[i]
            progress(done)


def last_layers(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """A batch's hidden states of all layers, B x T x (L + 1) x H, rows padded on the right."""
    import torch

    from redflag.backends.head import backbone

    width = max(map(len, rows))
    # No position sees what comes after it, so the padding needs no mask.
    batch = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    with torch.inference_mode():
        out = backbone(model)(input_ids=batch, use_cache=False, output_hidden_states=True)
        return torch.stack(out.hidden_states, dim=2)


def drawn_steps(lengths: Sequence[int], onsets: Sequence[int | None], most: int, window: int = 1) -> list[Steps]:
    """Which steps of each response are kept, in order: all of them, or `most` in all.

    Short responses keep every step, long ones equally many: up to half from just before the onset on, if there is one
    (a window apart: the first mean that is of harmful steps alone, then the next), the others spread, one drawn from
    each stretch of what is left. With more responses than places, some have none.

    Args:
        window: Steps with fewer steps before them are not drawn, unless the response is shorter.
    """
    firsts = [max(0, min(length, window) - 1) for length in lengths]
    counts = np.array([length - first for length, first in zip(lengths, firsts, strict=True)], dtype=np.int64)
    draw = np.random.default_rng(0)
    if counts.sum() <= most:
        limit = int(counts.max(initial=0))
    else:
        limits = np.arange(1, int(counts.max()) + 1)
        limit = int(sum(np.minimum(counts, n).sum() <= most for n in limits))
    chosen = set(range(len(lengths)) if limit else draw.permutation(len(lengths))[:most].tolist())
    steps = []
    for i, (first, length, onset) in enumerate(zip(firsts, lengths, onsets, strict=True)):
        room = min(max(1, limit), length - first) if i in chosen else 0
        if room in (0, length - first):
            steps.append(np.arange(first, first + room))
            continue
        near = np.zeros(0, dtype=np.int64)
        if onset is not None:
            start = min(max(first, onset + window - 1 - room // 8), length - 1)
            near = np.arange(start, length, window)[: room // 2]
        left = np.setdiff1d(np.arange(first, length), near)
        parts = np.array_split(left, room - len(near))
        steps.append(np.sort(np.array([*near, *(draw.choice(part) for part in parts)], dtype=np.int64)))
    return steps


class _Store(NamedTuple):
    """A file of states, and where the steps of each response are in it."""

    path: Path
    view: View
    steps: list[Steps]
    starts: Steps

    @property
    def partial(self) -> Path:
        return self.path.with_suffix(".partial")

    @classmethod
    def of(cls, context: BaselineContext, reads: Sequence[Read], view: View) -> _Store:
        lengths = [len(read.judged_ids) for read in reads]
        layers, bytes_each = _all_layers(context), 2 * context.config.hidden_size
        if sum(lengths) * len(layers) * bytes_each <= MOST_DISK:
            view, steps = View(layers), [np.arange(length) for length in lengths]
        else:
            most = MOST_DISK // 2 // (len(view.layers) * bytes_each)
            onsets = [(read.onset or 0) if read.row.harmful else None for read in reads]
            steps = drawn_steps(lengths, onsets, most, view.window)
        rows = digest([model_stamp(context.hidden_folder), context.bf16, [[r.prompt_ids, r.judged_ids] for r in reads]])
        path = context.folder / f"{rows}-{digest([view, [some.tolist() for some in steps]])}.npy"
        return cls(path, view, steps, np.concatenate([[0], np.cumsum([len(some) for some in steps])]).astype(np.int64))


def _files(context: BaselineContext) -> list[Path]:
    return [path for kind in ("*.npy", "*.partial", "*.reading") for path in context.folder.glob(kind)]


def _begun(context: BaselineContext, wanted: Mapping[Path, _Store], missing: Sequence[_Store], order: str) -> Path:
    """Where it is recorded how far the missing stores are; makes room for them."""
    rows = missing[0].path.name.split("-")[0]
    record = context.folder / f"{rows}-{digest([order, [store.path.name for store in missing]])}.reading"
    context.folder.mkdir(parents=True, exist_ok=True)
    partials = [store.partial for store in missing]
    whole = record.exists() and all(path.exists() for path in partials)
    for path in _files(context):
        if not path.name.startswith(rows) or (path.suffix != ".npy" and not (whole and path in (record, *partials))):
            path.unlink()
    # Other views of the same rows stay for probes to come, as far as there is room.
    others = [path for path in context.folder.glob("*.npy") if path not in wanted]
    room = MOST_DISK - sum(
        2 * context.config.hidden_size * len(s.view.layers) * int(s.starts[-1]) for s in wanted.values()
    )
    if sum(path.stat().st_size for path in others) > room:
        for path in others:
            path.unlink()
    return record


def _opened(context: BaselineContext, store: _Store, new: bool) -> Any:
    """The file that a pass writes to, mapped: a new one, or what an earlier one left."""
    if not new:
        return np.load(store.partial, mmap_mode="r+")
    shape = (int(store.starts[-1]), len(store.view.layers), context.config.hidden_size)
    states = np.lib.format.open_memmap(store.partial, mode="w+", dtype=np.float16, shape=shape)
    _reserve(store.partial)
    return states


def _all_layers(context: BaselineContext) -> tuple[int, ...]:
    return tuple(range(context.config.num_hidden_layers + 1))


def _seen(states: npt.NDArray[np.float16], steps: Steps, view: View) -> npt.NDArray[np.float16]:
    """These steps as the view has them."""
    if len(view.layers) != states.shape[1]:
        states = states[:, list(view.layers)]
    if view.window == 1 or not len(steps):
        return states[steps]
    means = [states[max(0, t + 1 - view.window) : t + 1].mean(axis=0, dtype=np.float32) for t in steps.tolist()]
    return np.stack(means).astype(np.float16)


def _reserve(path: Path) -> None:
    """Takes the disk space now: writing to a mapped file on a full disk would end the process."""
    size = path.stat().st_size
    try:
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise RedflagError(
            f"{path.parent} must have {size / 1e9:.1f} GB for hidden states ({error.strerror}). Free the space, or "
            "give another hidden_dir."
        ) from error


def _batches(lengths: Sequence[int], most_tokens: int, batch_size: int) -> list[list[int]]:
    """Rows of similar length together; a batch has at most `most_tokens`, padding included, but at least one row."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[i] > most_tokens):
            batches.append([])
        batches[-1].append(i)
    return batches
