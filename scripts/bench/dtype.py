#!/usr/bin/env python3
"""What bfloat16 costs: how far the flag probabilities of one response lie apart between the ways to measure them.

    python scripts/bench/dtype.py --model runs/nano/model --rows runs/nano/rows/test.jsonl
    python scripts/bench/dtype.py --model MODEL --rows rows.jsonl --device cuda --vllm ""    # without vLLM
    python scripts/bench/dtype.py --model MODEL --scored bfloat16.jsonl float32.jsonl    # of `redflag score`, same rows

The model answers the requests of the rows at temperature 1, once token by token in this process and once behind a stock
vLLM. The very tokens of each answer are then measured again in batches, as `redflag score` and `redflag calibrate` do.
For float32 and bfloat16, and for bfloat16 batches against float32 batches, the table says how far probabilities are
apart and how many responses raise an alarm one way and not the other, at the thresholds in the model's folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serve import serve

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")
SMALL = 0.01  # below it, differences are told as shares of the probability


class Answer(NamedTuple):
    """What was written after a prompt, and the T x K flag probabilities measured on the way."""

    prompt: list[int]
    tokens: list[int]
    probs: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a flagged model's folder, with thresholds.json")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", help="conversations whose requests are answered")
    what.add_argument("--scored", nargs=2, help="compare two files of `redflag score` instead")
    parser.add_argument("--count", type=int, default=500, help="requests")
    parser.add_argument("--tokens", type=int, default=90, help="most tokens of an answer")
    parser.add_argument(
        "--begun",
        type=int,
        default=0,
        help="characters of a row's answer that the model goes on from, half of it at most: its own rarely alarm",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--vllm", default=str(ROOT / ".vllm/bin/python"), help="Python of vLLM's environment; '' = none"
    )
    parser.add_argument("--vllm-arguments", default="--enforce-eager --max-model-len 1024")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    result: dict[str, Any] = {"model": arguments.model, "count": arguments.count, "seed": arguments.seed, "lines": []}
    if arguments.scored:
        result["lines"].append(compared_files(arguments))
        print(table(result["lines"]), file=sys.stderr, flush=True)
    for dtype in () if arguments.scored else DTYPES:
        result["lines"] += measure(arguments, dtype)
        print(table(result["lines"]), file=sys.stderr, flush=True)
    print(json.dumps(result))


def measure(arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """The lines of the table for one type of weights."""
    from redflag.backends.load import load_flagged
    from redflag.data.rows import load_rows
    from redflag.prompt import render_prompt
    from redflag.watching.thresholds import Thresholds

    thresholds = Thresholds.load(arguments.model)
    backend, tokenizer, spec = load_flagged(arguments.model, arguments.device, dtype)
    rows = load_rows(arguments.rows).rows[: arguments.count]
    prompts = [render_prompt(tokenizer, begun(row.messages, arguments.begun), spec) for row in rows]
    answers = {"token by token": streamed(backend, prompts, arguments)}
    if arguments.vllm:
        answers["vLLM, streamed"] = served(arguments, dtype, spec, backend.eos_ids, prompts)
    lines = []
    for name, written in answers.items():
        batches = backend.score([(answer.prompt, answer.tokens) for answer in written], batch_size=16)
        pairs = [(answer.probs, probs) for answer, probs in zip(written, batches, strict=True)]
        lines.append(compared(f"{dtype}: {name} / batches", pairs, thresholds))
    if dtype != "float32":
        wide, _, _ = load_flagged(arguments.model, arguments.device, "float32")
        written = answers["token by token"]
        reference = wide.score([(answer.prompt, answer.tokens) for answer in written], batch_size=16)
        batches = backend.score([(answer.prompt, answer.tokens) for answer in written], batch_size=16)
        pairs = list(zip(batches, reference, strict=True))
        lines.append(compared(f"{dtype} batches / float32 batches", pairs, thresholds))
    return lines


def compared_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """The line for two files of the same rows; rows that one of them lacks are left out."""
    from redflag.scoring.score import read_scored
    from redflag.watching.thresholds import Thresholds

    first, second = ({row["id"]: row for row in read_scored(path)} for path in arguments.scored)
    pairs = []
    for name in sorted(first.keys() & second.keys()):
        one, other = first[name], second[name]
        if one["token_ids"] != other["token_ids"]:
            sys.exit(f"--scored must hold the same rows (got other tokens for {name})")
        pairs.append(tuple([*side["flag_probs"], *side["tail_probs"]] for side in (one, other)))
    name = " / ".join(Path(path).stem for path in arguments.scored)
    return compared(name, pairs, Thresholds.load(arguments.model))


def begun(messages: list[dict[str, Any]], characters: int) -> list[dict[str, Any]]:
    """A conversation up to its answer, or into it."""
    answer = messages[-1]["content"]
    start = answer[: min(characters, len(answer) // 2)]
    return [*messages[:-1], {"role": "assistant", "content": start}] if start.strip() else messages[:-1]


def streamed(backend: Any, prompts: Sequence[list[int]], arguments: argparse.Namespace) -> list[Answer]:
    """Answers written in this process, one token after the other."""
    from redflag.backends import Sampling

    answers = []
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_new_tokens=arguments.tokens, seed=arguments.seed + number)
        steps = list(backend.stream(prompt, sampling))
        answers.append(Answer(prompt, [step.token_id for step in steps], [step.flag_probs for step in steps]))
    return answers


def served(
    arguments: argparse.Namespace, dtype: str, spec: Any, eos_ids: frozenset[int], prompts: Sequence[list[int]]
) -> list[Answer]:
    """Answers written by a stock vLLM and read as `redflag serve --upstream` reads them."""
    from redflag.backends import Sampling
    from redflag.backends.remote import RemoteBackend

    command = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model]
    command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--dtype", dtype]

    async def all_answers(url: str) -> list[Answer]:
        backend = RemoteBackend(url, spec.ids, eos_ids)
        gate = asyncio.Semaphore(16)

        async def one(prompt: list[int]) -> Answer:
            async with gate:
                steps = [step async for step in backend.astream(prompt, Sampling(max_new_tokens=arguments.tokens))]
            return Answer(prompt, [step.token_id for step in steps], [step.flag_probs for step in steps])

        try:
            return await asyncio.gather(*map(one, prompts))
        finally:
            await backend.aclose()

    with serve([*command, *arguments.vllm_arguments.split()], "/health") as server:
        return asyncio.run(all_answers(server.url))


def compared(name: str, pairs: Sequence[tuple[Any, Any]], thresholds: Any) -> dict[str, Any]:
    """One line: both ways' probabilities of the same responses."""
    import numpy as np

    from redflag.watching.monitor import peaks

    one = np.concatenate([np.asarray(first, dtype=np.float64) for first, _ in pairs])
    other = np.concatenate([np.asarray(second, dtype=np.float64) for _, second in pairs])
    apart = np.abs(one - other)
    small = (other > 0) & (other < SMALL)
    values = list(thresholds.values.values())
    alarms = [
        [
            any(peak >= value for peak, value in zip(peaks(thresholds.monitor, side), values, strict=True))
            for side in (np.asarray(first, dtype=np.float64).tolist(), np.asarray(second, dtype=np.float64).tolist())
        ]
        for first, second in pairs
    ]
    return {
        "compared": name,
        "responses": len(pairs),
        "steps": len(one),
        "largest": float(apart.max()),
        "p99": float(np.quantile(apart, 0.99)),
        "relative_below_0.01": float(np.quantile(apart[small] / other[small], 0.99)) if small.any() else None,
        "alarms": sum(second for _, second in alarms),
        "alarms_changed": sum(first != second for first, second in alarms),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, as it stands in docs/engines.md."""
    columns = ["compared", "responses", "largest difference", "99% of differences below"]
    columns += ["99% of those below p = 0.01 within", "alarms changed"]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in lines:
        relative = line["relative_below_0.01"]
        share = f"{line['alarms_changed']} ({line['alarms_changed'] / line['responses']:.2%})"
        cells = [line["compared"], str(line["responses"]), f"{line['largest']:.1e}", f"{line['p99']:.1e}"]
        cells += ["-" if relative is None else f"{relative:.2g} x p", share]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
