"""A chat of several turns with one cache: each turn reads only what is new.

    python examples/chat.py
    python examples/chat.py --model Qwen/Qwen2.5-0.5B-Instruct --say "Who are you?" "Why?"

`generate` feeds what the cache does not hold yet, so a long history is never read twice, and it may
be far larger than `device_bytes`. An answer that is not wanted is taken back with `crop`. A model
without a chat template (such as the byte-level one that comes with the project, which only
remembers facts) gets the plain lines.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from hf_tiered_cache import TieredCache

TINY_LM = Path(__file__).parent.parent / "eval" / "tiny_lm"
SAY = ("code=318240\n" * 8 + "gate=972605\n" * 8, "gate=", "\n" + "room=445019\n" * 8 + "code=")


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    with TieredCache(
        config=model.config, device_bytes=arguments.device_bytes, disk_dir=arguments.disk_dir
    ) as cache:
        answers, question = chat(model, tokenizer, cache, arguments, is_told=True)
        # The last token of a prompt is read again, so that there are logits to start from.
        cache.crop(question.shape[1] - 1 - cache.get_seq_length())
        again = generate(model, cache, question, arguments.new_tokens)[0, question.shape[1] :]
        print(f"[the last answer taken back and given again: {tokenizer.decode(again)!r}]")
        print(cache)
    expected, _ = chat(model, tokenizer, DynamicCache(config=model.config), arguments)
    print(f"all answers are {'those' if answers == expected else 'NOT those'} of DynamicCache")


def chat(model, tokenizer, cache, arguments, is_told=False) -> tuple[list[str], torch.Tensor]:
    """The answers, and all tokens before the last one `[1, tokens]`."""
    messages: list[dict[str, str]] = []
    tokens = torch.empty((1, 0), dtype=torch.long)
    for said in arguments.say:
        messages.append({"role": "user", "content": said})
        held = cache.get_seq_length()
        history = prompt_of(tokenizer, messages, tokens)
        tokens = generate(model, cache, history, arguments.new_tokens)
        answer = tokenizer.decode(tokens[0, history.shape[1] :], skip_special_tokens=True)
        if is_told:
            print(f"> {said.strip()[:60]!r}\n{answer!r}")
            print(f"[{held:,} tokens were known, {history.shape[1] - held:,} were read]")
        messages.append({"role": "assistant", "content": answer})
    return [one["content"] for one in messages if one["role"] == "assistant"], history


def prompt_of(tokenizer, messages: list[dict[str, str]], history: torch.Tensor) -> torch.Tensor:
    """The whole chat as tokens `[1, tokens]`; it begins with what was there before."""
    if tokenizer.chat_template is None:
        new = tokenizer(messages[-1]["content"], return_tensors="pt", add_special_tokens=False)
        return torch.cat([history, new.input_ids], dim=1)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    known = history.shape[1]
    if not torch.equal(tokens[:, :known], history):
        # A template may render an old answer otherwise than it was generated.
        raise SystemExit("this model's chat template rewrites history: feed only the new messages")
    return tokens


def generate(model, cache, history: torch.Tensor, new_tokens: int) -> torch.Tensor:
    return model.generate(
        history,
        attention_mask=torch.ones_like(history),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_LM), help="hub name or folder")
    parser.add_argument("--say", nargs="+", default=SAY, help="one message per turn")
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--device-bytes", default="2MiB", help="budget of the device tier")
    parser.add_argument("--disk-dir", help="folder of the disk tier")
    parser.add_argument("--dtype", default="auto", help='"auto", "float32", "bfloat16", "float16"')
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    main()
