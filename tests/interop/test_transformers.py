"""Falcon against transformers: logits, gradients, generated tokens, config files and checkpoints in both directions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from tests.falcons import FLAVOURS, falcon_configs, falcon_of, talker_of, tokens_of

#: Of float32 logits: 420 units of 2^-24 at 4, which the logits reach. Eight matrix products one after the other are sums of
#: at most 192 terms each, whose roundings mostly cancel. Measured: under 2e-6.
LOGITS = 1e-4
#: The same in float64. A layer norm of two nearly equal features multiplies an error by up to 1 / sqrt(epsilon) = 316.
EXACT = 1e-9

flavours = pytest.mark.parametrize("config", FLAVOURS.values(), ids=FLAVOURS)


def their_config(config: qlite.FalconConfig, **more) -> transformers.FalconConfig:
    """The same shape in transformers' config, field by field and not through our to_dict."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    return transformers.FalconConfig(**fields, rope_parameters=rope, **more)


def attention_of(config: qlite.FalconConfig) -> str:
    """The implementation that shares least with ours, where it is right: the eager path adds ALiBi's bias twice."""
    return "sdpa" if config.alibi else "eager"


def theirs_of(config: qlite.FalconConfig, dtype: torch.dtype = torch.float32) -> transformers.FalconForCausalLM:
    model = transformers.AutoModelForCausalLM.from_config(
        their_config(config), attn_implementation=attention_of(config), dtype=dtype
    )
    return model.eval()


def pair_of(config: qlite.FalconConfig, dtype: torch.dtype = torch.float32):
    """A model of ours and one of theirs, of the same weights."""
    ours, theirs = falcon_of(config, dtype=dtype), theirs_of(config, dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def left_padded(prompts):
    """Token ids and mask (B, T), zeros on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@flavours
@torch.no_grad()
def test_logits_are_those_of_transformers(config):
    ours, theirs = pair_of(config)
    ids = tokens_of(config, 2, 24)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=LOGITS)


@given(falcon_configs(), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**32))
@torch.no_grad()
def test_logits_are_those_of_transformers_for_any_config(config, batch, length, seed):
    ours, theirs = pair_of(config, torch.float64)
    ids = tokens_of(config, batch, length, seed=seed)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=EXACT)


@flavours
@torch.no_grad()
def test_alibi_and_rotary_agree_beyond_256_positions(config):
    # bfloat16 counts in ones up to 256 only, and ALiBi multiplies in it.
    config = dataclasses.replace(config, num_hidden_layers=1, max_position_embeddings=300)
    ours, theirs = pair_of(config, torch.float64)
    ids = tokens_of(config, 1, 300)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=EXACT)


@flavours
@torch.no_grad()
def test_logits_of_left_padded_rows_are_those_of_transformers(config):
    ours, theirs = pair_of(config, torch.float64)
    ids, mask = left_padded([tokens_of(config, length, seed=length).tolist() for length in (9, 4, 1)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=mask, position_ids=positions).logits
    # What stands at a padding token is nobody's answer, and the libraries differ there.
    torch.testing.assert_close(ours(ids, attention_mask=mask)[mask.bool()], wanted[mask.bool()], rtol=0, atol=EXACT)


@flavours
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_all_parameters_are_those_of_transformers(config, dtype):
    ours, theirs = pair_of(config, dtype)
    ids, targets = tokens_of(config, 2, 12), tokens_of(config, 24, seed=1)
    nn.functional.cross_entropy(ours(ids).flatten(0, 1), targets).backward()
    nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets).backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        # Of the largest element: 1,000 roundings forward and as many backward. Measured: 12.
        error = (parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error <= 2000 * torch.finfo(dtype).eps / 2, name


@flavours
@torch.no_grad()
def test_weights_copy_both_ways_by_name(config):
    theirs = theirs_of(config)
    ours = qlite.Falcon(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    again = theirs_of(config)
    again.load_state_dict(ours.state_dict(), strict=True)
    ids = tokens_of(config, 2, 8)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=LOGITS)


@flavours
@torch.no_grad()
def test_a_checkpoint_that_transformers_wrote_loads_with_the_same_logits(config, tmp_path):
    ours, theirs = pair_of(config)
    theirs.save_pretrained(tmp_path)
    loaded = qlite.load_falcon(tmp_path, dtype=torch.float32)
    ids = tokens_of(config, 2, 8)
    assert torch.equal(loaded(ids), ours(ids))
    torch.testing.assert_close(loaded(ids), theirs(ids).logits, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_a_sharded_bfloat16_checkpoint_of_transformers_loads_bit_for_bit(tmp_path):
    theirs = theirs_of(FLAVOURS["11b"], torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, wanted = qlite.load_falcon(tmp_path).state_dict(), theirs.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], wanted[name]) for name in wanted)


@flavours
@torch.no_grad()
def test_a_checkpoint_of_ours_loads_in_transformers_with_the_same_logits(config, tmp_path):
    ours, twin = pair_of(config)
    qlite.save_checkpoint(ours, tmp_path / "saved")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation=attention_of(config), local_files_only=True, output_loading_info=True
    )
    assert isinstance(theirs, transformers.FalconForCausalLM) and theirs.dtype == torch.float32
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = tokens_of(config, 2, 8)
    assert torch.equal(theirs(ids).logits, twin(ids).logits)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=LOGITS)


@given(falcon_configs())
def test_a_config_that_transformers_wrote_is_the_config_that_it_was(config):
    written = json.loads(their_config(config).to_json_string())
    read = qlite.FalconConfig.from_dict(written)
    assert read.to_dict() == config.to_dict()
    assert (read.kv_heads, read.ffn, read.head_dim, read.two_norms) == (
        config.kv_heads,
        config.ffn,
        config.head_dim,
        config.two_norms,
    )


@given(falcon_configs())
def test_a_config_of_ours_is_read_by_transformers_as_it_was(config):
    read = transformers.FalconConfig(**json.loads(json.dumps(config.to_dict())))
    wanted = their_config(config)
    wanted.num_kv_heads = config.kv_heads  # theirs says 71 under multi-query as well, and does not look at it then
    keys = dataclasses.asdict(config).keys() - {"rope_theta"} | {"rope_parameters", "activation", "hidden_dropout"}
    assert {key: getattr(read, key) for key in keys} == {key: getattr(wanted, key) for key in keys}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500042.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500042.0}},
        {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0}},
        {"rope_theta": 500042.0, "rope_parameters": {"rope_type": "default"}},
        {},
    ],
    ids=["top level", "parameters", "both", "half in each", "neither"],
)
def test_the_rotary_base_is_read_from_where_transformers_reads_it(rope):
    theirs = transformers.FalconConfig(**rope).rope_parameters["rope_theta"]
    assert qlite.FalconConfig.from_dict({"model_type": "falcon", **rope}).rope_theta == theirs


OLD = {
    "7b": (
        {"model_type": "RefinedWebModel", "n_layer": 32, "n_head": 71, "hidden_size": 4544, "multi_query": True},
        {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True},
    ),
    "40b": (
        {"model_type": "RefinedWeb", "n_layer": 60, "n_head": 128, "n_head_kv": 8, "hidden_size": 8192},
        {
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "hidden_size": 8192,
            "new_decoder_architecture": True,
        },
    ),
    "rw": (
        {"model_type": "RefinedWebModel", "n_layer": 24, "n_head": 32, "n_embed": 2048, "alibi": True, "bias": True}
        | {"multi_query": False, "parallel_attn": False},
        {"num_hidden_layers": 24, "num_attention_heads": 32, "hidden_size": 2048, "alibi": True, "bias": True}
        | {"multi_query": False, "parallel_attn": False},
    ),
}


@pytest.mark.parametrize("old, new", OLD.values(), ids=OLD)
def test_the_keys_of_2023_and_those_of_today_give_one_config(old, new):
    more = {"architectures": ["RWForCausalLM"], "apply_residual_connection_post_layernorm": False, "torch_dtype": "bfloat16"}
    today = json.loads(transformers.FalconConfig(**new).to_json_string())
    read = qlite.FalconConfig.from_dict(old | more)
    assert read == qlite.FalconConfig.from_dict({"model_type": "falcon", **new})
    assert read.to_dict() == qlite.FalconConfig.from_dict(today).to_dict()


def talkers_of(config):
    """A model of ours and one of theirs, of the same weights, that say more than one token."""
    ours = talker_of(config)
    theirs = theirs_of(ours.config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def prompts_of(config, *lengths):
    return [tokens_of(config, length, seed=length).tolist() for length in lengths]


@flavours
def test_greedy_generation_is_that_of_transformers_token_for_token(config):
    ours, theirs = talkers_of(config)
    prompts = prompts_of(config, 7, 1, 4, 5)
    answers = qlite.generate(ours, prompts, max_new_tokens=16, eos_token_id=None)
    ids, mask = left_padded(prompts)
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(ids, max_new_tokens=16, **options)[:, ids.shape[1] :].tolist()
    assert answers == wanted
    assert len({token for answer in answers for token in answer}) > 4  # no constant that any two models would agree on


@flavours
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_transformers_without_any_cache(config):
    ours, theirs = talkers_of(config)
    ids = tokens_of(config, 1, 5)
    answer = qlite.generate(ours, ids[0].tolist(), max_new_tokens=12, eos_token_id=None)
    for _ in range(12):
        ids = torch.cat((ids, theirs(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert answer == ids[0, 5:].tolist()


def test_the_end_of_text_stops_the_same_rows_at_the_same_tokens():
    ours, theirs = talkers_of(FLAVOURS["40b"])
    prompts = prompts_of(ours.config, 7, 1, 4, 5)
    end = qlite.generate(ours, prompts, max_new_tokens=16, eos_token_id=None)[0][5]
    answers = qlite.generate(ours, prompts, max_new_tokens=16, eos_token_id=end)
    ids, mask = left_padded(prompts)
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    wanted = theirs.generate(ids, max_new_tokens=16, **options)[:, ids.shape[1] :].tolist()
    assert answers == [row[: row.index(end)] if end in row else row for row in wanted]
    assert min(map(len, answers)) < max(map(len, answers))


def test_the_repetition_penalty_is_that_of_transformers():
    ours, theirs = talkers_of(FLAVOURS["7b"])
    prompts = prompts_of(ours.config, 6)
    options = {"max_new_tokens": 16, "eos_token_id": None, "repetition_penalty": 1.7}
    answer = qlite.generate(ours, prompts[0], **options)
    ids, mask = left_padded(prompts)
    wanted = theirs.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
    assert answer == wanted[0, 6:].tolist()
    assert answer != qlite.generate(ours, prompts[0], max_new_tokens=16, eos_token_id=None)
