"""Falcon alone: the shape that a config describes, the cache, masks and causality, checkpointing, tying, first weights.

That its numbers are Falcon's is tested in interop/test_transformers.py.
"""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite.falcon import Falcon, FalconConfig, KVCache
from qlite.falcon_config import FIXED, MODEL_TYPES
from tests.falcons import FLAVOURS, falcon_configs, falcon_of, tokens_of

flavours = pytest.mark.parametrize("config", FLAVOURS.values(), ids=FLAVOURS)

#: Two orders of summation in float64: sums of under 200 terms, three layers deep, are some 2,000 roundings of 2^-53 on
#: logits below 100, so 1e-11; a layer norm of two nearly equal features multiplies that by up to 1 / sqrt(1e-5) = 316.
#: (Angles and slopes are rounded to 32 and 16 bits, but they depend on the position alone: the same bits on both sides.)
EXACT = {"rtol": 0, "atol": 1e-9}

PUBLISHED = {
    "7b": ({}, 6_921_720_704),
    "40b": (
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
        | {"new_decoder_architecture": True},
        41_303_293_952,
    ),
    "180b": (
        {"hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232, "num_kv_heads": 8}
        | {"new_decoder_architecture": True},
        178_557_088_768,
    ),
    "11b": (
        {"hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "num_kv_heads": 8}
        | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
        11_102_822_400,
    ),
    "rw-1b": (
        {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32}
        | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        1_311_625_216,
    ),
}


def loss_of(model, ids, **more):
    logits = model(ids, **more)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def padded_rows(config, paddings, length, seed=0):
    """Token ids and mask (B, length), row i with paddings[i] tokens of padding on the left."""
    ids = tokens_of(config, len(paddings), length, seed=seed)
    return ids, torch.arange(length)[None] >= torch.tensor(paddings)[:, None]


def in_chunks(model, ids, sizes, mask=None, cache=None):
    """Logits of ids, fed to a cache a chunk after the other."""
    cache = cache or KVCache(model.config, ids.shape[0], ids.shape[1], device="cpu", dtype=model.lm_head.weight.dtype)
    parts = []
    for chunk in ids.split(sizes, dim=1):
        seen = None if mask is None else mask[:, : cache.length + chunk.shape[1]]
        parts.append(model(chunk, attention_mask=seen, cache=cache))
    return torch.cat(parts, dim=1)


# The config.


@pytest.mark.parametrize("fields, parameters", PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(fields, parameters):
    model = Falcon(FalconConfig(**fields), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_derived_sizes_of_falcon_7b_and_40b_are_the_published_ones():
    small, large = FalconConfig(), FalconConfig(**PUBLISHED["40b"][0])
    assert (small.head_dim, small.kv_heads, small.ffn, small.two_norms) == (64, 1, 18176, False)
    assert (large.head_dim, large.kv_heads, large.ffn, large.two_norms) == (64, 8, 32768, True)
    names = dict(Falcon(small, device="meta").named_parameters())
    assert names["transformer.h.31.self_attention.query_key_value.weight"].shape == (4672, 4544)
    assert names["transformer.h.31.mlp.dense_4h_to_h.weight"].shape == (4544, 18176)


@given(falcon_configs())
def test_a_config_that_was_written_reads_back_as_the_same_model(config):
    written = json.loads(json.dumps(config.to_dict()))
    read = FalconConfig.from_dict(written)
    assert read.to_dict() == written
    shapes = [{name: p.shape for name, p in Falcon(c, device="meta").named_parameters()} for c in (config, read)]
    assert shapes[0] == shapes[1]
    derived = {"num_kv_heads": config.kv_heads, "ffn_hidden_size": config.ffn}
    assert read == dataclasses.replace(config, **derived)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocab_size": 0}, "vocab_size is 0; wanted at least 1"),
        ({"hidden_size": -64}, "hidden_size is -64; wanted at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"ffn_hidden_size": 0}, "ffn_hidden_size is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"bos_token_id": -1}, "bos_token_id is -1; wanted at least 0"),
        ({"eos_token_id": -1}, "eos_token_id is -1; wanted at least 0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0; wanted a finite number above 0"),
        ({"initializer_range": float("nan")}, "initializer_range is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"num_attention_heads": 72}, "num_attention_heads 72 does not divide hidden_size 4544"),
        ({"num_kv_heads": 2, "new_decoder_architecture": True}, "num_kv_heads 2 does not divide num_attention_heads 71"),
        ({"hidden_size": 71 * 3}, "even head size; it is 3"),
        ({"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3; wanted 1 or 2"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "new_decoder_architecture with parallel_attn=False"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_refused_with_the_name_of_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        FalconConfig(**fields)


@pytest.mark.parametrize("field", dataclasses.fields(FalconConfig), ids=lambda field: field.name)
@pytest.mark.parametrize("value", ["1", [1], {}], ids=repr)
def test_a_value_of_another_type_is_refused_with_the_name_of_its_field(field, value):
    with pytest.raises(TypeError, match=rf"{field.name} is .*; wanted {field.type.replace('|', '.')}"):
        FalconConfig(**{field.name: value})


def test_true_is_no_size_and_one_is_no_flag():
    with pytest.raises(TypeError, match="num_hidden_layers is True; wanted int"):
        FalconConfig(num_hidden_layers=True)
    with pytest.raises(TypeError, match="alibi is 1; wanted bool"):
        FalconConfig(alibi=1)


UNSUPPORTED = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation": "relu",
    "apply_residual_connection_post_layernorm": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}


def test_every_setting_that_has_one_supported_value_is_tested_here():
    assert UNSUPPORTED.keys() == FIXED.keys()


@pytest.mark.parametrize("key, value", UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_a_setting_that_is_not_supported_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} is .*; only .* is supported"):
        FalconConfig.from_dict({"model_type": "falcon", key: value})


@pytest.mark.parametrize("rope", [{"rope_type": "yarn"}, {"type": "yarn", "factor": 2.0}], ids=["today", "old"])
def test_stretched_rotary_positions_are_refused_by_name(rope):
    with pytest.raises(ValueError, match="rope_type is 'yarn'; only 'default' is supported"):
        FalconConfig.from_dict({"model_type": "falcon", "rope_parameters": rope})


@pytest.mark.parametrize("values", [{}, {"model_type": "llama"}, {"model_type": ["falcon"]}], ids=["none", "llama", "list"])
def test_the_config_of_another_model_is_refused_with_what_is_wanted(values):
    with pytest.raises(ValueError, match=f"model_type is .*; wanted one of {', '.join(MODEL_TYPES)}"):
        FalconConfig.from_dict(values)


def test_a_key_without_a_value_is_as_good_as_absent():
    nothing = dict.fromkeys(("n_head_kv", "n_layer", "num_kv_heads", "ffn_hidden_size", "rope_parameters", "rope_scaling"))
    assert FalconConfig.from_dict({"model_type": "falcon", **nothing}) == FalconConfig()


# The cache.


@flavours
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6], [11, 1], [1, 11]], ids=str)
@torch.no_grad()
def test_tokens_in_chunks_give_the_logits_of_one_pass(config, sizes):
    model = falcon_of(config, dtype=torch.float64)
    ids = tokens_of(config, 2, 12)
    torch.testing.assert_close(in_chunks(model, ids, sizes), model(ids), **EXACT)


@flavours
@torch.no_grad()
def test_tokens_one_by_one_give_the_logits_of_one_pass_in_float32(config):
    model = falcon_of(config)
    ids = tokens_of(config, 2, 12)
    # 420 units of 2^-24 at 4, which the logits reach; sums of at most 192 terms, whose roundings mostly cancel.
    torch.testing.assert_close(in_chunks(model, ids, 1), model(ids), rtol=0, atol=1e-4)


@given(
    falcon_configs(),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
@torch.no_grad()
def test_a_padded_row_in_chunks_gets_what_it_gets_alone_in_one_pass(config, paddings, sizes, spare, seed):
    model = falcon_of(config, seed, torch.float64)
    length = sum(sizes)
    ids, mask = padded_rows(config, [min(padding, length - 1) for padding in paddings], length, seed)
    cache = KVCache(config, len(ids), length + spare, device="cpu", dtype=torch.float64)
    logits = in_chunks(model, ids, sizes, mask, cache)
    assert cache.length == length
    assert logits.isfinite().all()
    for row, (tokens, visible) in enumerate(zip(ids, mask)):
        torch.testing.assert_close(logits[row, visible], model(tokens[visible][None])[0], **EXACT)


@flavours
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@torch.no_grad()
def test_a_mask_may_be_of_any_type(config, dtype):
    model = falcon_of(config)
    ids, mask = padded_rows(config, [3, 0], 8)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)), model(ids, attention_mask=mask))


@flavours
@torch.no_grad()
def test_a_mask_without_padding_changes_nothing(config):
    model = falcon_of(config, dtype=torch.float64)
    ids = tokens_of(config, 2, 9)
    torch.testing.assert_close(model(ids, attention_mask=torch.ones(2, 9)), model(ids), **EXACT)


@flavours
@torch.no_grad()
def test_padding_on_the_right_leaves_the_tokens_before_it_alone(config):
    model = falcon_of(config, dtype=torch.float64)
    ids = tokens_of(config, 2, 9)
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    torch.testing.assert_close(model(ids, attention_mask=mask)[mask], model(ids)[mask], **EXACT)


@flavours
@torch.no_grad()
def test_what_stands_in_the_padding_changes_no_bit(config):
    model = falcon_of(config)
    ids, mask = padded_rows(config, [4, 1], 9)
    other = torch.where(mask, ids, tokens_of(config, 2, 9, seed=5))
    assert not torch.equal(other, ids)
    assert torch.equal(model(other, attention_mask=mask)[mask], model(ids, attention_mask=mask)[mask])


@flavours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_padding_alone_give_finite_logits_and_gradients(config, dtype):
    model = falcon_of(config, dtype=dtype)
    ids, mask = padded_rows(config, [6, 5, 0], 6)
    logits = model(ids, attention_mask=mask)
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@flavours
@torch.no_grad()
def test_no_row_of_the_softmax_is_empty_however_a_kernel_treats_empty_ones(config, monkeypatch):
    def textbook(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
        return (scores + attn_mask).softmax(dim=-1) @ value  # NaN, where all of a row is masked

    model = falcon_of(config, dtype=torch.float64)
    ids, mask = padded_rows(config, [6, 4, 0], 6)
    padded, plain = model(ids, attention_mask=mask), model(ids)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", textbook)
    torch.testing.assert_close(model(ids, attention_mask=mask), padded, **EXACT)
    torch.testing.assert_close(model(ids), plain, **EXACT)


@pytest.mark.parametrize("size, fits", [(8, True), (7, False)])
@torch.no_grad()
def test_a_cache_holds_exactly_its_length_and_is_left_alone_by_what_does_not_fit(size, fits):
    config = FLAVOURS["40b"]
    model, ids = falcon_of(config), tokens_of(config, 2, 8)
    cache = KVCache(config, 2, size, device="cpu", dtype=torch.float32)
    model(ids[:, :5], cache=cache)
    before = cache.keys.clone(), cache.values.clone()
    if fits:
        assert model(ids[:, 5:], cache=cache).shape == (2, 3, 61) and cache.length == cache.max_length == 8
        return
    with pytest.raises(ValueError, match=r"2 rows of 7 tokens, 5 of them used; 2 rows of 3 more do not fit"):
        model(ids[:, 5:], cache=cache)
    assert cache.length == 5
    assert torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_of_another_batch_size_is_refused(batch):
    config = FLAVOURS["7b"]
    cache = KVCache(config, batch, 8, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"the cache holds {batch} rows of 8 tokens, 0 of them used; 2 rows of 4"):
        falcon_of(config)(tokens_of(config, 2, 4), cache=cache)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (2, 5, 5), (5,)], ids=str)
@pytest.mark.parametrize("past", [0, 3])
@torch.no_grad()
def test_a_mask_of_another_shape_is_refused_with_the_shape_that_is_wanted(shape, past):
    config = FLAVOURS["7b"]
    model, ids = falcon_of(config), tokens_of(config, 2, 5)
    cache = KVCache(config, 2, 8, device="cpu", dtype=torch.float32)
    if past:
        model(ids[:, :past], cache=cache)
    # With tokens in the cache, a mask of the new tokens alone is the likely mistake.
    with pytest.raises(ValueError, match=rf"attention_mask has shape .*; wanted \(2, {5 + past}\)"):
        model(ids, attention_mask=torch.ones(shape), cache=cache)
    assert cache.length == past


@pytest.mark.parametrize("shape", [(5,), (1, 5, 1), ()], ids=str)
def test_token_ids_without_a_batch_are_refused(shape):
    with pytest.raises(ValueError, match=r"input_ids has shape .*; wanted \(batch, tokens\)"):
        falcon_of(FLAVOURS["7b"])(tokens_of(FLAVOURS["7b"], *shape))


@pytest.mark.parametrize("name, heads", [("7b", 1), ("40b", 2), ("rw", 4), ("grouped, a group a head", 6)])
def test_the_cache_holds_the_key_value_heads_and_no_copies_of_them(name, heads):
    config = FLAVOURS[name]
    cache = KVCache(config, 3, 7, device="meta", dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 3, heads, 7, config.head_dim)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16 and cache.max_length == 7


# What a token may depend on.


@flavours
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_token_changes_no_bit_of_what_comes_before_it_and_all_that_follows(config, padded):
    model = falcon_of(config)
    ids, mask = padded_rows(config, [3, 0], 9)
    mask = mask if padded else None
    before = model(ids, attention_mask=mask)
    for place in (4, 8):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % config.vocab_size
        after = model(other, attention_mask=mask)
        # Equal bits, for the two passes do the same operations in the same order and a weight of zero adds nothing.
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place:] != before[:, place:]).any(dim=-1).all()


@flavours
@torch.no_grad()
def test_the_order_of_the_tokens_before_matters(config):
    # One layer: without positions it would sum over a set. The swapped tokens stand far from the last one.
    model = falcon_of(dataclasses.replace(config, num_hidden_layers=1), dtype=torch.float64)
    ids = torch.tensor([[5, 9, 13, 20, 3, 40]])
    swapped = torch.tensor([[9, 5, 13, 20, 3, 40]])
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


def test_the_branches_of_a_parallel_block_are_added_before_the_residual():
    class Constant(nn.Module):
        def forward(self, x, *_):
            return torch.full_like(x, 2**-8)

    block = Falcon(FLAVOURS["7b"], dtype=torch.bfloat16).transformer.h[0]
    block.self_attention, block.mlp = Constant(), Constant()
    x = torch.ones(1, 1, 48, dtype=torch.bfloat16)
    # 1 + 2^-8 is a tie that goes to 1, so that one after the other would both be lost.
    assert torch.equal(block(x, None, None, None), torch.full_like(x, 1 + 2**-7))


# Training.


def gradients_of(model, ids, **more):
    model.zero_grad()
    loss = loss_of(model, ids, **more)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@flavours
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients_bit_for_bit(config, padded):
    model = falcon_of(config).train()
    ids, mask = padded_rows(config, [3, 0], 9)
    mask = mask if padded else None
    loss, gradients = gradients_of(model, ids, attention_mask=mask)
    model.gradient_checkpointing = True
    again, recomputed = gradients_of(model, ids, attention_mask=mask)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_gradient_checkpointing_reaches_adapters_over_a_frozen_encoded_base():
    model = falcon_of(dataclasses.replace(FLAVOURS["7b"], hidden_size=192)).requires_grad_(False)
    qlite.quantize_model(model)
    qlite.add_lora(model, qlite.LoRAConfig(r=2, dropout=0.0), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.constant_(parameter, 0.01)
    ids = tokens_of(model.config, 2, 9)
    _, gradients = gradients_of(model.train(), ids)
    model.gradient_checkpointing = True
    _, recomputed = gradients_of(model, ids)
    assert len(gradients) == 2 * 4 * 2  # A and B, of the four linears, of the two blocks
    assert all(torch.equal(gradients[name], recomputed[name]) and gradients[name].any() for name in gradients)


@pytest.mark.parametrize("training, checkpointing, calls", [(True, True, 2), (True, False, 1), (False, True, 1)])
def test_blocks_are_recomputed_in_training_mode_only_and_only_when_asked(training, checkpointing, calls):
    model = falcon_of(FLAVOURS["7b"]).train(training)
    model.gradient_checkpointing = checkpointing
    seen = []
    model.transformer.h[0].self_attention.query_key_value.register_forward_pre_hook(lambda *_: seen.append(1))
    loss_of(model, tokens_of(model.config, 2, 9)).backward()
    assert len(seen) == calls
    assert not Falcon(model.config, device="meta").gradient_checkpointing


# Parameters.


@flavours
def test_tied_embeddings_are_one_parameter_and_others_two(config):
    model = Falcon(config)
    tied = model.lm_head.weight is model.transformer.word_embeddings.weight
    assert tied == config.tie_word_embeddings
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    assert "lm_head.weight" in model.state_dict()


def test_a_tied_parameter_stays_one_through_a_copy_a_cast_and_a_step():
    model = copy.deepcopy(falcon_of(FLAVOURS["7b"])).double()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    before = model.lm_head.weight.clone()
    loss_of(model, tokens_of(model.config, 2, 9)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not torch.equal(model.lm_head.weight, before)


def test_tie_weights_ties_again_what_leaving_meta_has_parted():
    model = Falcon(FLAVOURS["7b"], device="meta").to_empty(device="cpu")
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    untied = Falcon(FLAVOURS["11b"])
    untied.tie_weights()
    assert untied.lm_head.weight is not untied.transformer.word_embeddings.weight


@flavours
def test_first_weights_depend_on_the_seed_alone(config):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Falcon(config, device="meta").to_empty(device="cpu")
    first.tie_weights()
    assert first.init_weights_(seed=7) is first
    assert torch.equal(torch.get_rng_state(), state)
    second, other = falcon_of(config).init_weights_(seed=7), falcon_of(config).init_weights_(seed=8)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert (parameter.ndim == 1) == torch.equal(parameter, other.get_parameter(name))


def test_first_weights_are_normal_in_the_range_of_the_config_and_norms_do_nothing():
    config = dataclasses.replace(FLAVOURS["rw"], hidden_size=128, initializer_range=0.05)
    for name, parameter in Falcon(config).init_weights_(seed=0).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0))
            continue
        n = parameter.numel()
        # Five standard deviations of the mean and of the standard deviation of n normal draws.
        assert abs(parameter.mean()) < 5 * 0.05 / n**0.5
        assert abs(parameter.std() - 0.05) < 5 * 0.05 / (2 * n) ** 0.5


def test_a_model_on_meta_allocates_nothing_however_it_is_copied():
    # 178,557,088,768 parameters: a machine that held them would have noticed.
    model = Falcon(FalconConfig(**PUBLISHED["180b"][0]), device="meta", dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    assert {(t.device.type, t.dtype) for m in (model, twin) for t in m.state_dict().values()} == {("meta", torch.bfloat16)}
    assert twin.lm_head.weight is twin.transformer.word_embeddings.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert model(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 65024)


@torch.no_grad()
def test_a_copy_gives_the_same_bits_and_shares_no_memory():
    model = falcon_of(FLAVOURS["40b"])
    twin, ids = copy.deepcopy(model), tokens_of(FLAVOURS["40b"], 2, 6)
    assert torch.equal(twin(ids), model(ids))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


@flavours
@torch.no_grad()
def test_the_head_is_applied_to_the_final_hidden_states(config):
    model, ids = falcon_of(config), tokens_of(config, 2, 6)
    hidden = model.hidden_states(ids)
    assert hidden.shape == (2, 6, config.hidden_size)
    assert torch.equal(model.lm_head(hidden), model(ids))
