"""A tiny random chat model with a tokenizer of bytes, saved once for the tests that serve it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chat_model import NUM_IDS, byte_tokenizer


def save_tiny_chat(folder: Path, max_positions: int = 4096) -> Path:
    """Weights, config and tokenizer; the same every time."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_IDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
