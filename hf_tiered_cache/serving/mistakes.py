"""Mistakes of clients that transformers' handlers would find in the middle of their work, or never:
each is an HTTPException 400 that names the field, what came and what was expected."""

from typing import Any

from fastapi import HTTPException

SEEDS = range(-(2**63), 2**64)  # what torch.manual_seed takes
TOKEN_COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

# Options of `generate` that change what it returns or what it is given, and what they must be.
FIXED = {
    "guidance_scale": (None, 1),  # feeds a second sequence beside the prompt
    "token_healing": (None, False),  # feeds another prompt than the cache was looked up for
    "return_dict_in_generate": (None, False),
}


def check_seed(body: dict[str, Any]) -> None:
    """Of the raw body."""
    seed = body.get("seed")
    if seed is not None:
        _expect(_is_whole(seed) and seed in SEEDS, "seed", seed, "a whole number of 64 bits")


def check_body(body: dict[str, Any], vocabulary: int) -> None:
    """The other fields of the raw body. vocabulary: number of the model's ids."""
    for name in TOKEN_COUNTS:
        if body.get(name) is not None:
            value = body[name]
            _expect(_is_whole(value) and value >= 1, name, value, "a whole number, 1 at least")
    for token, bias in _mapping("logit_bias", body.get("logit_bias")).items():
        is_known = str(token).isdecimal() and int(token) < vocabulary
        _expect(is_known, "logit_bias", token, f"token ids from 0 to {vocabulary - 1}")
        _expect(_is_number(bias), f"logit_bias of {token}", bias, "a number")
    stop = body.get("stop")
    if stop is not None:
        texts = stop if isinstance(stop, list) else [stop]
        is_text = all(isinstance(it, str) and it for it in texts)
        _expect(is_text, "stop", stop, "a text that is not empty, or a list of such")
    if "messages" in body:
        messages = body["messages"]
        is_list = isinstance(messages, list) and messages
        _expect(is_list, "messages", messages, "a list of one message at least")
    config = body.get("generation_config")
    _expect(config is None or isinstance(config, str), "generation_config", config, "JSON text")


def check_config(config: Any) -> None:
    """The GenerationConfig that was made of the body."""
    for name, allowed in FIXED.items():
        value = getattr(config, name, None)
        _expect(value in allowed, name, value, " or ".join(map(repr, allowed)))
    most = config.max_new_tokens
    is_count = most is None or (_is_whole(most) and most >= 1)
    _expect(is_count, "max_new_tokens", most, "a whole number, 1 at least")
    if config.do_sample:
        heat, top_p = config.temperature, config.top_p
        is_positive = heat is None or (_is_number(heat) and heat > 0)
        _expect(is_positive, "temperature", heat, "a positive number, or 0 for no sampling")
        is_share = top_p is None or (_is_number(top_p) and 0 < top_p <= 1)
        _expect(is_share, "top_p", top_p, "a number above 0, 1 at most")


def _mapping(name: str, value: Any) -> dict[Any, Any]:
    _expect(value is None or isinstance(value, dict), name, value, "an object")
    return value or {}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _expect(is_so: Any, name: str, got: Any, expected: str) -> None:
    if not is_so:
        raise HTTPException(400, f"{name} is {got!r:.80}: expected {expected}")
