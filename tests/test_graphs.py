"""Steps that are recorded: the same losses and gradients as without, whatever the shape of the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite import graphs
from qlite.data import ASSETS, Batch, FAQBatches
from qlite.graphs import BUCKET, SeededDropout, StepGraphs, why_not
from qlite.train import answer_loss
from tests.falcons import FLAVOURS

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODES = [False, True, "selective", "offload"]
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
WITHOUT_ALIBI = sorted(name for name, config in FLAVOURS.items() if not config.alibi)


def adapted(flavour="7b", *, dropout=0.0, dtype=torch.float32, kind=qlite.Linear4bit):
    config = dataclasses.replace(FLAVOURS[flavour], max_position_embeddings=512)
    model = qlite.Falcon(config, dtype=dtype).init_weights_(seed=0)
    qlite.quantize_model(model, kind)
    qlite.add_lora(model, qlite.LoRAConfig(r=4, dropout=dropout, targets=("query_key_value", "dense_h_to_4h")), seed=1)
    with torch.no_grad():
        for parameter in qlite.lora_parameters(model):
            parameter.add_(0.02)  # a B of zeros would hide A's gradient
    return model.to(DEVICE).train()


def batch(rows, length, *, seed=0, vocabulary=FLAVOURS["7b"].vocab_size, prompt=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[0, length - length // 3 :] = -100  # the padding of a shorter row
    return Batch(ids, labels, int((labels[:, 1:] != -100).sum()))


def gradients(model):
    return [parameter.grad.clone() for parameter in qlite.lora_parameters(model)]


@pytest.mark.parametrize("flavour", WITHOUT_ALIBI)
@pytest.mark.parametrize("checkpointing", MODES)
def test_loss_and_gradients_are_those_of_answer_loss(flavour, checkpointing):
    model = adapted(flavour, dtype=torch.float64)
    model.gradient_checkpointing = checkpointing
    parameters = qlite.lora_parameters(model)
    batches = [batch(2, length, seed=length, vocabulary=model.config.vocab_size) for length in (9, BUCKET, 9, 30, BUCKET + 1)]
    expected = [answer_loss(model, one).item() for one in batches]
    (sum(answer_loss(model, one) for one in batches) * 0.25).backward()
    wanted = gradients(model)
    with StepGraphs(model, parameters) as steps:
        found = [steps.backward(one, 0.25).item() for one in batches]
    # Parameters are float32, and so is what of their gradients is added up.
    assert found == pytest.approx(expected, rel=1e-9)
    for grad, reference in zip(gradients(model), wanted, strict=True):
        assert (grad - reference).norm() <= 1e-5 * reference.norm() and reference.norm() > 0


@given(rows=st.integers(1, 3), lengths=st.lists(st.integers(3, 3 * BUCKET), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_padding_changes_nothing(rows, lengths, seed):
    model = adapted()
    with StepGraphs(model, qlite.lora_parameters(model)) as steps:
        for length in lengths:
            one = batch(rows, length, seed=seed)
            expected = answer_loss(model, one).item()
            assert steps.backward(one, 1.0).item() == pytest.approx(expected, rel=1e-5)
        assert set(steps.shapes) == {(rows, -(-length // BUCKET) * BUCKET) for length in lengths}


def test_a_block_computed_twice_has_one_mask_and_each_batch_another():
    found = {}
    for checkpointing in MODES:
        model = adapted(dropout=0.3)
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        with StepGraphs(model, qlite.lora_parameters(model)) as steps:
            losses = [steps.backward(batch(2, 20), 1.0).item() for _ in range(3)]
            assert len(set(losses)) == 3
            assert all(type(m.dropout) is SeededDropout for m in model.modules() if isinstance(m, qlite.LoRALinear))
        found[checkpointing] = losses, gradients(model)
    for losses, found_gradients in found.values():
        assert losses == found[False][0]
        assert all(torch.equal(a, b) for a, b in zip(found_gradients, found[False][1], strict=True))


def test_layers_have_masks_of_their_own_and_none_in_evaluation():
    model = adapted(dropout=0.3)
    with StepGraphs(model, qlite.lora_parameters(model)) as steps:
        assert len(steps.dropouts) == 2 * model.config.num_hidden_layers
        steps.backward(batch(1, 9), 1.0)
        assert len(set(steps.seeds[:, 0].tolist())) == len(steps.dropouts)
        first = next(m.dropout for m in model.modules() if isinstance(m, qlite.LoRALinear))
        x = torch.ones(1000, device=DEVICE)
        assert 0 < (first(x) == 0).sum() < 500 and torch.equal(first.eval()(x), x)


def test_a_parameter_that_the_loss_does_not_reach_gets_no_gradient():
    model = adapted()
    model.register_parameter("idle", nn.Parameter(torch.ones(3, device=DEVICE)))
    with StepGraphs(model, [*qlite.lora_parameters(model), model.idle]) as steps:
        for length in (9, 9, 9):
            steps.backward(batch(1, length), 1.0)
        assert model.idle.grad is None and all(gradient.any() for gradient in gradients(model))


def test_the_model_is_as_it_was_afterwards():
    model = adapted(dropout=0.3)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), StepGraphs(model, qlite.lora_parameters(model)):
        assert not model.preserve_rng_state
        model.eval()
        raise ZeroDivisionError
    assert [type(module) for module in model.modules()] == before and model.preserve_rng_state
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
    assert dropouts and all(module.p == 0.3 and not module.training for module in dropouts)


def test_what_cannot_be_recorded_is_said():
    assert "not qlite.Falcon" in why_not(nn.Linear(2, 2))
    assert "ALiBi" in why_not(qlite.Falcon(next(config for config in FLAVOURS.values() if config.alibi)))
    split = adapted().cpu()
    assert why_not(split) == "its tensors are on cpu, not on one CUDA device"
    split.lm_head.to("meta")
    assert "cpu, meta" in why_not(split)


HOOKS = {
    "forward": lambda model: model.lm_head.register_forward_hook(print),
    "forward pre": lambda model: model.register_forward_pre_hook(print),
    "backward": lambda model: model.lm_head.register_full_backward_hook(print),
    "backward pre": lambda model: model.lm_head.register_full_backward_pre_hook(print),
    "gradient": lambda model: qlite.lora_parameters(model)[0].register_hook(print),
    "accumulated": lambda model: qlite.lora_parameters(model)[0].register_post_accumulate_grad_hook(print),
    "everywhere": lambda model: nn.modules.module.register_module_forward_hook(print),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_is_a_reason_not_to_record(kind):
    model = adapted()
    handle = HOOKS[kind](model)
    try:
        assert "has a hook" in why_not(model)
    finally:
        handle.remove()
    assert "hook" not in (why_not(model) or "")


def test_dropout_that_cannot_be_seeded_is_a_reason_not_to_record():
    model = adapted(dropout=0.3)
    layer = next(module for module in model.modules() if isinstance(module, qlite.LoRALinear))
    layer.dropout = nn.AlphaDropout(0.3)
    assert "is a AlphaDropout" in why_not(model)


def test_a_model_that_found_no_room_for_gradients_is_as_it_was(monkeypatch):
    model = adapted(dropout=0.3)
    before = [type(module) for module in model.modules()]

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(graphs.torch, "zeros_like", full)
    with pytest.raises(torch.OutOfMemoryError), StepGraphs(model, qlite.lora_parameters(model)):
        raise AssertionError
    assert [type(module) for module in model.modules()] == before and model.preserve_rng_state


def test_recordings_that_leave_no_room_are_dropped_and_the_batch_counts_once(monkeypatch):
    model = adapted()
    with StepGraphs(model, qlite.lora_parameters(model)) as steps:
        steps.backward(batch(1, 9), 1.0)
        wanted = [gradient * 2 for gradient in gradients(model)]
        next(iter(steps.shapes.values())).graph = "a recording"
        run, failures = steps.run, [torch.OutOfMemoryError("no room")]

        def once_full(*arguments):
            if failures:
                raise failures.pop()
            return run(*arguments)

        monkeypatch.setattr(steps, "run", once_full)
        one = batch(1, 9)
        longer = Batch(
            nn.functional.pad(one.input_ids, (0, BUCKET)), nn.functional.pad(one.labels, (0, BUCKET), value=-100), one.n_tokens
        )
        with pytest.warns(UserWarning, match="from here on no step is recorded"):
            steps.backward(longer, 1.0)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(gradients(model), wanted, strict=True))
        assert steps.most == 0 and all(shape.graph is None for shape in steps.shapes.values())
        failures.append(torch.OutOfMemoryError("no room"))
        with pytest.raises(torch.OutOfMemoryError):  # nothing is left to be dropped
            steps.backward(longer, 1.0)


def test_a_checkpoint_goes_on_where_nothing_is_recorded(tmp_path, monkeypatch):
    def run(**options):
        model = adapted()
        made = qlite.AdamW8bit(qlite.lora_parameters(model))
        pairs = [("a", "b"), ("c", "d")]
        data = FAQBatches(pairs, qlite.load_tokenizer(ASSETS / "tiny-falcon"), batch_size=1)
        data.rows = [([1, 2], [3, 4]), ([5, 6], [7, 8])]
        return qlite.finetune(model, data, made, accumulate=1, progress=False, output_dir=tmp_path, save_every=1, **options)

    monkeypatch.setattr("qlite.train.why_not", lambda model: None)
    assert run(steps=2).facts["cuda_graphs"] is True
    monkeypatch.undo()
    assert run(steps=2, resume=True, cuda_graphs=False).facts["cuda_graphs"] is False


def test_finetune_refuses_to_record_what_cannot_be():
    model = adapted().cpu()
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model))
    with pytest.raises(ValueError, match="cuda_graphs is True, but its tensors are on cpu"):
        qlite.finetune(model, [batch(1, 8)], optimizer, steps=1, cuda_graphs=True)
    result = qlite.finetune(model, [batch(1, 8)], optimizer, steps=1, accumulate=1, progress=False)
    assert result.facts["cuda_graphs"] is False


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("flavour", WITHOUT_ALIBI)
def test_a_recording_does_what_was_recorded_bit_for_bit(flavour, dtype, checkpointing, monkeypatch):
    found = []
    for most in (0, graphs.MOST_GRAPHS):
        monkeypatch.setattr(graphs, "MOST_GRAPHS", most)
        model = adapted(flavour, dropout=0.1, dtype=dtype)
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        with StepGraphs(model, qlite.lora_parameters(model)) as steps:
            sizes = [(1, 40), (2, 100), (1, 33), (2, 70), (1, 64), (2, 128), (1, 8)]
            losses = [steps.backward(batch(*size, vocabulary=model.config.vocab_size), 0.5).item() for size in sizes]
            assert [shape.graph is not None for shape in steps.shapes.values()] == [most > 0] * 2
        found.append((losses, gradients(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@needs_gpu
@pytest.mark.parametrize("optimizer", [qlite.AdamW8bit, qlite.PagedAdamW8bit])
def test_a_run_has_the_losses_of_a_run_without(optimizer):
    losses = []
    for recorded in (False, True):
        model = adapted(dtype=torch.float32)
        batches = [batch(2, length, seed=length) for length in (20, 40, 64, 65, 90, 33)]
        made = optimizer(qlite.lora_parameters(model), lr=1e-2)
        result = qlite.finetune(model, batches, made, steps=12, accumulate=2, progress=False, cuda_graphs=recorded)
        assert result.facts["cuda_graphs"] is recorded
        losses.append(result.losses)
        assert all(parameter.grad is None for parameter in model.parameters())
    # float32 products in another order, and 8-bit moments whose codes may differ by one where a value is near a midpoint.
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[0][-1] < losses[0][0]


@needs_gpu
def test_only_so_many_shapes_are_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    model = adapted()
    with StepGraphs(model, qlite.lora_parameters(model)) as steps:
        for _ in range(2):
            for rows in (1, 2):
                steps.backward(batch(rows, 10), 1.0)
        assert [shape.graph is not None for shape in steps.shapes.values()] == [True, False]
