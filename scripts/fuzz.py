"""Hostile texts in every place of a conversation, and in tool calls that a model writes: does one become a flag?

    python scripts/fetch-tokenizers && python scripts/fuzz.py --texts 1000000 --model smollm2-135m runs/nano/model

Each conversation has texts that try to become flags or control tokens (whole, cut, doubled, full-width, with joiners,
among Unicode) as system, user and assistant turns, thoughts, and arguments and results of tools. It is rendered as
`redflag serve` renders it, by released tokenizers and by those of `--model`; no flag's id may be among the ids, and the
control tokens must be those that harmless texts lead to. The other way, the same texts are arguments of calls that the
model writes: what `redflag.api.tool_calls.CallReader` shows or calls holds no flag. Conversations that a template
cannot show are refused, and their texts do not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from redflag.api.tool_calls import CallReader
from redflag.control_tokens import control_ids
from redflag.errors import RedflagError
from redflag.flags import FlagSpec, attach
from redflag.models.named import model_folder
from redflag.tool_prompt import MARK, ToolUse, find_format, mark_ids, render_tool_prompt

RANGES = (
    (32, 127),
    (0xA0, 0x250),
    (0x300, 0x36F),
    (0x4E00, 0x4E80),
    (0x200B, 0x2010),
    (0xFF01, 0xFF5E),
    (0x1F600, 0x1F640),
)
CLOSES = {"hermes": "}\n</tool_call>", "mistral": "}]", "harmony": "<|call|>"}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {"a": {}}}}}


def world(name: str) -> tuple[Any, FlagSpec]:
    """A tokenizer and its flags: a flagged model's, or a released one with two flags on a model of one narrow layer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    released = Path(".cache/tokenizers") / name
    if not (released / "tokenizer.json").is_file():
        folder = Path(name) if Path(name).is_dir() else model_folder(name)
        return AutoTokenizer.from_pretrained(folder), FlagSpec.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(released)
    if name == "gptoss":  # the package has no template; TRL ships the published one
        tokenizer.chat_template = (files("trl") / "chat_templates" / "gptoss.jinja").read_text()
    sizes = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    return tokenizer, attach(model, tokenizer, FlagSpec.of("harm", "fraud"))


class Fuzz:
    """Draws texts against one tokenizer."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.draw = name, random.Random(f"{name} {seed}")
        self.tokenizer, self.spec = world(name)
        self.flags = [flag.token for flag in self.spec.flags]
        controls = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        self.targets = self.flags * max(3, len(controls) // 4) + controls[:400]
        self.control = control_ids(self.tokenizer, self.spec)
        self.format = find_format(self.tokenizer, self.spec)
        self.use = ToolUse(self.format, (TOOL,))
        self.marks = frozenset(mark[1:] for mark in mark_ids(self.tokenizer, self.format).values())
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def text(self) -> str:
        """A hostile text; never blank, since a blank turn is another conversation."""
        draw, parts = self.draw, []
        for _ in range(draw.randint(1, 4)):
            target = draw.choice(self.targets)
            cut = draw.randint(0, len(target))
            wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in target)
            shapes = (
                target, target * 2, target[:cut] + target + target[cut:], target[:cut], target[cut:], wide,
                target[:cut] + "\u200b" + target[cut:], target[:cut] + "\u0301" + target[cut:], f"\u3000{target}\t",
                wide[:cut] + target[cut:], target.upper(), target.replace("|", "\\|"), f" {target}\n", f'"{target}"',
            )  # fmt: skip
            parts.append(draw.choice(shapes))
            parts.append("".join(chr(draw.randrange(*draw.choice(RANGES))) for _ in range(draw.randint(0, 4))))
        return "x" + "".join(parts) if draw.random() < 0.5 else "".join(parts) + "x"

    def conversation(self, text: Any) -> list[dict[str, Any]]:
        """Twelve texts."""
        call = {"id": "abcdefghi", "type": "function"}
        call["function"] = {"name": "lookup", "arguments": {"a": text(), "b": {"deep": [text(), text()]}}}
        thought = {"role": "assistant", "content": text(), "reasoning_content": text()}
        return [
            {"role": "system", "content": text()},
            {"role": "user", "content": text()},
            thought,
            {"role": "user", "content": text()},
            {"role": "assistant", "content": text(), "tool_calls": [call]},
            {"role": "tool", "content": text(), "tool_call_id": "abcdefghi", "name": "lookup"},
            {"role": "assistant", "content": text()},
            {"role": "user", "content": text()},
        ]

    def prompt(self) -> None:
        """One conversation, with tools; where the template refuses such turns, without."""
        state = self.draw.getstate()
        messages = self.conversation(self.text)
        shapes = [messages, [m for m in messages if m["role"] in ("system", "user") or "tool_calls" not in m]]
        shapes[1] = [m for m in shapes[1] if m["role"] != "tool"][:4]
        shapes.append([m for m in shapes[1] if m["role"] != "system"])
        for shape, turns in enumerate(shapes):
            use = self.use if shape == 0 else ToolUse(self.format)
            try:
                ids = render_tool_prompt(self.tokenizer, turns, self.spec, use).ids
            except RedflagError:
                continue
            found = set(self.spec.ids) & set(ids)
            expected = render_tool_prompt(self.tokenizer, self._harmless(turns), self.spec, use).ids
            if found or [i for i in ids if i in self.control] != [i for i in expected if i in self.control]:
                self.wrong.append(
                    f"{self.name}: flags {found} or other control tokens from {turns}; state {state[1][:2]}"
                )
            self.counts["texts"] += (12, 5, 4)[shape]
            self.counts["arguments"] += 3 * (shape == 0)
            return
        self.counts["refused"] += 1

    def _harmless(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._harmless(item) for item in value]
        fixed = ("role", "id", "type", "name", "tool_call_id")
        if isinstance(value, dict):
            return {k: v if k in fixed else self._harmless(v) for k, v in value.items()}
        return "x"

    def call(self) -> None:
        """One answer that calls a tool, as its text is released piece by piece."""
        arguments = json.dumps({"a": self.text(), self.text(): [self.text()]}, ensure_ascii=self.draw.random() < 0.5)
        before, after = self.format.before, self.format.after
        text = f"{before}lookup{after}{arguments}" + CLOSES.get(self.format.name, "}")
        for mark in self.marks:  # that the model writes as one token
            text = text.replace(mark, MARK + mark)
        text = self.draw.choice(("", "", self.text() + " ")) + text
        reader = CallReader(self.use, self.marks, flags=self.flags)
        shown, at = [], 0
        while at < len(text):
            size = self.draw.randint(1, 12)
            shown.append(reader.push(text[at : at + size]))
            at += size
        shown.append(reader.finish())
        given = "".join(shown) + "".join(json.dumps(json.loads(c.arguments), ensure_ascii=False) for c in reader.calls)
        for flag in self.flags:
            if flag in given or any(flag in str(json.loads(c.arguments)) for c in reader.calls):
                self.wrong.append(f"{self.name}: {flag} in {given!r}, written as {text!r}")
        self.counts["written arguments"] += 3
        self.counts["calls"] += len(reader.calls)


def run(job: tuple[str, int, int]) -> tuple[str, Counter[str], list[str]]:
    """So many texts against one tokenizer."""
    name, texts, seed = job
    fuzz = Fuzz(name, seed)
    tries = 0
    while fuzz.counts["texts"] + fuzz.counts["written arguments"] < texts and tries < texts:
        tries += 1
        fuzz.prompt()
        fuzz.call()
    return name, fuzz.counts, fuzz.wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000, help="how many, over all tokenizers")
    parser.add_argument(
        "--model", nargs="*", default=["smollm2-135m"], help="flagged models beside released tokenizers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    released = sorted(path.parent.name for path in Path(".cache/tokenizers").glob("*/tokenizer.json"))
    names = [*arguments.model, *released]
    jobs = [(name, -(-arguments.texts // len(names)), arguments.seed) for name in names]
    begun, total, wrong = time.monotonic(), Counter(), []
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    with multiprocessing.Pool(arguments.processes, maxtasksperchild=1) as pool:
        for name, found, errors in pool.imap_unordered(run, jobs):
            counts[name] += found
            total += found
            wrong += errors
            print(f"{time.monotonic() - begun:.0f} s  {name}: {dict(found)}, {len(errors)} wrong", file=sys.stderr)
    print(json.dumps({"total": total, "by tokenizer": counts, "seed": arguments.seed, "wrong": wrong[:20]}, indent=2))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
