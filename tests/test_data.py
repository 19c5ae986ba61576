"""A FAQ as token batches: what is read, what is refused and how, and which tokens the loss counts."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import qlite
from qlite import data
from qlite.data import (
    ASSETS,
    END_OF_TEXT,
    IGNORED,
    FAQBatches,
    collate,
    encode_answer,
    encode_prompt,
    faq_batches,
    format_prompt,
    load_tokenizer,
    read_faq,
)

TINY = ASSETS / "tiny-falcon"
TOKENIZER = load_tokenizer(TINY)
EOS = TOKENIZER.token_to_id(END_OF_TEXT)
PAIRS = [(f"Question number {i}?", f"Answer {i}" + " and more" * i) for i in range(12)]

# Any characters, and among them what a template, a mask by value or a splitter of lines could trip over.
awkward = st.sampled_from(
    (END_OF_TEXT, "\n", "\nAnswer:", "Question:", "\u2028", "\x85", "\x00", "\r\n", "  ", "{0}", "\ufeff")
)
texts = st.lists(st.one_of(st.text(max_size=12), awkward), max_size=6).map("".join).filter(str.strip)
pairs = st.tuples(texts, texts)


def decode(ids):
    return TOKENIZER.decode([int(i) for i in ids], skip_special_tokens=False)


def written(folder, text, name="faq.json"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def asked(**fields):
    return {"question": "Q?", "answer": "A.", **fields}


def questions(*records):
    return json.dumps({"questions": records})


# Reading


@given(st.lists(pairs, min_size=1, max_size=4), st.booleans(), st.booleans(), st.sampled_from(("\n", "\r\n", "\n \n")))
@example([("a\u2028b\u2029c\x85d\x1ee\x0bf", "g\u2028h")], False, False, "\n")
def test_what_is_written_is_read_in_its_order_from_json_and_from_jsonl(tmp_path_factory, found, bom, escaped, end):
    folder = tmp_path_factory.mktemp("faq")
    mark = "\ufeff" if bom else ""
    records = [{"id": i, "question": q, "tags": [{"deep": None}], "answer": a} for i, (q, a) in enumerate(found)]
    lines = "".join(json.dumps(record, ensure_ascii=escaped) + end for record in records)
    whole = json.dumps({"version": 3, "questions": records}, ensure_ascii=escaped, indent=1).replace("\n", end.strip(" "))
    wanted = [(q.strip(), a.strip()) for q, a in found]
    assert read_faq(written(folder, mark + lines, "faq.jsonl")) == wanted
    assert read_faq(str(written(folder, mark + whole))) == wanted


def test_the_packaged_files_are_read():
    assert len(read_faq(ASSETS / "faq.json")) > 20 and len(read_faq(ASSETS / "faq_paraphrases.json")) > 5


DEEP = "[" * 100_000

BAD = {
    "not JSON": ('{"questions": [', "not JSON"),
    "nothing": ("", "not JSON"),
    "no object": ("[]", "wanted"),
    "no questions": ('{"answers": []}', "wanted"),
    "questions that are no list": ('{"questions": {}}', "wanted"),
    "an empty list": ('{"questions": []}', "has no questions"),
    "a question too little": (questions(asked(), {"answer": "A."}), "question 2: question is None; wanted a string"),
    "an answer too little": (questions({"question": "Q?"}), "question 1: answer is None; wanted a string"),
    "an empty question": (questions(asked(question=" \n\u2028")), "question 1: the question is empty"),
    "an empty answer": (questions(asked(), asked(answer="")), "question 2: the answer is empty"),
    "a number": (questions(asked(answer=7)), "question 1: answer is 7; wanted a string"),
    "a long list": (questions(asked(question=["x" * 10_000])), r"question 1: question is \['x{0,60}; wanted a string"),
    "a record that is a string": (questions("Q? A."), "question 1: is str; wanted an object"),
    "half of a surrogate pair": (questions(asked(answer="a\ud83d")), "question 1: answer has half of a surrogate pair"),
    "a key that stands twice": ('{"questions": [{"question": "Q", "answer": "A", "answer": "B"}]}', "'answer' stands twice"),
    "questions twice": ('{"questions": [], "questions": [{"question": "Q", "answer": "A"}]}', "'questions' stands twice"),
    "deep nesting": ('{"questions": ' + DEEP, "not JSON"),
    "a number of 10,000 digits": ('{"questions": ' + "9" * 10_000 + "}", "not JSON"),
    "Latin-1": ('{"questions": [{"question": "Où?", "answer": "A"}]}'.encode("latin-1"), r"not UTF-8 \(byte 30\)"),
    "UTF-16": (questions(asked()).encode("utf-16"), r"not UTF-8 \(byte 0\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_json_file_is_refused_with_its_name_and_the_record(tmp_path, name):
    text, words = BAD[name]
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=words) as error:
        read_faq(path)
    assert str(path) in str(error.value) and len(str(error.value)) < len(str(path)) + 250


GOOD = json.dumps(asked())

BAD_LINES = {
    "a line cut off": ('{"question": "Q?"', "not JSON"),
    "a list": ("[1]", "is list; wanted an object"),
    "null": ("null", "is NoneType; wanted an object"),
    "a whole JSON file": (questions(asked()), "question is None; wanted a string"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "an empty answer": (json.dumps(asked(answer="\t")), "the answer is empty"),
    "a number": (json.dumps(asked(question=1.5)), "question is 1.5; wanted a string"),
    "half of a surrogate pair": (json.dumps(asked(question="\udc00")), "question has half of a surrogate pair"),
    "a key that stands twice": ('{"question": "Q", "question": "R", "answer": "A"}', "'question' stands twice"),
    "deep nesting": (DEEP, "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_in_the_file(tmp_path, name):
    text, words = BAD_LINES[name]
    path = written(tmp_path, f"{GOOD}\n\n{GOOD}\r\n{text}\n{GOOD}\n", "faq.jsonl")
    with pytest.raises(ValueError, match=rf"faq.jsonl, line 4: .*{words}"):
        read_faq(path)


@pytest.mark.parametrize("text", ["", "\n \r\n", "\ufeff"])
def test_a_jsonl_file_without_a_line_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"faq.jsonl: has no questions"):
        read_faq(written(tmp_path, text, "faq.jsonl"))


@pytest.mark.parametrize("name", ["missing.json", "missing.jsonl", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such file") as error:
        faq_batches(tmp_path / name, TOKENIZER)
    assert str(tmp_path) in str(error.value)


def test_a_file_too_large_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path, questions(asked()))
    size = path.stat().st_size
    monkeypatch.setattr(data, "LARGEST_FILE", size)
    assert len(read_faq(path)) == 1
    monkeypatch.setattr(data, "LARGEST_FILE", size - 1)
    monkeypatch.setattr(data.pathlib.Path, "read_bytes", lambda path: pytest.fail("the file was read"))
    with pytest.raises(ValueError, match=f"{size} bytes; at most {size - 1} are read"):
        read_faq(path)


# Tokens and labels


@given(st.lists(pairs, min_size=1, max_size=4), st.integers(1, 4))
@example([("Which token ends a text?", f"{END_OF_TEXT}"), ("A", "B" * 40)], 2)
@example([(f"{END_OF_TEXT} Answer: {END_OF_TEXT}", f"a{END_OF_TEXT}b")], 1)
def test_the_loss_counts_the_answer_and_its_end_and_nothing_else(found, batch_size):
    batches = FAQBatches(found, TOKENIZER, batch_size=batch_size, max_length=4096, shuffle=False)
    rows = [
        (batch.input_ids[i], batch.labels[i], batch)
        for batch in batches
        for i in range(batch.input_ids.shape[0])
    ]  # fmt: skip
    assert len(rows) == len(found)
    for (question, answer), (ids, labels, batch) in zip(found, rows, strict=True):
        counted = labels != IGNORED
        prompt = encode_prompt(TOKENIZER, question)
        wanted = [*prompt, *encode_answer(TOKENIZER, answer)]
        assert decode(labels[counted]) == f" {answer.strip()}{END_OF_TEXT}"
        # The end-of-text token is the last one alone: what a user writes like it stays ordinary characters.
        assert (ids[: len(wanted)] == EOS).nonzero().flatten().tolist() == [len(wanted) - 1]
        assert ids.tolist() == wanted + [0] * (len(ids) - len(wanted))
        assert counted.tolist() == [len(prompt) <= at < len(wanted) for at in range(len(ids))]
        assert torch.equal(labels[counted], ids[counted])
        assert decode(prompt) == format_prompt(question) == f"Question: {question.strip()}\nAnswer:"
        assert ids.dtype == labels.dtype == torch.int64
        assert batch.n_tokens == int((batch.labels != IGNORED).sum())


def test_padding_with_the_end_of_text_token_is_not_counted_and_the_token_itself_is():
    assert EOS == 0  # the id that collate pads with
    batch = collate([([5, 6], [7, EOS]), ([5], [EOS])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [5, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 0], [IGNORED, 0, IGNORED, IGNORED]]
    assert batch.n_tokens == 3


def test_a_batch_is_as_long_as_its_longest_row():
    batches = FAQBatches(PAIRS, TOKENIZER, batch_size=5, shuffle=False)
    lengths = [len(prompt) + len(answer) for prompt, answer in batches.rows]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [
        (5, max(lengths[:5])), (5, max(lengths[5:10])), (2, max(lengths[10:])),
    ]  # fmt: skip


def test_special_tokens_are_ordinary_characters_only_while_a_text_is_encoded():
    tokenizer = load_tokenizer(TINY)
    assert EOS not in encode_prompt(tokenizer, END_OF_TEXT)
    assert tokenizer.encode_special_tokens is False and tokenizer.encode(END_OF_TEXT).ids == [EOS]
    with pytest.raises(TypeError):
        encode_prompt(tokenizer, "\ud800")
    assert tokenizer.encode_special_tokens is False


def test_the_command_line_asks_with_the_prompt_of_the_training(monkeypatch):
    from qlite import cli

    seen = []
    monkeypatch.setattr(qlite, "generate", lambda model, prompts, **options: seen.extend(prompts) or [[] for _ in prompts])
    cli._answers(None, TOKENIZER, [question for question, _ in PAIRS])  # type: ignore[arg-type]
    assert seen == [prompt for prompt, _ in FAQBatches(PAIRS, TOKENIZER).rows]


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_an_empty_question_has_no_prompt(question):
    with pytest.raises(ValueError, match="the question is empty"):
        encode_prompt(TOKENIZER, question)


# What is left out


@pytest.mark.parametrize("spare", [0, -1])
def test_an_answer_too_long_is_left_out_counted_and_named(spare):
    lengths = [len(encode_prompt(TOKENIZER, q)) + len(encode_answer(TOKENIZER, a)) for q, a in PAIRS]
    limit = sorted(lengths)[6] + spare  # a row of exactly so many tokens stays, one of a token more does not
    batches = FAQBatches(PAIRS, TOKENIZER, batch_size=2, max_length=limit)
    left_out = [question for (question, _), length in zip(PAIRS, lengths, strict=True) if length > limit]
    kept = [prompt + answer for prompt, answer in batches.rows]
    assert batches.skipped == left_out and 3 < len(left_out) < 9
    assert len(kept) + len(left_out) == len(PAIRS) and max(map(len, kept)) <= limit
    said = batches.report()
    assert said.startswith(f"{len(kept)} questions in {-(-len(kept) // 2)} batches an epoch; {len(left_out)} left out")
    assert f"longer than {limit} tokens: {'; '.join(left_out[:3])} ..." in said


def test_the_report_says_nothing_of_what_is_not_left_out():
    assert FAQBatches(PAIRS, TOKENIZER, batch_size=5).report() == "12 questions in 3 batches an epoch"


def test_all_answers_too_long_is_an_error():
    with pytest.raises(ValueError, match="all 12 questions with their answers are longer than max_length=3 tokens"):
        FAQBatches(PAIRS, TOKENIZER, max_length=3)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"max_length": 0}])
def test_sizes_below_one_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} {value}"):
        FAQBatches(PAIRS, TOKENIZER, **options)


# Order and place


@given(st.integers(-(2**40), 2**40), st.integers(0, 1000), st.integers(1, 12))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_number_alone(seed, epoch, rows):
    one = FAQBatches(PAIRS[:rows], TOKENIZER, seed=seed)
    other = FAQBatches(PAIRS[:rows], TOKENIZER, seed=seed, batch_size=3)
    state = torch.get_rng_state()
    other.order(epoch + 1)
    assert one.order(epoch) == other.order(epoch)
    assert sorted(one.order(epoch)) == list(range(rows))
    assert torch.equal(state, torch.get_rng_state())


def test_other_epochs_and_other_seeds_have_other_orders():
    orders = [tuple(FAQBatches(PAIRS, TOKENIZER, seed=seed).order(epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_without_shuffling_every_epoch_has_the_order_of_the_file():
    batches = FAQBatches(PAIRS, TOKENIZER, shuffle=False)
    assert batches.order(0) == batches.order(3) == list(range(12))


def test_each_iteration_is_an_epoch_in_its_order():
    batches = FAQBatches(PAIRS, TOKENIZER, batch_size=5, seed=7)
    for epoch in range(3):
        answers = [decode(row[row != IGNORED]) for batch in batches for row in batch.labels]
        assert answers == [f" {PAIRS[i][1]}{END_OF_TEXT}" for i in batches.order(epoch)]
        assert len(batches) == 3 and batches.state_dict()["epoch"] == epoch + 1


def stream(batches, count):
    taken = []
    while len(taken) < count:
        for batch in batches:
            taken.append((batch.input_ids.tolist(), batch.labels.tolist()))
            if len(taken) == count:
                break
    return taken


@given(st.integers(0, 30), st.integers(1, 13), st.booleans())
def test_a_state_continues_at_its_place(taken, batch_size, shuffle):
    options = {"batch_size": batch_size, "seed": 3, "shuffle": shuffle}
    whole, first, rest = (FAQBatches(PAIRS, TOKENIZER, **options) for _ in range(3))
    wanted = stream(whole, taken + 20)
    assert stream(first, taken) == wanted[:taken]
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert stream(rest, 20) == wanted[taken:]


@pytest.mark.parametrize(
    ("found", "options", "words"),
    [
        (PAIRS, {"seed": 1}, "seed=1, not 0"),
        (PAIRS, {"batch_size": 3}, "batch_size=3, not 2"),
        (PAIRS, {"shuffle": False}, "shuffle=False, not True"),
        (PAIRS[1:], {}, "rows=11, not 12; sha256="),
        ([*PAIRS[:-1], (PAIRS[-1][0], "another")], {}, "has sha256="),
        ([PAIRS[1], PAIRS[0], *PAIRS[2:]], {}, "has sha256="),
        (PAIRS, {"seed": 1, "batch_size": 3}, "seed=1, not 0; batch_size=3, not 2"),
    ],
)
def test_a_state_of_other_data_is_refused_and_nothing_changes(found, options, words):
    saved = FAQBatches(PAIRS, TOKENIZER, batch_size=2)
    stream(saved, 4)
    other = FAQBatches(found, TOKENIZER, **{"batch_size": 2, **options})
    before = other.state_dict()
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == before


# The tokenizer's file


def tokenizer_file(folder, **changes):
    fields = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    written(folder, json.dumps({**fields, **changes}), "tokenizer.json")
    return folder


def test_padding_and_truncation_of_a_file_are_dropped_before_they_take_memory(tmp_path):
    padding = {
        "strategy": {"Fixed": 2**27}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folder = tokenizer_file(tmp_path, padding=padding, truncation=truncation)
    # The file does ask for it: a library that trusts it cuts to two tokens (and would pad to 2^27, about 14 GB).
    trusting = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert trusting.padding["length"] == 2**27
    trusting.no_padding()
    assert len(trusting.encode("Where is my parcel?").ids) == 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer = load_tokenizer(folder)
    assert tokenizer.padding is None and tokenizer.truncation is None
    assert encode_answer(tokenizer, "Where is my parcel?") == encode_answer(TOKENIZER, "Where is my parcel?")
    # KiB. 2^27 ids of 4 bytes are 512 MiB alone; the file and its dictionary are under one.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


WHOLE = (TINY / "tokenizer.json").read_bytes()
BROKEN = {
    "truncated": WHOLE[: len(WHOLE) // 2],
    "empty": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "not UTF-8": b"\xff" + WHOLE,
    "deep nesting": DEEP.encode(),
    "a vocabulary that is a list": json.dumps(
        {**json.loads(WHOLE), "model": {"type": "BPE", "vocab": [], "merges": []}}
    ).encode(),
    "a model of no kind": json.dumps({**json.loads(WHOLE), "model": {"type": "Rumour"}}).encode(),
    "a merge of unknown tokens": json.dumps(
        {**json.loads(WHOLE), "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}}
    ).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_tokenizer_is_a_clear_error(tmp_path, name):
    written(tmp_path, BROKEN[name], "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer: .") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_taken_for_damage(monkeypatch, kind):
    monkeypatch.setattr(data.json, "loads", lambda text: (_ for _ in ()).throw(kind()))
    with pytest.raises(kind):
        load_tokenizer(TINY)


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tmp_path):
    model = json.loads(WHOLE)["model"]
    vocabulary = {token: i for token, i in model["vocab"].items() if token != END_OF_TEXT}
    folder = tokenizer_file(tmp_path, added_tokens=[], model={**model, "vocab": vocabulary})
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["missing", "a/b/c", "../tiny", "tokenizer.json", "/missing/folder"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_a_download(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "{}", "tokenizer.json")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load_tokenizer(name)
