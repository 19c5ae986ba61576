"""Questions and answers as token batches: one prompt template, and a loss mask that covers the answer alone.

A record becomes `prompt + answer + end of text`, encoded piece by piece, so that the mask is known from the lengths of the
pieces. It is never found by comparing ids: Falcon pads with its end-of-text id, and a mask `ids == pad` hides the one label
that teaches the model to stop. Text of users is encoded with special tokens switched off: whatever it says, it yields no
special id.

Not done here: packing several records into a row, chat templates, other formats than the two of `read_faq`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
#: The label of a position that takes no part in the loss.
NO_LABEL = -100
MAX_FAQ_BYTES = 256 * 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20
#: Characters of one question or answer. Some tokenizers need time that grows faster than the text.
MAX_TEXT = 2**20
JSON_LINES = (".jsonl", ".ndjson")
FAQ_FORMATS = '{"questions": [{"question": "...", "answer": "..."}, ...]}, or one {"question", "answer"} a line'


def format_prompt(question: str) -> str:
    """Returns the text before the answer, the same in training and in generation.

    >>> format_prompt("Where is my parcel?")
    'Question: Where is my parcel?\\nAnswer:'
    """
    return f"Question: {question.strip()}\nAnswer:"


def format_answer(answer: str) -> str:
    """Returns the text after the prompt: the answer behind one space, as byte-level tokenizers expect of a word."""
    return f" {answer.strip()}"


class _TokenizersErrors:
    """A `with` block in which the errors of the tokenizers library become ValueError.

    Its Rust code raises `Exception` itself, no subclass, and panics with a PanicException that is no Exception at all.
    """

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and (kind is Exception or kind.__name__ == "PanicException"):
            raise ValueError(f"{self.what}: {error}") from error


def load_tokenizer(path_or_repo_id: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Returns the tokenizer of a model, without padding and truncation, blind to special tokens in text.

    Args:
        path_or_repo_id: a folder with a tokenizer.json, such a file, or a repository of the hub.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: there is no tokenizer.json. ValueError: it is not one, or larger than 64 MiB.

    Example:
        >>> tokenizer = qlite.load_tokenizer("tiiuae/falcon-7b")
    """
    path = _tokenizer_file(path_or_repo_id, revision)
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{path}: {size:,} bytes; wanted a tokenizer.json of at most {MAX_TOKENIZER_BYTES:,}")
    content = _parse_json(_decode_utf8(path.read_bytes(), path), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{path}: no "model" at the top level; wanted the tokenizer.json that the tokenizers library saves')
    # Both are properties of somebody's batches, not of the vocabulary: padding to 2**27 fills the memory here.
    content["padding"] = content["truncation"] = None
    with _TokenizersErrors(f"{path}: not a tokenizer.json that the tokenizers library can read"):
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _tokenizer_file(path_or_repo_id: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(path_or_repo_id)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    name = os.fspath(path_or_repo_id)
    looks_local = not isinstance(path_or_repo_id, str) or path.is_absolute() or name.startswith((".", "~"))
    if looks_local or path.suffix == ".json" or name.count("/") > 1:
        raise FileNotFoundError(f"{path}: no such file; wanted a folder with a tokenizer.json, or a hub id like owner/name")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(name, "tokenizer.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{name}: no folder here, and no tokenizer.json at revision {revision or 'main'} of such a hub repository: {error}"
        ) from error


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text, none of them special: `<|endoftext|>` written by a user is thirteen characters.

    Raises:
        ValueError: text is longer than 2**20 characters, cannot be written in UTF-8, or gives a special id all the same.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"encode_text: {len(text):,} characters; wanted at most {MAX_TEXT:,}")
    if not _is_unicode(text):
        raise ValueError(f"encode_text: {text[:40]!r} holds half a surrogate pair; wanted text that UTF-8 can write")
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        with _TokenizersErrors(f"encode_text: the tokenizer fails on {text[:40]!r}"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = before
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = sorted(special.intersection(ids))
    if found:
        raise ValueError(
            f"encode_text: {text[:40]!r} gives the special ids {found}; wanted a tokenizer whose vocabulary reaches them "
            "through added tokens only"
        )
    return ids


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Returns the ids of `format_prompt(question)`: what to hand to `generate`."""
    return encode_text(tokenizer, format_prompt(question))


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Returns the id of `<|endoftext|>`.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    index = tokenizer.token_to_id(END_OF_TEXT)
    if index is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT!r}; wanted a Falcon tokenizer, which ends a text with it")
    return index


def read_faq(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs of a file, in its order, without surrounding white space.

    Args:
        path: {"questions": [{"question", "answer"}, ...]} as JSON, or one {"question", "answer"} a line. UTF-8. Other keys
            are left alone. A file is read by lines if it is named .jsonl or .ndjson, or if its first line is a record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, larger than 256 MiB, not UTF-8, not JSON, without questions, or a record is no object, names
            a key twice, or has an empty or missing text. The message names the line or the record.
        TypeError: a question or an answer is not a string.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted {FAQ_FORMATS}")
    size = path.stat().st_size
    if size > MAX_FAQ_BYTES:
        raise ValueError(f"{path}: {size:,} bytes; wanted at most {MAX_FAQ_BYTES:,}")
    text = _decode_utf8(path.read_bytes(), path)
    if not text.strip():
        raise ValueError(f"{path}: empty; wanted {FAQ_FORMATS}")
    if path.suffix.lower() in JSON_LINES or _first_line_is_a_record(text):
        # Not splitlines: JSON strings may hold U+2028 and its like as they are.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [_pair(_parse_json(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines]
    content = _parse_json(text, str(path))
    if not isinstance(content, _Object) or not isinstance(content.get("questions"), list):
        raise ValueError(f'{path}: no list "questions" at the top level; wanted {FAQ_FORMATS}')
    if content.repeated is not None:
        raise ValueError(f"{path}: the key {content.repeated!r} stands twice at the top level; wanted it once")
    if not content["questions"]:
        raise ValueError(f'{path}: the list "questions" is empty; wanted at least one question with its answer')
    return [_pair(record, f"{path}, question {number}") for number, record in enumerate(content["questions"], 1)]


class _Object(dict[str, Any]):
    """A JSON object that remembers a key that stood in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated = next((key for key in keys if keys.count(key) > 1), None) if len(self) < len(keys) else None


def _decode_utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ValueError(f"{where}: not JSON at {at}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not usable JSON: nested too deeply") from error
    except ValueError as error:  # NaN and Infinity, and integers of thousands of digits
        raise ValueError(f"{where}: not usable JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _first_line_is_a_record(text: str) -> bool:
    try:
        record = json.loads(text.lstrip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "questions" not in record


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _pair(record: Any, where: str) -> tuple[str, str]:
    if not isinstance(record, _Object):
        raise ValueError(f'{where}: {type(record).__name__}; wanted an object with "question" and "answer"')
    if record.repeated is not None:
        raise ValueError(f"{where}: the key {record.repeated!r} stands twice; wanted it once")
    texts = []
    for key in ("question", "answer"):
        if key not in record:
            raise ValueError(f'{where}: no "{key}"; its keys are {sorted(record)}, wanted "question" and "answer"')
        text = record[key]
        if not isinstance(text, str):
            raise TypeError(f'{where}: "{key}" is {type(text).__name__}; wanted a string')
        if not text.strip():
            raise ValueError(f'{where}: "{key}" is empty; fill it in or take the record out')
        if len(text) > MAX_TEXT:
            raise ValueError(f'{where}: "{key}" has {len(text):,} characters; wanted at most {MAX_TEXT:,}')
        if not _is_unicode(text):
            raise ValueError(f'{where}: "{key}" holds half a surrogate pair; wanted text that UTF-8 can write')
        texts.append(text.strip())
    return texts[0], texts[1]


@dataclass(frozen=True)
class Batch:
    """Some rows of training text.

    Attributes:
        input_ids: (B, T) int64, padded on the right.
        labels: (B, T) int64, aligned with input_ids (the loss shifts them): the ids of answer and end of text, else -100.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def n_tokens(self) -> int:
        """The number of labels that a loss can count: those that a position before them predicts."""
        return int((self.labels[:, 1:] != NO_LABEL).sum())


@dataclass(frozen=True)
class DataReport:
    """What `faq_batches` made of a file; `print` it.

    Attributes:
        path: the file. records: how many it holds. skipped: (number of the record, its tokens) of those that do not fit in
            max_length. tokens: of the others, prompts included. labels: those that the loss counts. longest: tokens of the
            longest record that is used.
    """

    path: str
    records: int
    max_length: int
    skipped: tuple[tuple[int, int], ...]
    tokens: int
    labels: int
    longest: int

    def __str__(self) -> str:
        used = self.records - len(self.skipped)
        text = f"{self.path}: {used:,} of {self.records:,} questions, {self.tokens:,} tokens, {self.labels:,} of them learnt"
        return f"{text}\n{self.describe_skipped()}" if self.skipped else text

    def describe_skipped(self) -> str:
        """Returns the sentence about the records that do not fit."""
        named = ", ".join(f"question {number} ({length} tokens)" for number, length in self.skipped[:5])
        more = f" and {len(self.skipped) - 5:,} more" if len(self.skipped) > 5 else ""
        return f"skipped {len(self.skipped):,} longer than max_length={self.max_length}: {named}{more}"


class FAQBatches:
    """The batches of a FAQ. Iterating gives the rest of the current epoch and moves on to the next one.

    Args:
        examples: (ids, number of ids that belong to the prompt) for each record.
        report: what the examples were made of.
        pad_id: any id; no label ever stands on it.
        batch_size: rows in a batch; the last batch of an epoch may have fewer.
        seed, shuffle: with shuffle the order of an epoch depends on (seed, epoch) alone, else it is the order of the file.

    Attributes:
        epoch: the current epoch, from 0. position: the batches of it that were handed out.
    """

    def __init__(
        self,
        examples: Sequence[tuple[Sequence[int], int]],
        report: DataReport,
        *,
        pad_id: int,
        batch_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self._examples = [(tuple(ids), prompt_length) for ids, prompt_length in examples]
        self._report = report
        self._pad_id = pad_id
        self._settings = {"seed": seed, "shuffle": shuffle, "batch_size": batch_size, "data": self._fingerprint()}
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return -(-len(self._examples) // self._settings["batch_size"])

    def __iter__(self) -> Iterator[Batch]:
        epoch, size = self.epoch, self._settings["batch_size"]
        order = self._order(epoch)
        while self.epoch == epoch:
            rows = order[self.position * size : (self.position + 1) * size]
            # Moved on before the batch is handed out: a state taken while it is worked on counts it as seen.
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = epoch + 1, 0
            yield self._batch(rows)

    @property
    def max_id(self) -> int:
        """The highest id in any batch; the model needs an embedding for it."""
        return max(self._pad_id, max(max(ids) for ids, _ in self._examples))

    def report(self) -> DataReport:
        """Returns how many records there are, how many tokens they have and which were skipped."""
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """Returns the settings and the place reached, as numbers and strings."""
        return {**self._settings, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns nothing; goes to the place that a state names.

        Raises:
            ValueError: the state was taken of other data or other settings, or names no place. Nothing is changed then.
        """
        wrong = [f"{name}: {state.get(name)!r} saved, {value!r} now" for name, value in self._settings.items()]
        wrong = [line for line, (name, value) in zip(wrong, self._settings.items(), strict=True) if state.get(name) != value]
        if wrong:
            raise ValueError(f"FAQBatches: the state belongs to other batches ({'; '.join(wrong)})")
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position < len(self):
            raise ValueError(f"FAQBatches: epoch {epoch!r}, position {position!r}; wanted 0 <= position < {len(self)}")
        self.epoch, self.position = epoch, position

    def _order(self, epoch: int) -> list[int]:
        # Sorted by a hash rather than drawn from a generator: the same in every version of Python and torch.
        def key(index: int) -> bytes:
            return hashlib.sha256(f"{self._settings['seed']}/{epoch}/{index}".encode()).digest()

        indices = list(range(len(self._examples)))
        return sorted(indices, key=key) if self._settings["shuffle"] else indices

    def _batch(self, rows: list[int]) -> Batch:
        length = max(len(self._examples[row][0]) for row in rows)
        input_ids = torch.full((len(rows), length), self._pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), length), NO_LABEL, dtype=torch.int64)
        for row, (ids, prompt_length) in enumerate(self._examples[index] for index in rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, prompt_length : len(ids)] = input_ids[row, prompt_length : len(ids)]
        return Batch(input_ids, labels)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for ids, prompt_length in self._examples:
            digest.update(f"{prompt_length}:{','.join(map(str, ids))};".encode())
        return digest.hexdigest()


def faq_batches(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 1,
    max_length: int = 512,
    seed: int = 0,
    shuffle: bool = True,
) -> FAQBatches:
    """Returns the batches of a FAQ file, to be handed to `finetune`.

    Args:
        path: see `read_faq`.
        tokenizer: with `<|endoftext|>` in its vocabulary.
        batch_size: rows in a batch.
        max_length: most tokens of a row, prompt, answer and end of text together. Records that do not fit are skipped, with
            a warning: an answer cut short would teach the model to stop in the middle.
        seed: decides the order together with the epoch. shuffle: False keeps the order of the file.

    Raises:
        ValueError: a setting is out of range, or no record fits; besides what `read_faq` raises.

    Example:
        >>> batches = qlite.faq_batches("faq.json", tokenizer, batch_size=1, max_length=512)
        >>> print(batches.report())
        faq.json: 82 of 82 questions, 4,019 tokens, 2,610 of them learnt
    """
    for name, value in {"batch_size": batch_size, "max_length": max_length}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"faq_batches: {name} is {value!r}; wanted a whole number of at least 1")
    if type(seed) is not int:
        raise ValueError(f"faq_batches: seed is {seed!r}; wanted a whole number")
    end = end_of_text_id(tokenizer)
    pairs = read_faq(path)
    examples, skipped = [], []
    for number, (question, answer) in enumerate(pairs, 1):
        prompt = encode_prompt(tokenizer, question)
        ids = [*prompt, *encode_text(tokenizer, format_answer(answer)), end]
        if len(ids) > max_length:
            skipped.append((number, len(ids)))
        else:
            examples.append((ids, len(prompt)))
    if not examples:
        shortest = min(length for _, length in skipped)
        raise ValueError(
            f"{path}: none of its {len(pairs):,} questions with answers fits in max_length={max_length}; the shortest has "
            f"{shortest} tokens. Raise max_length"
        )
    tokens = sum(len(ids) for ids, _ in examples)
    labels = tokens - sum(length for _, length in examples)
    longest = max(len(ids) for ids, _ in examples)
    report = DataReport(os.fspath(path), len(pairs), max_length, tuple(skipped), tokens, labels, longest)
    if skipped:
        warnings.warn(f"{path}: {report.describe_skipped()}", stacklevel=2)
    return FAQBatches(examples, report, pad_id=end, batch_size=batch_size, seed=seed, shuffle=shuffle)
