"""The call that puts encoded layers into a model: what it takes, what it leaves, and what it says of both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlite
from qlite.experts import ExpertStack
from qlite.linear import QuantizedLinear


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


class LinearSubclass(nn.Linear):
    """As transformers' FalconLinear: a subclass that a test of `type(module) is nn.Linear` would not find."""


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.block = nn.ModuleDict({"up": LinearSubclass(64, 128), "down": nn.Linear(128, 64, bias=False)})
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 10, bias=False)

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.lm_head(self.norm(hidden + self.block["down"](torch.relu(self.block["up"](hidden)))))


def test_quantize_model_replaces_linears_and_their_subclasses_and_says_what_it_left():
    model = Tiny()
    ids = torch.arange(10)
    before = model(ids)
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"block.up", "block.down"}
    assert set(report.skipped) == {"embedding", "norm", "lm_head"}
    assert report.quantized["block.down"][0] == 128 * 64 * 4
    # 4 bits and an 8-bit absmax per 64 weights; one scale, one offset and 16 levels of float32.
    assert report.quantized["block.down"][1] == 128 * 64 // 2 + 128 + 4 + 4 + 64
    assert "not a linear layer (Embedding)" in str(report) and "named in skip (lm_head)" in str(report)
    assert (model(ids) - before).norm() / before.norm() < 0.2


def test_a_weight_that_is_tied_to_another_module_stays_dense():
    model = Tiny()
    model.lm_head.weight = model.embedding.weight
    report = qlite.quantize_model(model, skip=())
    assert report.skipped["lm_head"][1] == "its weight is also embedding.weight"
    assert model.lm_head.weight is model.embedding.weight


def test_a_meta_model_is_quantized_without_any_memory():
    with torch.device("meta"):
        model = Tiny()
    report = qlite.quantize_model(model, qlite.Linear8bit)
    assert len(report.quantized) == 2
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_a_model_without_linears_is_an_error_and_not_a_silent_success():
    with pytest.raises(ValueError, match="no linear layer of Sequential was quantized"):
        qlite.quantize_model(nn.Sequential(nn.Embedding(4, 4)))


def test_quantizing_twice_is_an_error():
    model = Tiny()
    qlite.quantize_model(model)
    with pytest.raises(ValueError, match="already quantized"):
        qlite.quantize_model(model)


def test_a_non_finite_weight_is_refused_with_the_name_of_its_layer():
    model = Tiny()
    model.block["down"].weight.data[3, 5] = float("inf")
    with pytest.raises(ValueError, match=r"block.down: .*non-finite.*\[3, 5\]"):
        qlite.quantize_model(model)


def test_evaluation_mode_is_kept():
    model = Tiny().eval()
    qlite.quantize_model(model)
    assert not any(module.training for module in model.modules())


def test_compiles_to_one_graph_with_lora_on_top():
    model = Tiny().requires_grad_(False)
    qlite.quantize_model(model)
    qlite.add_lora(model, qlite.LoRAConfig(r=2, dropout=0.0), seed=0)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(torch.arange(10)), model(torch.arange(10)))


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_named_in_the_report():
    model = nn.Sequential(nn.Linear(64, 64), Tripled(64, 64))
    report = qlite.quantize_model(model)
    assert report.overridden == {"1": "Tripled"} and "1 of them were Tripled, whose own forward" in str(report)


def test_torchs_own_attention_still_runs_with_its_output_layer_left_dense():
    model = nn.Sequential(nn.Linear(64, 512))
    model.attention = nn.MultiheadAttention(64, 4, batch_first=True)
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"0"} and "read by the module above" in report.skipped["attention.out_proj"][1]
    assert qlite.add_lora(model, qlite.LoRAConfig(r=2)).targets == ("0",)
    x = seeded(1, 3, 64)
    assert model.attention(x, x, x)[0].shape == (1, 3, 64)


def test_a_weight_that_is_computed_is_left_dense():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 128))
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"1"} and model(seeded(2, 64)).shape == (2, 128)


def test_the_order_of_a_sequence_is_kept():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    qlite.quantize_model(model)
    assert [type(module) for module in model] == [qlite.Linear4bit, nn.ReLU, qlite.Linear4bit]


# GPT-2's linear layer


class Conv1D(nn.Module):
    """As transformers' class of this name, which the library must know without importing it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(seeded(nx, nf)), nn.Parameter(seeded(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class LoudConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
@pytest.mark.parametrize("nf", [64, 96])  # a square one must be transposed too, and no shape would tell
def test_a_conv1d_becomes_the_layer_of_its_transposed_weight(kind, nf):
    model = nn.Sequential(Conv1D(nf, 64).eval())
    wanted = kind(64, nf).quantize_(model[0].weight.detach().T.contiguous()).dequantize()
    bias = model[0].bias
    report = qlite.quantize_model(model, kind)
    assert isinstance(model[0], kind) and not model[0].training and model[0].bias is bias
    assert torch.equal(model[0].dequantize(), wanted)
    assert report.quantized["0"][0] == 4 * (64 * nf + nf) and not report.overridden
    # float32 dot products of 64 terms.
    torch.testing.assert_close(model(seeded(2, 64)), seeded(2, 64) @ wanted.T + bias, rtol=1e-5, atol=1e-5)


def test_a_subclass_of_conv1d_with_a_forward_of_its_own_is_named():
    assert qlite.quantize_model(nn.Sequential(LoudConv1D(64, 64))).overridden == {"0": "LoudConv1D"}


def test_a_conv1d_on_meta_becomes_an_empty_layer_that_knows_how_its_file_lies():
    model = nn.Sequential(Conv1D(48, 64)).to("meta")
    assert set(qlite.quantize_model(model).quantized) == {"0"}
    assert (model[0].out_features, model[0].in_features, model[0].transposed) == (48, 64, True) and model[0].weight.is_meta


# Stacks of expert matrices


class Experts(nn.Module):
    """As transformers has them, the "eager" way."""

    def __init__(self, count=3, hidden=64, inner=96):
        super().__init__()
        self.num_experts, self.is_transposed = count, False
        self.gate_up_proj = nn.Parameter(seeded(count, 2 * inner, hidden) / 8)
        self.down_proj = nn.Parameter(seeded(count, hidden, inner) / 8)

    def forward(self, x, chosen):
        gate, up = nn.functional.linear(x, self.gate_up_proj[chosen]).chunk(2, dim=-1)
        return nn.functional.linear(torch.relu(gate) * up, self.down_proj[chosen])


class Mixture(nn.Module):
    def __init__(self, experts=None):
        super().__init__()
        self.embedding, self.inner, self.way = nn.Embedding(10, 64), nn.Linear(64, 64, bias=False), "grouped_mm"
        self.experts = experts or Experts()

    def set_experts_implementation(self, way):
        self.way = way


def test_stacks_of_experts_are_encoded_and_used_one_at_a_time():
    model = Mixture()
    before = model.experts(seeded(2, 64), 1)
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"inner", "experts.gate_up_proj", "experts.down_proj"} and model.way == "eager"
    assert report.experts == {"experts.gate_up_proj": 3, "experts.down_proj": 3}
    assert report.quantized["experts.gate_up_proj"] == (4 * 3 * 192 * 64, model.experts.gate_up_proj.encoded_bytes())
    assert "quantized 1 linear layers and 6 matrices of experts" in str(report)
    # Two encoded products one after the other, each within 10 % of the dense one.
    assert 0 < (model.experts(seeded(2, 64), 1) - before).norm() / before.norm() < 0.2


def test_the_report_tells_the_share_that_stayed_dense_and_why_the_largest_first():
    model = Mixture()
    report = qlite.quantize_model(model, skip=["inner", "down_proj"])
    assert set(report.quantized) == {"experts.gate_up_proj"}
    left = {"embedding": 10 * 64 * 4, "inner": 64 * 64 * 4, "experts.down_proj": 3 * 64 * 96 * 4}
    assert {name: size for name, (size, _) in report.skipped.items()} == left
    total = sum(p.nbytes for p in Mixture().parameters())
    assert report.dense_share == sum(left.values()) / total
    reasons = [line.partition(": ")[2] for line in str(report).splitlines()[1:]]
    share = f"{100 * sum(left.values()) / total:.1f} % of the bytes"
    assert reasons == [share, "named in skip (down_proj)", "named in skip (inner)", "not a linear layer (Embedding)"]


class TransposedExperts(Experts):
    def __init__(self):
        super().__init__()
        self.is_transposed = True


def state_of(model):
    return {name: (type(p), p.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Mixture(TransposedExperts()), r"not a linear layer \(TransposedExperts\)\nthe largest is experts"),
        (nn.Sequential(nn.Linear(64, 8), Experts()), "experts of a model without set_experts_implementation"),
        (nn.Sequential(nn.Linear(64, 8), nn.LSTM(64, 64)), r"not a linear layer \(LSTM\)"),
    ],
    ids=["transposed", "no switch", "another kind of layer"],
)
def test_a_model_of_which_most_would_stay_dense_is_refused_and_unchanged(model, reason):
    before = state_of(model)
    with pytest.raises(ValueError, match=f"(?s)quantize_model: 9. % of the weights .* name them in skip.*{reason}"):
        qlite.quantize_model(model)
    assert state_of(model) == before


def test_what_is_named_in_skip_may_stay_dense_with_all_beneath_it():
    model = Mixture(TransposedExperts())
    assert set(qlite.quantize_model(model, skip=["experts"]).quantized) == {"inner"} and model.way == "grouped_mm"
    nested = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(64, 64), "ab": nn.Linear(64, 64)}), "b": nn.Linear(64, 64)})
    assert set(qlite.quantize_model(nested, skip=["a"]).quantized) == {"b"}


def test_convolutions_and_embeddings_may_be_most_of_a_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(64, 64, 3), nn.Embedding(1000, 64))
    assert qlite.quantize_model(model).dense_share > 0.99


def test_a_shared_weight_is_counted_once():
    model = Tiny()
    model.lm_head.weight = model.embedding.weight
    total = sum(p.nbytes for p in model.parameters())
    report = qlite.quantize_model(model)
    assert report.skipped["lm_head"][0] == 0
    dense = (model.embedding.weight, *model.norm.parameters())
    assert report.dense_share == sum(p.nbytes for p in dense) / total


def test_what_a_model_keeps_in_float32_stays_dense():
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("wi", "wo", "wow")})
    model._keep_in_fp32_modules = {"wo"}
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"wi", "wow"} and "_keep_in_fp32_modules" in report.skipped["wo"][1]


def test_no_encoded_layer_or_stack_is_encoded_again():
    model = Mixture()
    qlite.quantize_model(model)
    kinds = [type(m) for m in model.modules() if isinstance(m, (QuantizedLinear, ExpertStack))]
    assert kinds == [qlite.Linear4bit, ExpertStack, ExpertStack]  # in the order of the modules
    with pytest.raises(ValueError, match=r"no linear layer of Mixture was quantized\.\nleft 3 x .* already quantized"):
        qlite.quantize_model(model)
