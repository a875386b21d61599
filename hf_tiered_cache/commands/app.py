"""The commands under one name, and how they end.

0: done, and every bar reached. 1: measured, and a bar missed. 2: a user's mistake, said in one
line.
"""

import typer

from hf_tiered_cache.commands.bench import bench
from hf_tiered_cache.commands.env import env
from hf_tiered_cache.commands.trace import trace
from hf_tiered_cache.commands.verify import verify

app = typer.Typer(
    name="hf-tiered-cache",
    help="Look at the tiered KV cache on your own machine and with your own model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (env, verify, bench, trace):
    app.command()(command)


def main() -> None:
    """Run what the command line says; exits."""
    app(prog_name="hf-tiered-cache")
