"""transformers as a backend: a decoding loop over a key-value cache that measures the flags from raw logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from redflag.backends import MOST_LOGPROBS, Sampling, refuse_earlier, room_for
from redflag.backends.choose import Chooser, measure
from redflag.backends.head import CACHE, backbone, head_agrees, measure_hidden, plain_model
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.trace import Step
from redflag.weights.prefix import PrefixSlot

_PART = 256  # tokens of a prompt that are measured at one time


class HFBackend:
    """Runs a causal language model of transformers, with or without PEFT, on the device where it lies.

    The model is put into evaluation mode. Several streams may be open at a time; each has its own cache.

    Attributes:
        context_length: Most tokens of prompt and response together; None when the model states no limit.
        most_logprobs: Largest allowed `Sampling.logprobs`.
        measures_earlier: True: spans of the prompt are measured in the prompt's own pass.

    Example:
        ```python
        backend = HFBackend(model, tokenizer, spec)
        for step in backend.stream(prompt_ids, Sampling(temperature=0.0)):
            print(step.token_id, step.flag_probs)
        ```
    """

    def __init__(self, model: Any, tokenizer: Any, spec: FlagSpec, *, reuse_prefix: bool = True) -> None:
        """Wraps a loaded model.

        Args:
            model: With the flags attached.
            tokenizer: Only the end-of-sequence id is read from it.
            reuse_prefix: Cache the last stream's keys and values for a prompt with the same beginning. Logits then
                equal those of a fresh run up to rounding; set False for seeded sampling that is equal bit by bit.

        Raises:
            RedflagError: A flag id lies outside the model's vocabulary.
        """
        self.logprob_mode = "raw"
        self.upper_bound = False
        self.most_logprobs = MOST_LOGPROBS
        self.measures_earlier = True
        self._model = model.eval()
        plain = plain_model(model)
        self._device: torch.device = plain.device
        config = plain.config.get_text_config()
        self._config = config
        vocabulary: int = plain.get_output_embeddings().weight.shape[0]
        self._vocabulary = vocabulary
        outside = [flag_id for flag_id in spec.ids if not 0 <= flag_id < vocabulary]
        if outside:
            raise RedflagError(
                f"flag ids must be below the model's vocabulary size, {vocabulary} (got {outside[0]}). Load the model "
                "that the flags were attached to."
            )
        self._flag_ids = torch.tensor(spec.ids, dtype=torch.long, device=self._device)
        ends = find_eos_ids(getattr(plain, "generation_config", None), plain.config, tokenizer)
        self.eos_ids = ends - frozenset(spec.ids)
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self._slot = PrefixSlot() if reuse_prefix else None
        accepted = inspect.signature(plain.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted
        self._head_apart: bool | None = None

    @property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        return self._model

    def stream(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()) -> Iterator[Step]:
        """Continues a prompt; see `redflag.backends.Backend.stream`.

        A response stops at the end of the context as it does at `max_new_tokens`. A step with NaN probabilities is the
        last one.
        """
        outside = [i for i in watch if not 0 <= i < self._vocabulary]
        if outside:
            raise RedflagError(
                f"watched ids must be below the model's vocabulary size, {self._vocabulary} (got {outside[0]})."
            )
        room = room_for(len(token_ids), sampling, self.context_length)
        return self._steps(list(token_ids), sampling, room, watch)

    def forget(self) -> None:
        """Frees the keys and values cached for the next prompt."""
        if self._slot is not None:
            self._slot.clear()

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int = 16
    ) -> list[list[Step]]:
        """Continues many prompts at once.

        Args:
            prompts: Ids of each, of any lengths.
            sampling: Prompt i uses `seed + i`.
            batch_size: Maximum number of prompts in a batch.

        Returns:
            For each prompt the steps that `stream` yields for it (up to rounding), in the order given.

        Raises:
            RedflagError: A prompt is empty or leaves no room for a response.
        """
        refuse_earlier(sampling)
        rooms = [room_for(len(prompt), sampling, self.context_length) for prompt in prompts]
        responses: list[list[Step]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        chooser = Chooser(sampling, prompts, self._flag_ids, self._device)
        for start in range(0, len(order), batch_size):
            self._complete_batch(prompts, order[start : start + batch_size], rooms, chooser, responses)
        return responses

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 16
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Flag probabilities of given responses, measured before each of their tokens (teacher forcing).

        Args:
            pairs: `(prompt_ids, response_ids)` for each response.
            batch_size: Maximum number of responses in one forward pass; responses are sorted by length.

        Returns:
            For each pair an array of shape `(T, K)`, float32, T being the length of its response. Row t equals the
            probabilities of the t-th step of a stream that chose the same tokens.

        Raises:
            RedflagError: A prompt is empty, or prompt and response do not fit the context.
        """
        for index, (prompt, response) in enumerate(pairs):
            self._check_pair(index, len(prompt), len(response))
        scores = [np.zeros((len(response), len(self._flag_ids)), dtype=np.float32) for _, response in pairs]
        order = sorted(
            (index for index, (_, response) in enumerate(pairs) if response),
            key=lambda index: len(pairs[index][0]) + len(pairs[index][1]),
        )
        if order and self._head_apart is None:
            sample = torch.tensor([list(pairs[order[0]][0])[:4]], device=self._device)
            self._head_apart = head_agrees(self._model, sample)
        # A model whose head cannot be applied separately runs row by row, so that only one row's logits are in memory.
        size = batch_size if self._head_apart else 1
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            probs = self._score_batch([pairs[row] for row in rows]).cpu().numpy()
            ends = np.cumsum([len(scores[row]) for row in rows])
            for row, part in zip(rows, np.split(probs, ends[:-1]), strict=True):
                scores[row][:] = part
        return scores

    def _check_pair(self, index: int, prompt: int, response: int) -> None:
        if not prompt:
            raise RedflagError(
                f"prompt {index} must hold at least one token (got none). Nothing else precedes its response's first "
                "token."
            )
        if self.context_length is not None and prompt + response > self.context_length:
            raise RedflagError(
                f"conversation {index} must have at most {self.context_length} tokens, the model's context (got "
                f"{prompt + response}). Shorten or leave out this row."
            )

    def _steps(self, prompt: list[int], sampling: Sampling, room: int, watch: Sequence[int]) -> Iterator[Step]:
        needed = [position for start, end in sampling.earlier for position in range(start, end)]
        measured: dict[int, tuple[float, ...]] = {}
        cached = self._slot.take(prompt, needed, measured) if self._slot is not None else None
        cache, held = cached if cached is not None else (DynamicCache(config=self._config), 0)
        chooser = Chooser(sampling, [prompt], self._flag_ids, self._device, watch)
        cached_ids, pending = prompt[:held], prompt[held:]
        missing = [position for position in needed if position not in measured]
        # False while the cache may be half written or hold NaN; then it is dropped instead of reused.
        sound = False
        try:
            for _ in range(room):
                sound = False
                if missing:
                    before, pending = self._measured(cache, len(cached_ids), pending, missing, measured)
                    cached_ids += before
                logits = self._last_logits(torch.tensor([pending], device=self._device), cache)
                cached_ids += pending
                step = chooser.step(logits, (0,))[0]
                sound = not any(map(math.isnan, step.flag_probs))
                if not watch:
                    measured[len(cached_ids)] = step.flag_probs
                if needed:
                    spans = sampling.earlier
                    step = step._replace(earlier=tuple(tuple(measured[p] for p in range(*span)) for span in spans))
                    needed, missing = [], []
                yield step
                if not sound or step.token_id in self.eos_ids:
                    return
                pending = [step.token_id]
        finally:
            if sound and self._slot is not None:
                self._slot.put(cache, cached_ids, measured)

    @torch.inference_mode()
    def _measured(
        self, cache: Any, held: int, pending: list[int], missing: list[int], measured: dict[int, tuple[float, ...]]
    ) -> tuple[list[int], list[int]]:
        """Runs the prompt up to the last position whose flags are missing, in parts, so that few logits are in memory.

        Args:
            cache: Holds the first `held` tokens of the prompt.
            held: Their number.
            pending: The others.
            missing: Positions in the prompt, ascending, all above `held`.
            measured: Gets the flag probabilities before their tokens.

        Returns:
            Tokens that the cache holds now in addition, and those that are still pending, at least one.
        """
        last = missing[-1] - held
        for start in range(0, last, _PART):
            part = pending[start : min(start + _PART, last)]
            # The logits at a position measure the token behind it: position p is measured by token p - 1 of the prompt.
            wanted = [p for p in missing if held + start < p <= held + start + len(part)]
            # A part without such positions runs too, to fill the cache. Its one row is dropped by `zip`: a tensor of no
            # rows would be of floats, which are no indices.
            rows = torch.tensor([p - 1 - held - start for p in wanted] or [0], device=self._device)
            output = self._model(
                input_ids=torch.tensor([part], device=self._device),
                use_cache=True,
                **{CACHE: cache},
                **({"logits_to_keep": rows} if self._last_only else {}),
            )
            logits = output.logits[0] if self._last_only else output.logits[0, rows]
            probs = measure(logits.to(self._device).float(), self._flag_ids).tolist()
            measured.update(zip(wanted, map(tuple, probs), strict=False))
        return pending[:last], pending[last:]

    @torch.inference_mode()
    def _last_logits(self, input_ids: torch.Tensor, cache: Any, **inputs: Any) -> torch.Tensor:
        """One forward pass; logits of the last position, shape `(B, V)`."""
        output = self._model(input_ids=input_ids, use_cache=True, **{CACHE: cache}, **self._last_only, **inputs)
        return output.logits[:, -1].to(self._device)

    @torch.inference_mode()
    def _complete_batch(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[int],
        rooms: Sequence[int],
        chooser: Chooser,
        responses: list[list[Step]],
    ) -> None:
        # Prompts are padded on the left, so that the last column is the next position of every row. The mask hides the
        # padding, and positions start at 0 behind it.
        width = max(len(prompts[row]) for row in rows)
        pads = torch.tensor([width - len(prompts[row]) for row in rows], device=self._device)
        input_ids = torch.tensor(
            [[0] * (width - len(prompts[row])) + list(prompts[row]) for row in rows], device=self._device
        )
        cache = DynamicCache(config=self._config)
        padded = bool(pads.any())
        first = 0
        while True:
            inputs: dict[str, torch.Tensor] = {}
            if padded:
                columns = torch.arange(first + input_ids.shape[1], device=self._device)
                inputs["attention_mask"] = (columns >= pads[:, None]).long()
                if self._takes_positions:
                    inputs["position_ids"] = (columns[first:] - pads[:, None]).clamp_min(0)
            steps = chooser.step(self._last_logits(input_ids, cache, **inputs), rows)
            first += input_ids.shape[1]
            running = []
            for index, (row, step) in enumerate(zip(rows, steps, strict=True)):
                responses[row].append(step)
                unjudged = any(map(math.isnan, step.flag_probs))
                if len(responses[row]) < rooms[row] and step.token_id not in self.eos_ids and not unjudged:
                    running.append(index)
            # Finished rows leave the batch and the cache; the others keep their order.
            if not running:
                return
            if len(running) < len(rows):
                still_running = torch.tensor(running, device=self._device)
                cache.reorder_cache(still_running)
                pads, rows = pads[still_running], [rows[index] for index in running]
            input_ids = torch.tensor([[steps[index].token_id] for index in running], device=self._device)

    def _score_batch(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
        """Probabilities of all response positions of a batch, one response after the other, shape `(sum of T, K)`.

        Rows are padded on the right: no position sees what comes after it, so the padding needs no mask.
        """
        rows = [[*prompt, *response] for prompt, response in pairs]
        width = max(map(len, rows))
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self._device)
        # Index i of the logits judges the moment before token i + 1.
        spans = [slice(len(prompt) - 1, len(row) - 1) for (prompt, _), row in zip(pairs, rows, strict=True)]
        if self._head_apart:
            hidden = backbone(self._model)(input_ids=input_ids, use_cache=False).last_hidden_state
            needed = torch.cat([hidden[index, span] for index, span in enumerate(spans)])
            return measure_hidden(self._model, needed, self._flag_ids)
        logits = self._model(input_ids=input_ids, use_cache=False).logits
        return torch.cat([measure(logits[index, span].float(), self._flag_ids) for index, span in enumerate(spans)])


def find_eos_ids(*sources: Any) -> frozenset[int]:
    """End-of-sequence ids from all given configurations and tokenizers."""
    eos_ids: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            eos_ids.update([ids] if isinstance(ids, int) else ids)
    return frozenset(eos_ids)
