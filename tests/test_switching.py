"""Several adapters on one base: each is what it is alone, the base is what it was, and what is done is done to one of them."""

import copy
import json

import pytest
import torch

import qlite
from qlite.adapters import CONFIG
from qlite.data import Batch
from qlite.switching import adapters_of
from tests.adapted import adapt, adapted, base_of, logits, stored_bytes
from tests.falcons import tokens_of

#: What the first and the second adapter of a model are. The second may change layers that the first does not, and whole ones.
PAIRS = {
    "alike": ({}, {}),
    "of other ranks and layers": ({"targets": ["query_key_value"], "r": 2}, {"targets": ["dense"], "r": 5}),
    "dora and whole modules": ({"dora": True}, {"targets": ["dense"], "modules_to_save": ["lm_head", "ln_f"]}),
    "a block whole, and layers in it": ({"modules_to_save": ["h.0"], "targets": ["dense_h_to_4h"]}, {"targets": ["dense"]}),
    "the head by both": ({"targets": ["lm_head"]}, {"targets": ["dense"], "modules_to_save": ["lm_head"]}),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def whole_moved(model, by):
    """Makes what is trained whole another than the base's."""
    with torch.no_grad():
        for parameter in qlite.lora_parameters(model):
            parameter.add_(by)


def two(pair, tmp_path, kind=None):
    """A model with adapters "a" and "b" that were saved from models of their own, and those models, by name."""
    alone = {}
    for seed, (name, options) in enumerate(zip("ab", pair), 1):
        alone[name] = base_of(kind)
        adapt(alone[name], seed=seed, **options)
        whole_moved(alone[name], 0.01 * seed)
        qlite.save_adapter(alone[name], tmp_path / name)
    model = base_of(kind)
    for name in "ab":
        assert qlite.load_adapter(model, tmp_path / name, name=name) is not None
    return model, alone


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [None, qlite.Linear4bit], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ["alike", "of other ranks and layers", "dora and whole modules", "the head by both"])
def test_each_adapter_says_what_it_says_alone_and_none_what_the_base_says(name, kind, tmp_path):
    model, alone = two(PAIRS[name], tmp_path, kind)
    base = base_of(kind)
    wanted = {"a": logits(alone["a"]), "b": logits(alone["b"]), None: logits(base)}
    assert not torch.equal(wanted["a"], wanted["b"]) and not torch.equal(wanted["a"], wanted[None])
    assert torch.equal(logits(model), wanted["b"])  # the one that was loaded last
    for chosen in ("a", None, "b", "b", "a", None):
        qlite.set_adapter(model, chosen)
        assert torch.equal(logits(model), wanted[chosen])
    assert same(tensors(model), tensors(base)) and not hasattr(model, "lora_config")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_a_block_that_is_trained_whole_and_layers_in_it_take_turns(tmp_path):
    model, alone = two(PAIRS["a block whole, and layers in it"], tmp_path)
    for chosen in "abab":
        qlite.set_adapter(model, chosen)
        assert torch.equal(logits(model), logits(alone[chosen]))


@pairs
def test_the_state_of_the_model_is_that_of_the_one_in_use(pair, tmp_path):
    model, alone = two(pair, tmp_path)
    for chosen in "ab":
        qlite.set_adapter(model, chosen)
        assert same(tensors(model), tensors(alone[chosen]))
        own, wanted = model.lora_config, alone[chosen].lora_config
        assert (own.r, own.dora, bool(own.modules_to_save)) == (wanted.r, wanted.dora, bool(wanted.modules_to_save))
        assert len(qlite.lora_parameters(model)) == len(qlite.lora_parameters(alone[chosen]))


@pairs
def test_what_is_saved_is_the_one_in_use_or_the_one_that_is_named(pair, tmp_path):
    model, _ = two(pair, tmp_path)
    files = {name: stored_bytes(tmp_path / name) for name in "ab"}
    assert files["a"] != files["b"]
    assert stored_bytes(qlite.save_adapter(model, tmp_path / "in use")) == files["b"]
    assert stored_bytes(qlite.save_adapter(model, tmp_path / "named", name="a")) == files["a"]
    assert adapters_of(model).active == "b" and stored_bytes(qlite.save_adapter(model, tmp_path / "again")) == files["b"]
    qlite.set_adapter(model, None)
    with pytest.raises(ValueError, match="save_adapter: no adapter is in use; name one of 'a', 'b'"):
        qlite.save_adapter(model, tmp_path / "neither")
    assert stored_bytes(qlite.save_adapter(model, tmp_path / "of the base", name="b")) == files["b"]
    assert adapters_of(model).active is None and not (tmp_path / "neither").exists()


def test_only_the_one_in_use_is_trained(tmp_path):
    model, _ = two(PAIRS["dora and whole modules"], tmp_path, qlite.Linear4bit)
    qlite.set_adapter(model, "a")
    before = {}
    for name in "ab":
        qlite.set_adapter(model, name)
        before[name] = tensors(model)
    qlite.set_adapter(model, "a")
    others = qlite.AdamW8bit(qlite.lora_parameters(model), lr=1e-2)
    qlite.set_adapter(model, "b")
    ids = tokens_of(model.config, 2, 9)
    run = {"steps": 2, "accumulate": 1, "progress": False}
    with pytest.raises(ValueError, match="the optimizer lacks"):
        qlite.finetune(model, [Batch(ids, ids, 18)], others, **run)
    qlite.finetune(model, [Batch(ids, ids, 18)], qlite.AdamW8bit(qlite.lora_parameters(model), lr=1e-2), **run)
    trained = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before["b"][name])}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    qlite.set_adapter(model, "a")
    assert same(tensors(model), before["a"])


def test_add_lora_makes_a_second_one_on_the_bare_base():
    model, alone = base_of(qlite.Linear4bit), base_of(qlite.Linear4bit)
    first = qlite.add_lora(model, qlite.LoRAConfig(r=2, targets=["dense"]), seed=1, name="first")
    whole_moved(model, 0.3)
    said = logits(model)
    assert qlite.add_lora(model, qlite.LoRAConfig(r=2, targets=["dense"]), seed=2) == first
    qlite.add_lora(alone, qlite.LoRAConfig(r=2, targets=["dense"]), seed=2)
    assert torch.equal(logits(model), logits(base_of(qlite.Linear4bit))) and same(tensors(model), tensors(alone))
    assert list(adapters_of(model).adapters) == ["first", "default"]
    qlite.set_adapter(model, "first")
    assert torch.equal(logits(model), said)


def test_without_an_adapter_in_use_nothing_is_trained(tmp_path):
    model, _ = two(PAIRS["alike"], tmp_path)
    qlite.set_adapter(model, None)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="lora_parameters: no adapter is in use; name one of 'a', 'b', or choose it by set_ad"):
        qlite.lora_parameters(model)


def test_loading_by_a_name_that_is_taken_replaces_that_one(tmp_path):
    model, alone = two(PAIRS["of other ranks and layers"], tmp_path)
    another = base_of()
    adapt(another, seed=7, targets=["query_key_value"], r=2, alpha=3.0)
    qlite.save_adapter(another, tmp_path / "c")
    assert qlite.load_adapter(model, tmp_path / "c", name="a") is None
    assert torch.equal(logits(model), logits(another)) and adapters_of(model).active == "a"
    qlite.set_adapter(model, "b")
    assert torch.equal(logits(model), logits(alone["b"]))
    qlite.set_adapter(model, "a")
    assert torch.equal(logits(model), logits(another)) and model.lora_config.alpha == 3.0


# Merging.


@pytest.mark.parametrize("in_use", ["a", "b", None])
def test_merging_takes_the_one_in_use_or_the_one_that_is_named_and_no_other(in_use, tmp_path):
    model, alone = two(PAIRS["of other ranks and layers"], tmp_path, qlite.Linear4bit)
    qlite.set_adapter(model, in_use)
    before = tensors(model)
    with pytest.raises(ValueError, match="merge_adapter: the model has 'b' too, made for the base as it is; delete_adapter fi"):
        qlite.merge_adapter(model, name="a")
    qlite.save_merged(model, tmp_path / "merged", name="a")
    qlite.save_merged(alone["a"], tmp_path / "wanted")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(tmp_path / "wanted")
    assert same(tensors(model), before) and adapters_of(model).active == in_use
    qlite.delete_adapter(model, "b")
    report = qlite.merge_adapter(model, name="a")
    assert report == qlite.merge_adapter(alone["a"]) and not adapters_of(model).adapters
    assert torch.equal(logits(model), logits(alone["a"]))
    qlite.add_lora(model, qlite.LoRAConfig(r=2), name="a")


def test_a_merge_that_is_refused_leaves_the_adapter_that_was_in_use():
    model = base_of()
    adapt(model)
    first = next(iter(adapted(model).values()))
    first.lora_A.data.fill_(10.0)
    first.lora_B.data.fill_(3e38)
    qlite.set_adapter(model, None)
    with pytest.raises(ValueError, match="becomes non-finite"):
        qlite.merge_adapter(model, name="default")
    assert adapters_of(model).active is None and not adapted(model)
    with pytest.raises(ValueError, match="merge_adapter: no adapter is in use; name one of 'default'"):
        qlite.merge_adapter(model)


# What happens to the model meanwhile.


def test_a_base_that_is_encoded_meanwhile_is_the_base_of_all(tmp_path):
    model, alone = two(PAIRS["of other ranks and layers"], tmp_path)
    qlite.set_adapter(model, None)
    qlite.quantize_model(model)
    for name in "ab":
        qlite.set_adapter(model, name)
        qlite.quantize_model(alone[name])
        assert torch.equal(logits(model), logits(alone[name]))


def test_what_waits_follows_the_model_to_another_dtype_and_mode(tmp_path):
    model, alone = two(PAIRS["dora and whole modules"], tmp_path)
    model.bfloat16().train()
    qlite.set_adapter(model, "a")
    qlite.set_adapter(model, "b")
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(alone["b"].bfloat16().train()))
    qlite.set_adapter(model, None)
    model.float().eval()
    qlite.set_adapter(model, "b")
    assert model.lm_head.weight.dtype == torch.float32 and not any(module.training for module in model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("between", ["a", None])
def test_what_waits_follows_the_model_to_another_device(between, tmp_path):
    model, _ = two(PAIRS["dora and whole modules"], tmp_path)
    qlite.set_adapter(model, between)
    model.cuda()
    for name in "ab":
        qlite.set_adapter(model, name)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
        assert model(tokens_of(model.config, 1, 4).cuda()).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_that_lives_in_host_memory_goes_from_one_adapter_to_another(tmp_path):
    model, alone = two(PAIRS["of other ranks and layers"], tmp_path, qlite.Linear4bit)
    qlite.place_model(model, {"": "cuda", "transformer.h": "cpu"}, compute="cuda")
    ids = tokens_of(model.config, 2, 7).cuda()
    for name in "ab":
        qlite.set_adapter(model, name)
        assert torch.equal(model(ids), alone[name].cuda()(ids))
        assert {parameter.device.type for parameter in qlite.lora_parameters(model)} == {"cuda"}


def test_the_base_alone_is_written_as_a_checkpoint(tmp_path):
    model, _ = two(PAIRS["dora and whole modules"], tmp_path, qlite.Linear4bit)
    with pytest.raises(ValueError, match="the model carries adapters"):
        qlite.save_checkpoint(model, tmp_path / "new")
    qlite.set_adapter(model, None)
    qlite.save_checkpoint(model, tmp_path / "new")
    qlite.save_checkpoint(base_of(qlite.Linear4bit), tmp_path / "wanted")
    assert stored_bytes(tmp_path / "new") == stored_bytes(tmp_path / "wanted")


def test_a_copy_switches_by_itself(tmp_path):
    model, alone = two(PAIRS["dora and whole modules"], tmp_path)
    twin = copy.deepcopy(model)
    qlite.set_adapter(twin, "a")
    whole_moved(twin, 0.5)
    assert torch.equal(logits(model), logits(alone["b"])) and adapters_of(model).active == "b"
    qlite.set_adapter(model, "a")
    assert torch.equal(logits(model), logits(alone["a"]))


# What is refused leaves all as it was.


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda model, folder: qlite.set_adapter(model, "c"), "set_adapter: the model has no adapter 'c'; it has 'a', 'b'"),
        (
            lambda model, folder: qlite.delete_adapter(model, "c"),
            "delete_adapter: the model has no adapter 'c'; it has 'a', 'b'",
        ),
        (lambda model, folder: qlite.save_adapter(model, folder / "new", name="c"), "save_adapter: .* no adapter 'c'"),
        (lambda model, folder: qlite.save_merged(model, folder / "new", name="c"), "save_merged: .* no adapter 'c'"),
        (lambda model, folder: qlite.merge_adapter(model, name="c"), "merge_adapter: .* no adapter 'c'"),
        (lambda model, folder: qlite.add_lora(model, qlite.LoRAConfig(), name="a"), "has adapters already, named 'a'"),
        (lambda model, folder: qlite.add_lora(model, qlite.LoRAConfig(targets=["no"]), name="c"), "matches no linear layer"),
        (lambda model, folder: qlite.load_adapter(model, folder / "b", name="a"), "another name than 'a'"),
        (lambda model, folder: qlite.load_adapter(model, folder / "of another", name="c"), "made for another base"),
    ],
    ids=["set", "delete", "save", "write merged", "merge", "taken", "no such target", "another kind", "another base"],
)
@pytest.mark.parametrize("in_use", ["a", "b", None])
def test_what_is_refused_leaves_the_one_in_use(in_use, refused, words, tmp_path):
    model, _ = two(PAIRS["of other ranks and layers"], tmp_path)
    another = base_of(flavour="180b")
    adapt(another)
    qlite.save_adapter(another, tmp_path / "of another")
    qlite.set_adapter(model, in_use)
    before, trained = tensors(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=words):
        refused(model, tmp_path)
    assert adapters_of(model).active == in_use and list(adapters_of(model).adapters) == ["a", "b"]
    assert same(tensors(model), before) and [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not (tmp_path / "new").exists()


def test_a_model_without_adapters_has_none_to_choose():
    with pytest.raises(ValueError, match="set_adapter: the model has no adapter 'a'; it has none"):
        qlite.set_adapter(base_of(), "a")


def test_a_name_is_not_in_the_files(tmp_path):
    model, _ = two(PAIRS["alike"], tmp_path)
    qlite.save_adapter(model, tmp_path / "c", name="a")
    assert "a" not in json.loads((tmp_path / "c" / CONFIG).read_text()).values()
