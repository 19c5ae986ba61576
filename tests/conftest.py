"""Settings that every test shares: hypothesis profiles, Triton's interpreter where there is no GPU, visible garbage.

pytest                                  # deterministic: 60 examples a property
pytest --hypothesis-profile=nightly     # 2,000, drawn anew each time
pytest --llama-cpp PATH                 # also runs llama.cpp's converters, from a copy of its sources, on files of ours
"""

import os

import torch
from hypothesis import HealthCheck, settings

from tests.hub_server import hub  # noqa: F401  a fixture

settings.register_profile("default_ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default_ci")

# One thread: sums have one order wherever the suite runs, and small operations do not wait for busy cores.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read by Triton when it is first imported; on a machine with a GPU the kernels are compiled and run there.
    os.environ["TRITON_INTERPRET"] = "1"
    # Deterministic mode also fills uninitialised memory with NaN and the largest integer: an element that nobody wrote
    # cannot pass for a result by luck. (On CUDA it would refuse kernels that the library does not choose.)
    torch.use_deterministic_algorithms(True)


def pytest_addoption(parser):
    parser.addoption("--llama-cpp", help="folder of llama.cpp's sources, whose converters are run on files of ours")
