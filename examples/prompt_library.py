"""A library of prompts: texts are computed once, and every later process begins behind them.

    python examples/prompt_library.py
    python examples/prompt_library.py --store ~/kv    # twice: the second one computes no text

Each text of the library is put into a store and pinned; then a question is asked behind each. The
second number says how many tokens the model had to read for it.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_tiered_cache import BlockStore, reuse, warm

TINY_LM = Path(__file__).parent.parent / "eval" / "tiny_lm"
LIBRARY = [Path(__file__).parent / name for name in ("chat.py", "long_document.py")]


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument("--store", help="folder that stays (default: one for this run)")
    parser.add_argument("--question", default="\n# The next line is", help="asked behind each text")
    parser.add_argument("texts", nargs="*", type=Path, default=LIBRARY)
    arguments = parser.parse_args(command)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    read: list[int] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        read.append(kwargs["input_ids"].shape[1])

    model.register_forward_hook(note, with_kwargs=True)

    def encode(text: str) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    with (
        tempfile.TemporaryDirectory() as folder,
        BlockStore(arguments.store or folder) as store,
        reuse(model, store),
    ):
        for path in arguments.texts:
            read.clear()
            num_tokens = warm(store, model, encode, path, pin=True)
            print(f"{path.name}: {num_tokens} tokens in the store, {sum(read)} read for it")
        for path in arguments.texts:
            ids = torch.tensor([encode(path.read_text() + arguments.question)["input_ids"]])
            read.clear()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )
            answer = tokenizer.decode(out[0, ids.shape[1] :])
            print(f"{path.name}: {ids.shape[1]} tokens, {read[0]} read: {answer!r}")
        store.flush()
        print(store.stats())


if __name__ == "__main__":
    main()
