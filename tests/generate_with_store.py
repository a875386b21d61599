"""A process of its own that generates with a store, for tests that end it early.

    python generate_with_store.py STORE DOCUMENT_TOKENS QUESTION

Prints "ready", then one JSON object: the tokens generated, and those fed to the first forward.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_tiered_cache import BlockStore, reuse

MODEL = Path(__file__).parents[1] / "eval" / "tiny_lm"
BLOCK_TOKENS = 64


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def prompt(num_tokens, question):
    """A document, the same for all questions, and the question."""
    text = (Path(__file__).parents[1] / "README.md").read_bytes()[:num_tokens]
    return torch.tensor([[byte + 3 for byte in text + question.encode()]])  # ByT5's ids


def main() -> None:
    root, num_tokens, question = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    model, fed = load(), []

    def note(module, args, kwargs, output):
        fed.append(kwargs["input_ids"].shape[1])

    # Behind the forward: a hook before it may change what is computed, so the store is bypassed.
    model.register_forward_hook(note, with_kwargs=True)
    ids = prompt(num_tokens, question)
    with BlockStore(root, capacity_bytes="1GiB") as store:
        print("ready", flush=True)
        with reuse(model, store, block_tokens=BLOCK_TOKENS):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )
    print(json.dumps({"tokens": out[0, ids.shape[1] :].tolist(), "fed": fed[0]}), flush=True)


if __name__ == "__main__":
    main()
