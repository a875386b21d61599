"""What a reader must know to judge a figure: versions, hardware, command."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_tiered_cache.evaluation.versions import package_version
from hf_tiered_cache.kernels import ops


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Command, processor, threads, versions, the kernel on `device`; ready for JSON."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_tiered_cache": package_version(),
        "kernel": ops.backend(device),
    }


def processor() -> str:
    """The processor's model name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
