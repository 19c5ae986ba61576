"""Generated tokens: greedy against full passes, sampling against the softmax, stopping, batches, what is refused.

`Chain` is a model whose next token depends on the last one alone, by a table of logits: all it says can be worked out.
"""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite.data import ASSETS
from qlite.generate import _Choice, _shares
from tests.falcons import FLAVOURS, falcon_configs, talker_of, tokens_of

flavours = pytest.mark.parametrize("config", FLAVOURS.values(), ids=FLAVOURS)


class Chain(nn.Module):
    """What `generate` asks of a model, around a table of logits (last token, next token)."""

    def __init__(self, table):
        super().__init__()
        size = len(table)
        self.config = qlite.FalconConfig(
            vocab_size=size, hidden_size=2, num_attention_heads=1, num_hidden_layers=1, eos_token_id=0, alibi=True
        )  # positions without tables
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding.from_pretrained(torch.eye(size))
        self.lm_head = nn.Linear(size, size, bias=False)
        self.lm_head.weight.data = table.t().contiguous()

    def hidden_states(self, input_ids, *, attention_mask=None, cache=None):
        cache.length += input_ids.shape[1]
        return self.transformer.word_embeddings(input_ids)

    def next_hidden(self, ids, rotary, visible, cache, at):
        return self.transformer.word_embeddings(ids)[:, -1]


def seeded(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cycle_of(size, likely=9.0):
    """A chain that goes 1, 2, ..., size - 1, 0, 1, ... when greedy."""
    return Chain(torch.eye(size).roll(1, 1) * likely)


@functools.cache
def tiny_base():
    return qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32)


def prompts_of(config, lengths, seed=0):
    return [tokens_of(config, length, seed=seed + i).tolist() for i, length in enumerate(lengths)]


# Greedy.


@torch.no_grad()
def greedy_by_full_passes(model, prompt, count, penalty=1.0):
    """The likeliest token, again and again, without a cache; the penalty (arXiv 1909.05858) written out in floats."""
    tokens = list(prompt)
    for _ in range(count):
        scores = model(torch.tensor([tokens]))[0, -1].float().tolist()
        for token in set(tokens):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        tokens.append(max(range(len(scores)), key=scores.__getitem__))
    return tokens[len(prompt) :]


@flavours
def test_greedy_is_the_argmax_of_full_passes(config):
    model = talker_of(config)
    (prompt,) = prompts_of(config, [5])
    answer = qlite.generate(model, prompt, max_new_tokens=12, eos_token_id=None)
    assert answer == greedy_by_full_passes(model, prompt, 12)


@given(falcon_configs(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_batch_of_prompts_of_any_lengths_gets_what_each_gets_alone(config, lengths, seed):
    # In float64 a near tie is one on both sides: a score is chosen after it is rounded to float32.
    model = talker_of(config, seed, torch.float64)
    prompts = prompts_of(config, lengths, seed)
    answers = qlite.generate(model, prompts, max_new_tokens=6, eos_token_id=None)
    assert answers == [greedy_by_full_passes(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_batch_of_prompts_gets_what_each_gets_alone_from_the_tiny_base(penalty):
    model = tiny_base()
    prompts = prompts_of(model.config, [3, 17, 1, 9, 17])
    options = {"max_new_tokens": 24, "repetition_penalty": penalty}
    answers = qlite.generate(model, prompts, **options)
    assert answers == [qlite.generate(model, prompt, **options) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) > 2


def test_greedy_from_the_tiny_base_is_the_argmax_of_full_passes():
    (prompt,) = prompts_of(tiny_base().config, [9])
    answer = qlite.generate(tiny_base(), prompt, max_new_tokens=16, eos_token_id=None)
    assert answer == greedy_by_full_passes(tiny_base(), prompt, 16)


def test_one_prompt_gives_a_list_of_tokens_and_a_list_of_prompts_a_list_of_lists():
    model = cycle_of(5)
    assert qlite.generate(model, [1], max_new_tokens=3) == [2, 3, 4]
    assert qlite.generate(model, [[1]], max_new_tokens=3) == [[2, 3, 4]]
    assert qlite.generate(model, ((1, 1), (2,)), max_new_tokens=2) == [[2, 3], [3, 4]]


# Sampling.


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"repetition_penalty": 1.3}], ids=str)
def test_a_seed_gives_one_answer_whatever_the_global_generators_hold(options):
    model, prompts = talker_of(FLAVOURS["7b"]), prompts_of(FLAVOURS["7b"], [4, 2])
    sample = functools.partial(qlite.generate, model, prompts, max_new_tokens=20, temperature=1.0, **options)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(seed=5) == first
    assert sample(seed=6) != first


@given(falcon_configs(), st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_the_one_likeliest_and_a_tiny_nucleus_are_greedy(config, temperature, seed):
    model = talker_of(config, seed, torch.float64)
    sample = functools.partial(qlite.generate, model, prompts_of(config, [3, 1], seed), max_new_tokens=5, eos_token_id=None)
    assert sample(temperature=temperature, top_k=1) == sample()
    assert sample(temperature=temperature, top_p=1e-9) == sample()


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    # A logit of 9 over 1e-38 is more than float32 can hold.
    assert qlite.generate(cycle_of(5), [[1], [3]], max_new_tokens=8, temperature=temperature) == [[2, 3, 4], [4]]


def test_a_very_high_temperature_is_uniform_and_no_error():
    # Of 200 draws among 5 tokens, one left out has probability 5 * 0.8^200 = 2e-19.
    drawn = qlite.generate(cycle_of(5), [[1]] * 200, max_new_tokens=1, temperature=1e38, eos_token_id=None)
    assert {token for answer in drawn for token in answer} == {0, 1, 2, 3, 4}


def shares_by_hand(logits, temperature=1.0, top_k=None, top_p=None, penalty=1.0, seen=()):
    """The probability of each token, in Python's floats, from the definitions."""
    scores = [(s / penalty if s > 0 else s * penalty) if i in seen else s for i, s in enumerate(logits)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    weights = {i: 2.718281828459045 ** (scores[i] / temperature) for i in order}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for i in order:
        if top_p is not None and mass >= top_p:
            break
        kept[i] = weights[i]
        mass += weights[i] / total
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(scores))]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.75},
        {"temperature": 2.0, "top_p": 0.75},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.75},
        {"temperature": 1.0, "repetition_penalty": 2.0},
        {"temperature": 2.0, "repetition_penalty": 0.5, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    draws, logits = 20_000, seeded(8)
    seen = (3, 6)
    model = Chain(logits.expand(8, 8))
    answers = qlite.generate(model, [list(seen)] * draws, max_new_tokens=1, eos_token_id=None, seed=1, **options)
    counts = torch.tensor([token for (token,) in answers]).bincount(minlength=8).tolist()
    arguments = {key.removeprefix("repetition_"): value for key, value in options.items()}
    for count, share in zip(counts, shares_by_hand(logits.tolist(), seen=seen, **arguments)):
        # Five standard deviations of a binomial count: eight tokens leave them with probability 5e-6, at some other seed.
        assert abs(count - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5


def test_the_draws_of_a_row_are_independent_of_one_another():
    # A fair coin: neither 0 nor 1 is the end, and what comes next has nothing to do with what came before.
    model, draws = Chain(torch.zeros(2, 2)), 2000
    answer = qlite.generate(model, [1], max_new_tokens=draws, temperature=1.0, eos_token_id=None, seed=4)
    pairs = torch.tensor(answer[:-1]) * 2 + torch.tensor(answer[1:])
    # Five standard deviations of the count of one pair, of probability 1/4; overlapping, its variance is at most twice that.
    assert (pairs.bincount(minlength=4) - draws / 4).abs().max() <= 5 * (2 * draws * 3 / 16) ** 0.5


# What is left to draw from.

logits_of_rows = st.builds(
    lambda rows, columns, spread, decimals, seed: (seeded(rows, columns, seed=seed) * spread).round(decimals=decimals),
    st.integers(1, 3),
    st.integers(1, 50),
    st.sampled_from((0.01, 1.0, 8.0)),
    st.sampled_from((0, 6)),  # to whole numbers: many ties
    st.integers(0, 2**32),
)


def shares_of(logits, top_k, top_p):
    """The share of each token of the vocabulary, zero where it is left out."""
    shares, tokens = _shares(logits, 1.0, top_k, top_p)
    return shares if tokens is None else torch.zeros(logits.shape).scatter(-1, tokens, shares)


@given(logits_of_rows, st.none() | st.integers(1, 60), st.none() | st.floats(1e-6, 1.0))
def test_what_is_kept_has_shares_as_its_logits_say_and_is_likelier_than_what_is_not(logits, top_k, top_p):
    shares = shares_of(logits, top_k, top_p)
    inside = shares > 0
    assert inside.any(dim=-1).all()
    wanted = logits.masked_fill(~inside, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(shares / shares.sum(dim=-1, keepdim=True), wanted)
    lowest = logits.masked_fill(~inside, torch.inf).amin(dim=-1)
    assert (logits.masked_fill(inside, -torch.inf).amax(dim=-1) <= lowest).all()


@given(logits_of_rows, st.integers(1, 60))
def test_top_k_keeps_k_tokens_and_with_ties_no_more(logits, k):
    inside = shares_of(logits, k, None) > 0
    assert (inside.sum(dim=-1) == min(k, logits.shape[-1])).all()


@given(logits_of_rows, st.floats(1e-6, 1.0))
def test_the_nucleus_is_the_shortest_list_of_likeliest_tokens_that_reaches_top_p(logits, top_p):
    inside = shares_of(logits, None, top_p) > 0
    shares = logits.double().softmax(dim=-1)
    mass = (shares * inside).sum(dim=-1)
    smallest = shares.masked_fill(~inside, 2.0).amin(dim=-1)
    # Up to 50 float32 probabilities are added one after the other, 2^-24 each; the rest is for the softmax itself.
    rounding = 64 * 2**-24
    assert (mass >= top_p - rounding).all()
    assert ((mass - smallest < top_p + rounding) | (inside.sum(dim=-1) == 1)).all()


@given(logits_of_rows, st.integers(1, 60), st.floats(1e-6, 1.0))
def test_the_nucleus_is_taken_of_the_k_likeliest(logits, k, top_p):
    alone = logits.masked_fill(shares_of(logits, k, None) == 0, -torch.inf)
    torch.testing.assert_close(shares_of(logits, k, top_p), shares_of(alone, None, top_p))


@pytest.mark.parametrize("k", [None, 5])
def test_of_equally_likely_tokens_the_nucleus_takes_the_first(k):
    inside = shares_of(torch.tensor([[0.0, 2, -1, 2, 2, 0, 2]]), k, 0.4) > 0
    assert inside.tolist() == [[False, True, False, True, False, False, False]]


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_a_nucleus_of_everything_leaves_out_nothing(spread):
    # 65,024 float32 probabilities do not add up to 1: a sum that stops where it reaches 1 would lose the unlikely ones.
    logits = seeded(2, 65024) * spread
    for top_k, top_p in ((None, 1.0), (65024, None), (70000, 1.0)):
        torch.testing.assert_close(shares_of(logits, top_k, top_p), logits.softmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_equal_logits_in_16_bits_the_first_is_chosen_as_in_float32(dtype):
    logits = (seeded(64, 65024) * 2).round().to(dtype)  # the highest of a row is there more than once in many
    highest = logits == logits.amax(dim=-1, keepdim=True)
    assert (highest.sum(dim=-1) > 1).sum() > 9
    choice, seen = _Choice(0.0, None, None, 1.0), torch.zeros(64, 1, dtype=torch.int64)
    found = choice.draw(logits, seen, torch.Generator())
    assert torch.equal(found, choice.draw(logits.float(), seen, torch.Generator()))
    assert torch.equal(found[:, 0], highest.int().argmax(dim=-1))


# The repetition penalty.


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
@pytest.mark.parametrize("name", ["7b", "rw", "11b"])
def test_the_repetition_penalty_is_the_formula_of_its_paper(name, penalty):
    model = talker_of(FLAVOURS[name])
    prompts = prompts_of(model.config, [6, 2, 4])
    answers = qlite.generate(model, prompts, max_new_tokens=12, eos_token_id=None, repetition_penalty=penalty)
    assert answers == [greedy_by_full_passes(model, prompt, 12, penalty) for prompt in prompts]
    assert answers != qlite.generate(model, prompts, max_new_tokens=12, eos_token_id=None)


def test_padding_is_no_token_that_was_seen():
    # Token 0 fills the padding. It is the likeliest after 1 by so little that a penalty would show.
    model = Chain(torch.tensor([[0.0, 0, 0, 1], [1.1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]))
    answers = qlite.generate(model, [[2, 2, 1], [1]], max_new_tokens=1, eos_token_id=None, repetition_penalty=2.0)
    assert answers == [[0], [0]]


# Stopping, and what is told on the way.


def test_a_row_stops_before_the_end_of_text_and_the_others_go_on():
    model = cycle_of(5)
    assert qlite.generate(model, [[1], [4], [2, 3], [0]], max_new_tokens=6) == [[2, 3, 4], [], [4], [1, 2, 3, 4]]


def test_the_end_of_text_is_the_configs_or_ones_own_or_none():
    model = cycle_of(5)
    assert qlite.generate(model, [1], max_new_tokens=6) == [2, 3, 4]
    assert qlite.generate(model, [1], max_new_tokens=6, eos_token_id=4) == [2, 3]
    assert qlite.generate(model, [1], max_new_tokens=6, eos_token_id=None) == [2, 3, 4, 0, 1, 2]
    assert qlite.generate(model, [[1], [4]], max_new_tokens=6, eos_token_id=[4, 3]) == [[2], [0, 1, 2]]


def test_the_end_of_text_in_a_prompt_ends_nothing():
    assert qlite.generate(cycle_of(5), [0, 3, 0], max_new_tokens=3) == [1, 2, 3]


def test_no_more_passes_are_made_than_are_needed():
    model, passes = cycle_of(5), []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    qlite.generate(model, [[2], [1]], max_new_tokens=50)
    assert len(passes) == 4  # 2, 3, 4 and the end, for the row that starts at 1
    passes.clear()
    qlite.generate(model, [1], max_new_tokens=2)
    assert len(passes) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_token_gets_every_token_of_the_answers_in_order(temperature):
    model = cycle_of(5, likely=1.0)
    told = []
    prompts = [[1], [3], [2, 4], [0]]
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 2}
    answers = qlite.generate(model, prompts, on_token=lambda row, token: told.append((row, token)), **options)
    assert [[token for row, token in told if row == i] for i in range(4)] == answers
    assert answers == qlite.generate(model, prompts, **options)
    # Step by step, and in a step row by row.
    steps = [(sum(r == row for r, _ in told[:i]), row) for i, (row, _) in enumerate(told)]
    assert steps == sorted(steps)


def test_on_token_is_called_as_each_token_comes():
    model, events = cycle_of(5), []
    model.lm_head.register_forward_hook(lambda *_: events.append("pass"))
    qlite.generate(model, [1], max_new_tokens=3, on_token=lambda _, token: events.append(token))
    assert events == ["pass", 2, "pass", 3, "pass", 4]


# The model is left as it was.


class Stop(Exception):
    pass


def raise_stop(row, token):
    raise Stop


@pytest.mark.parametrize("on_token", [None, raise_stop])
@pytest.mark.parametrize("training", [True, False])
def test_every_module_is_in_the_mode_that_it_was_in_even_after_an_exception(on_token, training):
    model = talker_of(FLAVOURS["7b"]).train(training)
    model.transformer.h[1].train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    inside = []
    model.transformer.h[0].register_forward_hook(lambda module, *_: inside.append(module.training))
    try:
        qlite.generate(model, [1, 2], max_new_tokens=3, eos_token_id=None, on_token=on_token)
    except Stop:
        assert on_token is raise_stop
    assert {name: module.training for name, module in model.named_modules()} == before
    assert inside == [False] * (1 if on_token else 3)


def test_dropout_and_checkpointing_are_off_while_it_runs():
    model = talker_of(FLAVOURS["7b"])
    qlite.add_lora(model, qlite.LoRAConfig(r=2, alpha=32, dropout=0.5), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.fill_(0.1)
    quiet = qlite.generate(model.eval(), [1, 2, 3], max_new_tokens=12, eos_token_id=None)
    model.gradient_checkpointing = True
    assert qlite.generate(model.train(), [1, 2, 3], max_new_tokens=12, eos_token_id=None) == quiet
    assert quiet == greedy_by_full_passes(model.eval(), [1, 2, 3], 12)


@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_an_encoded_model_with_adapters_is_trained_after_it_has_answered(kind):
    model = talker_of(FLAVOURS["40b"]).requires_grad_(False)
    qlite.quantize_model(model, kind)
    qlite.add_lora(model, qlite.LoRAConfig(r=2), seed=0)
    before = copy.deepcopy(model.state_dict())
    answer = qlite.generate(model, [1, 2, 3], max_new_tokens=8, eos_token_id=None)
    assert answer == greedy_by_full_passes(model.eval(), [1, 2, 3], 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # Nothing that was kept from inference mode stands in the way of a gradient.
    model.train()(torch.tensor([[1, 2, 3]])).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_prompts_are_left_as_they_were():
    prompts = [[1, 2], [3]]
    qlite.generate(cycle_of(5), prompts, max_new_tokens=3)
    assert prompts == [[1, 2], [3]]


# What is refused.


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompts is empty; wanted token ids, or a list of lists"),
        ([[]], {}, "prompt 0 is empty; it needs at least one token"),
        ([[1], [], [2]], {}, "prompt 1 is empty"),
        ([5], {}, r"prompt 0 has token 5; the vocabulary is 0\.\.4"),
        ([[1], [2, -1]], {}, r"prompt 1 has token -1; the vocabulary is 0\.\.4"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; wanted at least 1"),
        ([1], {"max_new_tokens": 2048}, "prompt of 1 tokens and 2048 new ones exceed the model's context of 2048"),
        ([[1], [1] * 2000], {"max_new_tokens": 49}, "prompt of 2000 tokens and 49 new ones exceed"),
        ([1], {"temperature": -0.1}, "temperature is -0.1; wanted 0 .greedy. or more"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"temperature": float("inf")}, "temperature is inf"),
        ([1], {"temperature": 1.0, "top_k": 0}, "top_k is 0; wanted at least 1"),
        ([1], {"temperature": 1.0, "top_k": -3}, "top_k is -3"),
        ([1], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; wanted 0 < top_p <= 1"),
        ([1], {"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ([1], {"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0; wanted a number above 0"),
        ([1], {"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ([1], {"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ([1], {"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ([1], {"top_k": 3}, "top_k and top_p choose among samples; set a temperature above 0"),
        ([1], {"top_p": 0.9}, "top_k and top_p choose among samples"),
        ([1], {"temperature": 0, "top_k": 3, "top_p": 0.9}, "top_k and top_p choose among samples"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_before_any_pass(prompts, options, message):
    model, passes = cycle_of(5), []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        qlite.generate(model, prompts, **options)
    assert not passes


def test_prompt_and_answer_may_fill_the_context_to_the_last_token():
    model = talker_of(FLAVOURS["7b"])
    assert len(qlite.generate(model, [1] * 14, max_new_tokens=50, eos_token_id=None)) == 50
