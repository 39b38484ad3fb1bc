"""A small language model from scratch: the base that the nano and small-real recipes flag.

Real users start from a released model; this exists so that the whole path runs on any machine without a download.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from redflag.errors import RedflagError
from redflag.files import atomic_write, keep_json, kept_json
from redflag.progress import Progress
from redflag.weights.precision import Machine, choose_precision

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
RESERVED_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(8))

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with a chat template and eight reserved tokens, all within `vocab_size`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *RESERVED_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=[*SPECIAL_TOKENS[2:], *RESERVED_TOKENS],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pretrain(
    conversations: Sequence[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    tokens: int,
    sequence_length: int = 256,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    max_minutes: float | None = None,
    read_only: Sequence[str] = (),
) -> Path:
    """Trains a Llama-shaped model on conversations rendered with the tokenizer's chat template, and saves it.

    The result is cached: if `output_dir` holds a finished model of the same settings and data, nothing is done. The run
    is resumable: a checkpoint is written every two minutes.

    Args:
        conversations: Lists of `{role, content}` messages; packed end to end, every token is learnt.
        output_dir: Ordinary Hugging Face directory that is written.
        tokens: Budget in tokens; the data is repeated, reshuffled, as often as needed.
        sequence_length: Tokens per packed sequence.
        batch_size: Sequences per step.
        learning_rate: Peak of a cosine schedule with 3% warm-up.
        max_minutes: Wall-clock limit of the training loop; the schedule adapts to it.
        read_only: Tokens in the conversations that are never learnt as the next token.
    """
    output_dir = Path(output_dir)
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *_encode(conversations, tokenizer)])
    count = len(ids) // (sequence_length + 1)
    if count == 0:
        raise RedflagError(
            f"the pretraining text must have at least one sequence of {sequence_length + 1} tokens (got {len(ids)}). "
            "Give more conversations or a smaller sequence_length."
        )
    blocks = torch.from_numpy(ids[: count * (sequence_length + 1)].astype(np.int64)).view(count, sequence_length + 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max(1024, sequence_length),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = {
        "shape": [hidden_size, layers, heads, intermediate_size, sequence_length, batch_size],
        "tokens": tokens,
        "learning_rate": learning_rate,
        "seed": seed,
        "data": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    if read_only:
        settings["read_only"] = list(read_only)
    unlearnt = torch.tensor([tokenizer.convert_tokens_to_ids(token) for token in read_only], dtype=torch.int64)
    record = output_dir / "pretrain.json"
    if kept_json(record, settings=settings) is not None:
        return output_dir

    autocast = choose_precision(Machine.here(), use_cpu=True).autocast
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).train()
    steps = max(1, tokens // (batch_size * sequence_length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoint = output_dir / "pretrain.checkpoint"
    output_dir.mkdir(parents=True, exist_ok=True)
    step, elapsed, losses = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] == settings:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, elapsed, losses = state["step"], state["elapsed"], state["losses"]
    start = saved = time.monotonic()
    limit = math.inf if max_minutes is None else 60.0 * max_minutes
    with Progress("base model", steps, "steps", step) as shown:
        while step < steps:
            spent = elapsed + time.monotonic() - start
            # Progress is measured by the token budget or the clock, whichever ends first, so the rate reaches zero.
            progress = max(step / steps, spent / limit)
            if progress >= 1.0:
                break
            warm_up, decay = min(1.0, (step + 1) / (0.03 * steps + 1)), 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm_up * decay
            batch = blocks[_batch(step, count, batch_size, seed)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            targets = batch[:, 1:].masked_fill(torch.isin(batch[:, 1:], unlearnt), -100)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(loss.item())
            shown(step, f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}")
            if time.monotonic() - saved > 120:
                saved = time.monotonic()
                state = {"settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"step": step, "elapsed": elapsed + saved - start, "losses": losses}
                with atomic_write(checkpoint) as file:
                    torch.save(state, file)
    model.eval().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    result = {
        "settings": settings,
        "steps": step,
        "loss": sum(losses[-50:]) / max(1, len(losses[-50:])),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    keep_json(record, result, indent=2)
    checkpoint.unlink(missing_ok=True)
    return output_dir


def _encode(conversations: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
            yield np.asarray(ids, dtype=np.int32)


def _batch(step: int, count: int, batch_size: int, seed: int) -> torch.Tensor:
    """Indices of a step's batch: a function of the step alone, so that a resumed run sees the same batches."""
    start = step * batch_size
    places = [divmod(position, count) for position in range(start, start + batch_size)]
    return torch.stack([_order(epoch, count, seed)[index] for epoch, index in places])


@lru_cache(maxsize=1)
def _order(epoch: int, count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
