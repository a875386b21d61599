"""The examples of deployment, as far as they can be checked without the tools that run them: they
parse, and what they tell the server is what it understands."""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from hf_tiered_cache.commands.app import app

DEPLOY = Path(__file__).parent.parent / "deploy"
INSTRUCTIONS = {
    *("ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK"),
    *("ENTRYPOINT", "CMD"),
}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def options_of_serve() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]
    return {name for parameter in command.params for name in parameter.opts}


def check_serve(arguments: list[str]) -> None:
    """A command line of the server: the subcommand, a model, options it knows."""
    assert arguments[0] == "serve"
    assert not arguments[1].startswith("-")
    given = {argument.partition("=")[0] for argument in arguments[2:]}
    assert given and given <= options_of_serve(), given - options_of_serve()


def test_the_dockerfile_parses_and_copies_what_there_is():
    found = instructions((DEPLOY / "Dockerfile").read_text())
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert [name for name, _ in found if name == "FROM"] == ["FROM", "FROM"]
    for name, arguments in found:
        if name in ("CMD", "ENTRYPOINT"):
            assert all(isinstance(it, str) for it in json.loads(arguments))
        if name == "HEALTHCHECK":
            compile(json.loads(arguments.partition(" CMD ")[2])[2], "healthcheck", "exec")
        if name == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (DEPLOY.parent / source).exists(), source
    users = [index for index, (name, _) in enumerate(found) if name == "USER"]
    assert users and all(name != "RUN" for name, _ in found[users[0] :])  # nothing as root after it


def test_the_compose_file_tells_the_server_what_it_knows():
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    check_serve(server["command"])
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).exists()
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert any(argument.startswith("--api-key-file") for argument in server["command"])


def test_the_unit_tells_the_server_what_it_knows():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "hf-tiered-cache.service")
    _, *arguments = shlex.split(unit["Service"]["ExecStart"])
    check_serve(arguments)
    assert unit["Service"]["KillSignal"] == "SIGINT"


def test_an_option_that_is_not_there_is_found():
    with pytest.raises(AssertionError, match="frob"):
        check_serve(["serve", "model", "--frob=1"])
