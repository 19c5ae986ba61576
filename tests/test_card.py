"""The model card: valid, made of facts, and with code that says what the facts say."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from qlite.card import model_card
from qlite.lora import LoRAConfig

NF4 = {"format": "nf4", "block_size": 64, "double_quant": True}
TRAINING = {
    "versions": {"qlite": None, "torch": "2.13.0"},
    "dtype": "torch.bfloat16",
    "layers": [{**NF4, "count": 128}],
    "optimizer": {"name": "PagedAdamW8bit", "lr": 2e-4, "weight_decay": 0.0},
    "steps": 80, "accumulate": 4, "schedule": "cosine", "warmup": 0.05, "max_grad_norm": 1.0, "seed": 3,
    "loss": {"first": 2.34567, "last": 0.12345},
    "questions": 82, "batch_size": 1, "prompt": "Question: {question}\nAnswer:",
}  # fmt: skip
LAYER = "transformer.h.0.self_attention.query_key_value"


def card(training=TRAINING, *, config=None, layer=LAYER, curve=None, **values):
    base = {"base_model_name_or_path": "tiiuae/falcon-7b", "task_type": "CAUSAL_LM"}
    values = {**base, "target_modules": ["query_key_value"], **values}
    config = config or LoRAConfig(r=16, alpha=32.0, dropout=0.05)
    return model_card("me/faq", config, values, training, layers=[layer], parameters=2048, curve=curve)


def codes(text):
    found = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 2
    for code in found:
        ast.parse(code)
    return found


@pytest.mark.parametrize("training", [{}, TRAINING], ids=["bare", "of a run"])
def test_the_front_matter_is_what_the_hub_reads(training):
    data = ModelCard(card(training)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("tiiuae/falcon-7b", "peft", "text-generation")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.tags == (["lora", "qlora", "qlite"] if training else ["lora", "qlite"])


def test_the_facts_of_the_run_are_in_the_table():
    said = card()
    assert "| base | `tiiuae/falcon-7b` |" in said
    assert "r=16, alpha=32, dropout 0.05; 2,048 parameters" in said and "| on | `query_key_value` |" in said
    assert "format nf4, block_size 64, double_quant True; computed in bfloat16" in said
    assert "82 questions with answers" in said and "80 of 4 x 1 rows; seed 3" in said
    assert "PagedAdamW8bit, learning rate 0.0002, weight_decay 0.0" in said
    assert "cosine, warm-up over 5 % of the steps, gradients clipped to norm 1" in said
    assert "2.3457 in the first step, 0.1235 in the last" in said
    assert "| made with | torch 2.13.0 |" in said  # and no version that nobody knows


def test_an_adapter_of_another_kind_says_so():
    config = LoRAConfig(rslora=True, dora=True, rank_pattern={"dense": 4}, modules_to_save=("lm_head",))
    row = next(line for line in card(config=config).splitlines() if line.startswith("| adapter |"))
    assert "rsLoRA, DoRA, r=16" in row and 'rank_pattern {"dense": 4}; saved whole ["lm_head"]' in row
    assert "alpha_pattern" not in row and "DoRA" not in card()


def test_a_card_without_a_run_claims_none():
    said = card({})
    words = ("loss", "optimizer", "steps", "questions", "trained with", "Prompt", "tokenizer", "quantize", "None")
    assert not [word for word in words if word in said]


@pytest.mark.parametrize("curve", [None, "loss.png"])
def test_the_curve_is_shown_where_there_is_one(curve):
    assert ("](loss.png)" in card(curve=curve)) == (curve is not None)


@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_the_commit_of_the_base_is_in_the_code(revision):
    text = card(revision=revision)
    assert all(code.count(f'"tiiuae/falcon-7b", revision="{revision}"') == (2 if revision else 0) for code in codes(text))
    assert (f"at `{revision}`" in text) == (revision is not None)


@pytest.mark.parametrize(
    ("layers", "argument"),
    [
        ([NF4], ", quantize=qlite.Linear4bit, "),
        ([{**NF4, "block_size": 128}], ", quantize=functools.partial(qlite.Linear4bit, block_size=128), "),
        ([{**NF4, "double_quant": False}], ", quantize=functools.partial(qlite.Linear4bit, double_quant=False), "),
        ([{**NF4, "format": "fp4"}], ', quantize=functools.partial(qlite.Linear4bit, levels="fp4"), '),
        ([{"format": "int8"}], ", quantize=qlite.Linear8bit, "),
        ([], '"tiiuae/falcon-7b", device'),
        ([NF4, {"format": "int8"}], '"tiiuae/falcon-7b", device'),
        ([{**NF4, "format": "custom4", "levels": [0.0] * 16}], '"tiiuae/falcon-7b", device'),
    ],
)
def test_qlite_loads_the_base_as_it_was_in_training(layers, argument):
    code = codes(card({**TRAINING, "layers": [{**kind, "count": 1} for kind in layers]}))[0]
    assert argument in code and "dtype=torch.bfloat16" in code
    assert ("functools" in code) == ("import functools" in code)


def test_a_base_that_is_no_falcon_is_not_loaded_as_one():
    assert "load_falcon" not in card(layer="model.layers.0.self_attn.q_proj") and "load_falcon" in card()


@pytest.mark.parametrize("targets", [r"a\.query|b\.dense", "x\n---\ny"])
def test_targets_of_any_form_stay_in_their_cell(targets):
    rows = [line for line in card(target_modules=targets).splitlines() if line.startswith("| on |")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 3
