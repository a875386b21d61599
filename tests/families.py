"""Tiny random models of many families, and what each of them does with a `TieredCache`.

`FAMILIES` says how to build one of each and what to expect of it; `MODES` says how it generates;
`compare` generates twice, with transformers' own cache and with a tiered one. The table of
docs/model_families.md is written from what was observed: `python tests/families.py --write`.
"""

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from support import sharpen
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

import hf_tiered_cache
from hf_tiered_cache import TieredCache
from hf_tiered_cache.integration.paged_states import Snapshot
from hf_tiered_cache.kernels import ops, reference
from hf_tiered_cache.kernels.cores import CpuCore

DOCUMENT = Path(__file__).parents[1] / "docs" / "model_families.md"
VOCABULARY, PROMPT, NEW, PADS, PERIOD = 97, 41, 8, 11, 10
WINDOW, BLOCK_TOKENS = 16, 4
TOLERANCE = 4e-5  # of logits, relative to the largest

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WIDE = {"head_dim": 16}
WINDOWED = {"sliding_window": WINDOW, "num_hidden_layers": 4}
UNTIED = {"tie_word_embeddings": False}  # where a tied model only repeats its last token
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
ROPE_OF_IMAGES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EYES = {
    "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
}
MLLAMA_EYES = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
        "vision_output_dim": 32,
    }
}

# What a model is loaded as, and which models speak from an encoder.
CAUSAL, TEXT_TO_TEXT, SPEECH, IMAGE = "CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText"

STATEFUL = ("assisted", "prompt lookup")  # not with recurrent states
CANNOT_SET = ("tiered",)  # attention is no function that could be exchanged
CANNOT_BE_SET = "cannot be set"

# Why the compiled kernel does not answer.
LOADED_EAGER = "loads with eager attention"
BY_ITSELF = "computes attention by itself"
LATENTS = "expands latents to keys and values"
BIASED = "adds a bias to the scores"
WINDOWS_ONLY = "sliding windows only"


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and what is expected of it."""

    name: str
    model_type: str  # transformers' name
    sizes: dict[str, Any] = field(default_factory=dict)  # beyond SIZES
    kind: str = CAUSAL
    around: dict[str, Any] = field(default_factory=dict)  # a multimodal config around the text's
    seed: int = 0
    refuses: tuple[str, ...] = ()  # modes that transformers itself does not offer
    why: str = ""  # why the compiled kernel does not answer as loaded; "" where it does

    @property
    def has_encoder(self) -> bool:
        return self.kind in (TEXT_TO_TEXT, SPEECH)

    def build(self) -> Any:
        """A random model whose tokens depend on its attention."""
        torch.manual_seed(self.seed)
        sizes = {**SIZES, **self.sizes}
        if self.around:
            config = AutoConfig.for_model(self.model_type, text_config=sizes, **self.around)
        else:
            config = AutoConfig.for_model(self.model_type, **sizes)
        auto_class = getattr(transformers, f"AutoModelFor{self.kind}")
        return sharpen(auto_class.from_config(config), factor=1.5)


FAMILIES = [
    Family("Llama", "llama"),
    Family("Qwen2", "qwen2"),
    Family("Qwen2-MoE", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("Qwen3", "qwen3", WIDE),
    Family("Qwen3-MoE", "qwen3_moe", {**EXPERTS, **WIDE}, seed=3),
    Family("Mistral", "mistral", WINDOWED, why=WINDOWS_ONLY),
    Family("Mixtral", "mixtral", {"num_local_experts": 4}),
    Family("Gemma", "gemma", WIDE),
    Family(
        "Gemma 2",
        "gemma2",
        {**WIDE, **WINDOWED, **UNTIED, "attn_logit_softcapping": 2.0},
        seed=1,
        why=LOADED_EAGER,
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        {**WIDE, **WINDOWED, **UNTIED, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3"),
    Family("GPT-2", "gpt2", GPT),
    Family(
        "GPT-Neo",
        "gpt_neo",
        {
            "num_hidden_layers": 4,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
        refuses=CANNOT_SET,
        why=BY_ITSELF,
    ),
    Family("GPT-NeoX", "gpt_neox"),
    Family("GPT-J", "gptj", {**GPT, "rotary_dim": 4}, refuses=CANNOT_SET, why=BY_ITSELF),
    Family("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("BLOOM", "bloom", {"n_layer": 3, "n_head": 4}, refuses=CANNOT_SET, why=BY_ITSELF),
    Family(
        "Falcon",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        refuses=("eager", *CANNOT_SET),
        why=BY_ITSELF,
    ),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2", seed=1),
    Family("OLMo 3", "olmo3", WINDOWED),
    Family("GLM", "glm", WIDE),
    Family("GLM-4", "glm4", WIDE),
    Family("Granite", "granite"),
    Family("SmolLM3", "smollm3"),
    Family("StarCoder2", "starcoder2", seed=3),
    Family("StableLM", "stablelm", seed=1),
    Family("Cohere", "cohere"),
    Family("Cohere 2", "cohere2", WINDOWED),
    Family(
        "Llama 4",
        "llama4_text",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "attention_chunk_size": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
        },
    ),
    Family("gpt-oss", "gpt_oss", {**WIDE, **WINDOWED, "num_local_experts": 4}, why=LOADED_EAGER),
    Family("DeepSeek-V2", "deepseek_v2", LATENT, why=LATENTS),
    Family("DeepSeek-V3", "deepseek_v3", {**LATENT, "n_shared_experts": 1}, why=LATENTS),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        {
            **EXPERTS,
            **WIDE,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        refuses=STATEFUL,
    ),
    Family(
        "Jamba",
        "jamba",
        {
            "num_hidden_layers": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        refuses=STATEFUL,
    ),
    Family(
        "Bamba",
        "bamba",
        {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
        refuses=STATEFUL,
    ),
    Family(
        "Falcon-H1",
        "falcon_h1",
        {**MAMBA, **WIDE, "mamba_d_ssm": 64},
        refuses=STATEFUL,
    ),
    Family(
        "Zamba2",
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "mamba_d_state": 16,
            "chunk_size": 16,
        },
        refuses=STATEFUL,
    ),
    Family(
        "Granite hybrid",
        "granitemoehybrid",
        {
            **MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_expand": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 32,
        },
        refuses=STATEFUL,
    ),
    Family(
        "LFM2",
        "lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "block_ff_dim": 64,
            "block_multiple_of": 16,
        },
    ),
    Family(
        "T5",
        "t5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "initializer_factor": 2.0,
        },
        TEXT_TO_TEXT,
        why=BIASED,
    ),
    Family("BART", "bart", {**SEQ2SEQ, **UNTIED, "initializer_range": 0.1}, TEXT_TO_TEXT),
    Family(
        "Whisper",
        "whisper",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 128,
        },
        SPEECH,
        refuses=("chunked prefill",),
    ),
    Family("Qwen2-VL", "qwen2_vl", {"rope_parameters": ROPE_OF_IMAGES}, IMAGE, EYES),
    Family("Qwen2.5-VL", "qwen2_5_vl", {"rope_parameters": ROPE_OF_IMAGES}, IMAGE, EYES),
    Family(
        "Mllama",
        "mllama",
        {"num_hidden_layers": 4, "cross_attention_layers": [2]},
        IMAGE,
        MLLAMA_EYES,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Mode:
    """One way to generate."""

    name: str
    how: dict[str, Any] = field(default_factory=dict)  # arguments of `generate`
    batch: int = 1  # rows of the cache
    prompt: str = "plain"  # or "padded", "repeating"
    implementation: str | None = None  # of attention; None: as loaded
    has_config: bool = True
    like: str = ""  # the mode that says what is expected; "": this one

    @property
    def is_special(self) -> bool:
        """Whether it is about how attention or the cache is set up."""
        return self.implementation is not None or not self.has_config


MODES = {
    mode.name: mode
    for mode in (
        Mode("greedy"),
        Mode("no config", has_config=False, like="greedy"),
        Mode("sampled", {"do_sample": True, "temperature": 0.9}),
        Mode("beams", {"num_beams": 3}, batch=3),
        Mode("assisted"),  # by `assistant`
        Mode("prompt lookup", {"prompt_lookup_num_tokens": 6}, prompt="repeating"),
        Mode("chunked prefill", {"prefill_chunk_size": 13}),
        Mode("left padding", batch=2, prompt="padded"),
        Mode("eager", implementation="eager", like="greedy"),
        # Padded, because this name brings a mask function of its own.
        Mode("tiered", batch=2, prompt="padded", implementation="tiered", like="left padding"),
    )
}


@cache
def tiny_model(name: str) -> Any:
    return BY_NAME[name].build()


@cache
def assistant(name: str) -> Any:
    """The model somewhat disturbed: it guesses some tokens and not others."""
    model = copy.deepcopy(tiny_model(name))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.05 * torch.randn_like(weight))
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def make_inputs(family: Family, prompt: str) -> dict[str, Any]:
    """Arguments of `generate`: a prompt, for the decoder where there is an encoder too."""
    batch = 2 if prompt == "padded" else 1
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 90, (batch, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    if prompt == "padded":
        ids[1, :PADS], mask[1, :PADS] = 0, 0
    if prompt == "repeating":
        ids = ids[:, :PERIOD].repeat(1, PROMPT // PERIOD)
        mask = torch.ones_like(ids)
    if not family.has_encoder:
        return {"input_ids": ids, "attention_mask": mask}
    inputs = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    if family.kind == SPEECH:
        return {"input_features": torch.randn((batch, 8, 40), generator=generator), **inputs}
    return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), **inputs}


def generate(
    name: str, past: DynamicCache, inputs: dict[str, Any], model: Any = None, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits of every new token) with `past` as the cache of the decoder. model: another
    one than the family's."""
    family, model = BY_NAME[name], model or tiny_model(name)
    torch.manual_seed(11)
    # Not the method: Whisper's own takes no decoder prompt together with an assistant.
    out = GenerationMixin.generate(
        model,
        **inputs,
        past_key_values=EncoderDecoderCache(past, DynamicCache()) if family.has_encoder else past,
        output_logits=True,
        return_dict_in_generate=True,
        **{"max_new_tokens": NEW, "do_sample": False, **how},
    )
    return out.sequences, torch.stack(out.logits, 1)


@contextmanager
def tiered_cache(name: str, mode: Mode) -> Iterator[TieredCache]:
    """A cache whose device tier holds about half of the blocks."""
    config = tiny_model(name).config
    tables = sum(
        isinstance(layer, DynamicLayer) and not (mode.has_config and layer.is_sliding)
        for layer in DynamicCache(config=config).layers
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        TieredCache(
            config if mode.has_config else None,
            block_tokens=BLOCK_TOKENS,
            device_bytes=6 * mode.batch * max(tables, 1) * 4096,
            disk_bytes="8MiB",
            disk_dir=folder,
        ) as past,
    ):
        yield past


@contextmanager
def attention_set(model: Any, implementation: str | None) -> Iterator[None]:
    """Attention as asked; raises ValueError where transformers leaves it (with a warning)."""
    before = model.config._attn_implementation
    if implementation is not None:
        model.set_attn_implementation(implementation)
    try:
        if implementation not in (None, model.config._attn_implementation):
            raise ValueError("set_attn_implementation leaves it as it is")
        yield
    finally:
        if implementation is not None:
            model.set_attn_implementation(before)


KERNEL, CHUNKS, DENSE = "kernel", "torch chunks", "dense"
Way = tuple[str, str]  # one of these, and what led there


@contextmanager
def watching() -> Iterator[set[Way]]:
    """Which ways attention takes over tiered layers, seen where each of them ends."""
    ways: set[Way] = set()

    def watch(owner: Any, name: str, describe: Callable[..., Way]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            ways.add(describe(*args, **kwargs))
            return original(*args, **kwargs)

        patch.setattr(owner, name, watched)

    def by_kernel(*args: Any, **kwargs: Any) -> Way:
        return KERNEL, ""

    def by_chunks(state, query, view, call) -> Way:
        return CHUNKS, ", ".join(ops.not_supported_reasons(query, view.layout, call))

    def made_dense(*args: Any) -> Way:
        return DENSE, asker(sys._getframe(2))

    with pytest.MonkeyPatch.context() as patch:
        watch(CpuCore, "attend", by_kernel)
        watch(reference, "attend_blocks", by_chunks)
        watch(Snapshot, "materialize", made_dense)
        yield ways


def asker(frame: FrameType | None) -> str:
    """The innermost function that asked for a dense tensor: of a model, or of our attention."""
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_qualname
        if "hf_tiered_cache/attention" in path and function != "_dense":
            return function
        if "transformers/models" in path and function != "repeat_kv":
            return function
        frame = frame.f_back
    return "?"


@dataclass(frozen=True)
class Expected:
    """What transformers' own cache says."""

    tokens: torch.Tensor | None
    logits: torch.Tensor | None
    refusal: str = ""  # instead of them: what transformers does not do


@dataclass(frozen=True)
class Observed:
    """What a tiered cache says, and how."""

    tokens: torch.Tensor
    logits: torch.Tensor
    ways: frozenset[Way]
    num_tiered: int  # layers
    other_layers: tuple[str, ...]  # their classes
    cold_reads: int

    @property
    def answered_by(self) -> str:
        """The ways by name."""
        return ", ".join(sorted({way for way, _ in self.ways})) or "-"

    @property
    def composition(self) -> str:
        """How many layers are tiered, and what the others are."""
        kinds = {"tiered": self.num_tiered, **Counter(self.other_layers)}
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)

    @property
    def why(self) -> str:
        """Why the kernel does not answer, as far as it was seen; "" where it does."""
        if not self.num_tiered:
            return WINDOWS_ONLY
        reasons = {_reason(way, cause) for way, cause in self.ways if way != KERNEL}
        return ", ".join(sorted(reasons))


def _reason(way: str, cause: str) -> str:
    if way == CHUNKS:
        return BIASED if cause == "bias" else cause
    if cause.endswith("eager_attention_forward"):
        return LOADED_EAGER
    if cause.endswith(".expand_kv"):
        return LATENTS
    return BY_ITSELF if "Attention." in cause else cause


def is_ours(layer: Any) -> bool:
    return type(layer).__module__.startswith(hf_tiered_cache.__name__)


def arguments(name: str, mode: Mode) -> dict[str, Any]:
    how = dict(mode.how)
    if mode.name == "assisted":
        how["assistant_model"] = assistant(name)
    return {"inputs": make_inputs(BY_NAME[name], mode.prompt), **how}


@cache
def expect(name: str, mode_name: str) -> Expected:
    """What `DynamicCache` says, or that it raises."""
    mode = MODES[mode_name]
    model = tiny_model(name)
    try:
        with attention_set(model, mode.implementation):
            if mode.like:
                return expect(name, mode.like)
            past = DynamicCache(config=model.config)
            return Expected(*generate(name, past, **arguments(name, mode)))
    except (ValueError, TypeError, NotImplementedError) as error:
        # Of a TypeError of `forward`, which describes the whole module first, the last line.
        return Expected(None, None, str(error).rpartition("\n")[2].removeprefix(") "))


@cache
def spread(name: str, mode_name: str) -> float:
    """How far the logits of `DynamicCache` are from those in float64 at most, relative to the
    largest; 0 where float64 leads to other tokens."""
    mode, model = MODES[mode_name], copy.deepcopy(tiny_model(name)).double()
    inputs = arguments(name, mode)
    with attention_set(model, mode.implementation):
        tokens, logits = generate(name, DynamicCache(config=model.config), model=model, **inputs)
    known = expect(name, mode_name)
    if not torch.equal(tokens, known.tokens):
        return 0.0
    return float((known.logits - logits).abs().max() / logits.abs().max())


@cache
def observe(name: str, mode_name: str) -> Observed:
    """What a small `TieredCache` says."""
    mode, model = MODES[mode_name], tiny_model(name)
    with (
        tiered_cache(name, mode) as past,
        attention_set(model, mode.implementation),
        watching() as ways,
    ):
        tokens, logits = generate(name, past, **arguments(name, mode))
        return Observed(
            tokens,
            logits,
            frozenset(ways),
            past.stats().num_layers,
            tuple(type(layer).__name__ for layer in past.layers if not is_ours(layer)),
            past.stats().counters.cold_reads,
        )


def row(family: Family) -> dict[str, str]:
    """What was observed of a family, by column."""
    offered = [mode for mode in MODES if mode not in family.refuses]
    answered_by = {mode: observe(family.name, mode).answered_by for mode in offered}
    as_loaded = {way for mode, way in answered_by.items() if not MODES[mode].is_special}
    implementation = tiny_model(family.name).config._attn_implementation
    return {
        "Family": family.name,
        "Layers": observe(family.name, "greedy").composition,
        "Layers without config": observe(family.name, "no config").composition,
        "As loaded": f"{implementation}: {', '.join(sorted(as_loaded))}",
        "Tiered": answered_by.get("tiered", CANNOT_BE_SET),
        "Eager": answered_by.get("eager", CANNOT_BE_SET),
        "Why not the kernel": family.why,
        "Compared": " but ".join(filter(None, ("all", ", ".join(family.refuses)))),
    }


def table() -> str:
    """The text of docs/model_families.md."""
    rows = [row(family) for family in FAMILIES]
    cells = [rows[0].keys(), ["---"] * len(rows[0]), *(one.values() for one in rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    refusals = [
        f"- {family.name}, {mode}: {expect(family.name, mode).refusal}"
        for family in FAMILIES
        for mode in family.refuses
    ]
    return "\n".join([INTRODUCTION, *lines, REFUSED, *refusals, ""])


INTRODUCTION = f"""\
# Model families

Written by `python tests/families.py --write` from what it observed with transformers
{transformers.__version__}; do not edit. `tests/test_families.py` checks it.

Every family is a tiny random model of transformers' own class. It generates with `DynamicCache`
and with a `TieredCache` of {BLOCK_TOKENS}-token blocks, about half of which lie on disk: the tokens
must be the same, and the logits within {TOLERANCE:g} of the largest; where `DynamicCache` itself
is that far from float64, within three times its distance.

Compared: {", ".join(MODES)}.

- *Layers*: how many are kept in blocks, and transformers' classes of the others, which stay on the
  device. *Without config*: in a `TieredCache()` made without `config=model.config`.
- *As loaded*, *Tiered*, *Eager*: what answered attention over the blocks, as the model is loaded
  and after `model.set_attn_implementation("tiered")` or `"eager"`. "{KERNEL}": the compiled kernel.
  "{CHUNKS}": plain torch, some blocks at a time. "{DENSE}": the keys and values of the layer were
  made dense at every call, which is right, but slower and not bounded by the budgets.
- Encoder-decoder models: `EncoderDecoderCache(TieredCache(config), DynamicCache())`; this is about
  their self-attention. Multimodal models: about text.
"""
REFUSED = """
What transformers does not do, with its own cache either:
"""


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(table())
