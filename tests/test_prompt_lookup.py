"""Guesses from the text so far: they are what followed before, and the tokens are those of a pass each."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlite
from qlite import decoding, prompt_lookup
from qlite.data import ASSETS, encode_prompt
from tests.falcons import FLAVOURS, falcon_configs, talker_of
from tests.test_decoding import kept, latest, talker  # noqa: F401  a fixture
from tests.test_generate import cycle_of, greedy_by_full_passes, prompts_of

CUDA = torch.cuda.is_available()


def guessed_by_hand(text, count):
    """The rule in Python's lists: the latest of the longest matches, and what follows it, in a circle."""
    best = 0, len(text) - 1
    for place in range(1, len(text)):
        common = 0
        while common < min(prompt_lookup.LONGEST_MATCH, place) and text[place - 1 - common] == text[-1 - common]:
            common += 1
        best = max(best, (common, place))
    return [text[best[1] :][i % (len(text) - best[1])] for i in range(count)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 12), st.lists(st.integers(0, 4), max_size=9))
def test_what_is_guessed_is_what_followed_the_latest_of_the_longest_matches(text, count, behind):
    buffer = torch.tensor(text + behind + [0] * (count - len(behind)))  # at least as long as the guesses
    found = prompt_lookup.guess(buffer, torch.tensor([len(text) - 1]), count)
    assert found.tolist() == guessed_by_hand(text, count)


def test_some_guesses():
    def guessed(text, count=4):
        return prompt_lookup.guess(torch.tensor(text), torch.tensor([len(text) - 1]), count).tolist()

    assert guessed([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [4, 5, 9, 1]
    assert guessed([7, 2, 8, 8, 1, 2, 6, 6, 0, 7, 2]) == [8, 8, 1, 2]  # two in common before one in common
    assert guessed([1, 5, 5, 1, 6, 6, 0, 1]) == [6, 6, 0, 1]  # of two alike the later
    assert guessed([4, 1, 2, 1, 2]) == [1, 2, 1, 2]
    assert guessed([1, 2, 3, 4]) == [4, 4, 4, 4]


@pytest.mark.parametrize("guesses", [1, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("config", FLAVOURS.values(), ids=FLAVOURS)
def test_tokens_are_those_of_a_pass_each(config, penalty, guesses):
    model = talker_of(config)
    (start,) = prompts_of(config, [6])
    options = {"max_new_tokens": 30, "eos_token_id": None, "repetition_penalty": penalty}
    for prompt in (start, start * 4):
        wanted = qlite.generate(model, prompt, **options)
        assert qlite.generate(model, prompt, prompt_lookup=guesses, **options) == wanted
    assert wanted == greedy_by_full_passes(model, start * 4, 30, penalty)


@settings(max_examples=30)
@given(falcon_configs(), st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 2**32))
def test_tokens_are_those_of_a_pass_each_of_any_falcon(config, prompt, guesses, seed):
    model = talker_of(config, seed, torch.float64)  # in which a near tie is one on both sides
    prompt = [token % config.vocab_size for token in prompt]
    options = {"max_new_tokens": 20, "eos_token_id": None}
    assert qlite.generate(model, prompt, prompt_lookup=guesses, **options) == qlite.generate(model, prompt, **options)


@pytest.mark.parametrize("quantize", [None, qlite.Linear4bit])
def test_the_tiny_base_answers_the_same_in_fewer_passes(quantize):
    model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=quantize, dtype=torch.float32)
    tokenizer, passes = qlite.load_tokenizer(ASSETS / "tiny-falcon"), []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    alone = guessed = 0
    for question in ("How can I create an account?", "a b c a b c a b c"):
        prompt = encode_prompt(tokenizer, question)
        answer = functools.partial(qlite.generate, model, prompt, max_new_tokens=32, eos_token_id=None)
        wanted, alone = answer(), alone + len(passes)
        passes.clear()
        assert answer(prompt_lookup=4) == wanted
        guessed += len(passes)
        passes.clear()
    assert guessed < alone == 2 * 32


@pytest.fixture
def chain(monkeypatch):
    """A model that counts 1, 2, ..., 6, 0, 1, ...: all its guesses are right once it has come round."""
    monkeypatch.setattr(prompt_lookup, "hidden_after", lambda model, ids, *_: model.transformer.word_embeddings(ids))
    model = cycle_of(7)
    model.passes = []
    model.lm_head.register_forward_hook(lambda *_: model.passes.append(1))
    return model


@pytest.mark.parametrize(("guesses", "passes"), [(0, 30), (1, 16), (4, 7), (9, 4)])
def test_a_pass_gives_as_many_tokens_as_are_guessed_right_and_one_more(chain, guesses, passes):
    turn = [1, 2, 3, 4, 5, 6, 0]
    answer = qlite.generate(chain, turn, max_new_tokens=30, eos_token_id=None, prompt_lookup=guesses)
    assert answer == (turn * 5)[:30] and len(chain.passes) == passes


def test_a_wrong_guess_is_no_token_that_was_seen(chain):
    # After 1 comes 2, and the prompt would have it be 5: were 5 taken for seen, the penalty would show where it comes.
    chain.lm_head.weight.data[6, 5] = 8.9  # after 5: 6, and 0 by 0.1 less
    options = {"max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": 1.2}
    for prompt in ([1, 5, 4, 1], [3, 1, 5, 0, 1], [2, 2, 6, 2]):
        assert qlite.generate(chain, prompt, prompt_lookup=3, **options) == qlite.generate(chain, prompt, **options)


@pytest.mark.parametrize("end", [3, [3], (6, 3), [0, 5], None])
def test_an_answer_ends_at_a_stop_token_among_the_guesses(chain, end):
    told, turn = [], [1, 2, 3, 4, 5, 6, 0]
    options = {"max_new_tokens": 20, "eos_token_id": end, "on_token": lambda row, token: told.append((row, token))}
    answer = qlite.generate(chain, turn * 2, prompt_lookup=5, **options)
    ends = [end] if isinstance(end, int) else end or []
    wanted = (turn * 3)[:20]
    first = next((place for place, token in enumerate(wanted) if token in ends), 20)
    assert answer == wanted[:first] == [token for _, token in told] and {row for row, _ in told} <= {0}


@pytest.mark.parametrize("guesses", [7, 63])
@pytest.mark.parametrize("new", [1, 2, 20, 50])
def test_prompt_and_answer_may_fill_the_context_to_the_last_token(new, guesses):
    model = talker_of(FLAVOURS["7b"])
    prompt = [1, 2, 1, 2] * 16
    options = {"max_new_tokens": new, "eos_token_id": None}
    found = qlite.generate(model, prompt[: 64 - new], prompt_lookup=guesses, **options)
    assert len(found) == new and found == qlite.generate(model, prompt[: 64 - new], **options)


@pytest.mark.parametrize("flavour", ["7b", "40b"])
@pytest.mark.parametrize("guesses", [1, 5])
def test_steps_that_are_read_by_the_chunk_are_kept_for_this_number_of_guesses(kept, guesses, flavour):  # noqa: F811
    model, options = talker(flavour), {"max_new_tokens": 41, "eos_token_id": None}
    prompts = [[1, 2, 3, 1, 2, 3, 1], [9, 8, 7, 9]]
    wanted = [qlite.generate(model, prompt, **options) for prompt in prompts]
    decoding.forget(model)
    for _ in range(2):
        assert [qlite.generate(model, prompt, prompt_lookup=guesses, **options) for prompt in prompts] == wanted
    steps = latest(model)
    assert steps.guesses == guesses and (steps.graph is not None) is CUDA
    assert qlite.generate(model, prompts[0], **options) == wanted[0] and latest(model) is not steps


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guesses", [1, 6])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("flavour", ["7b", "40b", "11b", "rw"])
def test_recorded_steps_over_guesses_give_the_tokens_of_steps_that_are_not(flavour, penalty, guesses, dtype, monkeypatch):
    model, options = talker(flavour, dtype), {"max_new_tokens": 45, "eos_token_id": None, "repetition_penalty": penalty}
    found = [qlite.generate(model, [1, 2, 3, 4, 1, 2], prompt_lookup=guesses, **options) for _ in range(2)]
    assert (latest(model).graph is not None) if flavour != "rw" else model not in decoding._KEPT
    decoding.forget(model)
    monkeypatch.setattr(decoding, "why_not", lambda model: "a test")
    plain = qlite.generate(model, [1, 2, 3, 4, 1, 2], prompt_lookup=guesses, **options)
    assert found == [plain, plain] and len(plain) == 45


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], [2]], {"prompt_lookup": 2}, "prompt_lookup is for one prompt at a time; there are 2"),
        ([1], {"prompt_lookup": 2, "temperature": 0.5}, "prompt_lookup is for greedy answers; the temperature is 0.5"),
        ([1], {"prompt_lookup": -1}, r"prompt_lookup is -1; wanted 0 .no guesses. to 63"),
        ([1], {"prompt_lookup": 64}, "prompt_lookup is 64"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_pass(chain, prompts, options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        qlite.generate(chain, prompts, **options)
    assert not chain.passes
