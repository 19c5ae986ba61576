"""What every benchmark shares: the machine, the roofs it can reach, two timers, host memory, and the results file.

Timers: `cuda_graph_time` for calls of microseconds (no launch gaps: the calls are captured in one CUDA graph, over buffers
that the caller rotates past the L2 cache), `event_time` for calls of a millisecond, and for what a graph cannot hold. Both
give the median.
"""

from __future__ import annotations

import collections
import functools
import gc
import importlib
import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

import qlite

RESULTS = pathlib.Path(__file__).parent / "results"
PEERS = ("bitsandbytes", "torchao", "gemlite")
#: Bytes that a rotation of buffers must pass before one of them comes round again: twice the L2 cache of an H100 or H200.
PAST_L2 = 100 * 2**20

#: Linear layers by model: (out_features, in_features).
SHAPES = {
    "falcon7b": {
        "query_key_value": (4672, 4544), "dense": (4544, 4544),
        "dense_h_to_4h": (18176, 4544), "dense_4h_to_h": (4544, 18176),
    },
    "falcon40b": {"query_key_value": (9216, 8192), "dense_h_to_4h": (32768, 8192), "dense_4h_to_h": (8192, 32768)},
    "llama8b": {"q_proj": (4096, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)},
}  # fmt: skip
#: What one variant may fail with and the others go on; the failure is printed.
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, AssertionError, KeyError,
    subprocess.SubprocessError, triton.TritonError,
)  # fmt: skip


@functools.cache
def environment(commit: str | None = None) -> dict[str, Any]:
    """Returns the machine and versions that a figure belongs to.

    Args:
        commit: what to call the tree, where it is no git checkout; None asks git.
    """
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        **_clocks(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "commit": commit or found.stdout.strip() or "unknown",
    }


def _clocks() -> dict[str, int]:
    """Returns the GPU's highest SM clock in MHz and its power limit in W, where nvidia-smi tells them."""
    if not torch.cuda.is_available():
        return {}
    fields = {"max_sm_mhz": "clocks.max.sm", "power_limit_w": "power.limit"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = done.stdout.splitlines()[torch.cuda.current_device()].split(",")
        return {key: round(float(value)) for key, value in zip(fields, values, strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def host_memory(key: str) -> int:
    """Returns a field of /proc/self/status in bytes: VmRSS (now) or VmHWM (the peak so far)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def record(benchmark: str, row: dict, *, commit: str | None = None, show: bool = True) -> None:
    """Prints a row and appends it, with the environment, to benchmarks/results/<benchmark>.jsonl."""
    line = json.dumps({**row, **environment(commit)})
    if show:
        print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(line + "\n")


def need_gpu(benchmark: str) -> None:
    """Ends the program where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks.{benchmark}: needs a CUDA GPU")
    gc.freeze()  # each capture of a graph collects garbage; what is imported by now is none


def rotation(nbytes: int, least: int = 4) -> int:
    """Returns how many buffers of `nbytes` it takes to pass the L2 cache before one comes round again, at least `least`."""
    return max(least, -(-PAST_L2 // nbytes) + 1)


def _elapsed_us(call: Callable[[], object], repeats: int) -> list[float]:
    """Returns the time of each of `repeats` calls, by CUDA events around it, in us."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for begin, end in zip(marks[::2], marks[1::2]):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in zip(marks[::2], marks[1::2])]


def event_time(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Returns the median over `repeats` of the time of one of `calls`, taken in turn, in us.

    All are queued before the first has ended, so that a launch counts only where it takes longer than the work.
    """
    turn = iter([call for _ in range(-(-repeats // len(calls)) + 1) for call in calls])
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    return statistics.median(_elapsed_us(lambda: next(turn)(), repeats))


def cuda_graph_time(calls: Sequence[Callable[[], object]], target_us: float = 1500.0) -> float:
    """Returns the time of one of `calls` in a CUDA graph that holds all of them, median of replays, in us.

    Args:
        calls: each a launch on buffers of its own: together they must pass the L2 cache (see `rotation`).
        target_us: the calls are captured as often as it takes for a replay of about this length.
    """
    stream = _timing_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    once = min(_elapsed_us(_captured(calls, 1).replay, 3))
    rounds = max(1, min(round(target_us / once), -(-512 // len(calls))))
    replays = max(5, min(15, round(30e3 / (once * rounds))))
    graph = _captured(calls, rounds)
    graph.replay()
    return statistics.median(_elapsed_us(graph.replay, replays)) / (rounds * len(calls))


@functools.cache
def _timing_stream() -> torch.cuda.Stream:
    """Returns the stream on which calls are made once and then captured: what they keep for a stream is there by then."""
    return torch.cuda.Stream()


def _captured(calls: Sequence[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
    """Returns a CUDA graph of all calls, `rounds` times."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_timing_stream()):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def keeping(calls: Sequence[Callable[[], object]], nbytes: int) -> list[Callable[[], object]]:
    """Returns calls whose last results, of `nbytes` each, stay alive: what is written is rotated past the L2 cache too."""
    kept: collections.deque[object] = collections.deque(maxlen=rotation(nbytes, least=1))
    return [functools.partial(lambda call: kept.append(call()), call) for call in calls]


@functools.cache
def copy_bandwidth() -> float:
    """Returns what a device-to-device copy of 1 GiB reaches, reads and writes counted, in bytes a second."""
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (event_time([lambda: target.copy_(source)]) * 1e-6)


@functools.cache
def bf16_peak() -> float:
    """Returns what cuBLAS reaches on bf16 matrices of 8192 x 8192, normal random values, in FLOP a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (event_time([lambda: torch.mm(a, b.T)]) * 1e-6)


@functools.cache
def peer(name: str) -> str | None:
    """Returns the version of one of PEERS, None where it does not import here; prints why not."""
    try:
        importlib.import_module(name)
        return importlib.metadata.version(name)
    except FAILURES as error:
        print(f"{name}: absent: {told(error)}", flush=True)
        return None


def told(error: BaseException) -> str:
    """Returns what went wrong in one line."""
    return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:200]}"


Coded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]


def coded_bytes(out_features: int, in_features: int, double_quant: bool = True) -> int:
    """Returns the bytes of an NF4 weight in blocks of 64: codes, absmax, and the absmax of the absmax."""
    blocks = out_features * -(-in_features // 64)
    return out_features * ((in_features + 1) // 2) + (blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks)


def coded_weights(out_features: int, in_features: int, count: int, double_quant: bool = True) -> list[Coded]:
    """Returns the parts of `count` normal random weights in NF4, as the ops take them: codes, absmax, scale, offset, levels."""
    found = []
    for _ in range(count):
        dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        q = qlite.quantize_nf4(dense, double_quant=double_quant)
        found.append((q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels))
    return found


def random_bf16(*shape: int) -> torch.Tensor:
    """Returns normal random values on the GPU: zeros would draw less power and let the clock rise."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the Frobenius norm of the difference over that of `wanted`, computed in float64."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns rows under a header in columns of equal width."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
