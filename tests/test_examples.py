"""The examples run; and of the script that makes the tiny base: its corpus keeps out what it says, its report is measured."""

from __future__ import annotations

import json
import pathlib
import runpy

import pytest
import torch

import qlite
from qlite.data import ASSETS, read_faq

ROOT = pathlib.Path(__file__).parents[1]
REPORT = json.loads((ASSETS / "tiny-falcon" / "training_report.json").read_text(encoding="utf-8"))


@pytest.fixture
def scripts(monkeypatch):
    """The two files of examples/, importable as they are when the script is run."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tiny_base_corpus
    import train_tiny_base

    return tiny_base_corpus, train_tiny_base


def test_the_held_out_loss_of_the_report_is_measured_again(scripts):
    corpus, train = scripts
    _, held_out = corpus.support(0)
    model = qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32)
    tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
    found = train.bits_per_byte(model, tokenizer, held_out, "cpu")
    # The report was measured on a GPU with tensor-float products, ten mantissa bits.
    assert found == pytest.approx(REPORT["held_out_bits_per_byte"]["support"], abs=0.003)


def test_no_sentence_of_the_faq_is_in_the_corpus(scripts):
    corpus, _ = scripts
    kept, held_out = corpus.support(0)
    text = "\n".join([*kept, *held_out])
    for name in ("faq.json", "faq_paraphrases.json"):
        for question, answer in read_faq(ASSETS / name):
            assert answer not in text
            assert f"Question: {question}\n" not in text


def test_questions_about_the_held_out_places_are_kept_from_training(scripts):
    corpus, _ = scripts
    kept, held_out = corpus.support(0)
    assert len(held_out) > 1000
    for place in corpus.HELD_OUT_PLACES:
        assert not any(place in document for document in kept)
    assert corpus.support(0) == (kept, held_out)


def test_a_module_is_held_out_with_its_docstrings(scripts):
    corpus, train = scripts
    parts = corpus.documentation_and_code()
    out = [(prose, source) for prose, source in parts if train.held_out(source or prose[0])]
    assert 0.02 < len(out) / len(parts) < 0.09  # one in twenty
    trained = {source for prose, source in parts if source and not train.held_out(source)}
    assert not trained & {source for _, source in out}


def test_the_page_tells_what_the_report_says():
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    for value in (*REPORT["held_out_bits_per_byte"].values(), REPORT["held_out_bits_per_byte_untrained"]):
        assert f"{value:.2f}" in page
    assert REPORT["parameters"] == sum(p.numel() for p in qlite.load_falcon(ASSETS / "tiny-falcon").parameters())


def test_the_example_of_a_transformers_model_learns_its_answer(capsys):
    with torch.random.fork_rng(devices=[]):
        losses = runpy.run_path(str(ROOT / "examples" / "02_transformers_model.py"))["main"]()
    assert losses[-1] < 0.2 * losses[0]
    (_, answer), *_ = read_faq(ASSETS / "faq.json")
    before, after = capsys.readouterr().out.split(f"loss {losses[0]:.2f}")
    assert answer not in before and answer in after
