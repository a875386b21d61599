"""What becomes of a server when more is asked of it than it can do.

    python eval/load_test.py
    python eval/load_test.py --model Qwen/Qwen2.5-0.5B-Instruct --trace conversation_trace.jsonl

Starts `hf-tiered-cache serve` on this machine, measures how many requests a second it answers when
it always has enough to do (its capacity), and then replays a trace at 1, 2 and 4 times that rate,
open loop: requests come when they come, whatever became of those before. Meanwhile `/health` is
asked ten times a second. Every load has a prompt prefix of its own, so none profits from another.
"""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Event, Manager
from pathlib import Path
from statistics import median, quantiles

import openai
import psutil

import benchmarking
from chat_model import save_tiny_lm_chat
from load_trace import Arrival, chats, read_trace

BAR_HEALTH_SECONDS = 0.05
BAR_REJECTED_SECONDS = 1.0
BAR_GROWTH = 0.05  # of the memory, and a little beside it
BAR_GROWTH_BYTES = 32 * 1024 * 1024
PROBE_SECONDS = 0.1
QUEUE_TIMEOUT, REQUEST_TIMEOUT = 10.0, 20.0


@dataclass
class Outcome:
    """What became of one request; seconds since it was sent."""

    status: int = 0
    total: float = 0.0
    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    cached: int = 0
    prompt: int = 0
    is_cut: bool = False  # a stream that a deadline ended


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(save_tiny_lm_chat(Path(folder) / "model"))
        server, base = start_server(model, Path(folder), arguments)
        try:
            rows = measure(model, base, server.pid, arguments)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    print_rows(rows)
    judge(rows, arguments.json)
    if arguments.picture:
        draw(rows, arguments.picture)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="hub id or folder; default: eval/tiny_lm, made to chat")
    parser.add_argument(
        "--trace", type=Path, help="JSON lines as Mooncake's; default: made-up chats"
    )
    parser.add_argument("--requests", type=int, default=50, help="in every load")
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--block-bytes", type=int, default=200, help="of text for a block's id")
    parser.add_argument("--most-bytes", type=int, default=1200, help="of a prompt")
    parser.add_argument("--target-ttft", type=float, default=2.0, help="seconds; what is good")
    parser.add_argument("--queued", type=int, default=8, help="--max-num-queued-reqs")
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens a forward")
    parser.add_argument("--threads", type=int, help="of the server's model")
    parser.add_argument("--json")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def start_server(
    model: str,
    folder: Path,
    arguments: argparse.Namespace,
    request_timeout: float = REQUEST_TIMEOUT,
) -> tuple[subprocess.Popen, str]:
    """The server's process and its address, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "hf_tiered_cache", "serve", model, f"--port={port}"),
        *(f"--disk-dir={folder}", f"--max-num-queued-reqs={arguments.queued}"),
        *("--device-bytes=48MiB", "--disk-bytes=1GiB", f"--chunk={arguments.chunk}"),
        *([f"--threads={arguments.threads}"] if arguments.threads else []),
        *(f"--queue-timeout={QUEUE_TIMEOUT}", f"--request-timeout={request_timeout}"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    base = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{base}/ready", timeout=5)
            return server, base
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {server.returncode}") from None
            time.sleep(0.2)
    server.kill()
    raise SystemExit("the server did not become ready")


def measure(model: str, base: str, pid: int, arguments: argparse.Namespace) -> list[dict]:
    """A row for each load; the first for the server kept busy, which tells its capacity."""
    warm = arrivals(arguments, seed=1)[:8]
    asyncio.run(keep_busy(model, base, warm, 2))
    busy = arrivals(arguments, seed=2)[: max(16, arguments.requests // 2)]
    began = time.perf_counter()
    asyncio.run(keep_busy(model, base, busy, 4))
    capacity = len(busy) / (time.perf_counter() - began)
    print(f"capacity {capacity:.2f} requests/s (4 at a time)", flush=True)
    rows = []
    for number, load in enumerate(arguments.loads):
        trace = arrivals(arguments, seed=10 + number)
        pace = len(trace) / max(trace[-1].seconds, 1e-9) / (capacity * load)
        trace = [replace(it, seconds=it.seconds * pace) for it in trace]
        with Manager() as manager:
            stop = manager.Event()
            with ProcessPoolExecutor(1) as pool:
                probing = pool.submit(probe, base, pid, stop)
                outcomes = asyncio.run(replay(model, base, trace))
                stop.set()
                probed = probing.result()
        rows.append(summary(load, capacity * load, outcomes, probed, arguments.target_ttft))
        print(f"  {load:g}x done: {rows[-1]['statuses']}", flush=True)
    return rows


def arrivals(arguments: argparse.Namespace, seed: int) -> list[Arrival]:
    """The trace, behind text that only this seed has."""
    sizes = arguments.block_bytes, arguments.most_bytes
    if arguments.trace is None:
        return chats(arguments.requests, *sizes, seed)
    trace = read_trace(arguments.trace, arguments.requests, *sizes)
    return [replace(it, prompt=f"load {seed}: {it.prompt}") for it in trace]


async def keep_busy(model: str, base: str, trace: list[Arrival], at_a_time: int) -> None:
    """Send the requests of a trace, always so many at a time."""
    waiting = iter(trace)
    async with new_client(base) as client:

        async def worker() -> None:
            for arrival in waiting:
                await ask(client, model, arrival)

        await asyncio.gather(*(worker() for _ in range(at_a_time)))


async def replay(model: str, base: str, trace: list[Arrival]) -> list[Outcome]:
    """Send each request at its time, whatever became of the others."""
    async with new_client(base) as client:
        began = time.perf_counter()

        async def one(arrival: Arrival) -> Outcome:
            await asyncio.sleep(max(0.0, arrival.seconds - (time.perf_counter() - began)))
            return await ask(client, model, arrival)

        return await asyncio.gather(*map(one, trace))


def new_client(base: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120)


async def ask(client: openai.AsyncOpenAI, model: str, arrival: Arrival) -> Outcome:
    """Stream one answer."""
    outcome, began = Outcome(), time.perf_counter()
    last = began
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": arrival.prompt}],
            max_tokens=arrival.output_tokens,
            temperature=0,
            stream=True,
        )
        outcome.status = 200
        async for part in stream:
            now = time.perf_counter()
            if part.usage is not None:
                outcome.prompt = part.usage.prompt_tokens
                outcome.cached = part.usage.prompt_tokens_details.cached_tokens
            if not part.choices or not part.choices[0].delta.content:
                continue
            if outcome.ttft is None:
                outcome.ttft = now - began
            else:
                outcome.gaps.append(now - last)
            last = now
    except openai.APIStatusError as error:
        outcome.status = error.status_code
    except openai.APIError:
        outcome.is_cut = True
    outcome.total = time.perf_counter() - began
    return outcome


def probe(base: str, pid: int, stop: Event) -> dict[str, list[float]]:
    """Seconds of `/health`, the queue's length and the process' memory, until told to stop. In a
    process of its own: its measure is not that of the clients' Python."""
    process = psutil.Process(pid)
    health, memory, queued = [], [], []
    while not stop.is_set():
        began = time.perf_counter()
        urllib.request.urlopen(f"{base}/health", timeout=30).read()
        health.append(time.perf_counter() - began)
        memory.append(float(process.memory_info().rss))
        text = urllib.request.urlopen(f"{base}/metrics", timeout=30).read().decode()
        queued += [float(it.split()[1]) for it in text.splitlines() if 'state="queued"' in it]
        time.sleep(PROBE_SECONDS)
    return {"health": health, "memory": memory, "queued": queued}


def summary(
    load: float, rate: float, outcomes: list[Outcome], probed: dict, target_ttft: float
) -> dict:
    """One load's figures, all of them JSON."""
    answered = [it for it in outcomes if it.status == 200 and not it.is_cut]
    refused = [it for it in outcomes if it.status == 503]
    statuses = {
        str(s): sum(it.status == s for it in outcomes) for s in {o.status for o in outcomes}
    }
    good = [it for it in answered if it.ttft is not None and it.ttft <= target_ttft]
    return {
        "load": load,
        "requests_per_second": rate,
        "requests": len(outcomes),
        "statuses": dict(sorted(statuses.items())),
        "cut": sum(it.is_cut for it in outcomes),
        "goodput": len(good) / len(outcomes),
        "rejected_seconds_max": max((it.total for it in refused), default=0.0),
        "answered_seconds_max": max((it.total for it in answered), default=0.0),
        "ttft": percentiles([it.ttft for it in answered if it.ttft is not None]),
        "itl": percentiles([gap for it in answered for gap in it.gaps]),
        "cached_share": sum(it.cached for it in answered)
        / max(1, sum(it.prompt for it in answered)),
        "longest_queue": max(probed["queued"], default=0.0),
        "health": percentiles(probed["health"]),
        "memory_bytes": [probed["memory"][0], max(probed["memory"]), probed["memory"][-1]],
        "outcomes": [asdict(it) for it in outcomes],
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99; zeros where there is nothing."""
    if len(seconds) < 2:
        return {"p50": sum(seconds), "p99": sum(seconds)}
    return {"p50": median(seconds), "p99": quantiles(seconds, n=100, method="inclusive")[98]}


def print_rows(rows: list[dict]) -> None:
    """As the documentation has them."""
    print(
        "\n| load | requests/s | answered | 503 | 504 | goodput | TTFT p50 / p99 | ITL p50 / p99 |"
        " longest queue | `/health` p99 | prompt cached |\n" + "|---" * 11 + "|"
    )
    for row in rows:
        cut = row["cut"]  # streams that a deadline ended
        times = [f"{1000 * row[it][p]:,.0f}" for it in ("ttft", "itl") for p in ("p50", "p99")]
        count = row["statuses"].get
        print(
            f"| {row['load']:g}x | {row['requests_per_second']:.1f} | {count('200', 0) - cut}"
            f" | {count('503', 0)} | {count('504', 0) + cut} | {row['goodput']:.0%}"
            f" | {times[0]} / {times[1]} ms | {times[2]} / {times[3]} ms"
            f" | {row['longest_queue']:.0f} | {1000 * row['health']['p99']:.0f} ms"
            f" | {row['cached_share']:.0%} |"
        )


def judge(rows: list[dict], json_file: str | None) -> None:
    """The bars, at the highest load."""
    table = benchmarking.Table(f"serving at {rows[-1]['load']:g} times its capacity")
    row = rows[-1]
    others = {k: n for k, n in row["statuses"].items() if k not in ("200", "503", "504")}
    table.value("answers other than 200, 503, 504", str(sum(others.values())), bar="0",
                is_reached=not others, note=str(others or ""))  # fmt: skip
    health = max(it["health"]["p99"] for it in rows)
    table.value("/health, p99 of the worst load", f"{1000 * health:.1f} ms", bar="50 ms",
                is_reached=health < BAR_HEALTH_SECONDS)  # fmt: skip
    slowest = max(it["rejected_seconds_max"] for it in rows)
    table.value("slowest refusal", f"{slowest:.2f} s", bar="1 s",
                is_reached=slowest < BAR_REJECTED_SECONDS)  # fmt: skip
    longest = max(it["answered_seconds_max"] for it in rows)
    table.value("slowest answer", f"{longest:.1f} s", bar=f"{REQUEST_TIMEOUT:g} s",
                is_reached=longest < REQUEST_TIMEOUT)  # fmt: skip
    first, last = rows[0]["memory_bytes"][-1], row["memory_bytes"][-1]
    grown = last - first
    table.value("memory after the last load over after the first", f"{grown / 2**20:+.0f} MiB",
                bar=f"{100 * BAR_GROWTH:g} %",
                is_reached=grown < first * BAR_GROWTH + BAR_GROWTH_BYTES)  # fmt: skip
    table.finish(None)
    if json_file:
        results = {**benchmarking.environment(), "rows": rows}
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n")


def draw(rows: list[dict], path: Path) -> None:
    """What became of the requests, and how long the answered ones waited."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{row['load']:g}x" for row in rows]
    below = [0.0] * len(rows)
    for status, label, color in (("200", "answered", "tab:green"), ("503", "503", "tab:orange"),
                                 ("504", "504", "tab:red")):  # fmt: skip
        shares = [row["statuses"].get(status, 0) / row["requests"] for row in rows]
        left.bar(names, shares, bottom=below, label=label, color=color)
        below = [b + s for b, s in zip(below, shares, strict=True)]
    left.set(xlabel="load over capacity", ylabel="share of the requests")
    left.legend()
    for row, name in zip(rows, names, strict=True):
        times = sorted(it["ttft"] for it in row["outcomes"] if it["ttft"] is not None)
        right.plot(times, [(i + 1) / len(times) for i in range(len(times))], label=name)
    right.set(xlabel="seconds to the first token", ylabel="share of the answered", ylim=(0, 1))
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
