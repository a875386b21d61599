"""Continue a long document through a cache that keeps a quarter of its bytes on the device.

    python examples/long_document.py
    python examples/long_document.py --model Qwen/Qwen2.5-0.5B --prompt book.txt

Without arguments it runs offline: the byte-level model that comes with the project continues a
source file of Python's standard library that it has not seen. The same prompt then goes through
transformers' DynamicCache, and the two token sequences are compared.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.utils import logging

from hf_tiered_cache import TieredCache, TieredCacheError, generation_progress
from hf_tiered_cache.evaluation.documents import LANGUAGE_REFERENCE
from hf_tiered_cache.evaluation.models import choose_dtype, load_outline
from hf_tiered_cache.evaluation.names import ModelError
from hf_tiered_cache.evaluation.scoring import fitting_shape
from hf_tiered_cache.evaluation.standard_library import language_reference
from hf_tiered_cache.integration.progress import Timing

TINY_LM = Path(__file__).parent.parent / "eval" / "tiny_lm"
# Standard library files the model was not trained on; the last one is in every installation.
DOCUMENTS = ("idlelib/pyshell.py", "test/test_types.py", "argparse.py")
OFF_DEVICE = 0.75  # of the blocks
CHAT_TOKENS = 64  # enough for what a chat template adds


def main(command: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(command)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype, why = choose_dtype(load_outline(arguments.model), arguments.dtype, torch.device("cpu"))
    print(why, end="\n" if why else "")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    own_attention = model.config._attn_implementation
    prompt = make_prompt(tokenizer, model, arguments)
    num_tokens = prompt.shape[1] + arguments.new_tokens
    shape = fitting_shape(model, num_tokens, OFF_DEVICE, disk_dir=arguments.disk_dir)
    budgets = shape.budgets(num_tokens, OFF_DEVICE)
    if arguments.device_bytes:
        budgets["device_bytes"] = arguments.device_bytes
    cache_bytes = shape.num_blocks(num_tokens) * shape.block_bytes

    model.set_attn_implementation("tiered")  # no query-by-key mask, however long the prompt
    with TieredCache(config=model.config, disk_dir=arguments.disk_dir, **budgets) as cache:
        print(
            f"{arguments.model}: {prompt.shape[1]:,} prompt tokens, a cache of "
            f"{cache_bytes / 2**20:.1f} MiB in {shape.num_layers} layers"
        )
        tiered, tiered_time = generate(model, prompt, cache, arguments, "TieredCache ")
        report = str(cache)
    print(
        f"\n--- the end of the prompt, then the continuation\n{tokenizer.decode(prompt[0, -160:])}"
    )
    print(f">>> {tokenizer.decode(tiered[0, prompt.shape[1] :])}\n---\n{report}")
    print(speed("TieredCache", tiered_time))
    if arguments.compare:
        model.set_attn_implementation(own_attention)
        cache = DynamicCache(config=model.config)
        dynamic, dynamic_time = generate(model, prompt, cache, arguments, "DynamicCache ")
        print(speed("DynamicCache", dynamic_time))
        same = torch.equal(tiered, dynamic)
        print(f"the {arguments.new_tokens} new tokens are {'identical' if same else 'DIFFERENT'}")
        if not same and model.dtype != torch.float32:
            print(f"{model.dtype} rounds; `hf-tiered-cache verify` shows transformers' own noise")


def generate(
    model: torch.nn.Module,
    prompt: torch.Tensor,
    cache: Cache,
    arguments: argparse.Namespace,
    label: str,
) -> tuple[torch.Tensor, Timing]:
    """Greedy continuation `[1, prompt + new tokens]`, and how long its two halves took."""
    with generation_progress(model, prompt.shape[1], arguments.new_tokens, label) as timing:
        sequences = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            prefill_chunk_size=arguments.chunk,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            do_sample=False,
        )
    return sequences, timing


def make_prompt(
    tokenizer: Any, model: torch.nn.Module, arguments: argparse.Namespace
) -> torch.Tensor:
    """The beginning of the document `[1, tokens]`; with a question behind it, as a chat."""
    if arguments.prompt == LANGUAGE_REFERENCE:
        text = language_reference()
    else:
        text = Path(arguments.prompt).read_text(errors="replace")
    document = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    num_tokens = prompt_tokens(model, arguments)
    if not arguments.ask:
        return document[:, :num_tokens]
    document = document[0, : num_tokens - CHAT_TOKENS - len(tokenizer(arguments.ask).input_ids)]
    said = f"{tokenizer.decode(document)}\n\n{arguments.ask}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]


def prompt_tokens(model: torch.nn.Module, arguments: argparse.Namespace) -> int:
    """As many as asked for, fewer where the model was made for fewer."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = limit - arguments.new_tokens if limit else arguments.prompt_tokens
    return min(arguments.prompt_tokens, most)


def default_document() -> Path:
    """A long text that is on any machine with Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    return next(folder / name for name in DOCUMENTS if (folder / name).exists())


def speed(name: str, timing: Timing) -> str:
    return (
        f"{name:>12}: prefill {timing.prefill_rate:8.1f} tokens/s, "
        f"decode {timing.decode_rate:6.1f} tokens/s"
    )


def parse_arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument(
        "--prompt",
        default=str(default_document()),
        help=f"text file to continue, or {LANGUAGE_REFERENCE}, prose that comes with Python "
        "(default: %(default)s)",
    )
    parser.add_argument("--ask", help="put this question behind the document, to a chat model")
    parser.add_argument("--prompt-tokens", type=int, default=16384, help="use this many at most")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--device-bytes", help='default: a quarter of the cache; e.g. "64MiB"')
    parser.add_argument("--disk-dir", help="folder of the disk tier")
    parser.add_argument("--dtype", default="auto", help='"auto", "float32", "bfloat16", "float16"')
    parser.add_argument(
        "--no-compare", dest="compare", action="store_false", help="skip the DynamicCache run"
    )
    arguments = parser.parse_args(command)
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ModelError, TieredCacheError) as error:  # says what to change
        sys.exit(f"error: {error}")
