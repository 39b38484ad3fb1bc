"""Request fields that are not supported: which are refused, and which are ignored.

A field that would change the answer is refused, unless its value changes nothing. All other unknown fields are ignored
and named in a response header, or refused too (`Limits.unknown_fields`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from redflag.api.api_errors import short, unsupported

# From the request schemas of OpenAI (openai 3.54) and vLLM (0.32), then what SGLang, llama.cpp and others add.
# Fields that are refused with any value but null.
_NEVER = (
    # OpenAI
    "audio", "moderation", "prediction", "suffix", "web_search_options",
    # vLLM
    "add_special_tokens", "allowed_token_ids", "chat_template", "guided_choice", "guided_grammar", "guided_regex",
    "guided_whitespace_pattern", "logits_processors", "logprob_token_ids", "prompt_embeds", "prompt_logprobs",
    "repetition_detection", "structural_tag", "truncate_prompt_tokens", "vllm_xargs",
    # SGLang
    "custom_logit_processor", "custom_params", "ebnf", "input_ids", "json_schema", "lora_path", "regex",
    "session_params", "stop_regex",
    # llama.cpp, Ollama, Mistral, OpenRouter
    "random_seed", "samplers",
    # OpenAI's Responses, Anthropic's Messages
    "conversation", "previous_response_id",
    # of another route: the prompt, and the longest answer
    "input", "instructions", "max_new_tokens", "max_output_tokens", "messages", "prompt", "stop_sequences", "system",
)  # fmt: skip
# Fields that are refused unless they have a value that changes nothing.
_UNLESS: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0, 0.0),
    "tool_choice": ("none", "auto", {"type": "none"}, {"type": "auto"}),
    "tools": ([],),
    # vLLM
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "continue_final_message": (False,),
    "documents": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "watermarking": (False,),
    # SGLang
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    # llama.cpp, Ollama, Mistral, OpenRouter
    "dry_multiplier": (0, 0.0),
    "dynatemp_range": (0, 0.0),
    "format": ("",),
    "grammar": ("",),
    "mirostat": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "options": ({},),
    "repeat_penalty": (1, 1.0),
    "safe_prompt": (False,),
    "tfs_z": (1, 1.0),
    "top_a": (0, 0.0),
    "typical_p": (1, 1.0),
    "xtc_probability": (0, 0.0),
    # OpenAI's Responses, Anthropic's Messages
    "background": (False,),
    "mcp_servers": ([],),
}
UNSUPPORTED = dict.fromkeys(_NEVER, ()) | _UNLESS
# Fields that change no token, and values that the server complies with, so that they are not named as ignored.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "include": ([],),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
}
_ADVICE = {
    "conversation": "nothing is stored here: send the earlier turns",
    "max_new_tokens": "give max_tokens",
    "max_output_tokens": "give max_tokens",
    "echo": "only answers are judged, so neither the prompt nor its log-probabilities are given; leave it out",
    "messages": "it belongs to /v1/chat/completions",
    "prompt": "it belongs to /v1/completions",
    "previous_response_id": "nothing is stored here: send the earlier turns in input",
    "stop_sequences": "give stop",
    "system": "send a message of the role system",
}
_LONGEST_NAME = 64
_MOST_NAMES = 32


def ignored_fields(extra: Mapping[str, Any]) -> list[str]:
    """Names of the top-level fields that are ignored, among those that the request's schema does not have.

    Raises:
        ApiError: 400; a field would change the answer and is not supported.

    Example:
        >>> ignored_fields({"prompt_cache_key": "a", "store": False, "best_of": 1})
        ['prompt_cache_key']
    """
    names = []
    for name, value in extra.items():
        neutral = UNSUPPORTED.get(name, _HARMLESS.get(name, ()))
        # Types are compared too, since True == 1.
        if value is None or any(value == item and type(value) is type(item) for item in neutral):
            continue
        if name in UNSUPPORTED:
            raise unsupported(f"{name}={short(value)} is not supported; {_ADVICE.get(name, 'leave it out')}", name)
        names.append(name)
    return names


def header(names: list[str]) -> str:
    """Names as a header's value. A client chose them, so they are cut and escaped.

    Example:
        >>> header(["store", "messages.id", "with\\nline end"])
        'store, messages.id, with%0Aline%20end'
    """
    return ", ".join(escaped(name) for name in names[:_MOST_NAMES])


def escaped(name: str) -> str:
    """A field's name in ASCII, without white space, of bounded length."""
    return quote(name[:_LONGEST_NAME], safe="", errors="replace")
