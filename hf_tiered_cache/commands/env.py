"""`env`: what there is on this machine, and what of it the cache would use. For bug reports."""

from typing import Annotated

import typer

from hf_tiered_cache.commands.manners import command, load_libraries, print_json


@command
def env(
    disk_dir: Annotated[
        str | None, typer.Option(help="Folder of the disk tier; default: the one a cache takes.")
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Read RAM, write and read the disk, a second or two each.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, kernels, tiers and their rates: paste it into a bug report."""
    load_libraries()
    from hf_tiered_cache.commands import findings

    found = {
        "versions": findings.versions(),
        "machine": findings.machine(),
        "kernels": findings.kernels(),
        "tiers": findings.tiers(disk_dir, measure),
        "environment": findings.environment_variables(),
    }
    if as_json:
        print_json(found)
        return
    for section, facts in found.items():
        typer.echo(section)
        width = max(map(len, facts))
        for name, fact in facts.items():
            typer.echo(f"  {name:<{width}}  {fact}")
