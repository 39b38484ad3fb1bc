"""A tiny Llama as a GGUF file, with its tokenizer, as llama.cpp's converter would write it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path, model, tokenizer, *, architecture: str = "llama", split: str = "", bits8: bool = False
) -> Path:
    """Writes model and tokenizer; `bits8` quantises all matrices whose rows are blocks of 32."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("a title")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    fast = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in fast["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in fast["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem = name.removesuffix(".weight")
        *layer, part = stem.split(".", 3) if stem.startswith("model.layers.") else ("", stem)
        given = ("blk." + layer[-1] + "." if layer[-1] else "") + NAMES[part] + ".weight"
        if (count := heads.get(part.rpartition(".")[2])) is not None:  # the two halves of each head, interleaved
            rows, columns = weight.shape
            weight = weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        array = weight.to(torch.float32).numpy()
        if bits8 and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(given, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(given, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
