"""Recorded decoding: the tokens of steps that are not recorded, and a recording that is used for as long as it is right."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qlite
from qlite import decoding
from qlite.data import Batch
from qlite.generate import _Choice
from tests.falcons import FLAVOURS, talker_of, tokens_of

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
OPTIONS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 1.0},
    "top-k": {"temperature": 0.8, "top_k": 5},
    "top-p": {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.1},
}
LONG = qlite.FalconConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
PROMPTS = {"one": [[1, 2, 3, 4]], "batch": [[5, 6], [1, 2, 3, 4, 5, 6, 7], [8]]}


def talker(flavour="7b", dtype=torch.float32, device="cuda" if CUDA else "cpu"):
    model = qlite.Falcon(FLAVOURS[flavour], dtype=dtype).init_weights_(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # of small ones the likeliest token is always the same
            if parameter.ndim == 2:
                parameter.mul_(12)
    qlite.quantize_model(model)
    qlite.add_lora(model, qlite.LoRAConfig(r=4, targets=("query_key_value", "dense_h_to_4h")), seed=1)
    return model.to(device)


CHOICE = _Choice(0.0, None, None, 1.0)


@pytest.mark.parametrize(("config", "length", "wanted"), [(FLAVOURS["7b"], 20, 64), (LONG, 257, 512), (LONG, 256, 256)])
def test_memory_of_a_decoder_is_a_multiple_and_within_the_context(config, length, wanted):
    with decoding.decoder(qlite.Falcon(config).eval(), 2, length, CHOICE) as steps:
        assert steps.cache.max_length == wanted


def test_nothing_is_kept_for_a_cpu():
    model = talker(device="cpu")
    qlite.generate(model, [1, 2], max_new_tokens=2)
    assert model not in decoding._KEPT


# What a step costs beside the blocks.


class Launches(TorchDispatchMode):
    """Counts the operators that are called and are no views: on a GPU a launch each, or more."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        mine = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        views = all(
            tensor.untyped_storage().data_ptr() in mine for tensor in (found if isinstance(found, tuple | list) else [found])
        )
        if func._schema.is_mutable or not (views or "empty" in func.__name__):
            self.names[func.__name__] += 1
        return found


def launches(layers, rows, choice, guesses=0):
    config = dataclasses.replace(FLAVOURS["7b"], hidden_size=96, num_hidden_layers=layers)
    model = qlite.Falcon(config, dtype=torch.bfloat16).eval()
    steps = decoding.Decoder(model, rows, 64, choice.draw, guesses)
    assert steps.few_launches
    ids = torch.ones(rows, 5, dtype=torch.int64)
    with torch.inference_mode():
        steps.prefill(ids, ids.bool(), 0)
        with Launches() as counted:
            steps._step()
    return counted.names


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("choice", "most"),
    [
        # The token, its embedding, its cos and sin; the last norm, the head, the choice; the places move on, the token is kept.
        (_Choice(0.0, None, None, 1.0), 8),
        # Logits in float32, those of tokens that were seen, divided, multiplied, one of both, put back.
        (_Choice(0.0, None, None, 1.1), 8 + 6),
        # Logits in float32, the highest, less that, over the temperature, softmax; variates, over them.
        (_Choice(0.8, None, None, 1.0), 8 + 7),
        # Instead of the highest: the k likeliest in the order of the vocabulary (3), and of their likelihood (2), a mask (4),
        # the variates and the token of those that are left.
        (_Choice(0.8, 50, 0.9, 1.0), 8 + 6 + 11),
    ],
    ids=["greedy", "penalty", "temperature", "top-k and top-p"],
)
def test_a_step_launches_little_beside_its_blocks(rows, choice, most):
    one, two = launches(1, rows, choice), launches(2, rows, choice)
    assert 2 * one.total() - two.total() <= most, f"beside the blocks: {one + one - two}"


def test_a_step_over_guesses_launches_no_more_for_more_of_them():
    choice = _Choice(0.0, None, None, 1.1)
    assert launches(1, 1, choice, 4).total() == launches(1, 1, choice, 40).total()


# A prompt in pieces.


@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize("lengths", [[13], [13, 13], [13, 1, 6]], ids=["one", "alike", "padded"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_prompt_in_pieces_gives_the_states_and_the_tokens_of_one_that_is_whole(flavour, lengths, most, monkeypatch):
    model = talker_of(FLAVOURS[flavour]).to("cuda" if CUDA else "cpu")
    prompts = [tokens_of(model.config, length, seed=length).tolist() for length in lengths]
    ids, real = torch.zeros(len(lengths), 13, dtype=torch.int64), torch.zeros(len(lengths), 13, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, 13 - len(prompt) :], real[row, 13 - len(prompt) :] = torch.tensor(prompt), True
    passes = []
    model.transformer.h[0].register_forward_hook(lambda block, arguments, x: passes.append(x.shape[:2].numel()))

    def states():
        passes.clear()
        steps = decoding.Decoder(model, len(lengths), 64, CHOICE.draw)
        with torch.inference_mode():
            mask = None if real.all() else real.to(steps.text.device)
            return steps._through(model, ids.to(steps.text.device), mask)

    options = {"max_new_tokens": 9, "eos_token_id": None}
    whole, answers = states(), qlite.generate(model, prompts, **options)
    monkeypatch.setattr(decoding, "PREFILL", most)
    # The sums are those of a pass through the cache against one without it.
    torch.testing.assert_close(states(), whole, rtol=0, atol=1e-4)
    assert max(passes) <= max(most, len(lengths)) and len(passes) == -(-13 // max(1, most // len(lengths)))
    assert qlite.generate(model, prompts, **options) == answers


@pytest.fixture
def kept(monkeypatch):
    """On a CPU: decoders that are kept and read by the chunk as on a GPU; a recording is then a step as any other."""
    if not CUDA:
        monkeypatch.setattr(decoding, "why_not", lambda model: "hooked" if model._forward_hooks else None)
        made = decoding.Decoder.__init__

        def as_on_a_gpu(self, model, *arguments):
            made(self, model, *arguments)
            self.recordable, self.chunk = decoding.why_not(model) is None, decoding.CHUNK

        monkeypatch.setattr(decoding.Decoder, "__init__", as_on_a_gpu)
        monkeypatch.setattr(decoding.Decoder, "_record", lambda self: None)
    return decoding._KEPT


def latest(model):
    """Returns the decoder of the last call that has one to keep."""
    return list(decoding._KEPT[model].values())[-1]


def fresh(model, prompt, **options):
    decoding.forget(model)
    return qlite.generate(model, prompt, **options)


@pytest.mark.parametrize("after", [1, 3, 8, 9, 12])
def test_a_call_that_was_interrupted_leaves_nothing_to_the_next(kept, after):
    model, options, told = talker(), {"max_new_tokens": 20, "eos_token_id": None}, []
    wanted = qlite.generate(model, [1, 2, 3], **options)
    assert model in kept

    def stop(row, token):
        told.append(token)
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlite.generate(model, [4, 5], **options, on_token=stop)
    assert not kept[model] and qlite.generate(model, [1, 2, 3], **options) == wanted


@pytest.mark.parametrize("choice", [CHOICE, dataclasses.replace(CHOICE, repetition_penalty=1.3)], ids=["plain", "penalty"])
def test_what_one_prompt_left_behind_is_not_read_by_the_next(choice):
    model = talker().eval()
    steps = decoding.Decoder(model, 1, 64, choice.draw)
    prompt, real = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.inference_mode():
        wanted = steps.prefill(prompt, real, 0), steps.steps(1)
        steps.prefill(torch.arange(40)[None], torch.ones(1, 40, dtype=torch.bool), 0)
        steps._step()  # which nobody reads
        assert (steps.prefill(prompt, real, 0), steps.steps(1)) == wanted


def test_calls_from_threads_and_from_within_have_decoders_of_their_own(kept):
    model, options = talker(), {"max_new_tokens": 12, "eos_token_id": None}
    prompts = [[1 + n, 2, 3] for n in range(4)]
    wanted = [fresh(model, prompt, **options) for prompt in prompts]
    outer = qlite.generate(model, prompts[0], **options, on_token=lambda *_: qlite.generate(model, [7, 8], **options))
    assert outer == wanted[0]
    if not CUDA:  # where recordings take turns
        model.eval()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda prompt: qlite.generate(model, prompt, **options), prompts * 5))
        assert found == wanted * 5


def test_of_calls_that_are_alike_and_overlap_the_longer_decoder_is_kept(kept, monkeypatch):
    monkeypatch.setattr(decoding, "LENGTHS", 16)
    model, lengths = talker(), []

    def ask(new, inside=None):
        qlite.generate(model, [1, 2, 3], max_new_tokens=new, eos_token_id=None, on_token=inside)
        lengths.append(latest(model).cache.max_length)

    ask(10, lambda row, token: lengths or ask(40))
    ask(50, lambda row, token: len(lengths) > 2 or ask(10))
    # The inner one ends first, and is kept then; of both the longer is left.
    assert lengths == [48, 48, 16, 64] and len(kept[model]) == 1


def test_what_was_not_finite_is_gone_with_the_weight_that_made_it(kept):
    model, options = talker(), {"max_new_tokens": 12, "eos_token_id": None}
    wanted, norm = fresh(model, [1, 2, 3], **options), model.transformer.h[0].input_layernorm.weight
    good = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
        qlite.generate(model, list(range(1, 40)), **options)
        norm.copy_(good)
    assert model in kept and qlite.generate(model, [1, 2, 3], **options) == wanted


def test_what_python_holds_is_part_of_what_a_decoder_is_known_by(kept):
    model, options = talker(), {"max_new_tokens": 12, "eos_token_id": None}
    qlite.generate(model, [1, 2, 3], **options)
    model.transformer.ln_f.eps = 1.0
    found = qlite.generate(model, [1, 2, 3], **options)
    assert len(kept[model]) == 2 and found == fresh(model, [1, 2, 3], **options)
    model.config = dataclasses.replace(model.config, rope_theta=10.0)
    found = qlite.generate(model, [1, 2, 3], **options)
    assert len(kept[model]) == 2 and found == fresh(model, [1, 2, 3], **options)
    handle = model.register_forward_hook(lambda *_: None)
    qlite.generate(model, [1, 2, 3], **options)
    assert len(kept[model]) == 1
    handle.remove()


def test_calls_of_several_sizes_find_their_decoders_again(kept, monkeypatch):
    model, options = talker(), {"max_new_tokens": 12, "eos_token_id": None}
    prompts = [[n, 2, 3] for n in range(1, 8)]
    monkeypatch.setattr(decoding, "LENGTHS", 16)
    made = {}
    for rows in (1, 2, 3):
        wanted = qlite.generate(model, prompts[:rows], **options)
        made[rows] = latest(model), wanted
    for rows in (2, 1, 3):
        assert qlite.generate(model, prompts[:rows], **options) == made[rows][1]
        assert latest(model) is made[rows][0]
    # As many as are allowed, of which the one that was used longest ago goes; a longer one takes the place of a shorter.
    for rows in (4, 5):
        qlite.generate(model, prompts[:rows], **options)
    assert [len(d.text) for d in kept[model].values()] == [1, 3, 4, 5]
    qlite.generate(model, prompts[:4], **{**options, "max_new_tokens": 40})
    assert [len(d.text) for d in kept[model].values()] == [1, 3, 5, 4]
    # And no more memory than is allowed, but for one.
    each = 2 * made[1][0].cache.keys.nbytes
    monkeypatch.setattr(decoding, "KEPT_BYTES", 6 * each)
    for rows, left in ((1, [1]), (3, [1, 3]), (2, [1, 3, 2]), (7, [7]), (1, [1])):
        qlite.generate(model, prompts[:rows], **options)
        assert [len(d.text) for d in kept[model].values()] == left


@pytest.mark.parametrize("flavour", ["7b", "rw"])
def test_autocast_may_be_on(kept, flavour):
    model, options = talker(flavour), {"max_new_tokens": 12, "eos_token_id": None}
    with torch.autocast("cuda" if CUDA else "cpu", dtype=torch.bfloat16):
        found = qlite.generate(model, [1, 2, 3], **options)
        assert found == qlite.generate(model, [1, 2, 3], **options) and len(found) == 12
    assert qlite.generate(model, [1, 2, 3], **options) == fresh(model, [1, 2, 3], **options)


def test_what_is_kept_for_one_adapter_is_not_used_for_another(kept):
    model, options = talker(), {"max_new_tokens": 24, "eos_token_id": None}
    qlite.add_lora(model, qlite.LoRAConfig(r=4, targets=("query_key_value", "dense_h_to_4h")), seed=2, name="second")
    wanted = {}
    for name, by in (("default", 0.1), ("second", 0.2), (None, 0.0)):
        qlite.set_adapter(model, name)
        with torch.no_grad():
            for parameter in qlite.lora_parameters(model) if name else ():
                parameter.add_(by)
        wanted[name] = fresh(model, [1, 2, 3], **options)
    assert len(set(map(tuple, wanted.values()))) == 3
    steps = {}
    for name in ("default", "second", "default", None, "second"):
        qlite.set_adapter(model, name)
        for _ in range(2):
            assert qlite.generate(model, [1, 2, 3], **options) == wanted[name]
        # Each has a decoder of its own, and finds it again.
        assert steps.setdefault(name, latest(model)) is latest(model)
    assert len(set(steps.values())) == 3


def test_finetune_frees_what_is_kept(kept):
    model = talker()
    qlite.generate(model, [1, 2], max_new_tokens=12)
    assert model in kept
    ids = torch.tensor([[1, 2, 3]])
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model))
    qlite.finetune(model, [Batch(ids, ids, 2)], optimizer, steps=1, accumulate=1, progress=False)
    assert model not in kept


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("flavour", ["7b", "40b", "11b", "rw"])
def test_recorded_steps_give_the_tokens_of_steps_that_are_not(flavour, options, prompts, dtype, monkeypatch):
    model = talker(flavour, dtype)
    options = {**OPTIONS[options], "max_new_tokens": 21, "eos_token_id": None, "seed": 5}
    first = qlite.generate(model, PROMPTS[prompts], **options)
    again = qlite.generate(model, PROMPTS[prompts], **options)  # every step but the prefill is a replay
    assert latest(model).graph is not None if flavour != "rw" else model not in decoding._KEPT
    monkeypatch.setattr(decoding, "why_not", lambda model: "a test")
    decoding._KEPT.pop(model, None)
    plain = qlite.generate(model, PROMPTS[prompts], **options)
    assert first == again == plain and len({len(row) for row in plain}) == 1
    if options.get("temperature"):
        assert qlite.generate(model, PROMPTS[prompts], **{**options, "seed": 6}) != plain


@needs_gpu
def test_a_recording_is_used_again_and_follows_the_weights():
    model, prompt = talker(), [1, 2, 3]
    before = qlite.generate(model, prompt, max_new_tokens=12, eos_token_id=None)
    steps = latest(model)
    graph = steps.graph
    assert qlite.generate(model, [4, 5], max_new_tokens=30, eos_token_id=None) and latest(model) is steps
    with torch.no_grad():
        for parameter in qlite.lora_parameters(model):
            parameter.add_(0.3)
    after = qlite.generate(model, prompt, max_new_tokens=12, eos_token_id=None)
    assert latest(model).graph is graph and after != before
    decoding._KEPT.pop(model)
    assert qlite.generate(model, prompt, max_new_tokens=12, eos_token_id=None) == after


@needs_gpu
@pytest.mark.parametrize("change", ["scaling", "tensor", "merge", "batch", "choice"])
def test_a_change_that_a_recording_would_miss_makes_a_new_one(change):
    model, options = talker(), {"max_new_tokens": 12, "eos_token_id": None}
    with torch.no_grad():
        for parameter in qlite.lora_parameters(model):
            parameter.add_(0.1)
    prompts = [[1, 2, 3]]
    qlite.generate(model, prompts, **options)
    steps = latest(model)
    first = next(module for module in model.modules() if isinstance(module, qlite.LoRALinear))
    if change == "scaling":
        first.scaling *= 5
    elif change == "tensor":
        first.lora_B = torch.nn.Parameter(first.lora_B.detach() * -3)
    elif change == "merge":
        qlite.merge_adapter(model)
    elif change == "batch":
        prompts = [[1, 2, 3], [4]]
    else:
        options["repetition_penalty"] = 1.5
    found = qlite.generate(model, prompts, **options)
    assert latest(model) is not steps
    decoding._KEPT.pop(model)
    assert qlite.generate(model, prompts, **options) == found


@needs_gpu
def test_a_row_that_ends_in_the_middle_of_a_chunk_ends_there():
    model, prompts = talker(), PROMPTS["batch"]
    whole = qlite.generate(model, prompts, max_new_tokens=20, eos_token_id=None)
    end = whole[0][3]
    told: list[list[int]] = [[] for _ in prompts]
    found = qlite.generate(model, prompts, max_new_tokens=20, eos_token_id=end, on_token=lambda row, t: told[row].append(t))
    wanted = [row[: row.index(end)] if end in row else row for row in whole]
    assert found == wanted == told


@needs_gpu
def test_memory_goes_with_the_model():
    model = talker()
    qlite.generate(model, [1, 2, 3], max_new_tokens=12)
    torch.cuda.synchronize()
    del model
    gc.collect()
    assert not decoding._KEPT
