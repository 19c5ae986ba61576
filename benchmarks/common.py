"""What every benchmark shares: the description of the machine, host memory, and the results file."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import subprocess

import torch

RESULTS = pathlib.Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Returns the machine and versions that a figure belongs to."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "commit": commit.stdout.strip() or "unknown",
    }


def host_memory(key: str) -> int:
    """Returns a field of /proc/self/status in bytes: VmRSS (now) or VmHWM (the peak so far)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def record(benchmark: str, row: dict) -> None:
    """Prints a row and appends it, with the environment, to benchmarks/results/<benchmark>.jsonl."""
    line = json.dumps({**row, **environment()})
    print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(line + "\n")
