"""How long a short request waits beside a long prompt: chunks of it, not the whole.

    python eval/bench_fairness.py
    python eval/bench_fairness.py --tokens 24000 --chunk 256

Starts the server, sends one prompt of `--tokens` bytes (a token each with eval/tiny_lm), and short
requests one after the other until that has its first token.
"""

import argparse
import asyncio
import re
import signal
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

import benchmarking
from chat_model import save_tiny_lm_chat
from load_test import Outcome, ask, new_client, start_server
from load_trace import Arrival, block_text

BAR_CHUNKS = 4.0  # a chunk under way, one more, and the short request's own prompt and token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="hub id or folder; default: eval/tiny_lm, made to chat")
    parser.add_argument("--tokens", type=int, default=12000, help="bytes of the long prompt")
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens a forward")
    parser.add_argument("--threads", type=int, help="of the server's model")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    arguments.queued = 8
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(save_tiny_lm_chat(Path(folder) / "model"))
        server, base = start_server(model, Path(folder), arguments, request_timeout=300)
        try:
            long, short = asyncio.run(race(model, base, arguments.tokens))
            chunk_seconds = mean_of(base, "htc_prefill_chunk_seconds")
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    table = benchmarking.Table(f"short requests beside a prompt of {arguments.tokens} tokens")
    waits = [it.ttft for it in short if it.ttft is not None]
    assert long.ttft is not None and waits, "the long prompt was read before a short request came"
    table.value("first token of the long prompt", f"{long.ttft:.2f} s")
    table.value("a chunk of a prompt, mean", f"{chunk_seconds:.3f} s")
    table.value("first token of a short request, median", f"{median(waits):.3f} s",
                note=f"{len(waits)} of them, {min(waits):.3f} to {max(waits):.3f} s")  # fmt: skip
    chunks = median(waits) / chunk_seconds
    table.value("the same in chunks", f"{chunks:.1f}", bar=f"{BAR_CHUNKS:g}",
                is_reached=chunks <= BAR_CHUNKS)  # fmt: skip
    table.finish(arguments.json)


async def race(model: str, base: str, num_bytes: int) -> tuple[Outcome, list[Outcome]]:
    """The long request, and those that were answered while its prompt was read."""
    async with new_client(base) as client:
        await ask(client, model, Arrival(0, "warm", 2))
        long = asyncio.create_task(ask(client, model, Arrival(0, block_text(0, num_bytes), 1)))
        await asyncio.sleep(0.2)
        short: list[Outcome] = []
        while not long.done():
            began = time.perf_counter()
            outcome = await ask(client, model, Arrival(0, f"short {len(short)}", 2))
            if not long.done():
                short.append(outcome)
            await asyncio.sleep(max(0.0, 0.05 - (time.perf_counter() - began)))
        return await long, short


def mean_of(base: str, histogram: str) -> float:
    """Seconds, over all that the server has observed."""
    text = urllib.request.urlopen(f"{base}/metrics", timeout=30).read().decode()
    total, count = (
        float(re.search(rf"^{histogram}_{it} (\S+)$", text, re.MULTILINE)[1])
        for it in ("sum", "count")
    )
    return total / count


if __name__ == "__main__":
    main()
