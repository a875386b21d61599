"""Read a long document once, ask it many things: forks of a cache share the document's blocks.

    python examples/shared_prompt.py
    python examples/shared_prompt.py --model Qwen/Qwen2.5-0.5B --prompt book.txt \\
        --questions "The main character is" "The book was written in"

`copy.deepcopy` of a `TieredCache` copies no keys and values: full blocks are shared and counted,
and only the block that is being filled is copied when a fork writes. Without arguments the
byte-level model that comes with the project reads a text in which facts (key=value) are hidden and
is asked for each of them.
"""

import argparse
import copy
import random
import string
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_tiered_cache import TieredCache, TieredCacheError
from hf_tiered_cache.evaluation.names import ModelError
from hf_tiered_cache.evaluation.scoring import fitting_shape

TINY_LM = Path(__file__).parent.parent / "eval" / "tiny_lm"
OFF_DEVICE = 0.75  # of the document's blocks


def main(command: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(command)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    if arguments.prompt:
        text, answers = Path(arguments.prompt).read_text(errors="replace"), {}
    else:
        text, answers = hide_facts(arguments.num_facts)
    questions = arguments.questions or list(answers)

    def encode(one: str) -> torch.Tensor:
        return tokenizer(one, return_tensors="pt", add_special_tokens=False).input_ids

    document = encode(text)
    num_tokens = document.shape[1]
    shape = fitting_shape(model, num_tokens, OFF_DEVICE, disk_dir=arguments.disk_dir)
    budgets = shape.budgets(num_tokens, OFF_DEVICE, num_forks=len(questions))
    if arguments.device_bytes:
        budgets["device_bytes"] = arguments.device_bytes
    model.set_attn_implementation("tiered")
    with TieredCache(config=model.config, disk_dir=arguments.disk_dir, **budgets) as cache:
        start = perf_counter()
        with torch.no_grad():
            for chunk in document.split(arguments.chunk, dim=1):
                model.base_model(chunk, past_key_values=cache)  # nobody reads its logits
        print(f"{document.shape[1]:,} tokens read in {perf_counter() - start:.1f} s: {used(cache)}")
        forks, found = [], 0
        for question in questions:
            start = perf_counter()
            forks.append(copy.deepcopy(cache))
            fork_ms = (perf_counter() - start) * 1e3
            prompt = torch.cat([document, encode(question)], dim=1)
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=forks[-1],
                max_new_tokens=arguments.new_tokens,
                do_sample=False,
            )
            answer = tokenizer.decode(tokens[0, prompt.shape[1] :])
            found += answer.startswith(answers.get(question, "no answer known"))
            print(f"  forked in {fork_ms:.1f} ms: {question!r} -> {answer!r}")
        print(f"{len(forks)} forks, all alive: {used(cache)}")
        if answers:
            print(f"{found} of {len(questions)} answers are those that were hidden")
        for fork in forks:
            fork.close()


def hide_facts(num_facts: int) -> tuple[str, dict[str, str]]:
    """A source file with facts between its lines, and question -> answer."""
    rng = random.Random(0)
    lines = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text().splitlines()[:90]
    answers = {}
    for place in sorted(rng.sample(range(len(lines)), num_facts), reverse=True):
        key = "".join(rng.choices(string.ascii_lowercase, k=4))
        answers[f"{key}="] = "".join(rng.choices(string.digits, k=6))
        lines.insert(place, f"{key}={answers[f'{key}=']}")
    return "\n".join(lines) + "\n", answers


def used(cache: TieredCache) -> str:
    """How many blocks lie where, those of all forks included."""
    return ", ".join(f"{tier.blocks} blocks on {tier.name}" for tier in cache.stats().tiers)


def parse_arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument("--prompt", help="text file (default: a source file with hidden facts)")
    parser.add_argument("--questions", nargs="+", help="what to append to the document")
    parser.add_argument("--num-facts", type=int, default=6, help="hidden in the default text")
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--device-bytes", help='default: a quarter of the cache; e.g. "64MiB"')
    parser.add_argument("--disk-dir", help="folder of the disk tier")
    parser.add_argument("--dtype", default="auto", help='"auto", "float32", "bfloat16", "float16"')
    arguments = parser.parse_args(command)
    if arguments.prompt and not arguments.questions:
        parser.error("--prompt needs --questions")
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ModelError, TieredCacheError) as error:  # says what to change
        sys.exit(f"error: {error}")
