"""One more token in few launches: the numbers of Falcon.next_hidden, and the models for which it does not stand in."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import qlite
from qlite import model_ops, one_token, token_step
from qlite.falcon import Falcon, FalconConfig, KVCache
from tests.falcons import FLAVOURS, falcon_of, tokens_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SIZES = {"vocab_size": 61, "num_hidden_layers": 3, "max_position_embeddings": 64}
CONFIGS = {
    "7b": FalconConfig(**_SIZES, hidden_size=192, num_attention_heads=3),
    "40b": FalconConfig(**_SIZES, hidden_size=192, num_attention_heads=6, num_kv_heads=2, new_decoder_architecture=True),
    "11b": FalconConfig(
        **_SIZES, hidden_size=128, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
        num_ln_in_parallel_attn=1, tie_word_embeddings=False,
    ),
    "biases": FalconConfig(**_SIZES, hidden_size=128, num_attention_heads=2, bias=True),
}  # fmt: skip
MODELS = {
    "dense": lambda model: None,
    "4 bits": lambda model: qlite.quantize_model(model),
    "4 bits, adapter": lambda model: (qlite.quantize_model(model), adapted(model, ("query_key_value",))),
    "4 bits, adapters everywhere": lambda model: (qlite.quantize_model(model), adapted(model, "all-linear")),
    "blocks of 32": lambda model: qlite.quantize_model(model, functools.partial(qlite.Linear4bit, block_size=32)),
    "int8": lambda model: qlite.quantize_model(model, qlite.Linear8bit),
}  # fmt: skip


def adapted(model, targets):
    qlite.add_lora(model, qlite.LoRAConfig(r=4, targets=targets), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))


def model_of(config, kind="dense", dtype=torch.float32):
    model = falcon_of(CONFIGS[config], dtype=dtype)
    MODELS[kind](model)
    return model.to(DEVICE).eval()


def step(next_hidden, model, rows, dtype):
    """The hidden states of three more tokens after a prompt, rows padded on the left by as many tokens as their number."""
    ids = tokens_of(model.config, rows, 5).to(DEVICE)
    cache = KVCache(model.config, rows, 16, device=DEVICE, dtype=dtype)
    real = torch.arange(5)[None] >= torch.arange(rows)[:, None] % 4
    found = []
    with torch.inference_mode():
        model.hidden_states(ids, attention_mask=real.to(DEVICE), cache=cache)
        visible = torch.zeros(rows, 16, dtype=torch.bool, device=DEVICE)
        visible[:, :5] = real.to(DEVICE)
        positions, table = real.sum(1).to(DEVICE), model.rotary_table(16)
        for at in (5, 6, 7):
            visible[:, at] = True
            token = tokens_of(model.config, rows, 1, seed=at).to(DEVICE)
            place = torch.tensor([at], device=DEVICE)
            found.append(next_hidden(model, token, table[:, positions], visible, cache, place))
            positions = positions + 1
    return torch.stack(found).double().cpu()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_the_hidden_states_are_those_of_the_blocks(config, kind, rows):
    model = model_of(config, kind)
    assert token_step.fits(model)
    wanted = step(Falcon.next_hidden, model, rows, torch.float32)
    # Float32 throughout: sums in another order.
    torch.testing.assert_close(step(token_step.next_hidden, model, rows, torch.float32), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4 bits", "4 bits, adapters everywhere", "int8"])
@pytest.mark.parametrize("config", CONFIGS)
def test_in_sixteen_bits_it_is_as_near_to_float32_as_the_blocks(config, kind, dtype):
    exact = step(Falcon.next_hidden, model_of(config, kind), 3, torch.float32)
    model = model_of(config, kind, dtype)
    usual, found = (step(of, model, 3, dtype) for of in (Falcon.next_hidden, token_step.next_hidden))
    # Fewer roundings, but of other numbers: it may be further off by chance, not by much.
    assert (found - exact).norm() <= 1.25 * (usual - exact).norm()


@pytest.mark.parametrize("kind", ["4 bits", "4 bits, adapters everywhere"])
def test_two_weights_are_multiplied_at_once_for_a_few_rows(kind, monkeypatch):
    model = model_of("7b", kind, torch.bfloat16)
    calls = []
    real = torch.ops.qlite.two_products
    monkeypatch.setattr(torch.ops.qlite, "two_products", lambda *arguments: (calls.append(1), real(*arguments))[1])
    step(token_step.next_hidden, model, 16, torch.bfloat16)
    assert len(calls) == 3 * 2 * model.config.num_hidden_layers
    calls.clear()
    step(token_step.next_hidden, model, 17, torch.bfloat16)
    assert not calls


def test_layers_whose_levels_came_from_a_file_are_told_apart_by_them():
    usual, mixed = model_of("7b"), model_of("7b")
    qlite.quantize_model(usual)
    qlite.quantize_model(mixed, functools.partial(qlite.Linear4bit, levels="fp4"))
    parts = {name: part for name, part in mixed.state_dict().items() if "dense_h_to_4h" in name}
    usual.load_state_dict(parts, strict=False)
    layer = usual.transformer.h[0].mlp.dense_h_to_4h
    assert layer.config()["format"] == "fp4"
    assert token_step._pair(usual.transformer.h[0].self_attention.query_key_value, layer, torch.zeros(1, 192).half()) is None


@pytest.mark.parametrize("name", [name for name in FLAVOURS if FLAVOURS[name].alibi or not FLAVOURS[name].parallel_attn])
def test_other_blocks_are_left_to_falcon(name):
    assert not token_step.fits(Falcon(FLAVOURS[name]))


def test_hooks_other_modules_and_dtypes_are_left_to_falcon():
    model = model_of("7b")
    assert token_step.fits(model)
    hooked = copy.deepcopy(model)
    hooked.transformer.h[1].mlp.dense_h_to_4h.register_forward_hook(lambda *arguments: None)
    replaced = copy.deepcopy(model)
    replaced.transformer.h[0].mlp = torch.nn.Sequential(replaced.transformer.h[0].mlp)
    mixed = copy.deepcopy(model)
    mixed.transformer.ln_f.double()
    last_hooked, last_replaced, patched = (copy.deepcopy(model) for _ in range(3))
    last_hooked.transformer.ln_f.register_forward_pre_hook(lambda *arguments: None)
    last_replaced.transformer.ln_f = torch.nn.Identity()
    mlp = patched.transformer.h[2].mlp
    mlp.forward = mlp.forward  # as accelerate's hooks take the place of a method
    others = (hooked, replaced, mixed, last_hooked, last_replaced, patched, copy.deepcopy(model).double())
    assert not any(map(token_step.fits, others))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not token_step.fits(model)


def test_the_operators_keep_their_word():
    x, part = torch.randn(2, 64), torch.randn(3, 2, 64)
    torch.library.opcheck(torch.ops.qlite.add_norm, (x, [part], torch.randn(64), torch.randn(64), 1e-5))
    torch.library.opcheck(torch.ops.qlite.lora_update, (x, torch.randn(4, 64), torch.randn(32, 4), 2.0))
    q = qlite.quantize_nf4(torch.randn(8, 64))
    weight = [q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels]
    for xs in ([x], [x, x]):
        torch.library.opcheck(torch.ops.qlite.two_products, (xs, weight, weight, 64))
    keys, values = torch.randn(2, 1, 8, 32), torch.randn(2, 1, 8, 32)
    fused, up, angle = torch.randn(1, 2, 5 * 32), torch.randn(1, 2, 40), torch.randn(1, 16)
    arguments = [fused], [up], angle.cos(), angle.sin(), keys, values, torch.tensor([3]), torch.ones(2, 8, dtype=torch.bool)
    torch.library.opcheck(torch.ops.qlite.between_products, arguments)
    assert model_ops.one_token is one_token
