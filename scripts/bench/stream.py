"""Guarded streaming against plain `model.generate` with a `TextIteratorStreamer`: same model, prompt and settings.

    python scripts/bench/stream.py                                    # Qwen2.5-0.5B's shape, CPU, float32
    python scripts/bench/stream.py --shape 8b --device cuda --dtype bfloat16

The weights are random: speed does not depend on what they say, and nothing has to be fetched. So is the vocabulary: a
byte-level one made here, padded to the model's size with words that decode to plain text. The guard holds 8 tokens
back and has a threshold that no probability reaches; its prefix cache is off, because the same prompt comes again and
again. No end-of-sequence token exists, so every run makes all its tokens. Runs come in pairs, the order turned round
each time; a ratio below 1 means that the guard costs speed. Prints one line per mode to standard error, and JSON to
standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import threading
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TextIteratorStreamer,
)

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.flags import Flag, FlagSpec
from redflag.guard.guard import Guard
from redflag.prompt import render_prompt
from redflag.trace import Done, Text
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

# hidden size, layers, heads, key-value heads, intermediate size, vocabulary, tied embeddings
SHAPES = {
    "smollm2": (576, 30, 9, 3, 1536, 49_152, True),  # SmolLM2-135M
    "0.5b": (896, 24, 14, 2, 4864, 151_936, True),  # Qwen2.5-0.5B
    "1b": (2048, 16, 32, 8, 8192, 128_256, True),  # Llama 3.2 1B
    "8b": (4096, 32, 32, 8, 14_336, 128_256, False),  # Llama 3.1 8B
    "tiny": (64, 2, 4, 2, 128, 4096, True),  # to try the script itself
}
MESSAGES = [{"role": "user", "content": "tell me something " * 4}]


def build_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    """A model of this shape with random weights, no end of sequence and a long context."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[shape]
    config_class, model_class = (Qwen2Config, Qwen2ForCausalLM) if shape == "0.5b" else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class(config).to(dtype).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=None, bos_token_id=None)
    return model


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """256 bytes and as many made-up words as are missing; the last id is the flag."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"Ġw{number}" for number in range(vocabulary - len(tokens) - 1)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|flag|>"]})
    return tokenizer


def run_plain(model: Any, tokenizer: Any, prompt: list[int], sampling: Sampling) -> float:
    """Seconds that `generate` and its streamer take."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    input_ids = torch.tensor([prompt], device=model.device)
    lengths: list[int] = []

    def work() -> None:
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            streamer=streamer,
            **({"do_sample": False} if sampling.greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}),
        )
        lengths.append(output.shape[1] - len(prompt))

    start = time.perf_counter()
    thread = threading.Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join()
    seconds = time.perf_counter() - start
    assert text and lengths == [sampling.max_new_tokens], lengths
    return seconds


def run_guarded(guard: Guard, sampling: Sampling) -> float:
    """Seconds that the guarded stream takes."""
    start = time.perf_counter()
    events = list(guard.stream(MESSAGES, sampling))
    seconds = time.perf_counter() - start
    assert events[-1] == Done(sampling.max_new_tokens, "length"), events[-1]
    assert any(isinstance(event, Text) and event.text for event in events)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="response tokens of each run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--hold-back", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads on the CPU; default: torch's own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    model = build_model(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokenizer = build_tokenizer(vocabulary)
    spec = FlagSpec(flags=(Flag("harm", "<|flag|>", id=vocabulary - 1),))
    assert tokenizer.convert_tokens_to_ids("<|flag|>") == spec.ids[0]
    never = Thresholds.manual(math.nextafter(1.0, 2.0), spec.categories)
    backend = HFBackend(model, tokenizer, spec, reuse_prefix=False)
    guard = Guard(backend, tokenizer, spec, never, Policy(hold_back=arguments.hold_back))
    prompt = render_prompt(tokenizer, MESSAGES, spec)

    result: dict[str, Any] = {
        "shape": arguments.shape,
        "parameters": model.num_parameters(),
        "vocabulary": vocabulary,
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "prompt_tokens": len(prompt),
        "tokens": arguments.tokens,
        "hold_back": arguments.hold_back,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        short = Sampling(max_new_tokens=8, temperature=temperature, seed=0)
        for _ in range(2):
            run_plain(model, tokenizer, prompt, short)
            run_guarded(guard, short)
        pairs = []
        for index in range(arguments.pairs):
            sampling = Sampling(max_new_tokens=arguments.tokens, temperature=temperature, seed=index)
            if index % 2:
                guarded = run_guarded(guard, sampling)
                plain = run_plain(model, tokenizer, prompt, sampling)
            else:
                plain = run_plain(model, tokenizer, prompt, sampling)
                guarded = run_guarded(guard, sampling)
            pairs.append((arguments.tokens / plain, arguments.tokens / guarded))
        ratios = [guarded / plain for plain, guarded in pairs]
        result[mode] = {
            "plain_tokens_per_second": [round(plain, 3) for plain, _ in pairs],
            "guarded_tokens_per_second": [round(guarded, 3) for _, guarded in pairs],
            "ratios": [round(ratio, 4) for ratio in ratios],
            "median_ratio": round(statistics.median(ratios), 4),
            "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        }
        print(
            f"{arguments.shape} {arguments.device} {arguments.dtype} {mode}: guarded / plain = "
            f"{statistics.median(ratios):.3f} (median of {len(ratios)} pairs, {min(ratios):.3f} to {max(ratios):.3f})",
            file=sys.stderr,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
