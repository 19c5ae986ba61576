"""Copies ahead of time: which one is begun when, that nothing is copied in vain, and that what arrives is what is at home.

The CPU copies to itself here: the order and the numbers. What a second stream has to wait for is in test_placement.py.
"""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from qlite.prefetch import Prefetch
from tests.adapted import adapt, base_of
from tests.falcons import tokens_of
from tests.test_placement import streamed, visits_of

NAMES = ("a", "b", "c")
KEYS = ("weight", "absmax")


@pytest.fixture
def homes():
    return {(name, key): torch.full((4,), float(i)) for i, (name, key) in enumerate((n, k) for n in NAMES for k in KEYS)}


def fetch(prefetch, homes, name, key="weight", **options):
    return prefetch.fetch(name, key, homes[name, key], **options)


def visit(prefetch, homes, name):
    """Fetches all of a module, and returns what is on its way then."""
    for key in KEYS:
        assert torch.equal(fetch(prefetch, homes, name, key), homes[name, key])
    return coming(prefetch)


def coming(prefetch):
    return [(ahead.place.name, ahead.place.key) for ahead in prefetch.pending]


def test_the_first_pass_learns_and_the_second_has_the_next_module_under_way_whenever_one_computes(homes):
    prefetch = Prefetch(torch.device("cpu"))
    assert [visit(prefetch, homes, name) for name in NAMES] == [[], [], []]
    for _ in range(2):
        under_way = [visit(prefetch, homes, name) for name in NAMES]
        assert under_way == [[("b", "weight"), ("b", "absmax")], [("c", "weight"), ("c", "absmax")], []]


def test_the_first_request_of_a_module_begins_the_rest_of_it_and_the_next_one_but_no_more(homes):
    prefetch = Prefetch(torch.device("cpu"))
    for name in NAMES:
        visit(prefetch, homes, name)
    fetch(prefetch, homes, "a")
    assert coming(prefetch) == [("a", "absmax"), ("b", "weight"), ("b", "absmax")]


def test_a_pass_that_goes_another_way_gets_what_it_asks_for_and_the_way_is_learned_anew(homes):
    prefetch = Prefetch(torch.device("cpu"))
    for order in ("abc", "abc", "acb", "acb"):
        under_way = [visit(prefetch, homes, name) for name in order]
    assert [{name for name, _ in each} for each in under_way] == [{"c"}, {"b"}, set()]
    assert visit(prefetch, homes, "b") == []  # the end of the last pass: nothing follows it any more


def test_a_module_that_is_called_twice_in_a_pass_gets_plain_copies_and_its_own_numbers(homes):
    prefetch = Prefetch(torch.device("cpu"))
    for _ in range(3):
        for name in "abab":
            visit(prefetch, homes, name)
    assert visit(prefetch, homes, "a") == [("b", "weight"), ("b", "absmax")]


@pytest.mark.parametrize(
    "change",
    [
        lambda homes: homes["b", "weight"].add_(1),
        lambda homes: homes.update({("b", "weight"): torch.full((4,), 9.0)}),
        lambda homes: homes["b", "weight"].set_(torch.full((4,), 9.0)),
    ],
)
def test_a_tensor_that_changed_after_its_copy_was_begun_is_copied_again(change, homes):
    prefetch = Prefetch(torch.device("cpu"))
    for _ in range(2):
        for name in NAMES:
            visit(prefetch, homes, name)
    assert ("b", "weight") in visit(prefetch, homes, "a")
    before = homes["b", "weight"].clone()
    change(homes)
    assert not torch.equal(homes["b", "weight"], before)
    visit(prefetch, homes, "b")


def test_a_copy_begun_in_inference_mode_is_not_given_to_autograd(homes):
    prefetch = Prefetch(torch.device("cpu"))
    for name in NAMES:
        visit(prefetch, homes, name)
    with torch.inference_mode():
        assert visit(prefetch, homes, "a") and fetch(prefetch, homes, "b").is_inference()
        assert coming(prefetch)
    assert not fetch(prefetch, homes, "b", "absmax").is_inference()


def test_what_was_learned_keeps_no_tensor_alive_and_one_that_is_gone_is_no_error(homes):
    prefetch = Prefetch(torch.device("cpu"))
    for name in NAMES:
        visit(prefetch, homes, name)
    del homes["b", "weight"]
    gc.collect()
    assert visit(prefetch, homes, "a") == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_starts_as_new(copied, homes):
    prefetch = Prefetch(torch.device("cpu"))
    for name in (*NAMES, "a"):
        visit(prefetch, homes, name)
    twin = copied(prefetch)
    assert coming(prefetch) and not twin.pending and not twin.after and twin.device == prefetch.device


class Counting(Prefetch):
    """Counts the requests, and those whose copy had been begun."""

    def __init__(self, device):
        super().__init__(device)
        self.asked = self.ready = 0

    def _arrived(self, place, home):
        found = super()._arrived(place, home)
        self.asked, self.ready = self.asked + 1, self.ready + (found is not None)
        return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bit", None])
def test_in_a_training_step_of_falcon_all_but_the_first_copy_of_each_pass_were_begun_ahead(kind, checkpointing):
    import qlite

    model = base_of(kind and getattr(qlite, kind))
    adapt(model)
    model.gradient_checkpointing = checkpointing
    streamed(model.train())
    prefetch = Counting(torch.device("cpu"))
    for each in visits_of(model):
        each.prefetch = prefetch
    ids = tokens_of(model.config, 2, 7)
    for step in range(3):
        prefetch.asked = prefetch.ready = 0
        model(ids).square().mean().backward()
        assert prefetch.asked > 20 and not prefetch.pending
        if step:
            # The head is the embedding: it is asked for at both ends of the forward pass, under names of its own.
            assert prefetch.asked - prefetch.ready == 2


def test_generation_has_the_next_module_under_way_from_its_second_token_on():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]).requires_grad_(False)
    streamed(model)
    prefetch = Counting(torch.device("cpu"))
    for each in visits_of(model):
        each.prefetch = prefetch
    with torch.inference_mode():
        for _ in range(3):
            model(torch.ones(1, 8))
    assert (prefetch.asked, prefetch.ready) == (30, 18) and not prefetch.pending
