"""gpt-oss -> a base that can be trained: bfloat16 weights, and prompts that end where the final answer begins.

    python recipes/models/gpt_oss_base.py [MODEL] [OUTPUT]

The published weights of the experts are MXFP4, which cannot be trained. And the published template ends a prompt with
`<|start|>assistant`: the model then names a channel itself and thinks in it. Rows hold final answers only, so the
prompt written here names the final channel. Training, calibration and serving take the template from the folder.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

END_OF_PROMPT = "<|start|>assistant\n{%- endif -%}"
FINAL_CHANNEL = "<|start|>assistant<|channel|>final<|message|>\n{%- endif -%}"


def final_channel(template: str) -> str:
    """The chat template, its generation prompt followed by the head of the final channel."""
    before, found, after = template.rpartition(END_OF_PROMPT)
    if not found or after.strip():
        raise SystemExit(
            "the chat template does not end as gpt-oss's did: look at it, and name the final channel by hand"
        )
    return before + FINAL_CHANNEL


def main(name: str = "openai/gpt-oss-20b", output: str = "runs/gpt-oss-20b/base") -> None:
    """Writes the base model; needs the memory of the bfloat16 weights, 42 GB, on the processor's side."""
    options = {}
    if getattr(AutoConfig.from_pretrained(name), "quantization_config", None) is not None:
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cpu", **options)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = final_channel(tokenizer.chat_template)
    model.save_pretrained(output, save_original_format=False)
    tokenizer.save_pretrained(output)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} weights in {model.dtype}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
