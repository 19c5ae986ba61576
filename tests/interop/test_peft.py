"""Adapters against PEFT, on transformers' Falcon: what either writes, the other reads, and both models say the same."""

import json

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import qlite
from qlite.adapters import CONFIG, TENSORS
from qlite.lora import LoRALinear
from tests.falcons import FLAVOURS, falcon_of, tokens_of

# peft asks transformers for an attribute by its old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Where a tied head is trained, and where a pattern of ranks has a key for nothing.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
    # Of starts that change the base, or want more to be told.
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights of the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but `eva_config` is not specified:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning"),
]
#: Of float32 logits that reach 5: 210 units of 2^-24 there. Two blocks of four matrix products and their adapters, sums of at
#: most 192 terms each in another order, whose roundings mostly cancel. Measured: under 2e-6.
LOGITS = 1e-4
#: What an adapter changes must be far above that, or the test says nothing.
VISIBLE = 0.1
flavours = pytest.mark.parametrize("flavour", ["7b", "40b", "11b", "rw"])
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of random weights of each flavour."""
    folder = tmp_path_factory.mktemp("bases")
    for flavour in ("7b", "40b", "11b", "rw"):
        qlite.save_checkpoint(falcon_of(FLAVOURS[flavour]), folder / flavour)
    return folder


def ours_of(folder):
    return qlite.load_falcon(folder, dtype=torch.float32)


def theirs_of(folder):
    # The eager path adds ALiBi's bias twice.
    return transformers.FalconForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def adapt(model, **options):
    """Adds adapters whose every parameter is away from where it began."""
    qlite.add_lora(model, qlite.LoRAConfig(**{"r": 4, "alpha": 8.0, "dropout": 0.0, **options}), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in qlite.lora_parameters(model):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def adapt_theirs(model, **options):
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def our_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def their_layers(model):
    names = (name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    return {name.removeprefix("base_model.model.") for name in names}


@torch.no_grad()
def assert_same_logits(ours, theirs, base):
    ids = tokens_of(ours.config, 2, 12)
    found = ours.eval()(ids)
    torch.testing.assert_close(found, theirs.eval()(ids).logits, rtol=0, atol=LOGITS)
    assert (found - ours_of(base)(ids)).abs().max() > VISIBLE


# Ours, read by peft.


@flavours
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["query_key_value"], LINEARS, ["dense"], ["h.0.mlp.dense_h_to_4h", "query_key_value"], r".*\.h\.1\..*"],
    ids=lambda value: str(value).replace(str(LINEARS), "four linears"),
)
def test_peft_reads_what_we_wrote_on_the_same_layers_with_the_same_logits(flavour, targets, bases, tmp_path):
    ours = ours_of(bases / flavour)
    adapt(ours, targets=targets, r=3, alpha=10.0)
    qlite.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs_of(bases / flavour), tmp_path)
    assert their_layers(theirs) == our_layers(ours)
    assert_same_logits(ours, theirs, bases / flavour)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 10.0, str(bases / flavour))


OURS = {
    "rank-stabilised": {"rslora": True},
    "ranks of their own": {"rank_pattern": {"dense": 6, r"h\.1\.mlp\..*": 2}, "alpha_pattern": {"query_key_value": 3.0}},
    "DoRA": {"dora": True},
    "DoRA, rank-stabilised, on some blocks": {"dora": True, "rslora": True, "layers": [1], "exclude": ["dense"]},
    "the head and a norm": {"modules_to_save": ["lm_head", "ln_f"]},
    "from PiSSA": {"init": "pissa", "rank_pattern": {"dense": 2}},
    "from PiSSA, rank-stabilised": {"init": "pissa", "rslora": True},
    "gaussian": {"init": "gaussian"},
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
@pytest.mark.parametrize("flavour", ["7b", "rw"])
def test_peft_reads_every_kind_of_adapter_with_the_same_logits(flavour, options, bases, tmp_path):
    ours = ours_of(bases / flavour)
    adapt(ours, **options)
    qlite.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs_of(bases / flavour), tmp_path)
    assert their_layers(theirs) == our_layers(ours)
    assert_same_logits(ours, theirs, bases / flavour)


def test_peft_reads_an_adapter_that_began_as_loftq_on_the_encoded_base(bases, tmp_path):
    ours = qlite.load_falcon(bases / "7b", quantize=qlite.Linear4bit, dtype=torch.float32)
    dense = ours_of(bases / "7b")
    config = qlite.LoRAConfig(r=4, dropout=0.0, init="loftq")
    qlite.add_lora(ours, config, seed=1, dense=lambda name: dense.get_submodule(name).weight.detach())
    qlite.save_adapter(ours, tmp_path)
    theirs = theirs_of(bases / "7b")
    for name in our_layers(ours):
        theirs.get_submodule(name).weight.data = ours.get_submodule(name).base.dequantize()
    assert_same_logits(ours, peft.PeftModel.from_pretrained(theirs, tmp_path), bases / "7b")


def test_an_adapter_of_an_encoded_base_is_an_adapter_for_peft_too(bases, tmp_path):
    ours = qlite.load_falcon(bases / "7b", quantize=qlite.Linear4bit, dtype=torch.float32)
    adapt(ours)
    qlite.save_adapter(ours, tmp_path)
    # peft gets the decoded weights, in a dense model.
    theirs = theirs_of(bases / "7b")
    for name in our_layers(ours):
        theirs.get_submodule(name).weight.data = ours.get_submodule(name).base.dequantize()
    assert_same_logits(ours, peft.PeftModel.from_pretrained(theirs, tmp_path), bases / "7b")


ALL = sorted(f"transformer.h.{i}.{part}" for i in range(2) for part in (
    "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
))  # fmt: skip


@pytest.fixture(scope="module")
def skeleton():
    """transformers' Falcon without weights, for questions of names."""
    config = transformers.FalconConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=2, vocab_size=61)
    with torch.device("meta"):
        return lambda: transformers.FalconForCausalLM(config)


@settings(max_examples=30)
@given(names=st.sets(st.sampled_from(ALL), min_size=1))
def test_for_any_set_of_layers_peft_wraps_the_ones_that_the_config_means(names, skeleton, tmp_path_factory):
    ours, folder = falcon_of(FLAVOURS["7b"]), tmp_path_factory.mktemp("adapter")
    adapt(ours, r=1, targets="|".join(names))
    assert our_layers(ours) == names
    qlite.save_adapter(ours, folder)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(folder), skeleton())
    assert their_layers(theirs) == names


class Nested(nn.Module):
    """Names that end other names, and a container that is called like a layer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"up": nn.Linear(4, 4), "inner": nn.ModuleDict({"up": nn.Linear(4, 4)})})
        self.inner = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "names", [["up"], ["block.up"], ["inner"], ["block.up", "inner"], ["up", "block.up", "block.inner.up"]], ids=str
)
def test_peft_wraps_the_same_layers_where_a_name_ends_another(names, tmp_path):
    ours = Nested()
    adapt(ours, r=1, targets="|".join(names))
    assert our_layers(ours) == set(names)
    qlite.save_adapter(ours, tmp_path)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(tmp_path), Nested())
    assert their_layers(theirs) == set(names)


# Peft's, read by us.


@flavours
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query_key_value"]},
        {"target_modules": LINEARS},
        {"target_modules": r".*\.h\.\d+\.mlp\.dense.*"},
        {"target_modules": "all-linear"},
        {"target_modules": ["dense"], "layers_to_transform": [1]},
        {"target_modules": LINEARS, "exclude_modules": ["dense"]},
        {"target_modules": LINEARS, "r": 2, "lora_alpha": 7, "lora_dropout": 0.3, "init_lora_weights": "gaussian"},
        {"target_modules": LINEARS, "init_lora_weights": False},
        {"target_modules": LINEARS, "init_lora_weights": "orthogonal"},
        {"target_modules": LINEARS, "init_lora_weights": "mica"},
        {"target_modules": LINEARS, "init_lora_weights": "eva"},
        {"target_modules": LINEARS, "use_rslora": True},
        {"target_modules": LINEARS, "rank_pattern": {"dense": 2, "^transformer.h.0.mlp.dense_h_to_4h": 7}},
        {"target_modules": LINEARS, "rank_pattern": {"not_there": 2}, "alpha_pattern": {r"h\.\d+\.mlp\..*": 3}},
        {"target_modules": LINEARS, "use_dora": True},
        {"target_modules": LINEARS, "use_dora": True, "use_rslora": True, "rank_pattern": {"dense": 2}},
        {"target_modules": LINEARS, "modules_to_save": ["ln_f", "lm_head"]},
        {"target_modules": ["dense"], "layers_to_transform": [0], "layers_pattern": "h"},
    ],
    ids=lambda value: str(value).replace(str(LINEARS), "four linears"),
)
def test_we_read_what_peft_wrote_on_the_same_layers_with_the_same_logits(flavour, options, bases, tmp_path):
    theirs = adapt_theirs(theirs_of(bases / flavour), **options)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(bases / flavour)
    report = qlite.load_adapter(ours, tmp_path)
    assert set(report.targets) == our_layers(ours) == their_layers(theirs)
    assert_same_logits(ours, theirs, bases / flavour)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_we_read_a_start_that_changed_the_base_once_peft_has_converted_it(init, bases, tmp_path):
    # PEFT subtracts the start from the adapter, which then fits the base as it was: of twice the rank.
    theirs = peft.get_peft_model(
        theirs_of(bases / "7b"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights=init)
    ).eval()
    config = theirs.peft_config["default"]
    config.init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = ours_of(bases / "7b")
    qlite.load_adapter(ours, tmp_path / "adapter")
    assert {module.lora_A.shape[0] for module in ours.modules() if isinstance(module, LoRALinear)} == {8}
    assert_same_logits(ours, theirs, bases / "7b")


def test_we_read_an_adapter_whose_base_transformers_wrote(bases, tmp_path):
    theirs = theirs_of(bases / "40b")
    theirs.save_pretrained(tmp_path / "base")
    theirs = adapt_theirs(theirs, target_modules=LINEARS)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ours_of(tmp_path / "base")
    qlite.load_adapter(ours, tmp_path / "adapter")
    assert_same_logits(ours, theirs, tmp_path / "base")


def test_an_adapter_that_went_through_both_is_the_same(bases, tmp_path):
    theirs = adapt_theirs(theirs_of(bases / "7b"), target_modules=LINEARS)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_of(bases / "7b")
    qlite.load_adapter(ours, tmp_path / "theirs")
    qlite.save_adapter(ours, tmp_path / "ours")
    one, other = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    assert sorted(one["target_modules"]) == other["target_modules"]
    # All that we write has the value that peft gave it.
    assert {key: one[key] for key in other if key != "target_modules"} == {
        key: value for key, value in other.items() if key != "target_modules"
    }


def test_merging_gives_the_weights_that_peft_gives(bases, tmp_path):
    theirs = adapt_theirs(theirs_of(bases / "rw"), target_modules=LINEARS)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(bases / "rw")
    qlite.load_adapter(ours, tmp_path)
    qlite.merge_adapter(ours)
    ours, theirs = ours.state_dict(), theirs.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        # Weights up to 1 and updates up to 1 of four products each: a few units of 2^-24.
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2**-20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        pytest.param(
            {"lora_bias": True},
            "lora_bias is True",
            marks=pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),  # peft, of its own lora_B.bias
        ),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"kasa_config": peft.KasaConfig()}, "kasa_config is {"),
        ({"monteclora_config": peft.MontecloraConfig()}, "monteclora_config is {"),
        ({"velora_config": peft.VeloraConfig()}, "velora_config is {"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "ensure_weight_tying is True"),
        ({"target_parameters": ["mlp.dense_h_to_4h.weight"], "target_modules": ["dense"]}, "target_parameters is "),
        ({"target_modules": ["word_embeddings", "dense"]}, "is not a LoRA weight in PEFT's layout"),
    ],
    ids=lambda value: str(value).replace(str(LINEARS), "four linears"),
)
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(options, words, bases, tmp_path):
    # peft warns where a tied embedding is trained, and where a layer without a bias gets one.
    base = bases / ("rw" if "lora_bias" in options else "11b")
    theirs = adapt_theirs(theirs_of(base), **{"target_modules": LINEARS, **options})
    theirs.save_pretrained(tmp_path)
    ours = ours_of(base)
    with pytest.raises(ValueError, match=words):
        qlite.load_adapter(ours, tmp_path)
    assert not our_layers(ours)


# GPT-2, whose Conv1D keeps the weight the other way round.


def gpt2():
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=48, n_layer=2, n_head=3)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_an_adapter_on_gpt2_is_the_same_to_both(options, tmp_path):
    ids = torch.arange(12)[None]
    ours, again = gpt2(), gpt2()
    adapt(ours, **options)
    assert len(our_layers(ours)) == 8
    qlite.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert their_layers(theirs) == our_layers(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=LOGITS)
        assert (ours(ids).logits - gpt2()(ids).logits).abs().max() > VISIBLE / 10  # its random start has smaller weights
        theirs.save_pretrained(tmp_path / "theirs")
        qlite.load_adapter(again, tmp_path / "theirs")
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=LOGITS)


def test_adapters_on_the_stacks_of_a_mixture_are_refused_by_name(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=61, num_hidden_layers=1, num_local_experts=2, **sizes)
    model = transformers.MixtralForCausalLM(config)
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters is \['experts.*_proj', 'experts.*_proj'\], which qlite"):
        qlite.load_adapter(transformers.MixtralForCausalLM(config), tmp_path)
