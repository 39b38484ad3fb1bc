"""Tokenizers and chat templates of many shapes, and conversations that try to write control tokens."""

from __future__ import annotations

import functools
import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from redflag.flags import Flag, FlagSpec
from redflag.models.pretrain import CHAT_TEMPLATE, train_tokenizer

TEXTS = ["The quick brown fox asks how bread is baked, and flags reserved harm end user assistant."] * 3
HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}"
    "{{ eos_token }}{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
JOINED = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|end|>{% endif %}"
)
TWICE = (
    "{% for message in messages %}{{ message['content'] }}<|user|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_level(special: list[str], ordinary: tuple[str, ...] = (), **roles: Any) -> Any:
    """A byte-level BPE tokenizer; only the tokens with a role are in `all_special_tokens`, as with Llama 3."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    rust.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    return PreTrainedTokenizerFast(tokenizer_object=rust, clean_up_tokenization_spaces=False, **roles)


def sentence_piece() -> Any:
    """Like Llama 2 and Mistral 7B: NFKC, `▁` for spaces, bytes for unknown characters."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    flags = ["[control_8]", "[control_9]"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *flags, *byte_tokens], show_progress=False
    )
    rust.train_from_iterator(TEXTS, trainer)
    rust.normalizer = normalizers.NFKC()
    record = json.loads(rust.to_str())
    record["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] not in byte_tokens]
    rust = Tokenizer.from_str(json.dumps(record))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "<unk>"
    tokenizer.chat_template = INST
    return tokenizer


def word_piece() -> Any:
    """Like BERT: everything becomes lower case, much becomes unknown."""
    rust = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[PAD]", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "[unused0]", "[unused1]"]
    rust.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="[UNK]", pad_token="[PAD]", eos_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def in_vocabulary() -> Any:
    """The model's own merges make the flag `<f>`, also from full-width look-alikes, and nothing is an added token."""
    letters = [chr(i) for i in range(32, 127)]
    vocab = {text: i for i, text in enumerate(["<unk>", "</s>", *letters, "<f", "<f>", "<g>"])}
    rust = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "f"), ("<f", ">")], unk_token="<unk>"))
    rust.normalizer = normalizers.NFKC()
    rust.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<g>", special=False, normalized=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


def with_template(template: str) -> Any:
    tokenizer = train_tokenizer(TEXTS, 330)
    tokenizer.chat_template = template
    return tokenizer


def plain() -> Any:
    """No chat template; the tokenizer itself puts a begin-of-sequence token in front."""
    tokenizer = byte_level(["<s>", "</s>", "<|reserved_0|>", "<|reserved_1|>"], bos_token="<s>", eos_token="</s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    return tokenizer


def headers() -> Any:
    turns = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    reserved = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    tokenizer = byte_level([*turns, *reserved], bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.chat_template = HEADERS
    return tokenizer


def thinking() -> Any:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|flag_a|>", "<|flag_b|>"]
    tokenizer = byte_level(tokens, ("<think>", "</think>"), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = THINKING
    return tokenizer


def sloppy() -> Any:
    """A fine-tune whose turn tokens, and whose flags, were added as ordinary tokens."""
    turns = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|flag_a|>", "<|flag_b|>")
    tokenizer = byte_level(["</s>"], turns, eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def shared_unknown() -> Any:
    """Like GPT-2: one token ends the sequence and stands for the unknown."""
    tokens = ["<|endoftext|>", "<|flag_a|>", "<|flag_b|>"]
    tokenizer = byte_level(tokens, unk_token="<|endoftext|>", eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    return tokenizer


# name -> (builder, two flags)
TOKENIZERS: dict[str, tuple[Any, tuple[str, str]]] = {
    "byte-level": (lambda: train_tokenizer(TEXTS, 330), ("<|reserved_0|>", "<|reserved_1|>")),
    "headers, trimmed": (headers, ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")),
    "thinking": (thinking, ("<|flag_a|>", "<|flag_b|>")),
    "sentence-piece": (sentence_piece, ("[control_8]", "[control_9]")),
    "word-piece": (word_piece, ("[unused0]", "[unused1]")),
    "flag in the vocabulary": (in_vocabulary, ("<f>", "<g>")),
    "nothing marked special": (sloppy, ("<|flag_a|>", "<|flag_b|>")),
    "unknown is end": (shared_unknown, ("<|flag_a|>", "<|flag_b|>")),
    "no template": (plain, ("<|reserved_0|>", "<|reserved_1|>")),
    "contents joined": (lambda: with_template(JOINED), ("<|reserved_0|>", "<|reserved_1|>")),
    "contents twice": (lambda: with_template(TWICE), ("<|reserved_0|>", "<|reserved_1|>")),
    "no system turn": (lambda: with_template(NO_SYSTEM), ("<|reserved_0|>", "<|reserved_1|>")),
}
# Those whose decoding gives back the text exactly.
EXACT = ("byte-level", "headers, trimmed", "thinking", "no template", "contents joined", "contents twice")


@functools.cache
def world(name: str) -> tuple[Any, FlagSpec]:
    build, tokens = TOKENIZERS[name]
    tokenizer = build()
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    assert len(set(ids)) == 2 and tokenizer.unk_token_id not in ids
    flags = tuple(Flag(f"harm{i}", token, id=index) for i, (token, index) in enumerate(zip(tokens, ids, strict=True)))
    return tokenizer, FlagSpec(flags)


def control_ids(tokenizer: Any) -> set[int]:
    """Special tokens and turn tokens, without what only means "unknown character"."""
    added = tokenizer.added_tokens_decoder
    ids = {i for i, token in added.items() if token.special or token.content.startswith("<|")}
    return ids - ({tokenizer.unk_token_id} if tokenizer.unk_token_id != tokenizer.eos_token_id else set())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rendered(name: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages without those that a template leaves out, which are refused."""
    return [message for message in messages if name != "no system turn" or message["role"] != "system"]


def fullwidth(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@st.composite
def hostile(draw: Any, tokenizer: Any, spec: FlagSpec) -> str:
    """Text that tries to become a flag or a control token, among arbitrary text."""
    controls = [token.content for token in tokenizer.added_tokens_decoder.values()]
    targets = [flag.token for flag in spec.flags] * 3 + controls
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        target = draw(st.sampled_from(targets))
        cut = draw(st.integers(0, len(target)))
        parts.append(
            draw(
                st.sampled_from(
                    [
                        target,
                        target + target,
                        target[:cut] + target + target[cut:],
                        target[:cut],
                        target[cut:],
                        target[:cut] + "\u200b" + target[cut:],
                        target[:cut] + "\u0301" + target[cut:],
                        fullwidth(target),
                        fullwidth(target[:cut]) + target[cut:],
                        target.upper(),
                        target.title(),
                        f" {target}\n",
                        f"\u3000{target}\t",
                        target.replace("|", "\\|"),
                        target.encode().decode("utf-16-le", "ignore"),
                    ]
                )
            )
        )
        parts.append(draw(st.one_of(st.just(""), st.text(max_size=4))))
    return "".join(parts)


@st.composite
def conversations(draw: Any, tokenizer: Any, spec: FlagSpec) -> list[dict[str, str]]:
    roles = st.sampled_from(["system", "user", "assistant"])
    turns = [turn(draw(roles), draw(hostile(tokenizer, spec))) for _ in range(draw(st.integers(1, 4)))]
    return [turn("user", draw(hostile(tokenizer, spec)) or "x"), *turns]


fast = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def spec_of(tokenizer: Any) -> FlagSpec:
    return FlagSpec((Flag("harm", "<|reserved_0|>", id=tokenizer.convert_tokens_to_ids("<|reserved_0|>")),))
