"""A chat that survives a restart: the text is kept in a file, its keys and values in a store.

    python examples/chat_restart.py --folder /tmp/chat --say "key=318240; key="
    python examples/chat_restart.py --folder /tmp/chat --say " and again: key="

Each run is a process of its own that goes on with the chat of the last one, and reads only what is
new: the message, and at most one block that was not full.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_tiered_cache import BlockStore, reuse

TINY_LM = Path(__file__).parent.parent / "eval" / "tiny_lm"


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument("--folder", type=Path, required=True, help="of the chat; made if missing")
    parser.add_argument("--say", required=True, help="the next message")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--block-tokens", type=int, default=64)
    arguments = parser.parse_args(command)
    logging.set_verbosity_error()
    arguments.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    history = arguments.folder / "chat.txt"
    text = (history.read_text() if history.exists() else "") + arguments.say
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    read: list[int] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        read.append(kwargs["input_ids"].shape[1])

    model.register_forward_hook(note, with_kwargs=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with (
        BlockStore(arguments.folder / "kv") as store,
        reuse(model, store, block_tokens=arguments.block_tokens),
    ):
        out = model.generate(
            inputs.input_ids,
            attention_mask=torch.ones_like(inputs.input_ids),
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
        )
    answer = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
    history.write_text(text + answer)
    print(f"[{inputs.input_ids.shape[1]} tokens, {read[0]} read] {answer!r}")


if __name__ == "__main__":
    main()
