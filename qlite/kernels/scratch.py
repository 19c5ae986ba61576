"""Memory that kernels of one stream use one after the other: the decoded weight of the moment, and counters.

One buffer a device and stream, as large as the largest weight so far, not one a layer: what is in it lasts until the next
call on the same stream. While a CUDA graph is captured, memory comes from the graph's own pool instead, which keeps it as
long as the graph.

Not done here: sharing between streams, which would need events; giving memory back.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTERS = 1 << 14
_bytes: dict[tuple, Tensor] = {}


def _kept(name: str, device: torch.device, dtype: torch.dtype, size: int, make) -> Tensor:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make(size, dtype=dtype, device=device)
    key, nbytes = (name, device, torch.cuda.current_stream(device).cuda_stream), size * dtype.itemsize
    found = _bytes.get(key)
    if found is None or found.numel() < nbytes:
        _bytes.pop(key, None)  # before the larger one is asked for: both need not fit
        with torch.inference_mode(False):
            found = _bytes[key] = make(nbytes, dtype=torch.uint8, device=device)
    return found[:nbytes].view(dtype)


def buffer(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """Returns `size` elements of `dtype`, of whatever content, that the next call on this stream may return again."""
    return _kept("buffer", device, dtype, size, torch.empty)


def counters(device: torch.device, size: int) -> Tensor:
    """Returns int32 zeros, at least `size`; who counts with them leaves zeros."""
    return _kept("counters", device, torch.int32, max(size, COUNTERS), torch.zeros)
