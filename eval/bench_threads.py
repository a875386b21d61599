"""Forks of one prompt, decoded side by side by two threads, over one thread.

    python eval/bench_threads.py
    python eval/bench_threads.py --context 16384 --rounds 9

Attention alone (one layer of Llama-3.1-8B's shape in bfloat16 behind a long context, one kernel
thread for each Python thread): each thread appends a token to its fork and attends, as a decode
step does in each layer. The share of the work is fixed, so the ratio is tokens per second with two
threads over one. 2.0 is what two idle processors give; the lock, the interpreter and the memory
they share take the rest. Both sides run in turn, and the medians are compared.
"""

import argparse
import copy
import threading
from time import perf_counter

import torch

from hf_tiered_cache import TieredCache, tiered_attention_forward

import benchmarking

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BAR = 1.7


class Attention(torch.nn.Module):
    """What an attention function wants to know of its layer."""

    is_causal = True


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    table = benchmarking.Table("forks decoded by two threads: tokens/s over one thread")
    for name, share in (("all on the device", 1.0), ("half in host memory", 0.5)):
        bench(table, name, share, arguments)
    table.finish(arguments.json)


@torch.no_grad()
def bench(
    table: benchmarking.Table, name: str, share: float, arguments: argparse.Namespace
) -> None:
    """One row: `share` of the context lies on the device."""
    num_bytes = arguments.context * KV_HEADS * HEAD_DIM * 2 * 2
    cache = TieredCache(
        device_bytes=int(share * num_bytes) + (64 << 20),
        host_bytes=0 if share == 1 else num_bytes,
        disk_bytes=0,
    )
    for _ in range(arguments.context // 1024):
        cache.update(*states(1024), 0)
    forks = [copy.deepcopy(cache) for _ in range(2)]
    module, query = Attention().eval(), torch.randn(1, HEADS, 1, HEAD_DIM).bfloat16()

    def decode(fork: TieredCache) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.no_grad():
            for _ in range(arguments.tokens):
                handles = fork.update(*states(1), 0)
                tiered_attention_forward(module, query, *handles, None)

    def together(num_threads: int) -> float:
        threads = [threading.Thread(target=decode, args=(fork,)) for fork in forks[:num_threads]]
        start = perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (perf_counter() - start) / num_threads  # for as many tokens

    one, two = benchmarking.paired(
        lambda: together(1), lambda: together(2), rounds=arguments.rounds, warmup=1
    )
    table.ratio(f"{name}, context {arguments.context:,}", baseline=one, ours=two, bar=BAR)
    for fork in forks:
        fork.close()
    cache.close()


def states(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values."""
    return torch.randn(2, 1, KV_HEADS, num_tokens, HEAD_DIM).bfloat16().unbind(0)  # type: ignore[return-value]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384, help="tokens")
    parser.add_argument("--tokens", type=int, default=40, help="for each thread and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
