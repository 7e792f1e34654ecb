"""A model folder with random weights in the shape of an 8B Llama, for memory and speed.

    python benchmarks/random_model.py FOLDER
    python examples/needle_128k.py --model FOLDER --depths 1

Its answers mean nothing. The tokenizer, and so the vocabulary, is the default model's, since no other is at
hand without a hub: two embeddings of 49152 tokens in place of 128256, so 7.4 billion weights and not 8.0.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantpress.pipelines.default_model import ensure_default_model


def main() -> None:
    """Parse arguments, make the model, save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to put it; 15 GB for the full shape")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ensure_default_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion random weights in {arguments.folder}"
    )


if __name__ == "__main__":
    main()
