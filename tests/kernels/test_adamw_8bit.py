"""The AdamW kernels against their reference, bit for bit: on the GPU, or in Triton's interpreter where there is none."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite import adamw_8bit, optim
from qlite.adamw_8bit import AdamWRule, flattened
from qlite.dynamic8 import dynamic_levels, quantize_dynamic8
from tests.strategies import DTYPES

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import adamw_8bit as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
#: What numpy says in Triton's interpreter of the arithmetic that these tests ask for.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
RULE = AdamWRule(1e-3, 0.9, 0.999, 1e-8, 0.01, 7)


@dataclasses.dataclass
class Case:
    """The arguments of an op: lists of tensors, rules, scale, and the block size where the moments are encoded."""

    tensors: list[list[torch.Tensor]]
    rules: list[float]
    scale: torch.Tensor | None
    block_size: int | None = None

    def stepped(self, step, device="cpu") -> list[torch.Tensor]:
        """The tensors after a step by a function, on the CPU."""
        lists = [[tensor.to(device, copy=True) for tensor in some] for some in self.tensors]
        sizes = () if self.block_size is None else (self.block_size,)
        step(*lists, self.rules, None if self.scale is None else self.scale.to(device), *sizes)
        return [tensor.cpu() for some in lists for tensor in some]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, but for which NaN a NaN is."""
    kinds = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    equal = one.view(kinds[one.element_size()]) == other.view(kinds[other.element_size()])
    return bool((equal | (one.isnan() & other.isnan())).all())


def assert_kernel_equals_reference(case: Case) -> None:
    encoded = case.block_size is not None
    found = case.stepped(kernels.step_encoded if encoded else kernels.step_plain, DEVICE)
    wanted = case.stepped(adamw_8bit.step_encoded if encoded else adamw_8bit.step_plain)
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert same(one, other), f"list {place // len(case.tensors[0])}, tensor {place % len(case.tensors[0])}"


def encoded(avg: torch.Tensor, sq: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    avg, avg_absmax = quantize_dynamic8(avg, signed=True, block_size=block_size)
    sq, sq_absmax = quantize_dynamic8(sq, signed=False, block_size=block_size, never_zero=True)
    return [avg, sq, avg_absmax, sq_absmax]


def values(n: int, scale: float, generator: torch.Generator, kind: str) -> torch.Tensor:
    x = torch.randn(n, generator=generator)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-40, 20, (n,), generator=generator))
    if kind == "sparse":
        x = x * (torch.rand(n, generator=generator) < 0.03)
    if kind == "zero blocks":
        x[: n // 2] = 0.0
    return (x.double() * scale).float()


rules = st.builds(
    AdamWRule,
    lr=st.sampled_from((0.0, 1e-4, 1e-3, 0.5)),
    beta1=st.sampled_from((0.0, 0.5, 0.9, 0.95)),
    beta2=st.sampled_from((0.0, 0.81, 0.95, 0.999)),  # 0.9 and 0.81: no bound
    eps=st.sampled_from((0.0, 1e-50, 1e-30, 1e-8, 1.0)),
    weight_decay=st.sampled_from((0.0, 0.01, 0.5)),
    step=st.sampled_from((1, 2, 50, 100_000)),
)
kinds = st.sampled_from(("normal", "wide", "sparse", "zero blocks"))
scales = st.none() | st.sampled_from((0.0, 1.0, 0.37, 2.0**-20, 1e30, math.inf, math.nan))


@st.composite
def cases(draw, block_sizes) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype, grad_dtype, block_size = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)), draw(block_sizes)
    rows, numbers = [], []
    for n in draw(st.lists(st.sampled_from((0, 1, 5, 255, 256, 257, 512, 700)), min_size=1, max_size=4)):
        # The square of 2^-75 is below all float32, that of 2^64 above.
        grad = values(n, 2.0 ** draw(st.sampled_from((-149, -75, -60, -20, 0, 0, 30, 64, 120))), generator, draw(kinds))
        limit = torch.finfo(grad_dtype).max
        grad = grad.clamp(-limit, limit).to(grad_dtype)
        if n and draw(st.booleans()):
            grad[draw(st.integers(0, n - 1))] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
        size = 2.0 ** draw(st.sampled_from((-100, -60, -20, 0, 0, 60)))
        avg, sq = values(n, size, generator, draw(kinds)), values(n, size, generator, draw(kinds)).square()
        moments = [avg, sq] if block_size is None else encoded(avg, sq.clamp(max=3e38), block_size)
        rows.append([torch.randn(n, generator=generator).to(dtype), grad, *moments])
        numbers.append(draw(rules))
    scale = draw(scales)
    tensors = [list(column) for column in zip(*rows, strict=True)]
    return Case(tensors, flattened(numbers), None if scale is None else torch.tensor(scale), block_size)


@given(cases(st.sampled_from((256, 256, 64))))
def test_encoded_moments_step_as_in_the_reference(case):
    assert_kernel_equals_reference(case)


@given(cases(st.none()))
def test_float32_moments_step_as_in_the_reference(case):
    assert_kernel_equals_reference(case)


def plain_case(sizes, block_size, dtype=torch.float32, seed=0) -> Case:
    """Tensors of these sizes with usual gradients and moments, each with a rule of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in sizes:
        grad, avg, sq = (values(n, 1e-3, generator, "normal") for _ in range(3))
        rows.append([torch.randn(n, generator=generator).to(dtype), grad.to(dtype), *encoded(avg, sq.square(), block_size)])
    numbers = [dataclasses.replace(RULE, lr=1e-3 * place, step=place) for place in range(1, len(rows) + 1)]
    return Case([list(column) for column in zip(*rows, strict=True)], flattened(numbers), None, block_size)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 48, 100, 128, 512, 1000, 4096])
def test_blocks_of_any_size_step_as_in_the_reference(block_size):
    assert_kernel_equals_reference(plain_case((300, 2 * block_size, 5), block_size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_that_steps_several_tiles_makes_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SHARED_FROM", 0)
    assert_kernel_equals_reference(plain_case((256 * 9 + 7, 1, 256 * 8, 1000), 256, dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 33])
def test_any_number_of_tensors_is_one_launch(count, monkeypatch):
    case, launches = plain_case([300 + 13 * place for place in range(count)], 256), []

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = kernels._encoded_kernel
    monkeypatch.setattr(kernels, "_encoded_kernel", Counting())
    assert_kernel_equals_reference(case)
    assert launches == [(sum(-(-(300 + 13 * place) // 256) for place in range(count)),)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", [256, 700])
def test_views_of_any_alignment_are_stepped_and_nothing_beside_them_is_written(offset, size, dtype):
    case = plain_case([size], 256, dtype)
    wanted = case.stepped(adamw_8bit.step_encoded)
    around, views = [], []
    for (tensor,) in case.tensors:
        buffer = torch.full((tensor.numel() + 64 + offset,), 77, dtype=tensor.dtype, device=DEVICE)
        views.append(buffer[32 + offset : 32 + offset + tensor.numel()])
        views[-1].copy_(tensor)
        around.append((buffer[: 32 + offset], buffer[32 + offset + tensor.numel() :]))
    kernels.step_encoded(*[[view] for view in views], case.rules, None, 256)
    assert all(same(view.cpu(), other) for view, other in zip(views, wanted, strict=True))
    assert all(bool((side == 77).all()) for sides in around for side in sides)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 1e30])
def test_a_block_that_is_not_finite_is_left_alone(bad):
    case = plain_case([1000], 256)
    case.tensors[1][0][300] = bad  # the square of 1e30 is infinite
    found = case.stepped(kernels.step_encoded, DEVICE)
    for place in (0, 2, 3):
        before, after = case.tensors[place][0], found[place]
        assert torch.equal(after[256:512], before[256:512]) and not torch.equal(after[:256], before[:256])
    for place in (4, 5):
        assert (found[place] == case.tensors[place][0]).tolist() == [False, True, False, False]


@pytest.mark.parametrize("signed", [True, False])
def test_a_cell_holds_one_midpoint_at_most_and_its_entry_is_what_bucketize_finds(signed):
    levels, entries = dynamic_levels(signed), kernels.cells(signed).long() & 0xFFFFFFFF
    midpoints, shift = (levels[:-1] + levels[1:]) / 2, 17 if signed else 16

    def codes(share):
        bits = share.view(torch.int32).long()
        place = (bits ^ (bits >> 31)) & (2**shift - 1)
        return (entries[(bits & 0xFFFFFFFF) >> shift] + place & 0xFFFFFFFF) >> 24

    ends = torch.tensor(2.0)
    beside = [midpoints, torch.nextafter(midpoints, ends), torch.nextafter(midpoints, -ends), levels]
    anywhere = torch.randint(0, 0x3F800002, (2**20,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    share = torch.cat([*beside, anywhere, torch.tensor([0.0, 1.0])])
    share = torch.cat([share, -share]) if signed else share
    assert torch.equal(codes(share), torch.bucketize(share, midpoints))
    # A cell that held two would be wrong in at least one code, which nothing else here need have met.
    cells = torch.where(midpoints < 0, 2**20, 0) + (midpoints.abs().view(torch.int32) >> shift)
    assert cells.unique().numel() == 255


def test_a_table_of_fewer_cells_would_not_do():
    levels = dynamic_levels(True)
    midpoints = ((levels[:-1] + levels[1:]) / 2).abs()
    assert (midpoints.view(torch.int32) >> 18).unique().numel() < (midpoints.view(torch.int32) >> 17).unique().numel()


def test_what_a_kernel_cannot_step_is_refused():
    case = plain_case([300, 300], 256)
    with pytest.raises(ValueError, match=r"params are .*wanted torch.float32 on .*, all in one call"):
        params, *others = case.tensors
        kernels.step_encoded([params[0], params[1].half()], *others, case.rules, None, 256)
    with pytest.raises(ValueError, match="grads have strides"):
        params, grads, *others = case.tensors
        kernels.step_encoded(params, [grads[0], torch.ones(1).expand(300)], *others, case.rules, None, 256)
    with pytest.raises(ValueError, match=r"exp_avg_absmax have \[1, 2\] elements; wanted \[2, 2\]"):
        *others, (absmax, other), sq_absmax = case.tensors
        kernels.step_encoded(*others, [absmax[:1], other], sq_absmax, case.rules, None, 256)
    with pytest.raises(ValueError, match=r"exp_avg are .*uint8.*wanted torch.float32"):
        kernels.step_plain(*case.tensors[:4], case.rules, None)
    with pytest.raises(ValueError, match=r"grads have \[299\] elements; wanted \[300\]"):
        kernels.step_plain([torch.ones(300)], [torch.ones(299)], [torch.ones(300)], [torch.ones(300)], flattened([RULE]), None)


# The optimizers by way of the kernels.


class Optimizers:
    """A resident and a paged optimizer over the same tensors, in two groups, some not contiguous, one without elements."""

    SHAPES = ((5, 64), (300,), (16, 40), (0,), (3,), (700,))

    def __init__(self, dtype, device):
        source = torch.Generator().manual_seed(1)
        starts = [torch.randn(shape, generator=source).to(device, dtype) for shape in self.SHAPES]
        self.all, self.device = [], device
        for kind, options in ((optim.AdamW8bit, {}), (optim.PagedAdamW8bit, {"page_above": 310})):
            params = [torch.nn.Parameter(start.clone()) for start in starts]
            params[2] = torch.nn.Parameter(starts[2].t().contiguous().t())
            groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.5, "betas": (0.5, 0.9), "weight_decay": 0.1}]
            self.all.append(kind(groups, lr=1e-2, min_8bit_size=256, **options))

    def run(self):
        source = torch.Generator().manual_seed(2)
        for step in range(3):
            grads = [torch.randn(shape, generator=source) for shape in self.SHAPES]
            for optimizer in self.all:
                optimizer.grad_scale = torch.tensor(0.5, device=self.device) if step == 1 else None
                for param, grad in zip((p for group in optimizer.param_groups for p in group["params"]), grads, strict=True):
                    param.grad = grad.to(param.device, param.dtype)
                optimizer.step()
        found = []
        for optimizer in self.all:
            found.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
            found[-1] += [v for s in optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
        return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_optimizers_step_by_the_kernels_to_the_bits_of_the_reference(dtype, monkeypatch):
    wanted = Optimizers(dtype, "cpu").run()[0]
    calls = []

    def by(step):
        return lambda *arguments: calls.append(len(arguments[0])) or step(*arguments)

    # What the dispatcher does for CUDA tensors.
    monkeypatch.setattr(torch.ops.qlite, "adamw_8bit_", by(kernels.step_encoded))
    monkeypatch.setattr(torch.ops.qlite, "adamw_", by(kernels.step_plain))
    for found in Optimizers(dtype, DEVICE).run():
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))
    # Three steps: a call for the encoded and one for the others; paged: the same, and one for the piece of the large.
    assert sorted(calls) == sorted(3 * [4, 2] + 3 * [1, 2] + 3 * [3])


def test_the_op_is_the_reference_on_a_cpu_and_takes_blocks_that_the_kernel_does_not():
    block_size = kernels.LONGEST_BLOCK + 1
    case = plain_case([block_size + 5], block_size)
    found, wanted = case.stepped(torch.ops.qlite.adamw_8bit_, DEVICE), case.stepped(adamw_8bit.step_encoded)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))
    with pytest.raises(AssertionError):
        case.stepped(kernels.step_encoded, DEVICE)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_the_op_steps_a_hundred_tensors_as_the_reference_does(dtype):
    case = plain_case([1 + 997 * place for place in range(100)], 256, dtype)
    found, wanted = case.stepped(torch.ops.qlite.adamw_8bit_, "cuda"), case.stepped(adamw_8bit.step_encoded)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))


@needs_cuda
def test_on_cuda_a_step_tells_autograd_that_the_parameter_has_changed():
    param = torch.ones(5000, device="cuda", requires_grad=True)
    loss = param.square().sum()
    optimizer = optim.AdamW8bit([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_cuda
def test_on_cuda_more_than_two_to_the_31_elements_are_stepped_at_the_right_place():
    n = 2**31 + 2**20 + 300
    param, grad = torch.ones(n, dtype=torch.bfloat16, device="cuda"), torch.ones(n, dtype=torch.bfloat16, device="cuda")
    grad[-300:] = torch.linspace(-1, 1, 300, device="cuda")
    avg, sq = torch.full((n,), 127, dtype=torch.uint8, device="cuda"), torch.zeros(n, dtype=torch.uint8, device="cuda")
    absmax = [torch.zeros(-(-n // 256), device="cuda") for _ in range(2)]
    torch.ops.qlite.adamw_8bit_([param], [grad], [avg], [sq], *[[a] for a in absmax], flattened([RULE]), None, 256)
    # The last 300 elements begin with a block: 2^31 + 2^20 is a multiple of 256.
    some = [torch.ones(300, dtype=torch.bfloat16), grad[-300:].cpu(), torch.full((300,), 127, dtype=torch.uint8)]
    some += [torch.zeros(300, dtype=torch.uint8), torch.zeros(2), torch.zeros(2)]
    adamw_8bit.step_encoded(*[[tensor] for tensor in some], flattened([RULE]), None, 256)
    ends = [param[-300:], grad[-300:], avg[-300:], sq[-300:], absmax[0][-2:], absmax[1][-2:]]
    assert all(same(one.cpu(), other) for one, other in zip(ends, some, strict=True))
    assert bool((absmax[0] > 0).all()) and bool((sq == 255)[:-300].all())
