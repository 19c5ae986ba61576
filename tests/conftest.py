"""Settings that every test shares: hypothesis profiles, Triton's interpreter where there is no GPU, visible garbage.

    pytest                                  # deterministic: 60 examples a property
    pytest --hypothesis-profile=nightly     # 2,000, drawn anew each time
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("default_ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default_ci")

if not torch.cuda.is_available():
    # Read by Triton when it is first imported; on a machine with a GPU the kernels are compiled and run there.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def uninitialised_memory_shows(monkeypatch):
    """torch.empty hands out NaN and 0xFF, so that an element nobody wrote cannot pass for a result by luck."""

    def filled(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta" or torch.compiler.is_compiling():
                return tensor
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else -1)

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
