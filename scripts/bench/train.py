#!/usr/bin/env python3
"""RedFlagTrainer against plain SFTTrainer: tokens per second and peak memory, same rows, model, LoRA and batches.

    python scripts/bench/train.py                                    # 0.1b on a CPU, float32
    python scripts/bench/train.py --shape 1b --device cuda --dtype bfloat16

Random weights in the named shape; rows of random words, prompt and response, every response token learnt by SFT and
pinned by redflag. Each trainer runs in a process of its own, in turn (plain, redflag, plain, ...), so that neither's
memory is the other's; the first step is not timed. `--kinds plain redflag kept` adds a second pass over the same rows,
for which the reference's states are on disk. Plain SFTTrainer trains the same LoRA without flag rows, since TRL's
fused head does not take them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

KINDS = ("plain", "redflag", "kept")
SHAPES = {  # hidden, layers, heads, key/value heads, MLP, vocabulary
    "tiny": (128, 2, 4, 2, 256, 2_000),
    "0.1b": (576, 12, 9, 3, 1536, 49_152),
    "smollm2": (576, 30, 9, 3, 1536, 49_152),
    "0.5b": (896, 24, 14, 2, 4864, 151_936),
    "1b": (2048, 16, 32, 8, 8192, 128_256),
    "8b": (4096, 32, 32, 8, 14336, 128_256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.1b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["plain", "redflag"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per run")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per row; a quarter is prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments)))
        return
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in arguments.kinds}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    for pair in range(arguments.pairs):
        for kind in arguments.kinds:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"the {kind} run failed:\n{done.stderr[-3000:]}")
            runs[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"pair {pair + 1} {kind}: {runs[kind][-1]}", file=sys.stderr)

    def ratios(name: str) -> dict[str, dict[str, object]]:
        """Of the other kinds to the first, pair by pair."""
        first, *others = arguments.kinds
        found = {kind: [a[name] / b[name] for a, b in zip(runs[kind], runs[first], strict=True)] for kind in others}
        return {kind: {"median": statistics.median(all_), "all": all_} for kind, all_ in found.items()}

    result = {
        "shape": arguments.shape,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "batch": [arguments.batch_size, arguments.length],
        "speed_ratio": ratios("tokens_per_s"),
        "memory_ratio": ratios("peak_mib"),
        "runs": runs,
    }
    print(json.dumps(result))


def run_one(arguments: argparse.Namespace) -> dict[str, float]:
    """One training; seconds are those after the first step, memory is the process's (CPU) or the device's peak."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from redflag.data.rows import Row
    from redflag.flags import FlagSpec, attach
    from redflag.models.pretrain import train_tokenizer
    from redflag.training.adapter import lora_config
    from redflag.training.encode import encode
    from redflag.training.trainer import RedFlagConfig, RedFlagTrainer

    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, mlp, vocabulary = SHAPES[arguments.shape]
    words = [f"word{i}" for i in range(500)]
    tokenizer = train_tokenizer([" ".join(words)], 1200)
    dtype = getattr(torch, arguments.dtype)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(dtype)
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    draw, quarter = random.Random(0), arguments.length // 4
    examples = []
    for i in range(arguments.batch_size * (arguments.steps + 1)):
        messages = [
            {"role": "user", "content": " ".join(draw.choices(words, k=quarter))},
            {"role": "assistant", "content": " ".join(draw.choices(words, k=4 * quarter))},
        ]
        example = encode(Row(messages, category="harm" if i % 3 == 0 else None), tokenizer, spec, arguments.length, i)
        # Equal lengths: the prompt is the first quarter, the response the rest, whatever the tokenizer made of it.
        examples.append(
            {**example, "input_ids": (example["input_ids"] * 4)[: arguments.length], "response_start": quarter}
        )

    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        shared = dict(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch_size,
            max_steps=(arguments.steps + 1) * (2 if arguments.one == "kept" else 1),
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            report_to="none",
            use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16",
            learning_rate=1e-4,
            max_length=None,
            gradient_checkpointing=False,
        )
        if arguments.one != "plain":
            cache = f"{folder}/reference" if arguments.one == "kept" else None
            trainer = RedFlagTrainer(
                model,
                RedFlagConfig(**shared, reference_cache=cache),
                spec,
                examples,
                processing_class=tokenizer,
                peft_config=lora_config(model, spec, 16),
                callbacks=[Clock()],
            )
        else:
            rows = [
                {"input_ids": e["input_ids"], "labels": [-100] * quarter + e["input_ids"][quarter:]} for e in examples
            ]
            trainer = SFTTrainer(
                model,
                args=SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
                callbacks=[Clock()],
            )
        start = peak_mib(arguments.device)
        trainer.train()
    seconds = stamps[-1] - stamps[-1 - arguments.steps]
    return {
        "tokens_per_s": arguments.steps * arguments.batch_size * arguments.length / seconds,
        "peak_mib": peak_mib(arguments.device),
        "before_training_mib": start,
    }


def peak_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
