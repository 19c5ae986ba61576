"""The output layer encoded: the head of the weight that it was, the error that the report says, files, training, merging."""

import functools

import pytest
import torch
from torch import nn

import qlite
from qlite.data import ASSETS, Batch
from tests.adapted import adapt
from tests.falcons import FLAVOURS, falcon_of, talker_of, tokens_of

HEADS = {
    "int8": qlite.Linear8bit,
    "nf4": qlite.Linear4bit,
    "nf4 in blocks of 32": functools.partial(qlite.Linear4bit, block_size=32),
}
heads = pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)


@heads
@pytest.mark.parametrize("flavour", ["7b", "11b", "rw"])
def test_the_head_is_that_of_the_encoded_weight_and_all_else_is_as_it_was(flavour, kind):
    model = falcon_of(FLAVOURS[flavour])
    twin = falcon_of(FLAVOURS[flavour])
    report = qlite.quantize_head(model, kind)
    encoded = kind(48, 61, bias=False).quantize_(twin.lm_head.weight.detach())
    ids = tokens_of(model.config, 2, 7)
    assert torch.equal(model(ids), encoded(twin.hidden_states(ids)))
    assert torch.equal(model.transformer.word_embeddings.weight, twin.transformer.word_embeddings.weight)
    assert isinstance(model.transformer.word_embeddings, nn.Embedding)
    assert report.tied is twin.config.tie_word_embeddings and not model.config.tie_word_embeddings
    assert (report.before, report.after) == (4 * 48 * 61, encoded.encoded_bytes())


@heads
@pytest.mark.parametrize("given", [True, False])
def test_the_report_says_how_far_the_logits_are_off(kind, given):
    model, twin = talker_of(FLAVOURS["7b"]), talker_of(FLAVOURS["7b"])
    tokens = tokens_of(model.config, 3, 40) if given else None
    report = qlite.quantize_head(model.train(), kind, tokens=tokens)
    if tokens is None:
        tokens = torch.randint(61, (4, 64), generator=torch.Generator().manual_seed(0))
    dense, found = twin(tokens).flatten(0, 1), model(tokens).flatten(0, 1)
    assert model.training and report.tokens == tokens.numel()
    assert report.error == pytest.approx(((found - dense).norm() / dense.norm()).item(), rel=1e-5)
    assert report.largest == pytest.approx((found - dense).abs().max().item(), rel=1e-5)
    assert report.changed == (found.argmax(1) != dense.argmax(1)).sum() < report.tokens / 2
    # int8: a step of absmax / 127, over the root of 12; absmax of 48 normal weights is 2.5 or so. NF4: the root of 0.0085.
    low, high = (0.002, 0.012) if kind is qlite.Linear8bit else (0.05, 0.15)
    assert low < report.error < high
    assert f"differ by {100 * report.error:.2g} % in norm" in str(report)


def test_the_report_says_whose_memory_is_whose():
    assert "beside the embedding's 0.0 MB, which it was" in str(qlite.quantize_head(falcon_of(FLAVOURS["7b"])))
    assert "head in int8: 0.0 MB -> 0.0 MB" in str(qlite.quantize_head(falcon_of(FLAVOURS["11b"])))


def test_it_is_a_choice_of_loading():
    model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit, head=qlite.Linear8bit, dtype=torch.float32)
    twin = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit, dtype=torch.float32)
    assert "lm_head left dense" in str(twin.load_report) and "lm_head" not in str(model.load_report)
    assert model.head_report == qlite.quantize_head(twin) and not hasattr(twin, "head_report")
    ids = tokens_of(model.config, 1, 9)
    assert torch.equal(model(ids), twin(ids)) and not model.training


@pytest.mark.parametrize("tokens", [0, 3])
def test_answers_and_guesses_go_through_it(tokens):
    model = talker_of(FLAVOURS["7b"])
    qlite.quantize_head(model, qlite.Linear4bit)
    text = [1, 2, 3, 1, 2]
    wanted = []
    for _ in range(12):
        wanted.append(int(model(torch.tensor([text + wanted]))[0, -1].argmax()))
    assert qlite.generate(model, text, max_new_tokens=12, eos_token_id=None, prompt_lookup=tokens) == wanted


@heads
@pytest.mark.parametrize("quantize", [None, qlite.Linear4bit])
def test_a_checkpoint_keeps_it(quantize, kind, tmp_path):
    model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=quantize, head=kind, dtype=torch.float32)
    qlite.save_checkpoint(model, tmp_path / "small")
    again = qlite.load_falcon(tmp_path / "small", dtype=torch.float32)
    ids = tokens_of(model.config, 1, 9)
    assert torch.equal(again(ids), model(ids)) and again.lm_head.config() == model.lm_head.config()
    assert again.base_fingerprint == model.base_fingerprint
    with pytest.raises(ValueError, match="quantize_head: lm_head is a Linear"):
        qlite.load_falcon(tmp_path / "small", head=kind)


def test_training_goes_through_it_and_leaves_it_alone():
    model = falcon_of(FLAVOURS["7b"])
    qlite.quantize_head(model)
    adapt(model)
    ids, codes = tokens_of(model.config, 2, 9), model.lm_head.weight.clone()
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model), lr=1e-2)
    result = qlite.finetune(model, [Batch(ids, ids, 18)], optimizer, steps=8, accumulate=1, progress=False)
    assert result.losses[-1] < result.losses[0] and torch.equal(model.lm_head.weight, codes)


@pytest.mark.parametrize("original", [None, ASSETS / "tiny-falcon"], ids=["decoded", "original"])
def test_merging_writes_it_dense(original, tmp_path):
    model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit, head=qlite.Linear8bit, dtype=torch.float32)
    adapt(model, targets=["dense"])
    qlite.save_merged(model, tmp_path / "merged", original=original)
    merged = qlite.load_falcon(tmp_path / "merged", dtype=torch.float32)
    wanted = model.lm_head.dequantize() if original is None else merged.transformer.word_embeddings.weight
    assert torch.equal(merged.lm_head.weight, wanted) and not merged.config.tie_word_embeddings


def with_adapter_on_the_head():
    model = falcon_of(FLAVOURS["7b"])
    adapt(model, targets=["lm_head"])
    return model


def with_trained_head():
    model = falcon_of(FLAVOURS["7b"])
    adapt(model, targets=["dense"], modules_to_save=["lm_head"])
    return model


def encoded_twice():
    model = falcon_of(FLAVOURS["7b"])
    qlite.quantize_head(model)
    return model


def test_an_adapter_that_trains_the_head_whole_has_its_own_again_after_it_was_encoded():
    model = with_trained_head()
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    ids = tokens_of(model.config, 1, 6)
    said = model(ids)
    qlite.set_adapter(model, None)
    qlite.quantize_head(model)
    qlite.set_adapter(model, "default")
    assert torch.equal(model(ids), said)
    qlite.set_adapter(model, None)
    assert isinstance(model.lm_head, qlite.Linear8bit)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (with_adapter_on_the_head, "lm_head is a LoRALinear; wanted a dense layer: encode it before add_lora"),
        (with_trained_head, "lm_head is trained whole by the adapter in use"),
        (encoded_twice, "lm_head is a Linear8bit; wanted a dense layer"),
        (lambda: qlite.Falcon(FLAVOURS["7b"], device="meta"), "lm_head is on meta"),
    ],
)
def test_what_cannot_be_encoded_is_refused(made, words):
    model = made()
    head = model.lm_head
    with pytest.raises(ValueError, match=f"quantize_head: {words}"):
        qlite.quantize_head(model)
    assert model.lm_head is head
