"""A step of AdamW with 8-bit moments against the floor of its bytes, torch's fused AdamW and bitsandbytes beside it.

    python -m benchmarks.adamw_8bit                     # under a minute
    python -m benchmarks.adamw_8bit --paged 100000000   # fewer paged parameters: 0 leaves them out

Three jobs: the 64 LoRA tensors of a Falcon-7B (rank 16 on query_key_value, float32), one float32 tensor of 1e8 elements, and
bfloat16 parameters whose state is paged to the host. First, two steps of the 64 tensors must equal the reference bit for
bit; if they do not, nothing is timed and the exit status is 1.

gpu: CUDA events around a step that is queued while the GPU is kept waiting, so that launches do not count (what a step waits
for itself does, and of paged state the way home of the last piece does not), median. wall: the time of many steps, to the
end of the last, over their number.

floor = bytes read and written once / measured copy bandwidth. Of paged state: the bytes of the state over the rate of copies
in both directions at once, from and to pinned memory, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import qlite
from benchmarks.common import FAILURES, copy_bandwidth, environment, need_gpu, peer, record, table, told

#: rank 16 on the query_key_value of 32 blocks: lora_A and lora_B.
LORA = ((16, 4544), (4672, 16)) * 32
LARGE = ((100_000_000,),)
STATE_BYTES = 2 + 8 / 256
#: Cycles for which the GPU waits while a step is queued, some 20 ms.
WAIT = 40_000_000


def step_bytes(dtype: torch.dtype) -> float:
    """Returns the bytes that a step moves an element: parameter and state read and written, gradient read."""
    return 3 * dtype.itemsize + 2 * STATE_BYTES


def parameters(shapes, dtype: torch.dtype, device: str = "cuda") -> list[torch.nn.Parameter]:
    """Returns parameters with gradients, normal random."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device, generator=generator))
        param.grad = torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(1e-3)
        found.append(param)
    return found


def equals_the_reference() -> bool:
    """Returns whether two steps of the LoRA tensors on the GPU give the bits of the CPU."""
    on_cpu, results = parameters(LORA, torch.float32, "cpu"), []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(param.detach().to(device, copy=True)) for param in on_cpu]
        for param, other in zip(params, on_cpu):
            param.grad = other.grad.to(device)
        optimizer = qlite.AdamW8bit(params, lr=1e-3)
        for _ in range(2):
            optimizer.step()
        state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
        results.append([tensor.detach().cpu() for tensor in (*params, *state)])
    return all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def gpu_us(step: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a step on the GPU, in us, its launches left out."""
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(found)


def wall_us(step: Callable[[], object], repeats: int) -> float:
    """Returns the mean time of a step, in us, from the first call to the end of the last on the GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats * 1e6


def page_rates(nbytes: int = 2**28) -> dict[str, float]:
    """Returns the bytes a second of copies from pinned memory, to it, and in each direction where both go at once."""
    host = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def there() -> None:
        with torch.cuda.stream(streams[0]):
            device[0].copy_(host[0], non_blocking=True)

    def back() -> None:
        with torch.cuda.stream(streams[1]):
            host[1].copy_(device[1], non_blocking=True)

    ways = {"to_device": [there], "to_host": [back], "each_of_both": [there, back]}
    for calls in ways.values():
        wall_us(lambda calls=calls: [call() for call in calls], 1)
    return {name: nbytes / (wall_us(lambda c=calls: [call() for call in c], 8) * 1e-6) for name, calls in ways.items()}


def optimizers(paged: bool) -> dict[str, Callable]:
    """Returns what makes each of the optimizers that are here."""
    found: dict[str, Callable] = {"qlite": qlite.PagedAdamW8bit if paged else qlite.AdamW8bit}
    found["torch fused"] = lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True)
    if peer("bitsandbytes"):
        import bitsandbytes

        found["bitsandbytes"] = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return found


def measure(job: str, shapes, dtype: torch.dtype, floor_us: float, repeats: int, *, paged: bool = False) -> list[dict]:
    """Returns a line for each optimizer; what fails is printed and has no times."""
    lines = []
    for name, make in optimizers(paged).items():
        line = {"job": job, "optimizer": name, "dtype": str(dtype).removeprefix("torch."), "tensors": len(shapes)}
        params = parameters(shapes, dtype)
        line |= {"elements": sum(param.numel() for param in params), "floor_us": round(floor_us, 1)}
        optimizer = None
        try:
            optimizer = make(params, lr=1e-5)
            for _ in range(3):
                optimizer.step()
            line["gpu_us"] = round(gpu_us(optimizer.step, repeats), 1)
            line["wall_us"] = round(wall_us(optimizer.step, repeats), 1)
        except FAILURES as error:
            print(f"{job}, {name}: {told(error)}", flush=True)
        lines.append(line)
        del params, optimizer
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return lines


def shown(lines: list[dict]) -> str:
    """Returns the table of some lines."""
    header = ("job", "optimizer", "dtype", "elements", "floor us", "gpu us", "of floor", "wall us", "of floor")
    rows = []
    for line in lines:
        cells = [line["job"], line["optimizer"], line["dtype"], line["elements"], line["floor_us"]]
        for key in ("gpu_us", "wall_us"):
            cells += [line[key], f"{line[key] / line['floor_us']:.2f}"] if key in line else ["-", "-"]
        rows.append(cells)
    return table(header, rows)


def main() -> None:
    """Measures, records and prints all jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paged", type=int, default=10**9, help="bfloat16 parameters with paged state; 0: none")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    need_gpu("adamw_8bit")
    if not equals_the_reference():
        raise SystemExit("the LoRA tensors do not step to the bits of the reference: RED")
    copy = copy_bandwidth()
    notes: dict[str, object] = {"copy_tb_s": round(copy / 1e12, 3), "bitsandbytes_version": peer("bitsandbytes")}
    print(f"{environment(options.commit)['device']}: copy {notes['copy_tb_s']} TB/s", flush=True)
    lines = []
    for job, shapes, repeats in (("lora", LORA, 20), ("large", LARGE, 20)):
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        lines += measure(job, shapes, torch.float32, elements * step_bytes(torch.float32) / copy * 1e6, repeats)
    if options.paged:
        rates = page_rates()
        notes |= {f"copy_{name}_gb_s": round(rate / 1e9, 1) for name, rate in rates.items()}
        floor = options.paged * STATE_BYTES / rates["each_of_both"] * 1e6
        lines += measure("paged", ((options.paged,),), torch.bfloat16, floor, 3, paged=True)
    for line in lines:
        record("adamw_8bit", {**line, **notes}, commit=options.commit, show=False)
    print(shown(lines), flush=True)
    print({key: value for key, value in notes.items() if key.startswith("copy")}, flush=True)


if __name__ == "__main__":
    main()
