"""Train a byte-level Llama of 2.9M parameters that attends far back, and measure that it does.

    python eval/train_tiny_lm.py --minutes 60          train, export to eval/tiny_lm, evaluate
    python eval/train_tiny_lm.py --evaluate            only the tables, for the exported model

A cache that loses tokens is only noticed by a model that reads them. Random weights do not, and
downloads are not always at hand; so this one is trained on a CPU from the Python standard library
(long files) and from synthetic documents whose answers stand far back. The context grows while it
trains, 256 to 16K. Knows nothing of the tiered cache: the tables are measured with `DynamicCache`.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_tiered_cache.evaluation.standard_library import held_out_files, read_files, train_files

from corpora import fact_line, random_fact, random_lines, recall_document

MODEL_FOLDER = Path(__file__).parent / "tiny_lm"
CHECKPOINT = Path(tempfile.gettempdir()) / "tiny_lm_checkpoint.pt"
CHECKPOINT_EVERY_SECONDS = 180

# Large, so that a third of each head's dimensions hardly turns within 16K tokens: content found at
# short distances is then found at long ones.
ROPE_THETA = 10_000_000.0
# How the first two layers start, see `_start_looking_back`. The residual stream's dimensions: 0 is
# shared by all tokens, CONTENT says which token it is, and from COPIES on there are as many
# dimensions for what stood 1, 2, 3 and 4 tokens back.
CONTENT_DIMENSIONS, CONTENT, COPIES = 48, 1, 64
EMBEDDING_DEVIATION, SHARED_VALUE, COPY_WEIGHT = 0.05, 0.4, 0.15
LOOK_BACK_PAIRS, LOOK_BACK_WEIGHT = 8, 0.9
# Rotary pairs from here on hardly turn; matching uses these only.
FIRST_SLOW_PAIR, MATCH_WEIGHT = 16, 1.7

# ByT5's ids: pad, end and unknown come first, then the 256 bytes.
BYTE_OFFSET = 3
# (context in tokens, sequences per step, share of the minutes). Short contexts first: a token costs
# three times less at 1K than at 8K, and what a head learns to match at 1K it keeps at 8K.
CURRICULUM = (
    (256, 16, 0.15),
    (512, 8, 0.18),
    (1024, 4, 0.20),
    (2048, 4, 0.15),
    (4096, 2, 0.12),
    (8192, 1, 0.14),
    (16384, 1, 0.06),
)
# Muon for the matrices of the layers, AdamW for the embedding and the norms.
MUON_LEARNING_RATE = 0.02
ADAMW_LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
# Share of the minutes after which the learning rate falls linearly to FINAL_LEARNING_RATE of it.
DECAY_FROM = 0.5
FINAL_LEARNING_RATE = 0.02

# What a byte counts in the loss: random bytes that nothing foretells would only be noise, answers
# are few and what this model is for. The values also tell the kinds apart.
NOISE, TEXT, COPY, ANSWER = 0.0, 1.0, 1.5, 2.0

BUCKETS = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, 16384))
HIDDEN_CONTEXTS = (4096, 8192)
HIDDEN_CONTINUATION_TOKENS = 1024
RECALL_DISTANCES = (512, 1024, 2048, 4096, 8192, 16000)


def new_model() -> LlamaForCausalLM:
    """Return an untrained model: 2.85M parameters, 11.4 MB in float32, 4 heads on 2 kv heads.

    Random but for the attention of the first two layers, which starts able to find the place where
    the last bytes stood before (see `_start_looking_back`). From random weights a model of this
    size stays on a plateau, knowing text but no copying, for longer than a CPU's hour.
    """
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _start_looking_back(model)
    return model


class TrainingText:
    """Batches of token ids and loss weights, the same for the same seed, step and context.

    A third of the sequences are windows of the files, joined in path order so that neighbours
    belong together; the rest need something that stands further back: facts or a whole passage.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._text = read_files(train_files())
        self._bytes = np.frombuffer(self._text.encode(), dtype=np.uint8)

    def batch(
        self, step: int, num_sequences: int, context_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and loss weights: [num_sequences, context_tokens]."""
        rng = random.Random(f"{self._seed}-{step}")
        makers = rng.choices(
            (self._file_window, self._recall_pieces, self._repeat_pieces),
            weights=(0.35, 0.4, 0.25),
            k=num_sequences,
        )
        sequences = [maker(rng, context_tokens) for maker in makers]
        ids = np.stack([ids for ids, _ in sequences]).astype(np.int64) + BYTE_OFFSET
        weights = np.stack([weights for _, weights in sequences])
        return torch.from_numpy(ids), torch.from_numpy(weights)

    def _file_window(self, rng: random.Random, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        start = rng.randrange(len(self._bytes) - num_bytes)
        window = self._bytes[start : start + num_bytes]
        return window, np.full(num_bytes, TEXT, dtype=np.float32)

    def _recall_pieces(self, rng: random.Random, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        # From bare lists of facts to a few facts in a file.
        filler_share = rng.uniform(0.0, 0.5)
        pieces: list[tuple[bytes, float]] = []
        facts: list[tuple[str, str]] = []
        length = 0
        while length < num_bytes:
            is_question = len(facts) > 1 and rng.random() < 0.5
            if rng.random() < filler_share:
                filler = random_lines(rng, self._text, rng.randint(5, 80))
                pieces.append((filler.encode(), TEXT))
            else:
                if not is_question:
                    facts.append(random_fact(rng))
                key, value = rng.choice(facts) if is_question else facts[-1]
                line = fact_line(key, value)
                between = line[len(key) : line.index(value)]
                value_weight = ANSWER if is_question else NOISE
                pieces += [(key.encode(), NOISE), (between.encode(), TEXT)]
                pieces += [(value.encode(), value_weight), (b"\n", TEXT)]
            length = sum(len(piece) for piece, _ in pieces)
        return _join(pieces, num_bytes)

    def _repeat_pieces(self, rng: random.Random, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        passage_bytes = rng.randint(num_bytes // 16, num_bytes // 2)
        if rng.random() < 0.3:
            passage, weight = random_lines(rng, self._text, passage_bytes).encode(), TEXT
        else:
            # Out of many symbols the last one alone says where to go on: the first thing a model
            # learns to copy. Out of few it takes the last several, as in text.
            symbols = rng.sample(range(32, 127), k=rng.randint(16, 95))
            passage, weight = bytes(rng.choices(symbols, k=passage_bytes)), NOISE
        pieces: list[tuple[bytes, float]] = [(passage, weight)]
        length = len(passage)
        while length < num_bytes:
            gap_bytes = rng.choice((0, rng.randint(1, num_bytes // 2)))
            gap = random_lines(rng, self._text, gap_bytes).encode() if gap_bytes else b""
            # A copy's first bytes cannot be known either: too few to matter.
            pieces += [(gap, TEXT), (passage, COPY)]
            length += len(gap) + len(passage)
        return _join(pieces, num_bytes)


def train(minutes: float, seed: int, checkpoint_path: Path, folder: Path, resume: bool) -> None:
    """Train for `minutes` of wall clock, evaluation not included, and export to `folder`.

    Curriculum and learning rate follow the clock, so that a busy machine trains less instead of
    longer; the steps done at each context are recorded. The last checkpoint is resumed on request.
    """
    torch.manual_seed(seed)
    model = new_model().train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    # torch's Muon orthogonalises in bfloat16, which a CPU without it emulates: 0.5 s a step here,
    # 0.1 s in float32 (torch 2.13).
    torch.optim._muon._zeropower_via_newtonschulz = _orthogonalised
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.02)
    adamw = torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    # Everything that a resumed run must know.
    progress: dict[str, Any] = {
        "commands": [],
        "step": 0,
        "seconds": 0.0,
        "tokens": 0,
        "losses": [],
        "steps_at_context": {},
    }
    if resume:
        saved = torch.load(checkpoint_path)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adamw.load_state_dict(saved["adamw"])
        progress = saved["progress"]
    progress["commands"].append(" ".join(["python", "eval/train_tiny_lm.py", *sys.argv[1:]]))

    def save() -> None:
        states = {"model": model.state_dict(), "muon": muon.state_dict()}
        torch.save(states | {"adamw": adamw.state_dict(), "progress": progress}, checkpoint_path)
        export(model, folder)
        _update_json(folder, _training_record(minutes, seed, progress))

    text = TrainingText(seed)
    bar = tqdm(total=round(minutes * 60), initial=round(progress["seconds"]), unit="s")
    saved_at = progress["seconds"]
    while progress["seconds"] < minutes * 60:
        started = time.monotonic()
        share_done = progress["seconds"] / (minutes * 60)
        context_tokens, num_sequences = _curriculum_at(share_done)
        factor = _learning_rate_factor(progress["step"], share_done)
        muon.param_groups[0]["lr"] = MUON_LEARNING_RATE * factor
        adamw.param_groups[0]["lr"] = ADAMW_LEARNING_RATE * factor

        ids, weights = text.batch(progress["step"], num_sequences, context_tokens)
        losses = _next_token_losses(model(input_ids=ids, use_cache=False).logits, ids)
        weights = weights[:, 1:]
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds = time.monotonic() - started
        bits = losses.detach() / math.log(2)
        entry = {
            "step": progress["step"],
            "minutes": round((progress["seconds"] + seconds) / 60, 2),
            "context_tokens": context_tokens,
            "text_bits_per_byte": _rounded_mean(bits[weights == TEXT]),
            "copy_bits_per_byte": _rounded_mean(bits[weights == COPY]),
            "answer_bits_per_byte": _rounded_mean(bits[weights == ANSWER]),
            "tokens_per_second": round(ids.numel() / seconds),
        }
        progress["losses"].append(entry)
        progress["step"] += 1
        progress["tokens"] += ids.numel()
        progress["seconds"] += seconds
        steps = progress["steps_at_context"]
        steps[str(context_tokens)] = steps.get(str(context_tokens), 0) + 1
        bar.update(min(round(progress["seconds"]), bar.total) - bar.n)
        if entry["step"] % 10 == 0:
            tqdm.write(" ".join(f"{name}={value}" for name, value in entry.items()))
            sys.stdout.flush()
        if progress["seconds"] - saved_at > CHECKPOINT_EVERY_SECONDS:
            save()
            saved_at = progress["seconds"]
    save()


def export(model: PreTrainedModel, folder: Path) -> None:
    """Write weights (safetensors, float32), configuration and tokenizer to `folder`."""
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


@torch.inference_mode()
def bits_per_byte_by_position(
    model: PreTrainedModel, tokenizer: Any, num_files: int
) -> list[dict[str, Any]]:
    """Measure held-out files from their first byte on; one row per bucket of positions.

    Only files that fill the last bucket count, so every row is about the same files.
    """
    num_tokens = BUCKETS[-1][1]
    sums = dict.fromkeys(BUCKETS, 0.0)
    files = held_out_files(min_bytes=num_tokens)[:num_files]
    for path in tqdm(files, desc="positions", leave=False):
        ids = _ids(tokenizer, read_files([path]))[:, :num_tokens]
        losses = _next_token_losses(model(input_ids=ids, use_cache=False).logits, ids)[0]
        for start, end in BUCKETS:
            # losses[i] is about token i + 1; nothing predicts token 0.
            bucket = losses[max(0, start - 1) : end - 1]
            sums[start, end] += bucket.mean().item() / math.log(2)
    return [
        {
            "from": start,
            "to": end,
            "files": len(files),
            "bits_per_byte": sums[start, end] / len(files),
        }
        for start, end in BUCKETS
    ]


@torch.inference_mode()
def hidden_middle(model: PreTrainedModel, tokenizer: Any, num_files: int) -> list[dict[str, Any]]:
    """Measure what follows in held-out files with the whole cache and without its middle half.

    Hidden are the cached tokens [n/4, 3n/4), by mask: positions and rotations stay as they were.
    What follows is once the file's own continuation, once a passage out of the hidden half again.
    """
    rows = []
    for context_tokens in HIDDEN_CONTEXTS:
        middle = (context_tokens // 4, 3 * context_tokens // 4)
        repeated = context_tokens // 2 - HIDDEN_CONTINUATION_TOKENS // 2
        for what_follows, start in (("continuation", context_tokens), ("repetition", repeated)):
            whole, hidden = [], []
            for path in tqdm(held_out_files()[:num_files], desc=what_follows, leave=False):
                ids = _ids(tokenizer, read_files([path]))
                following_ids = ids[:, start : start + HIDDEN_CONTINUATION_TOKENS]
                ids = torch.cat((ids[:, :context_tokens], following_ids), dim=1)
                cache = DynamicCache(config=model.config)
                model(input_ids=ids[:, :context_tokens], past_key_values=cache, logits_to_keep=1)
                for hidden_tokens, losses in (((0, 0), whole), (middle, hidden)):
                    logits = _continue(model, cache, ids, context_tokens, hidden_tokens)
                    loss = _next_token_losses(logits, following_ids).mean().item()
                    losses.append(loss / math.log(2))
            differences = [after - before for before, after in zip(whole, hidden, strict=True)]
            rows.append(
                {
                    "context_tokens": context_tokens,
                    "what_follows": what_follows,
                    "files": len(whole),
                    "whole_cache_bits_per_byte": statistics.mean(whole),
                    "hidden_middle_bits_per_byte": statistics.mean(hidden),
                    "difference": statistics.mean(differences),
                    "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
                }
            )
    return rows


@torch.inference_mode()
def recall_accuracy(
    model: PreTrainedModel, tokenizer: Any, num_documents: int, seed: int
) -> list[dict[str, Any]]:
    """Ask for facts at growing distances; an answer counts if greedy decoding gives all of it.

    The same questions are asked again with the tokens around the fact hidden (by mask): without
    them the answer can only be guessed.
    """
    filler = read_files(held_out_files())
    rows = []
    for distance in RECALL_DISTANCES:
        rng = random.Random(f"{seed}-recall-{distance}")
        correct, correct_hidden = 0, 0
        for _ in tqdm(range(num_documents), desc=f"recall at {distance}", leave=False):
            document = recall_document(rng, distance + 256, filler, distance)
            text_ids = _ids(tokenizer, document.text)
            asked_ids = _ids(tokenizer, document.question + document.answer)
            answer_tokens = _ids(tokenizer, document.answer).shape[1]
            num_cached = text_ids.shape[1]
            cache = DynamicCache(config=model.config)
            model(input_ids=text_ids, past_key_values=cache, logits_to_keep=1)
            ids = torch.cat((text_ids, asked_ids), dim=1)
            fact = num_cached - document.distance_bytes
            fact_tokens = (fact, fact + asked_ids.shape[1])
            # All bytes are given and each must be the most likely one: that is greedy decoding.
            for hidden_tokens in ((0, 0), fact_tokens):
                logits = _continue(model, cache, ids, num_cached, hidden_tokens)
                guesses = logits.argmax(dim=-1)[0, -answer_tokens - 1 : -1]
                is_correct = torch.equal(guesses, ids[0, -answer_tokens:])
                correct += is_correct and hidden_tokens != fact_tokens
                correct_hidden += is_correct and hidden_tokens == fact_tokens
        rows.append(
            {
                "distance_bytes": distance,
                "documents": num_documents,
                "accuracy": correct / num_documents,
                "accuracy_fact_hidden": correct_hidden / num_documents,
            }
        )
    return rows


def evaluate(folder: Path, seed: int, num_samples: int) -> None:
    """Print the three tables for the model in `folder`; write them to training.json and README.

    num_samples: files, and documents per distance.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tables = {
        "bits_per_byte_by_position": bits_per_byte_by_position(model, tokenizer, num_samples),
        "hidden_middle": hidden_middle(model, tokenizer, num_samples),
        "recall": recall_accuracy(model, tokenizer, num_samples, seed),
    }
    for name, rows in tables.items():
        print(f"\n{name}\n{_markdown(rows)}")
    record = _update_json(folder, {"tables": tables})
    (folder / "README.md").write_text(_model_card(record))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--evaluate", action="store_true", help="only measure the model in --folder"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="wall clock of the training")
    parser.add_argument("--samples", type=int, default=16, help="files and documents per table row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=MODEL_FOLDER, help="where the model lies")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="state of the training")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    arguments = parser.parse_args()
    # Tiny attention weights are denormal numbers, which a CPU handles many times slower.
    torch.set_flush_denormal(True)
    if not arguments.evaluate:
        train(
            arguments.minutes,
            arguments.seed,
            arguments.checkpoint,
            arguments.folder,
            arguments.resume,
        )
    evaluate(arguments.folder, arguments.seed, arguments.samples)


def _start_looking_back(model: LlamaForCausalLM) -> None:
    """Set the attention of the first two layers so that together they find the last bytes again.

    Layer 0, head n attends n + 1 tokens back and copies what stands there. A rotary pair of key j
    is turned by j * frequency; a query turned back by `distance * frequency` matches best where
    i - j = distance. Both turn a constant: dimension 0 of the embedding.

    Layer 1 compares the last four tokens at the query with those before each key, so that it
    attends where the same four stood, one later: at what followed them. What to do with it, and
    everything else, is learned.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    half = config.head_dim // 2
    embedding = model.model.embed_tokens.weight
    embedding.mul_(EMBEDDING_DEVIATION / config.initializer_range)
    embedding[:, 0] = SHARED_VALUE
    # A random first MLP would drown the embedding in noise.
    model.model.layers[0].mlp.down_proj.weight.mul_(0.1)

    attention = model.model.layers[0].self_attn
    queries = attention.q_proj.weight.view(heads, config.head_dim, -1)
    keys = attention.k_proj.weight.view(kv_heads, config.head_dim, -1)
    values = attention.v_proj.weight.view(kv_heads, config.head_dim, -1)
    outputs = attention.o_proj.weight.view(-1, heads, config.head_dim)
    pairs = torch.arange(LOOK_BACK_PAIRS)
    content = torch.arange(CONTENT_DIMENSIONS)
    keys[:, pairs, 0] = LOOK_BACK_WEIGHT
    keys[:, pairs + half, 0] = 0.0
    values[:, content] = 0.0
    values[:, content, CONTENT + content] = 1.0
    outputs[:, :, content] = 0.0
    for head in range(heads):
        angles = -(head + 1) * ROPE_THETA ** (-pairs / half)
        queries[head, pairs, 0] = LOOK_BACK_WEIGHT * angles.cos()
        queries[head, pairs + half, 0] = LOOK_BACK_WEIGHT * angles.sin()
        outputs[COPIES + head * CONTENT_DIMENSIONS + content, head, content] = COPY_WEIGHT

    attention = model.model.layers[1].self_attn
    queries = attention.q_proj.weight.view(kv_heads, heads // kv_heads, config.head_dim, -1)
    keys = attention.k_proj.weight.view(kv_heads, config.head_dim, -1)
    slow_pairs = torch.arange(FIRST_SLOW_PAIR, half)
    slow = torch.cat((slow_pairs, slow_pairs + half))
    for back in range(heads):
        rows = slow[back::heads]
        queries[:, :, rows] = 0.0
        keys[:, rows] = 0.0
        for kv_head in range(kv_heads):
            # Each kv head compares other dimensions of the content.
            compared = content[kv_head * len(rows) : (kv_head + 1) * len(rows)]
            copies = COPIES + compared
            keys[kv_head, rows, copies + back * CONTENT_DIMENSIONS] = MATCH_WEIGHT
            if back == 0:
                # The embedding is that much smaller than a copy of it.
                weight = MATCH_WEIGHT * COPY_WEIGHT / EMBEDDING_DEVIATION
                queries[kv_head, :, rows, CONTENT + compared] = weight
            else:
                queries[kv_head, :, rows, copies + (back - 1) * CONTENT_DIMENSIONS] = MATCH_WEIGHT


def _join(pieces: list[tuple[bytes, float]], num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    joined = np.frombuffer(b"".join(piece for piece, _ in pieces), dtype=np.uint8)
    weights = [np.full(len(piece), weight, dtype=np.float32) for piece, weight in pieces]
    return joined[:num_bytes], np.concatenate(weights)[:num_bytes]


def _curriculum_at(share_done: float) -> tuple[int, int]:
    for context_tokens, num_sequences, share in CURRICULUM:
        if share_done < share:
            return context_tokens, num_sequences
        share_done -= share
    return CURRICULUM[-1][:2]


def _learning_rate_factor(step: int, share_done: float) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decayed = max(0.0, share_done - DECAY_FROM) / (1.0 - DECAY_FROM)
    return warmup * (1.0 - (1.0 - FINAL_LEARNING_RATE) * decayed)


def _orthogonalised(
    gradient: torch.Tensor,
    coefficients: tuple[float, float, float],
    num_steps: int,
    eps: float,
) -> torch.Tensor:
    """Do torch's Newton-Schulz iteration in the gradient's own dtype. gradient: [rows, columns]."""
    matrix = gradient.T if gradient.size(0) > gradient.size(1) else gradient
    matrix = matrix / matrix.norm().clamp(min=eps)
    first, second, third = coefficients
    for _ in range(num_steps):
        gram = matrix @ matrix.T
        update = torch.addmm(gram, gram, gram, beta=second, alpha=third)
        matrix = torch.addmm(matrix, update, matrix, beta=first)
    return matrix.T if gradient.size(0) > gradient.size(1) else matrix


def _next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss in nats of each token but the first. ids: [batch, tokens]."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    # ByT5 would close the text with its end token: nothing here ends.
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def _continue(
    model: PreTrainedModel,
    cache: DynamicCache,
    ids: torch.Tensor,
    num_cached: int,
    hidden_tokens: tuple[int, int],
) -> torch.Tensor:
    """Return the logits of the tokens [num_cached, tokens) of `ids`; leave the cache as it was.

    hidden_tokens: half-open range of cached tokens that are masked out. ids: [1, tokens].
    """
    num_tokens = ids.shape[1]
    mask = torch.zeros(num_tokens - num_cached, num_tokens)
    mask.fill_(torch.finfo(mask.dtype).min)
    mask.triu_(num_cached + 1)
    mask[:, hidden_tokens[0] : hidden_tokens[1]] = torch.finfo(mask.dtype).min
    logits = model(
        input_ids=ids[:, num_cached:],
        attention_mask=mask[None, None],
        position_ids=torch.arange(num_cached, num_tokens)[None],
        past_key_values=cache,
    ).logits
    # Negative: the number of tokens to take off.
    cache.crop(num_cached - num_tokens)
    return logits


def _training_record(minutes: float, seed: int, progress: dict[str, Any]) -> dict[str, Any]:
    return {
        "commands": progress["commands"],
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "minutes_planned": minutes,
        "minutes": round(progress["seconds"] / 60, 1),
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "steps_at_context": progress["steps_at_context"],
        "loss_curve": list(_thinned(progress["losses"])),
    }


def _rounded_mean(values: torch.Tensor) -> float | None:
    # A step of one or two long sequences may hold no answer at all.
    return round(values.mean().item(), 4) if values.numel() else None


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.mean(known), 4) if known else None


def _thinned(losses: list[dict[str, Any]], num_rows: int = 60) -> Iterator[dict[str, Any]]:
    """Yield about `num_rows` rows, each the mean of as many neighbours."""
    width = max(1, len(losses) // num_rows)
    for start in range(0, len(losses), width):
        rows = losses[start : start + width]
        means = {
            name: _mean_of_known([row[name] for row in rows])
            for name in rows[0]
            if name.endswith(("_per_byte", "_per_second"))
        }
        yield {name: rows[-1][name] for name in ("step", "minutes", "context_tokens")} | means


def _update_json(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    path = folder / "training.json"
    record = (json.loads(path.read_text()) if path.exists() else {}) | entries
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _model_card(record: dict[str, Any]) -> str:
    tables = {name: _markdown(rows) for name, rows in record["tables"].items()}
    steps = _markdown([{"context": "steps"} | record["steps_at_context"]])
    commands = "\n".join(f"    {command}" for command in record["commands"])
    return f"""# tiny_lm: a byte-level Llama that reads far back

2.85M parameters (4 layers, hidden size 256, 4 heads on 2 kv heads, head_dim 64, RoPE theta 1e7),
float32, trained on a CPU for the demo, the evaluations and the parity tests of this repository.
It knows Python's standard library a little and finds again what stands thousands of bytes back:
surely up to 4K, mostly at 8K, not at 16K (tables below). It is good for nothing else.

* Tokenizer: `ByT5Tokenizer`, a token per byte. It closes every text with `</s>`, which means "end
  of file" to nobody here: encode with `add_special_tokens=False`.
* Data: the standard library's sources (`hf_tiered_cache/evaluation/standard_library.py`; files
  held out by a hash of their path), lists of `key=value` facts that are asked for again, and
  repeated passages.
* Start: the attention of the first two layers starts as a circuit that finds the last four bytes
  again (`_start_looking_back` in `eval/train_tiny_lm.py`); all other weights start random, and all
  weights are trained. In an earlier trial (RoPE theta 5e5) with all weights random at the start, it
  had not begun to copy after 380 steps; started like this, it had after 20.

## Training

{commands}

Seed {record["seed"]}. {record["minutes"]} of {record["minutes_planned"]} planned minutes,
{record["steps"]} steps, {record["tokens"]} tokens on {record["threads"]} busy CPU threads.
Python {record["python"]}, torch {record["torch"]}, transformers {record["transformers"]}.
The schedule follows the clock, so another run or
machine gives other weights. The loss curve is in `training.json`.

{steps}

## Bits per byte of held-out files, by position

{tables["bits_per_byte_by_position"]}

## Held-out files with the middle half of the cache hidden

Bits per byte of the next {HIDDEN_CONTINUATION_TOKENS} tokens; the cached tokens [n/4, 3n/4) are
masked, positions stay. What follows is the file's own continuation, or a passage out of the hidden
half again. On the continuation this model loses little: what it has learned of code is local.
Measure a cache's losses with repetitions or with recall.

{tables["hidden_middle"]}

## Recall by distance

Share of the answers (six random digits, all must be right, greedy) to a question about one of the
facts in held-out code, with another fact every 256 bytes. Chance is one in a million.

{tables["recall"]}
"""


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " ---: |" * len(rows[0])]
    for row in rows:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
