"""`serve MODEL`: an OpenAI-compatible server whose chats keep their caches between turns."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_tiered_cache.commands import options
from hf_tiered_cache.commands.manners import MistakeError, check, command, load_libraries
from hf_tiered_cache.evaluation.names import AUTO, check_device, check_dtype, check_model
from hf_tiered_cache.sizes import parse_bytes

EXTRA = ("fastapi", "uvicorn", "openai", "greenlet", "prometheus_client")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Bytes = Annotated[str, typer.Option(metavar="SIZE", help="Int bytes, 4GiB, 1.5GB or auto.")]


@command
def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address; the default is this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Of TCP.")] = 8000,
    device_bytes: Bytes = AUTO,
    host_bytes: Bytes = AUTO,
    disk_bytes: Bytes = AUTO,
    disk_dir: options.DiskDir = None,
    block_tokens: options.BlockTokens = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of blocks that outlive the server; default: none.")
    ] = None,
    store_bytes: Bytes = AUTO,
    chunk: Annotated[
        int, typer.Option(help="Prompt tokens per forward: what others may have to wait for.")
    ] = 512,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that take turns.")] = 4,
    max_num_parked: Annotated[
        int, typer.Option(help="Chats that keep their cache; memory may allow fewer.")
    ] = 64,
    max_num_queued_reqs: Annotated[
        int, typer.Option(help="That wait beside those; more get a 503.")
    ] = 64,
    max_num_queued_tokens: Annotated[
        int, typer.Option(help="Of waiting prompts; more get a 503.")
    ] = 200_000,
    queue_timeout: Annotated[float, typer.Option(help="Seconds to wait, then a 504.")] = 60,
    request_timeout: Annotated[float, typer.Option(help="Seconds in all, then a 504.")] = 600,
    max_body_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Larger bodies get a 413.")
    ] = "8MiB",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="One key a line; caches are shared under one key only."),
    ] = None,
    dtype: options.Dtype = AUTO,
    device: options.Device = AUTO,
    attention: options.Attention = None,
    threads: options.Threads = None,
) -> None:
    """Serve a chat model to OpenAI clients; a chat's next turn computes only what is new.

    POST /v1/chat/completions, /v1/completions, /v1/responses; GET /v1/models, /health, /ready,
    /metrics.
    """
    check(0 < port < 2**16, f"--port {port}: expected 1 to {2**16 - 1}")
    check(queue_timeout > 0, f"--queue-timeout {queue_timeout:g}: expected seconds above 0")
    check(request_timeout > 0, f"--request-timeout {request_timeout:g}: expected seconds above 0")
    options.check_at_least(
        1, max_num_seqs=max_num_seqs, max_num_queued_tokens=max_num_queued_tokens
    )
    options.check_at_least(
        0, max_num_parked=max_num_parked, max_num_queued_reqs=max_num_queued_reqs
    )
    options.check_at_least(2, chunk=chunk)
    body = parse_bytes("max_body_bytes", max_body_bytes)
    check(isinstance(body, int), f"--max-body-bytes {max_body_bytes}: expected a size")
    cache: dict[str, Any] = {
        "device_bytes": device_bytes,
        "host_bytes": host_bytes,
        "disk_bytes": disk_bytes,
        "disk_dir": disk_dir,
        "block_tokens": block_tokens,
    }
    options.check_cache(**cache)
    parse_bytes("store_bytes", store_bytes)
    options.check_threads(threads)
    check_model(model)
    check_dtype(dtype)
    check_device(device)
    keys = _read_keys(api_key_file)
    missing = [name for name in EXTRA if find_spec(name) is None]
    check(
        not missing,
        f"serve needs {', '.join(missing)}: pip install 'hf_tiered_cache[serve]'",
    )
    load_libraries(threads)
    from hf_tiered_cache.evaluation.models import (
        NOT_LOADED,
        check_attention,
        choose_device,
        load_outline,
        not_loaded,
    )
    from hf_tiered_cache.serving.admission import Limits
    from hf_tiered_cache.serving.server import Server, Settings, run
    from hf_tiered_cache.store.block_store import BlockStore

    choose_device(device)
    outline = load_outline(model, dtype)
    if attention is not None:
        check_attention(outline, attention)
    if store is not None:
        BlockStore(store, capacity_bytes=store_bytes).close()  # what is wrong with it is said now
    settings = Settings(
        model=model,
        device=device,
        dtype=dtype,
        attention=attention,
        cache=cache,
        store=store,
        store_bytes=store_bytes,
        chunk=chunk,
        max_num_seqs=max_num_seqs,
        max_num_parked=max_num_parked,
        max_num_queued_reqs=max_num_queued_reqs,
        max_num_queued_tokens=max_num_queued_tokens,
        limits=Limits(queue_timeout, request_timeout, int(body)),
        keys=keys,
    )
    try:
        server = Server(settings)
    except NOT_LOADED as error:
        raise not_loaded(model, error) from None
    typer.echo(f"{model} is loaded; OpenAI clients: base_url=http://{host}:{port}/v1")
    if host not in LOOPBACK and not keys:
        typer.echo(f"{host}: whoever reaches this machine may use it; see --api-key-file", err=True)
    run(server, host, port)


def _read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises MistakeError where there is none."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except OSError as error:
        raise MistakeError(f"--api-key-file {path}: {error.strerror}") from None
    check(bool(keys), f"--api-key-file {path}: it holds no key; expected one a line")
    return keys
