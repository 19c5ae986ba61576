"""Merged folders and adapters in other hands: transformers, llama.cpp's converters, and what vLLM and ollama ask of an adapter.

The converters run where `--llama-cpp PATH` names llama.cpp's sources, in the Python that runs the tests. What was run with
which version is in docs/merging.md.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlite
from qlite.adapters import CONFIG, TENSORS
from qlite.data import ASSETS
from qlite.storage import fingerprint, stored_tensors
from tests.adapted import adapt, adapted, base_of, logits
from tests.falcons import FLAVOURS, tokens_of

#: Of float32 logits that reach 5, as in test_peft.py: Falcon's two implementations sum in other orders.
LOGITS = 1e-4
#: What an adapter changes must be far above that, or the test says nothing.
VISIBLE = 0.1


def loaded(folder, dtype=torch.float32):
    # The eager path of transformers adds ALiBi's bias twice.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


# transformers reads merged folders.


@torch.no_grad()
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_merged_falcon_says_in_transformers_what_the_adapted_one_said(flavour, tmp_path):
    model = base_of(qlite.Linear4bit, flavour)
    base = logits(model)
    adapt(model)
    qlite.save_merged(model, tmp_path / "merged")
    found = loaded(tmp_path / "merged")(tokens_of(model.config, 2, 7)).logits
    assert (logits(model) - base).abs().max() > VISIBLE
    torch.testing.assert_close(found, logits(model), rtol=0, atol=LOGITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_weight_of_a_merged_falcon_is_the_same_in_transformers_bit_for_bit(flavour, dtype, tmp_path):
    model = base_of(qlite.Linear4bit, flavour, dtype=dtype)
    adapt(model)
    qlite.save_merged(model, tmp_path / "merged")
    qlite.merge_adapter(model)
    theirs, ours = loaded(tmp_path / "merged", "auto").state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        assert weight.dtype == dtype and torch.equal(theirs[name], weight), name


def llama(tied=False, vocab_size=61):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=tied, **sizes
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def gpt2():
    config = transformers.GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=3, n_positions=64)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def mixtral(vocab_size=61):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=vocab_size, num_hidden_layers=2, max_position_embeddings=64, num_local_experts=3, **sizes
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def theirs_of(kind):
    """A model of transformers with adapters that change what it says: encoded, or dense GPT-2, whose layers are Conv1D."""
    torch.manual_seed(0)
    made = {"mixtral": mixtral, "gpt2": gpt2, "encoded gpt2": gpt2}.get(kind)
    model = made() if made is not None else llama(tied=kind == "tied llama")
    model.eval().requires_grad_(False)
    if kind != "gpt2":
        qlite.quantize_model(model)
    adapt(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_another_merged_model_of_transformers_says_what_it_says_when_it_is_merged_in_place(kind, tmp_path):
    model = theirs_of(kind)
    ids = tokens_of(model.config, 2, 7)
    before = model(ids).logits
    qlite.save_merged(model, tmp_path / "merged")
    found = loaded(tmp_path / "merged")
    # float32 sums of at most 80 terms in another order, through two blocks, relative to the largest logit.
    assert (found(ids).logits - before).abs().max() <= 2**-16 * before.abs().max()
    assert found.config.tie_word_embeddings == (kind != "llama")
    assert type(found.config) is type(model.config)
    assert len(qlite.merge_adapter(model).changes) == {"gpt2": 8}.get(kind, 14)
    for name, weight in found.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        ours = module.dequantize() if isinstance(module, qlite.Linear4bit) else getattr(module, name.rpartition(".")[2])
        assert torch.equal(weight, ours), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoded gpt2", "mixtral"])
def test_an_encoded_conv1d_and_a_stack_of_experts_are_written_as_transformers_reads_them(kind, tmp_path):
    model = theirs_of(kind)
    ids = tokens_of(model.config, 2, 7)
    before = model(ids).logits
    qlite.save_merged(model, tmp_path / "merged")
    assert (loaded(tmp_path / "merged")(ids).logits - before).abs().max() <= 2**-16 * before.abs().max()


@torch.no_grad()
def test_the_original_of_an_encoded_conv1d_is_read_the_other_way_round(tmp_path):
    model, dense = theirs_of("encoded gpt2"), theirs_of("gpt2")
    ids = tokens_of(model.config, 2, 7)
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "dense")
    model.base_fingerprint = fingerprint(stored_tensors(tmp_path / "dense"))
    qlite.save_merged(model, tmp_path / "merged", original=tmp_path / "dense")
    before = dense(ids).logits
    assert (loaded(tmp_path / "merged")(ids).logits - before).abs().max() <= 2**-16 * before.abs().max()


def test_an_original_without_one_of_the_experts_is_refused_by_name(tmp_path):
    model = theirs_of("mixtral")
    mixtral().save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    model.base_fingerprint = fingerprint(stored_tensors(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is not there; wanted floats"):
        qlite.save_merged(model, tmp_path / "merged", original=tmp_path / "dense")


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True], ids=["folder", "in place"])
def test_a_head_with_an_adapter_is_untied_in_transformers_too(in_place, tmp_path):
    torch.manual_seed(0)
    model = llama(tied=True).eval()
    ids = tokens_of(model.config, 2, 7)
    base = model(ids).logits
    adapt(model, targets=["lm_head"])
    before = model(ids).logits
    if in_place:
        qlite.merge_adapter(model)
        model.save_pretrained(tmp_path / "merged")
    else:
        qlite.save_merged(model, tmp_path / "merged")
    # transformers itself unties two weights that differ, with a warning; others believe the config.
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    found = loaded(tmp_path / "merged")(ids).logits
    assert (before - base).abs().max() > VISIBLE
    assert (found - before).abs().max() <= 2**-16 * before.abs().max()


def test_a_config_of_transformers_is_written_whole(tmp_path):
    model = theirs_of("llama")
    qlite.save_merged(model, tmp_path / "merged", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written.pop("architectures") == ["LlamaForCausalLM"] and written.pop("dtype") == "bfloat16"
    whole = json.loads(json.dumps(model.config.to_dict()))
    assert len(written) > 10 and written == {
        key: whole[key] for key in whole.keys() - {"architectures", "dtype", "quantization_config"}
    }


def test_the_tokenizer_goes_along_and_says_the_same(tmp_path):
    model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
    adapt(model, r=1, targets=["dense"])
    qlite.save_merged(model, tmp_path / "merged", files_from=ASSETS / "tiny-falcon")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "merged" / "tokenizer.json"))
    text = "How can I create an account?"
    assert tokenizer.encode(text) == qlite.load_tokenizer(tmp_path / "merged").encode(text).ids


# What llama.cpp, vLLM and ollama take for granted.


def test_a_merged_folder_has_what_a_converter_looks_for(tmp_path):
    model = base_of(qlite.Linear4bit, "7b", dtype=torch.bfloat16)
    adapt(model)
    qlite.save_merged(model, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["FalconForCausalLM"] and "quantization_config" not in config
    assert {"hidden_size", "num_attention_heads", "num_kv_heads", "num_hidden_layers", "layer_norm_epsilon"} <= config.keys()
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    theirs = loaded(tmp_path / "merged", "auto").state_dict()
    assert names == theirs.keys() - {"lm_head.weight"}  # a tied head is stored once


def test_an_adapter_has_what_other_servers_take_for_granted(tmp_path):
    model = base_of(qlite.Linear4bit, "7b", dtype=torch.bfloat16)
    adapt(model, r=3, alpha=6.0)
    qlite.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    # vLLM: r, lora_alpha and target_modules must be there, and neither biases, whole modules nor DoRA.
    assert config["r"] == 3 and config["target_modules"] and config["bias"] == "none"
    assert not config["modules_to_save"] and not config.get("use_dora")
    # ollama parses lora_alpha into an unsigned integer, and "6.0" is none.
    assert '"lora_alpha": 6,' in (tmp_path / CONFIG).read_text()
    # llama.cpp: the scale is lora_alpha / r for every layer, and nothing but lora_A and lora_B.
    assert not config.get("use_rslora") and not config.get("alpha_pattern")
    with safe_open(tmp_path / TENSORS, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            layer, which = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
            weight = adapted(model)[layer]
            assert file.get_slice(name).get_dtype() == "F32"
            wanted = [3, weight.in_features] if which == "A" else [weight.out_features, 3]
            assert list(file.get_slice(name).get_shape()) == wanted


def test_an_alpha_that_is_not_whole_is_written_as_it_is(tmp_path):
    model = base_of()
    adapt(model, alpha=2.5)
    qlite.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_alpha"] == 2.5
    again = base_of()
    qlite.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# llama.cpp's converters.

#: Runs a converter with a name for the one pre-tokenizer that it does not know: it knows one by a hash of the ids that a text
#: gets, which a vocabulary of one's own changes. How the tokenizer of tiny-falcon splits text is GPT-2's.
CONVERT = """
import runpy, sys
script = sys.argv[1]
sys.argv[:2] = [script]
sys.path.insert(0, script.rpartition("/")[0])
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(script, run_name="__main__")
"""
#: Their names for our layers.
LAYERS = {
    "transformer.word_embeddings": "token_embd", "transformer.ln_f": "output_norm", "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture
def llama_cpp(request, monkeypatch):
    folder = request.config.getoption("--llama-cpp")
    if folder is None:
        pytest.skip("llama.cpp's converters run with --llama-cpp PATH")
    monkeypatch.syspath_prepend(str(pathlib.Path(folder) / "gguf-py"))
    return pathlib.Path(folder).absolute()


def converted(llama_cpp, script, *arguments):
    """The tensors, by name, and the reader of the GGUF file that a converter writes."""
    import gguf

    out = pathlib.Path(arguments[0]).with_suffix(".gguf")
    command = [sys.executable, "-c", CONVERT, llama_cpp / script, *arguments, "--outfile", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    reader, tensors = gguf.GGUFReader(out), {}
    for entry in reader.tensors:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.tensor_type.name]
        flat = torch.frombuffer(bytearray(entry.data.tobytes()), dtype=dtype)
        tensors[entry.name] = flat.view([int(size) for size in reversed(entry.shape)])
    return tensors, reader


def their_name(layer):
    block = re.fullmatch(r"(?:transformer\.h|model\.layers)\.(\d+)\.(.+)", layer)
    return f"blk.{block[1]}.{LAYERS[block[2]]}" if block else LAYERS[layer]


def their_rows(layer, weight, config):
    """The rows as they lay them out: queries, keys and values apart, and the halves of a rotated head woven together."""
    heads, groups = config.num_attention_heads, getattr(config, "kv_heads", None) or config.num_key_value_heads
    if layer.endswith("query_key_value"):
        parts = weight.view(groups, heads // groups + 2, config.head_dim, -1).split((heads // groups, 1, 1), dim=1)
        return torch.cat([part.flatten(0, 2) for part in parts])
    if layer.endswith(("q_proj", "k_proj")):
        count = heads if layer.endswith("q_proj") else groups
        return weight.view(count, 2, weight.shape[0] // count // 2, -1).transpose(1, 2).flatten(0, 2)
    return weight


def small(kind, folder):
    """The base in a folder, a model with adapters on it, and their files."""
    if kind == "falcon":
        model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
        base = ASSETS / "tiny-falcon"
    else:
        model, base = llama(vocab_size=4096).to(torch.bfloat16), folder / "base"
        model.save_pretrained(base)
        shutil.copy(ASSETS / "tiny-falcon" / "tokenizer.json", base)
        qlite.quantize_model(model)
    adapt(model)
    qlite.save_adapter(model, folder / "lora")
    qlite.save_merged(model, folder / "merged", files_from=base)
    return base, model


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["falcon", "llama"])
def test_llama_cpp_converts_a_merged_folder_bit_for_bit(kind, outtype, llama_cpp, tmp_path):
    _, model = small(kind, tmp_path)
    found, reader = converted(llama_cpp, "convert_hf_to_gguf.py", tmp_path / "merged", "--outtype", outtype)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(found) == len(ours) > 20
    for name, weight in ours.items():
        layer, _, attribute = name.rpartition(".")
        theirs = found[f"{their_name(layer)}.{attribute}"]
        assert torch.equal(theirs, their_rows(layer, weight, model.config).to(theirs.dtype)), name
        assert theirs.dtype == torch.float32 or theirs.ndim > 1
    wanted = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[outtype]
    assert found["token_embd.weight"].dtype == found["blk.0.ffn_up.weight"].dtype == wanted
    assert reader.fields[f"{kind}.attention.head_count"].parts[-1][0] == model.config.num_attention_heads


def test_llama_cpp_converts_a_merged_mixture_whose_experts_are_written_one_by_one(llama_cpp, tmp_path):
    model = mixtral(vocab_size=4096)
    qlite.quantize_model(model)
    adapt(model)
    qlite.save_merged(model, tmp_path / "merged", files_from=ASSETS / "tiny-falcon")
    found, _ = converted(llama_cpp, "convert_hf_to_gguf.py", tmp_path / "merged", "--outtype", "f32")
    merged = loaded(tmp_path / "merged").state_dict()
    for block in range(2):
        gate, up = merged[f"model.layers.{block}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        assert torch.equal(found[f"blk.{block}.ffn_gate_exps.weight"], gate)
        assert torch.equal(found[f"blk.{block}.ffn_up_exps.weight"], up)
        assert torch.equal(found[f"blk.{block}.ffn_down_exps.weight"], merged[f"model.layers.{block}.mlp.experts.down_proj"])
        assert torch.equal(found[f"blk.{block}.ffn_gate_inp.weight"], merged[f"model.layers.{block}.mlp.gate.weight"])


@pytest.mark.parametrize("kind", ["falcon", "llama"])
def test_llama_cpp_converts_an_adapter_bit_for_bit(kind, llama_cpp, tmp_path):
    base, model = small(kind, tmp_path)
    found, reader = converted(llama_cpp, "convert_lora_to_gguf.py", tmp_path / "lora", "--base", base)
    assert len(found) == 2 * len(adapted(model)) > 20
    for layer, module in adapted(model).items():
        assert torch.equal(found[f"{their_name(layer)}.weight.lora_a"], module.lora_A), layer
        assert torch.equal(found[f"{their_name(layer)}.weight.lora_b"], their_rows(layer, module.lora_B, model.config)), layer
    assert reader.fields["adapter.lora.alpha"].parts[-1][0] == 8.0
