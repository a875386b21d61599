"""A chat of several turns with one cache: each turn reads only what is new.

    python examples/chat.py
    python examples/chat.py --model Qwen/Qwen2.5-0.5B-Instruct --say "Who are you?" "Why?"

`generate` feeds what the cache does not hold yet, so a long history is never read twice, and it may
be far larger than the device. Before every turn the cache is forked, which copies no blocks.
A turn that is not wanted is taken back by going on with the fork: that works with any model, while
`crop` cannot bring back what slid out of a window. The same fork serves where a chat template
renders an old answer otherwise than it was generated. A model without a template (such as the
byte-level one that comes with the project, which only remembers facts) gets the plain lines.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.utils import logging

from hf_tiered_cache import TieredCache, TieredCacheError
from hf_tiered_cache.evaluation.names import ModelError
from hf_tiered_cache.evaluation.scoring import fitting_shape

TINY_LM = Path(__file__).parent.parent / "eval" / "tiny_lm"
SAY = ("code=318240\n" * 8 + "gate=972605\n" * 8, "gate=", "\n" + "room=445019\n" * 8 + "code=")
OFF_DEVICE = 0.75  # of the whole chat's blocks


class Chat:
    """Messages, their tokens, and the cache that holds them; and how it was a turn ago."""

    def __init__(self, model: Any, tokenizer: Any, cache: Cache, new_tokens: int) -> None:
        self._model, self._tokenizer, self._new_tokens = model, tokenizer, new_tokens
        self._messages: list[dict[str, str]] = []
        self._tokens = torch.empty((1, 0), dtype=torch.long)
        self.cache = cache
        self._before = (self._tokens, copy.deepcopy(cache))

    def say(self, text: str) -> tuple[str, int, int]:
        """(the answer, tokens that were known, tokens that were read)."""
        self._messages.append({"role": "user", "content": text})
        prompt = self._prompt(text)
        if not begins_with(prompt, self._tokens):
            self._go_back()  # the template rewrote the last answer
            if not begins_with(prompt, self._tokens):
                raise SystemExit("this model's chat template rewrites more than the last answer")
        self._remember()
        known = self.cache.get_seq_length()
        self._tokens = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=self._new_tokens,
            do_sample=False,
        )
        new = self._tokens[0, prompt.shape[1] :]
        answer = self._tokenizer.decode(new, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        return answer, known, prompt.shape[1] - known

    def take_back(self) -> str:
        """Forget the last turn; return what was said in it."""
        self._go_back()
        said, _ = self._messages[-2:]
        del self._messages[-2:]
        return said["content"]

    def _remember(self) -> None:
        _, old = self._before
        self._before = (self._tokens, copy.deepcopy(self.cache))
        close(old)

    def _go_back(self) -> None:
        close(self.cache)
        self._tokens, fork = self._before
        self.cache = copy.deepcopy(fork)

    def _prompt(self, text: str) -> torch.Tensor:
        """The whole chat as tokens `[1, tokens]`."""
        if self._tokenizer.chat_template is None:
            return torch.cat([self._tokens, self._encode(text)], dim=1)
        rendered = self._tokenizer.apply_chat_template(
            self._messages, tokenize=False, add_generation_prompt=True
        )
        return self._encode(rendered)

    def _encode(self, text: str) -> torch.Tensor:
        return self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def close(self) -> None:
        """Give back what the cache and its fork hold."""
        close(self.cache)
        close(self._before[1])


def begins_with(prompt: torch.Tensor, history: torch.Tensor) -> bool:
    return torch.equal(prompt[:, : history.shape[1]], history)


def close(cache: Cache) -> None:
    if isinstance(cache, TieredCache):
        cache.close()


def main(command: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(command)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    said = len(tokenizer("".join(arguments.say)).input_ids)
    num_tokens = said + len(arguments.say) * arguments.new_tokens
    shape = fitting_shape(model, num_tokens, OFF_DEVICE, disk_dir=arguments.disk_dir)
    budgets = shape.budgets(num_tokens, OFF_DEVICE, num_forks=2)  # of the last turn, and a new one
    if arguments.device_bytes:
        budgets["device_bytes"] = arguments.device_bytes
    cache = TieredCache(config=model.config, disk_dir=arguments.disk_dir, **budgets)
    chat = Chat(model, tokenizer, cache, arguments.new_tokens)
    answers = []
    for text in arguments.say:
        answer, known, read = chat.say(text)
        answers.append(answer)
        print(f"> {text.strip()[:60]!r}\n{answer!r}")
        print(f"[{known:,} tokens were known, {read:,} were read]")
    answer, known, read = chat.say(chat.take_back())
    print(f"[the last turn taken back, {read:,} tokens read again: {answer!r}]")
    print(chat.cache)
    chat.close()
    other = Chat(model, tokenizer, DynamicCache(config=model.config), arguments.new_tokens)
    expected = [other.say(text)[0] for text in arguments.say]
    print(f"all answers are {'those' if answers == expected else 'NOT those'} of DynamicCache")
    if answers != expected and model.dtype != torch.float32:
        print(f"{model.dtype} rounds; `hf-tiered-cache verify` shows transformers' own noise")


def parse_arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument("--say", nargs="+", default=SAY, help="one message per turn")
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--device-bytes", help='default: a quarter of the chat; e.g. "64MiB"')
    parser.add_argument("--disk-dir", help="folder of the disk tier")
    parser.add_argument("--dtype", default="auto", help='"auto", "float32", "bfloat16", "float16"')
    arguments = parser.parse_args(command)
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    try:
        main()
    except (ModelError, TieredCacheError) as error:  # says what to change
        sys.exit(f"error: {error}")
