"""transformers' own models, quantized, adapted, trained and saved by qlite: the numbers are those of a dense twin.

The twin is a model of transformers alone, whose weights are the decoded ones. In float32 the two do the same products, in
an order of their own; so logits and greedy tokens are compared, and not only seen to be near.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import qlite
from qlite.data import collate
from qlite.experts import ExpertStack
from qlite.linear import QuantizedLinear
from qlite.lora import LoRALinear
from qlite.train import answer_loss

# peft asks transformers for an attribute by its old name, and mends its own config where a layer is a Conv1D. The older name
# of gradient checkpointing is the one that all versions of transformers know.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]
#: Of float32 logits that stay under 4: 84 units of 2^-23 there. Two blocks of up to eight matrix products one after the
#: other, sums of at most 256 terms, whose roundings mostly cancel. Measured: 0 without adapters, under 2e-6 with them.
LOGITS = 1e-5
VOCABULARY = 96
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"vocab_size": VOCABULARY, **SIZES, "intermediate_size": 112}
GROUPED = {**LLAMA, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {**GROUPED, "head_dim": 16}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**HEADS),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**LLAMA),
    "falcon": lambda: transformers.FalconConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **SIZES),
    "gemma": lambda: transformers.GemmaConfig(**HEADS),
    "gemma2": lambda: transformers.Gemma2Config(**HEADS, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**HEADS, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**GROUPED, **MIXTURE, shared_expert_intermediate_size=64),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**HEADS, **MIXTURE),
    "t5": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
    "flan_t5": lambda: transformers.T5Config(
        **T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
}
#: Every layer that qlite encodes, by the last part of its name. T5's wo stays dense.
TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2_moe": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "shared_expert_gate"],
    "t5": ["q", "k", "v", "o", "wi"],
    "flan_t5": ["q", "k", "v", "o", "wi_0", "wi_1"],
}
LLAMAS_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
ENCODER_DECODERS = ["t5", "flan_t5"]
DECODERS = [name for name in CONFIGS if name not in ENCODER_DECODERS]
names = pytest.mark.parametrize("name", CONFIGS)
decoders = pytest.mark.parametrize("name", DECODERS)
mixtures = pytest.mark.parametrize("name", MIXTURES)


def tokens(*shape, seed=5):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def dense_of(name, dtype=torch.float32, attention=None):
    """A model of random weights, which are large and its embeddings small, so that it says more than one token."""
    kind = transformers.AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind.from_config(CONFIGS[name](), dtype=dtype, attn_implementation=attention).eval()
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
                weight.data.normal_(std=weight.shape[-1 if isinstance(module, nn.Linear) else 0] ** -0.5)
                if path.endswith(".q"):  # T5's attention has the root of the head's size in these weights
                    weight.data.mul_(model.config.d_kv**-0.5)
            elif isinstance(module, nn.Embedding):
                weight.data.normal_(std=0.05)
    return model


@functools.cache
def _encoded(name, kind, dtype, attention):
    model = dense_of(name, dtype, attention)
    return model, qlite.quantize_model(model, kind)


def encoded_of(name, kind=qlite.Linear4bit, dtype=torch.float32, attention=None):
    """A fresh copy of the encoded model; encoding is done once."""
    return copy.deepcopy(_encoded(name, kind, dtype, attention)[0])


def decoded_state(model):
    """The state dict of a model of transformers alone, from an encoded one with or without adapters."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, ExpertStack)):
            path = name.removesuffix(".base")
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.") or key.endswith(".bias")}
            state[path if isinstance(module, ExpertStack) else f"{path}.weight"] = module.dequantize()
    return {key.replace(".base.", "."): value for key, value in state.items() if ".lora_" not in key}


def twin_of(model, name, dtype=torch.float32, attention=None):
    """The dense model of transformers whose weights are the decoded ones of `model`."""
    twin, state = dense_of(name, dtype, attention), decoded_state(model)
    for path, module in twin.named_modules():
        if isinstance(module, Conv1D):
            state[f"{path}.weight"] = state[f"{path}.weight"].T
    twin.load_state_dict(state, strict=True)
    return twin


def logits_of(model, ids):
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids[:, :7]).logits
    return model(input_ids=ids).logits


def adapt(model, name, seed=None, **options):
    options = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS.get(name, LLAMAS_TARGETS), **options}
    report = qlite.add_lora(model, qlite.LoRAConfig(**options), seed=1)
    if seed is not None:  # adapters that do something
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.data = torch.randn(module.lora_B.shape, generator=generator) * 0.1
    return report


def say(model, ids, count=12):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, max_new_tokens=count, **options)


# What an encoded model computes


@names
@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
@torch.no_grad()
def test_logits_are_those_of_the_decoded_model_and_near_the_dense_one(name, kind):
    model, ids = encoded_of(name, kind), tokens(2, 12)
    found, before = logits_of(model, ids), logits_of(dense_of(name), ids)
    torch.testing.assert_close(found, logits_of(twin_of(model, name), ids), rtol=0, atol=LOGITS)
    error = ((found - before).norm() / before.norm()).item()
    # NF4 errs by 9 % of a weight's norm, int8 by 0.7 %, and each of a chain of products adds its own: twenty of them in
    # quadrature are 0.4 and 0.03. Measured: up to 0.31 and 0.026. A layer with another's weight gives more than 1.
    assert 0 < error < (0.4 if kind is qlite.Linear4bit else 0.03), error


@names
def test_generate_says_the_tokens_of_the_decoded_model(name):
    model, ids = encoded_of(name), tokens(2, 6)
    found = say(model, ids)
    assert torch.equal(found, say(twin_of(model, name), ids))
    assert len(set(found[:, -12:].flatten().tolist())) > 2  # no constant that any two models would agree on


@pytest.mark.parametrize(
    ("name", "attention"),
    # transformers has no sdpa for Gemma 2, whose attention logits are capped.
    [(name, way) for name in CONFIGS for way in ("eager", "sdpa") if (name, way) != ("gemma2", "sdpa")],
)
@torch.no_grad()
def test_bfloat16_and_both_attentions_run_and_agree_with_the_decoded_model(name, attention):
    model, ids = encoded_of(name, dtype=torch.bfloat16, attention=attention), tokens(2, 12)
    found = logits_of(model, ids)
    assert found.dtype == model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    wanted = logits_of(twin_of(model, name, torch.bfloat16, attention), ids)
    # The products are those of the same bfloat16 weights, rounded the same way: 2 units of 2^-8 of the norm.
    assert (found - wanted).float().norm() <= 2**-7 * wanted.float().norm()


@names
def test_embeddings_heads_and_their_ties_stay_dense(name):
    model, dense = encoded_of(name), dense_of(name)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        found, wanted = getattr(model, get)(), getattr(dense, get)()
        assert type(found) is type(wanted) and torch.equal(found.weight, wanted.weight)
    ties = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, dense)]
    assert ties[0] is ties[1]
    model.tie_weights()
    said = model.config.to_dict()
    assert said.pop("quantization_config")["format"] == "qlite" and said == dense.config.to_dict()
    assert model.num_parameters() > 0


@names
def test_every_byte_is_in_the_report_once(name):
    report, dense = _encoded(name, qlite.Linear4bit, torch.float32, None)[1], dense_of(name)
    sizes = sum(before for before, _ in report.quantized.values()) + sum(size for size, _ in report.skipped.values())
    assert sizes == sum(p.nbytes for p in dense.parameters())
    # Embeddings, head, norms, routers, and T5's wo; these models are small, and their embeddings the more.
    assert report.dense_share < 0.25
    linears = {n for n, m in dense.named_modules() if isinstance(m, (nn.Linear, Conv1D))} - {"lm_head"}
    left = {n for n in linears if n.endswith(".wo")}
    stacks = {n for n, p in dense.named_parameters() if p.ndim == 3}
    assert set(report.quantized) == linears - left | stacks and set(report.experts) == stacks


# Training


def loss_of(model, ids):
    labels = {"labels": ids[:, :7].contiguous()} if model.config.is_encoder_decoder else {"labels": ids}
    return model(input_ids=ids, **labels).loss


@names
def test_training_with_checkpointing_lowers_the_loss_and_leaves_the_base_alone(name):
    model, ids = encoded_of(name), tokens(2, 12)
    adapt(model, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=5e-2, weight_decay=0.0)
    model.gradient_checkpointing_enable()
    model.train()
    losses = []
    for _ in range(4):
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 2:  # the first step moves lora_B alone, which starts at zero
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in qlite.lora_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if ".lora_" in key}


@names
def test_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model = encoded_of(name).train()
        adapt(model, name, seed=2)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model, tokens(2, 12)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in qlite.lora_parameters(model)]))
    # T5 sums the gradients of its shared position bias in another order, encoded or not: 9e-7; for the others it is 0.
    assert (gradients[0] - gradients[1]).norm() <= (1e-5 if name in ENCODER_DECODERS else 0) * gradients[0].norm()


@names
def test_the_gradient_of_the_input_is_that_through_the_decoded_weights(name):
    model = encoded_of(name)
    twin = twin_of(model, name)
    gradients = []
    for which in (model, twin):
        which.requires_grad_(False)
        inputs = which.get_input_embeddings().weight.requires_grad_(True)
        loss_of(which.train(), tokens(2, 12)).backward()
        gradients.append(inputs.grad)
    # Relative Frobenius error; chains of sums of at most 256 float32 products.
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm() > 0


# Adapters


@names
def test_peft_opens_the_adapter_on_the_dense_model_with_the_same_logits(name, tmp_path):
    model, ids = encoded_of(name), tokens(2, 12)
    with torch.no_grad():
        before = logits_of(model, ids)
    report = adapt(model, name, seed=2)
    qlite.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin_of(model, name), tmp_path).eval()
    layers = {
        n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert layers == set(report.targets)
    with torch.no_grad():
        found = logits_of(model.eval(), ids)
        torch.testing.assert_close(found, logits_of(theirs, ids), rtol=0, atol=LOGITS)
    assert (found - before).abs().max() > 0.05  # far above the tolerance, or the test says nothing


@decoders
def test_an_adapter_of_ours_is_loaded_onto_a_fresh_encoded_model(name, tmp_path):
    model, ids = encoded_of(name), tokens(2, 12)
    adapt(model, name, seed=2)
    again = encoded_of(name)
    qlite.load_adapter(again, qlite.save_adapter(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(logits_of(again.eval(), ids), logits_of(model.eval(), ids))


# Mixtures of experts


@mixtures
def test_an_encoded_stack_of_experts_refuses_to_be_used_as_a_whole(name):
    model = encoded_of(name)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(AttributeError, match=r"ExpertStack: .*set_experts_implementation\('eager'\)"):
        logits_of(model, tokens(1, 4))


@mixtures
def test_training_keeps_codes_of_experts_and_no_decoded_matrix(name):
    model, kept = encoded_of(name), []
    adapt(model, name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(model, tokens(2, 12))
    stacks = [m for m in model.modules() if isinstance(m, ExpertStack)]
    shapes = {tuple(stack.dequantize().shape) for stack in stacks}
    matrices = {shape[1:] for shape in shapes} | {shape[:0:-1] for shape in shapes}
    codes = {row.data_ptr() for stack in stacks for row in stack.weight}
    assert not [t for t in kept if t.is_floating_point() and (t.shape in shapes or t.shape in matrices)]
    assert len(codes & {t.data_ptr() for t in kept}) > len(stacks)


def peak_of_a_step(model):
    """The most bytes that torch's allocator had given out at once in a training step, above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(model, tokens(2, 32)).backward()
    events = profiler.profiler.kineto_results.events()
    taken = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in taken))


def test_a_training_step_takes_a_few_decoded_matrices_more_than_over_dense_experts():
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8, "vocab_size": 128}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**GROUPED, **shape}))
    dense = copy.deepcopy(model)
    dense.set_experts_implementation("eager")
    qlite.quantize_model(model)
    for which in (dense, model):
        adapt(which, "mixtral")
    matrix = 4 * 2 * 512 * 256
    # Measured: 1.5 matrices more. One stack of one layer is eight, and two layers have four stacks.
    assert peak_of_a_step(model) < peak_of_a_step(dense) + 3 * matrix
    encoded = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert encoded < 0.2 * sum(p.nbytes for p in dense.parameters())


def test_without_their_stacks_nine_tenths_of_a_mixture_would_stay_dense_and_the_report_says_so():
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8, "vocab_size": 128}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**GROUPED, **shape}))
    total = sum(p.nbytes for p in model.parameters())
    stacks = sum(p.nbytes for p in model.parameters() if p.ndim == 3)
    report = qlite.quantize_model(model, skip=["lm_head", "experts"])
    assert report.dense_share == pytest.approx(1 - sum(b for b, _ in report.quantized.values()) / total)
    first = str(report).splitlines()[1:3]
    assert first == [
        f"left dense: {100 * report.dense_share:.1f} % of the bytes",
        f"left 4 x {stacks / 1e6:,.1f} MB: named in skip (experts)",
    ]
    assert report.dense_share > 0.9


# What reads the weight of a layer, and what writes it


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_reads_the_dtype_of_wo_which_stays_dense(name, dtype):
    model = encoded_of(name, dtype=dtype)
    kept = [module for path, module in model.named_modules() if path.endswith(".wo")]
    assert len(kept) == 4 and all(type(module) is nn.Linear for module in kept)
    assert logits_of(model, tokens(2, 12)).dtype == dtype


@names
def test_all_linear_adapts_every_architecture_and_counts_the_weights_it_stands_for(name):
    model = encoded_of(name)
    total = sum(p.numel() for p in dense_of(name).parameters())
    report = adapt(model, name, targets="all-linear", seed=2)
    assert report.total == total + report.trainable and not any(target.endswith("lm_head") for target in report.targets)
    assert bool(torch.isfinite(logits_of(model, tokens(2, 12))).all())


@names
@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_what_save_pretrained_writes_of_an_encoded_model_is_refused_when_it_is_loaded(name, kind, tmp_path):
    # The codes of eight bits have the shape of the weight, and would be taken for it.
    model = encoded_of(name, kind)
    if name in MIXTURES and kind is qlite.Linear4bit:
        with pytest.raises(ValueError, match="Undefined Operation"):  # of its way from stacks back to the files' matrices
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `quant_method` attribute"):
        type(model).from_pretrained(tmp_path)


@torch.no_grad()
def test_after_a_merge_the_config_says_what_is_still_encoded_and_save_pretrained_writes_the_rest_dense(tmp_path):
    model, ids = encoded_of("llama", qlite.Linear8bit), tokens(2, 12)
    adapt(model, "llama", seed=2, targets=["q_proj"])
    qlite.merge_adapter(model)
    assert len(model.config.quantization_config["layers"]) == 12  # seven in each of two blocks, less q_proj
    model = encoded_of("llama", qlite.Linear8bit)
    adapt(model, "llama", seed=2)
    qlite.merge_adapter(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path), ids), logits_of(model, ids))


# Our loop

ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14, 15]), ([16, 17], [18])]


@decoders
def test_the_loss_of_a_padded_batch_is_that_of_its_rows_alone(name):
    model = encoded_of(name).double() if name not in MIXTURES else encoded_of(name)
    with torch.no_grad():
        together = answer_loss(model, collate(ROWS)).item()
        alone = sum(answer_loss(model, collate([row])).item() for row in ROWS)
        logits = model(input_ids=collate(ROWS).input_ids).logits.float()
    # The loss is a float32 sum of eight terms; one token more or less would be off by 5 %.
    assert together == pytest.approx(alone, rel=1e-5)
    labels = collate(ROWS).labels[:, 1:].flatten()
    wanted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    assert together == pytest.approx(wanted.item(), rel=1e-5)


@decoders
def test_our_loop_trains_it(name):
    model = encoded_of(name)
    adapt(model, name)
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=5e-2, weight_decay=0.0)
    batches = [collate(ROWS[:2]), collate(ROWS[2:])]
    model.gradient_checkpointing_enable()
    result = qlite.finetune(model, batches, optimizer, steps=6, accumulate=2, progress=False)
    assert result.losses[-1] < result.losses[0] - 0.3 and result.skipped == 0 and not model.training
    assert result.facts["gradient_checkpointing"] is True


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_our_loop_resumes_it_bit_for_bit(name, tmp_path):
    states, counts = [], []
    for folder, stop in (("whole", None), ("parts", 3), ("parts", None)):
        model, done = encoded_of(name), []
        adapt(model, name, dropout=0.1)
        optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-2)

        def count(*_, done=done, stop=stop):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(1)

        optimizer.register_step_pre_hook(count)
        batches = qlite.data.FAQBatches(PAIRS, tokenizer_of(), batch_size=2, end_of_text="</s>")
        options = {"steps": 6, "accumulate": 1, "progress": False, "save_every": 1, "resume": True}
        with contextlib.suppress(KeyboardInterrupt):
            qlite.finetune(model, batches, optimizer, output_dir=tmp_path / folder, **options)
        states.append(model.state_dict())
        counts.append(len(done))
    assert counts == [6, 3, 3]
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_run_over_experts_that_are_encoded_otherwise_is_not_resumed(tmp_path):
    for kind, words in ((qlite.Linear4bit, None), (qlite.Linear8bit, "layers")):
        model = dense_of("mixtral")
        qlite.quantize_model(model, skip=["lm_head", "experts"])
        qlite.quantize_model(model, kind, skip=["lm_head"])
        adapt(model, "mixtral")
        optimizer = qlite.AdamW8bit(qlite.lora_parameters(model))
        batches = qlite.data.FAQBatches(PAIRS, tokenizer_of(), end_of_text="</s>")
        options = {"steps": 1, "save_every": 1, "resume": True, "progress": False, "output_dir": tmp_path}
        with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
            qlite.finetune(model, batches, optimizer, **options)


PAIRS = [("Where is my parcel?", "On its way."), ("Who are you?", "A shop."), ("When?", "Now.")]


@functools.cache
def tokenizer_of():
    """A tokenizer of the Llama kind: no <|endoftext|>, and <s> before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(c): 3 + i for i, c in enumerate(range(32, 122))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_a_tokenizer_from_a_folder_of_transformers_makes_batches_with_its_own_first_and_last_tokens(tmp_path):
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(), eos_token="</s>", bos_token="<s>").save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>.*end_of_text="):
        qlite.load_tokenizer(folder)
    tokenizer = qlite.load_tokenizer(folder, end_of_text="</s>")
    (tmp_path / "faq.json").write_text('{"questions": [{"question": "Who?", "answer": "me"}]}')
    with pytest.raises(ValueError, match=r"no token <\|endoftext\|>"):
        qlite.faq_batches(tmp_path / "faq.json", tokenizer)
    batch = next(iter(qlite.faq_batches(tmp_path / "faq.json", tokenizer, end_of_text="</s>")))
    text = [tokenizer.id_to_token(i) for i in batch.input_ids[0].tolist()]
    assert (text[0], text[-1], text.count("<s>")) == ("<s>", "</s>", 1) and int(batch.labels[0, -1]) == 2
    assert batch.n_tokens == 4  # " me" and the end


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_our_loop_refuses_an_encoder_decoder_by_name(name):
    model = encoded_of(name)
    adapt(model, name)
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*transformers\.Trainer"):
        qlite.finetune(model, [collate(ROWS)], optimizer, steps=1, progress=False)


@pytest.mark.parametrize(
    ("output", "words"),
    [(lambda ids: {"loss": 1}, "returned a dict"), (lambda ids: torch.zeros(len(ids), 96), r"returned \(3, 96\)")],
)
def test_a_model_that_returns_no_logits_is_refused_by_name(output, words):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids):
            return output(input_ids)

    with pytest.raises(TypeError, match=f"finetune: Model {words}.*; wanted logits"):
        answer_loss(Model(), collate(ROWS))


# transformers.Trainer


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        ids = tokens(10, seed=index)
        return {"input_ids": ids, "labels": ids[:7] if self.short else ids}

    def __init__(self, short):
        self.short = short


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers_trains_it_with_our_optimizer(name, checkpointing, tmp_path):
    model = encoded_of(name)
    adapt(model, name)
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=5e-2, weight_decay=0.0)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if ".lora_" not in key}
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=6, per_device_train_batch_size=4, gradient_checkpointing=checkpointing, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, max_grad_norm=1.0,
    )  # fmt: skip
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 6)
    rows = Rows(short=name == "t5")
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    qlite.save_adapter(trainer.model, tmp_path / "adapter")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    assert written == {"adapter/adapter_model.safetensors"}
