"""Recall of facts by depth and length: tiered beside dynamic, identical cell by cell.

    python eval/recall.py
    python eval/recall.py --model Qwen/Qwen2.5-0.5B --lengths 4096 16384 --off-device 0.9
    accelerate launch --config_file examples/accelerate_cpu.yaml eval/recall.py

A fact (`key=value`) is hidden at a depth of a long text and asked for at its end; the answer is
generated. Three ways of reading the same documents:

    dynamic    transformers' DynamicCache
    tiered     a TieredCache with most of its blocks on disk
    dropped    a fork of the tiered cache that loses what is on disk: the check that this
               measurement can see a loss at all

Tasks: "needle", one fact in the text; "keys", a fact every 256 bytes, one of them asked for;
"variables", a chain of names (`b=a`, `a=value`) that the model's own answers must follow to its
value. Ends with 1 unless tiered and dynamic give the same tokens in every cell, and dropping the
cold blocks takes away what the tiered cache recalled from them.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed, tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_tiered_cache import TieredCache
from hf_tiered_cache.evaluation.scoring import BlockShape, block_shape
from hf_tiered_cache.evaluation.standard_library import held_out_files, read_files

import benchmarking
import corpora
import plots

TINY_LM = Path(__file__).parent / "tiny_lm"
TASKS = ("needle", "keys", "variables")
FACT_EVERY_BYTES = 256
HOPS = 2  # names between the one that is asked for and the value
# Chance is 10^-6: six digits. "Far above", and "collapsed".
RECALL_BAR, DROPPED_BAR = 0.5, 0.1
TITLE = "recall by depth and length"


@dataclass(frozen=True)
class Question:
    """A document and what is asked at its end."""

    task: str
    length: int  # tokens asked for; the text is as long to within a line
    depth: float  # of the fact, 0 is the beginning
    text: str
    key: str
    value: str
    fact_end: int  # bytes from the beginning to the end of what must be recalled


@dataclass
class Answer:
    """What the three ways said."""

    task: str
    length: int
    depth: float
    is_identical: bool
    is_on_disk: bool  # every token of what must be recalled
    dynamic: bool
    tiered: bool
    dropped: bool


def main(command: Sequence[str] | None = None) -> int:
    """Run; return 0 if every bar was reached, else 1."""
    arguments = parse_arguments(command)
    accelerator = Accelerator(cpu=True)
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    shape = block_shape(model, arguments.block_tokens, arguments.disk_dir)
    questions = list(make_questions(tokenizer, arguments))
    answers: list[Answer] = []
    bar = tqdm(total=len(questions), desc="recall", unit="question", leave=False)
    with bar:
        for first in range(0, len(questions), accelerator.num_processes):
            mine = first + accelerator.process_index
            asked = questions[mine : mine + 1] if mine < len(questions) else []
            answers += gather_object(
                [ask(model, tokenizer, one, shape, arguments) for one in asked]
            )
            bar.update(min(accelerator.num_processes, len(questions) - first))
    is_good = True
    if accelerator.is_main_process:
        is_good = report(answers, arguments)
    accelerator.end_training()
    return 0 if is_good else 1


def make_questions(tokenizer: Any, arguments: argparse.Namespace) -> Iterator[Question]:
    """Every cell's documents, the same for every run with the same seed."""
    filler = read_files(held_out_files())
    bytes_per_token = len(filler[:20000].encode()) / len(tokenizer(filler[:20000]).input_ids)
    for task in arguments.tasks:
        for length in arguments.lengths:
            for depth in arguments.depths:
                for sample in range(arguments.samples):
                    rng = random.Random(f"{arguments.seed} {task} {length} {depth} {sample}")
                    num_bytes = round(length * bytes_per_token)
                    yield make_question(rng, task, length, depth, num_bytes, filler)


def make_question(
    rng: random.Random, task: str, length: int, depth: float, num_bytes: int, filler: str
) -> Question:
    """One document of about `num_bytes`."""
    document = corpora.recall_document(
        rng,
        num_bytes,
        filler,
        distance_bytes=round((1 - depth) * num_bytes),
        fact_every_bytes=FACT_EVERY_BYTES if task == "keys" else num_bytes,
    )
    key, text = document.question.removesuffix("="), document.text
    fact = corpora.fact_line(key, document.answer)
    if task == "variables":
        names = [corpora.random_fact(rng)[0] for _ in range(HOPS)]
        chain = "".join(
            corpora.fact_line(name, known)
            for name, known in zip(names, [key, *names], strict=False)
        )
        text, key = text.replace(fact, fact + chain), names[-1]
        fact += chain
    fact_end = len(text[: text.index(fact)].encode()) + len(fact.encode())
    return Question(task, length, depth, text, key, document.answer, fact_end)


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    question: Question,
    shape: BlockShape,
    arguments: argparse.Namespace,
) -> Answer:
    """Put one question to a cache of each kind."""
    ids = encode(tokenizer, question.text)
    budgets = shape.budgets(ids.shape[1] + 64, arguments.off_device)
    dynamic = DynamicCache(config=model.config)
    with TieredCache(config=model.config, disk_dir=arguments.disk_dir, **budgets) as tiered:
        for cache in (dynamic, tiered):
            for chunk in ids.split(arguments.chunk, 1):
                model(chunk, past_key_values=cache, logits_to_keep=1)
        stats = tiered.stats()
        cold_tokens = stats.cold_blocks // stats.num_layers * stats.block_tokens
        fact_tokens = encode(tokenizer, question.text.encode()[: question.fact_end].decode())
        with deepcopy(tiered) as fork, fork.attending("resident_only"):
            dropped = follow(model, tokenizer, fork, ids, question)
        said = [follow(model, tokenizer, cache, ids, question) for cache in (dynamic, tiered)]
    return Answer(
        task=question.task,
        length=question.length,
        depth=question.depth,
        is_identical=torch.equal(*said),
        is_on_disk=fact_tokens.shape[1] <= cold_tokens,
        dynamic=is_right(tokenizer, said[0], ids, question),
        tiered=is_right(tokenizer, said[1], ids, question),
        dropped=is_right(tokenizer, dropped, ids, question),
    )


def follow(
    model: PreTrainedModel, tokenizer: Any, cache: Cache, ids: torch.Tensor, question: Question
) -> torch.Tensor:
    """Ask for the key, and for each name that comes as an answer; all tokens `[1, tokens]`."""
    new_tokens = encode(tokenizer, question.value).shape[1]
    key = question.key
    for _ in range(HOPS + 1):
        prompt = torch.cat([ids, encode(tokenizer, f"{key}=")], 1)
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answer = tokenizer.decode(ids[0, prompt.shape[1] :]).partition("\n")[0]
        if question.task != "variables" or not answer.isalpha():
            break
        key = answer
        ids = torch.cat([ids, encode(tokenizer, "\n")], 1)
    return ids


def is_right(tokenizer: Any, tokens: torch.Tensor, ids: torch.Tensor, question: Question) -> bool:
    """Whether the last answer is the value."""
    said = tokenizer.decode(tokens[0, ids.shape[1] :])
    return said.rpartition("=")[2].startswith(question.value)


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def report(answers: list[Answer], arguments: argparse.Namespace) -> bool:
    """Print the cells and the bars, write what was asked for; whether all bars were reached."""
    table = benchmarking.Table(TITLE)
    cells = make_cells(answers)
    for cell in cells:
        table.value(
            f"{cell['task']}, {cell['length']:,} tokens, depth {cell['depth']:.2f}"
            f" ({cell['on_disk']:.0%} of facts on disk)",
            f"{cell['tiered']:.2f}",
            note=f"dynamic {cell['dynamic']:.2f}, cold blocks dropped {cell['dropped']:.2f}",
        )
    same = sum(one.is_identical for one in answers)
    table.value(
        "tokens identical to DynamicCache's, questions",
        f"{same}",
        bar=f"{len(answers)}",
        is_reached=same == len(answers),
    )
    # A task that the model cannot do at all has nothing that a cache could lose.
    doable = {one.task for one in answers if one.dynamic}
    on_disk = [one for one in answers if one.is_on_disk and one.task in doable]
    recalled = fmean(one.tiered for one in on_disk) if on_disk else 0.0
    table.value(
        f"recall of {len(on_disk)} facts on disk ({', '.join(sorted(doable))})",
        f"{recalled:.2f}",
        bar=f">= {RECALL_BAR}",
        is_reached=recalled >= RECALL_BAR,
    )
    lost = fmean(one.dropped for one in on_disk) if on_disk else 1.0
    table.value(
        "the same with the cold blocks dropped",
        f"{lost:.2f}",
        bar=f"<= {DROPPED_BAR}",
        is_reached=lost <= DROPPED_BAR,
    )
    table.finish()
    if arguments.output:
        write(Path(arguments.output), cells, table, arguments)
    return all(row.is_reached is not False for row in table.rows)


def make_cells(answers: list[Answer]) -> list[dict[str, Any]]:
    """Shares of right answers by task, length and depth."""
    cells: dict[tuple[str, int, float], list[Answer]] = {}
    for one in answers:
        cells.setdefault((one.task, one.length, one.depth), []).append(one)
    return [
        {
            "task": task,
            "length": length,
            "depth": depth,
            "questions": len(group),
            "on_disk": fmean(one.is_on_disk for one in group),
            "dynamic": fmean(one.dynamic for one in group),
            "tiered": fmean(one.tiered for one in group),
            "dropped": fmean(one.dropped for one in group),
            "identical": all(one.is_identical for one in group),
        }
        for (task, length, depth), group in cells.items()
    ]


def write(
    folder: Path,
    cells: list[dict[str, Any]],
    table: benchmarking.Table,
    arguments: argparse.Namespace,
) -> None:
    """Write recall.json, recall.md and a heat map per task into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: vars(arguments)[name] for name in ("off_device", "samples", "seed", "dtype")}
    bars = [asdict(row) for row in table.rows if row.is_reached is not None]
    results = {"title": TITLE, **benchmarking.environment(), **settings, "cells": cells}
    (folder / "recall.json").write_text(json.dumps({**results, "bars": bars}, indent=1) + "\n")
    lines = [
        f"`{results['command']}`",
        "",
        "| task | length | depth | on disk | dynamic | tiered |",
    ]
    lines[-1] += " dropped | identical |"
    lines.append("|" + " --- |" * 8)
    for cell in cells:
        lines.append(
            f"| {cell['task']} | {cell['length']:,} | {cell['depth']:.2f} | {cell['on_disk']:.0%} "
            f"| {cell['dynamic']:.2f} | {cell['tiered']:.2f} | {cell['dropped']:.2f} "
            f"| {'yes' if cell['identical'] else 'NO'} |"
        )
    (folder / "recall.md").write_text("\n".join(lines) + "\n")
    for task in arguments.tasks:
        of_task = [cell for cell in cells if cell["task"] == task]
        plots.recall_heat_map(of_task, folder / f"recall_{task}.png")


def parse_arguments(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(TINY_LM), help="hub id or folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096], help="tokens")
    parser.add_argument("--depths", nargs="+", type=float, default=[0.05, 0.3, 0.55, 0.8, 0.95])
    parser.add_argument("--samples", type=int, default=2, help="questions per cell")
    parser.add_argument("--off-device", type=float, default=0.75, help="share of the blocks")
    parser.add_argument("--block-tokens", type=int, default=64, help="power of two")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--disk-dir", help="folder of the disk tier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the JSON, the Markdown table and the pictures")
    arguments = parser.parse_args(command)
    if not all(0 <= depth <= 1 for depth in arguments.depths):
        parser.error(f"--depths {arguments.depths}: expected numbers from 0 to 1")
    if not 0 < arguments.off_device < 1:
        parser.error(f"--off-device {arguments.off_device}: expected more than 0, less than 1")
    if arguments.samples < 1:
        parser.error(f"--samples {arguments.samples}: expected 1 or more")
    logging.set_verbosity_error()
    return arguments


if __name__ == "__main__":
    sys.exit(main())
