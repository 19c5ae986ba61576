"""The error of four bits: what the formats and the search for scales leave of a weight.

    python -m benchmarks.quantization_error    # a CPU, a minute

Relative squared error, |w' - w|^2 / |w|^2 with w' decoded into float32, of weights from N(0, 1), of Student's t with 8 degrees
of freedom whose rows and columns have spreads of their own (log-normal, 0.3 and 0.2), and of the linear layers of the packaged
tiny base. Bits a weight are counted from the tensors. bitsandbytes, where it is installed, encodes and decodes itself; "read by
bitsandbytes" is its decoding of what qlite searched for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import qlite
from benchmarks.common import peer, record, table
from qlite import bnb_layout
from qlite.data import ASSETS

ROWS, COLUMNS = 2048, 4544
METHODS: dict[str, dict] = {
    "nf4": {},
    "nf4 searched": {"search": True},
    "nf4 float32 scales": {"double_quant": False},
    "nf4 float32 scales searched": {"double_quant": False, "search": True},
    "nf4 blocks of 32": {"block_size": 32},
    "nf4 blocks of 32 searched": {"block_size": 32, "search": True},
    "ls4 searched": {"levels": "ls4", "search": True},
    "ls4 blocks of 32 searched": {"levels": "ls4", "block_size": 32, "search": True},
    "bof4-s searched": {"levels": "bof4-s", "search": True},
    "best table searched": {"levels": "best", "search": True},
    "af4": {"levels": "af4"},
    "fp4": {"levels": "fp4"},
    "fp4 searched": {"levels": "fp4", "search": True},
}


def samples() -> dict[str, list[Tensor]]:
    """Returns the weights by the name of their kind, float32 matrices."""
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(8.0).sample((ROWS, COLUMNS))
    heavy *= (0.3 * torch.randn(ROWS, 1)).exp() * (0.2 * torch.randn(1, COLUMNS)).exp()
    base = qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32)
    trained = [module.weight.detach() for module in base.transformer.modules() if isinstance(module, nn.Linear)]
    return {"normal": [torch.randn(ROWS, COLUMNS)], "student t(8)": [heavy], "tiny base": trained}


def by_qlite(options: dict) -> Callable[[Tensor], tuple[Tensor, int]]:
    """Returns w -> (decoded, bytes) for options of quantize_nf4."""

    def run(w: Tensor) -> tuple[Tensor, int]:
        q = qlite.quantize_nf4(w, **options)
        return q.dequantize(torch.float32), q.nbytes

    return run


def by_bitsandbytes(w: Tensor) -> tuple[Tensor, int]:
    """Returns what bitsandbytes makes of w, and its bytes."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(w.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    held = (packed, state.absmax, state.state2.absmax, state.offset.view(1))
    return functional.dequantize_4bit(packed, state), sum(tensor.nbytes for tensor in held)


def read_by_bitsandbytes(w: Tensor) -> tuple[Tensor, int]:
    """Returns what bitsandbytes decodes of the layer that qlite searched for."""
    from bitsandbytes import functional

    q = qlite.quantize_nf4(w, search=True, flat=True)
    parts = {name: part for name, part in bnb_layout.to_4bit(q).items() if name != "weight"}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    return functional.dequantize_4bit(q.codes.view(-1, 1), state).float(), q.nbytes


def main() -> None:
    """Measures every method on every kind of weight, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    methods: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {name: by_qlite(options) for name, options in METHODS.items()}
    if peer("bitsandbytes"):
        methods |= {"bitsandbytes nf4": by_bitsandbytes, "nf4 searched, read by bitsandbytes": read_by_bitsandbytes}
    kinds, lines = samples(), []
    for name, method in methods.items():
        line = [name]
        for kind, weights in kinds.items():
            start = time.perf_counter()
            error, squares, held, count = 0.0, 0.0, 0, 0
            for w in weights:
                decoded, nbytes = method(w)
                error += (decoded.view(w.shape) - w).double().square().sum().item()
                squares += w.double().square().sum().item()
                held, count = held + nbytes, count + w.numel()
            row = {"method": name, "weights": kind, "relative_mse": round(error / squares, 6)}
            row |= {"bits_per_weight": round(8 * held / count, 3), "seconds": round(time.perf_counter() - start, 2)}
            record("quantization_error", row, show=False)
            line += [f"{row['relative_mse']:.5f}", f"{row['bits_per_weight']:.3f}"]
        lines.append(line)
    print(table(("method", *(part for kind in kinds for part in (kind, "bits"))), lines))


if __name__ == "__main__":
    main()
