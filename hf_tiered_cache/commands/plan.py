"""`plan MODEL`: tokens per second of a context under a budget, before anything runs."""

from typing import Annotated, Any

import typer

from hf_tiered_cache.commands import options
from hf_tiered_cache.commands.manners import check, command, load_libraries, print_json
from hf_tiered_cache.config import TieredCacheConfig
from hf_tiered_cache.evaluation.names import (
    AUTO,
    check_device,
    check_dtype,
    check_model,
    model_name,
)
from hf_tiered_cache.sizes import AUTO as AUTO_BYTES

Bytes = Annotated[str, typer.Option(help='Such as "4GiB"; 0: none; default: auto.')]


@command
def plan(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or hub id.")],
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    device_bytes: Bytes = AUTO_BYTES,
    host_bytes: Bytes = AUTO_BYTES,
    disk_bytes: Bytes = AUTO_BYTES,
    staging_bytes: Bytes = AUTO_BYTES,
    block_tokens: options.BlockTokens = None,
    chunk: options.Chunk = 1024,
    dtype: options.Dtype = AUTO,
    device: options.Device = AUTO,
    device_profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="h200, h100, 4090 or 3060: predict for that GPU instead, by published numbers.",
        ),
    ] = None,
    disk_dir: options.DiskDir = None,
    disk_io: options.DiskIO = AUTO,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Predict where blocks will lie and tokens per second. The config is enough; no weights are
    loaded.

    Rates are measured here in some seconds, each probe named: the kernels, the disk, and the
    model's first layers, made up. What is printed are predictions, not results.
    """
    options.check_at_least(1, context=context, batch=batch)
    options.check_at_least(2, chunk=chunk)
    tiers = TieredCacheConfig(
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        disk_bytes=disk_bytes,
        staging_bytes=staging_bytes,
        block_tokens=block_tokens,
        disk_dir=disk_dir,
        disk_io=disk_io,
    )
    options.check_threads(threads)
    check_model(model)
    check_dtype(dtype)
    check_device(device)
    load_libraries(threads)
    from hf_tiered_cache.evaluation.models import choose_device, load_outline
    from hf_tiered_cache.integration.planning import plan_by_profile, plan_for
    from hf_tiered_cache.planner.profiles import PROFILES
    from hf_tiered_cache.planner.report import as_dict, describe

    given: dict[str, Any] = {"batch": batch, "chunk": chunk}
    if device_profile is None:
        outline = load_outline(model, dtype)
        planned = plan_for(outline, tiers, context, device=choose_device(device), **given)
        what = f"{model_name(model)}, {planned.shape.layout.dtype}, on {choose_device(device)}"
    else:
        check(
            device_profile in PROFILES,
            f"--device-profile {device_profile}: expected {', '.join(PROFILES)}",
        )
        profile = PROFILES[device_profile]
        planned = plan_by_profile(load_outline(model, dtype), tiers, context, profile, **given)
        what = f"{model_name(model)}, {planned.shape.layout.dtype}, on a GPU like {profile.name}"
    is_profile = device_profile is not None
    if as_json:
        print_json({"model": what, **as_dict(planned, is_profile=is_profile)})
        return
    typer.echo(f"{what.replace('torch.', '')}\n{describe(planned, is_profile=is_profile)}")
