"""The commands under one name, and how they end.

0: done, and every bar reached. 1: measured, and a bar missed. 2: a user's mistake, said in one
line.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from hf_tiered_cache.commands.bench import bench
from hf_tiered_cache.commands.env import env
from hf_tiered_cache.commands.manners import fail
from hf_tiered_cache.commands.plan import plan
from hf_tiered_cache.commands.serve import serve
from hf_tiered_cache.commands.store import store
from hf_tiered_cache.commands.trace import trace
from hf_tiered_cache.commands.verify import verify
from hf_tiered_cache.evaluation.versions import package_version

# Of click, which typer brings along in some versions and imports in others.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


class Commands(TyperGroup):
    """The commands; what does not parse is said in one line, like every other mistake."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The same as click's; no arguments show the help."""
        if not args:
            return super().parse_args(ctx, args)
        with _in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        fail(f"{cast(Any, error).format_message()} (--help lists what there is)")


app = typer.Typer(
    name="hf-tiered-cache",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"hf-tiered-cache {package_version()}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Look at the tiered KV cache on your own machine and with your own model."""


for command in (env, plan, verify, bench, trace, serve):
    app.command()(command)

app.add_typer(store, name="store", cls=Commands)


def main() -> None:
    """Run what the command line says; exits."""
    app(prog_name="hf-tiered-cache")
