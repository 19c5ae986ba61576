"""Questions and answers to token batches: one prompt template, and a loss mask that covers the answer alone.

A row is `Question: ...\\nAnswer: ...<|endoftext|>`, or ends with another token that is named. The labels are -100 up to
and including "Answer:", so that the loss counts the tokens of the answer and the end-of-text token. The mask follows
positions, never token values: Falcon pads with its end-of-text token, and a mask by value would keep a model from ever
learning to stop.

Not done here: other templates, packing of several answers into a row, streaming of files larger than memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qlite.cross_entropy import IGNORED
from qlite.download import resolve_folder
from qlite.storage import no_duplicates

END_OF_TEXT = "<|endoftext|>"
#: The demo's own files: faq.json, faq_paraphrases.json and the folder tiny-falcon.
ASSETS = pathlib.Path(__file__).parent / "assets"
LARGEST_FILE = 256 * 2**20  # bytes; a whole FAQ is read into memory


def format_prompt(question: str) -> str:
    """Returns the text that stands before an answer, in training and in generation alike."""
    return f"Question: {question.strip()}\nAnswer:"


def load_tokenizer(
    path_or_repo_id: str | pathlib.Path, *, revision: str | None = None, end_of_text: str = END_OF_TEXT
) -> Tokenizer:
    """Returns the tokenizer of a folder or of a repository on the hub, with padding and truncation switched off.

    Args:
        path_or_repo_id: a folder with tokenizer.json, or a hub id such as "tiiuae/falcon-7b".
        revision: branch, tag or commit on the hub.
        end_of_text: the token that ends an answer, "</s>" for many a Llama; `faq_batches` wants the same.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json. ValueError: the file is no tokenizer, or does not have that
            token. PermissionError, ConnectionError: of the hub, see docs/sharing.md.

    Example:
        >>> from qlite.data import ASSETS
        >>> tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
        >>> tokenizer.decode(tokenizer.encode("Where is my parcel?").ids)
        'Where is my parcel?'
    """
    file = resolve_folder(path_or_repo_id, revision=revision, names=("tokenizer.json",)) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no tokenizer.json")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        # Padding and truncation that a file asks for are dropped before the file is trusted with memory.
        tokenizer = Tokenizer.from_str(json.dumps({**fields, "padding": None, "truncation": None}))
    # The tokenizers package raises bare Exception for a malformed file, and PanicException (a BaseException) beyond.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    if tokenizer.token_to_id(end_of_text) is None:
        raise ValueError(f"{file} has no token {end_of_text}, which ends an answer; name the one it has: end_of_text=...")
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of text, in which "<|endoftext|>" and its like are ordinary characters."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = before


def _start(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that a tokenizer itself puts before a text: Llama's <s>; none for Falcon."""
    encoding = tokenizer.encode("a")
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask))]


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Returns the ids of the prompt for a question, after what the tokenizer begins with; the model's answer comes next.

    Raises:
        ValueError: the question is empty.
    """
    if not question.strip():
        raise ValueError("encode_prompt: the question is empty")
    return [*_start(tokenizer), *_encode(tokenizer, format_prompt(question))]


def encode_answer(tokenizer: Tokenizer, answer: str, *, end_of_text: str = END_OF_TEXT) -> list[int]:
    """Returns the ids of an answer as the model should give it: a space, the text, the end-of-text token.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    end = tokenizer.token_to_id(end_of_text)
    if end is None:
        raise ValueError(
            f"faq_batches: the tokenizer has no token {end_of_text}; name the one that ends an answer: end_of_text=..."
        )
    return [*_encode(tokenizer, " " + answer.strip()), end]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        hint = "; a file of one object a line is named .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{where}: not JSON ({error}){hint}") from error


def read_faq(path: str | pathlib.Path) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs of a file, in its order, stripped of outer white space.

    Args:
        path: JSON `{"questions": [{"question": ..., "answer": ...}, ...]}`, or JSONL with one such object a line (a name
            that ends in .jsonl). Other keys of an object are left alone.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8, not JSON, no questions, or a question or answer that is
            missing, empty or not a string; the message names the line or the number of the record.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; at most {LARGEST_FILE:,} are read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = [(f"{path}, line {number}", _parse(line, f"{path}, line {number}")) for number, line in lines]
    else:
        content = _parse(text, str(path))
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise ValueError(f'{path}: wanted {{"questions": [{{"question": ..., "answer": ...}}, ...]}}')
        records = [(f"{path}, question {number}", record) for number, record in enumerate(content["questions"], 1)]
    if not records:
        raise ValueError(f"{path}: has no questions")
    return [_pair(record, where) for where, record in records]


def _pair(record: Any, where: str) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: is {type(record).__name__}; wanted an object with question and answer")
    for key in ("question", "answer"):
        value = record.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} is {value!r:.60}; wanted a string")
        if not value.strip():
            raise ValueError(f"{where}: the {key} is empty")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{where}: {key} has half of a surrogate pair, which is no character: {value!a:.60}")
    return record["question"].strip(), record["answer"].strip()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        input_ids: int64 (B, T).
        labels: int64 (B, T), aligned with input_ids: the token itself where the loss counts it, else -100. The loss
            compares the logits of position t with the label of position t + 1.
        n_tokens: labels that count.
    """

    input_ids: Tensor
    labels: Tensor
    n_tokens: int


class FAQBatches:
    """The batches of a question-answer file; iterating runs through one epoch, and the next time through the next.

    The order of an epoch depends on the seed and the number of the epoch alone. An answer too long for max_length is left
    out, never cut, and `skipped` names it.

    Args:
        pairs: (question, answer). tokenizer: of the model. batch_size: rows a batch. max_length: tokens a row may have.
        seed: of the order. shuffle: False keeps the order of the file in every epoch.
        end_of_text: the token of the tokenizer that ends an answer.

    Attributes:
        pairs: the (question, answer) that are used, and rows: their ids. skipped: the questions that were left out.

    Raises:
        ValueError: a size below 1, all answers too long, or no such token.
    """

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        tokenizer: Tokenizer,
        *,
        batch_size: int = 1,
        max_length: int = 512,
        seed: int = 0,
        shuffle: bool = True,
        end_of_text: str = END_OF_TEXT,
    ):
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"faq_batches: batch_size {batch_size} and max_length {max_length} must be at least 1")
        self.batch_size, self.max_length, self.seed, self.shuffle = batch_size, max_length, seed, shuffle
        self.pairs: list[tuple[str, str]] = []
        self.rows: list[tuple[list[int], list[int]]] = []
        self.skipped: list[str] = []
        for question, answer in pairs:
            row = encode_prompt(tokenizer, question), encode_answer(tokenizer, answer, end_of_text=end_of_text)
            if len(row[0]) + len(row[1]) > max_length:
                self.skipped.append(question)
            else:
                self.pairs.append((question, answer))
                self.rows.append(row)
        if not self.rows:
            raise ValueError(
                f"faq_batches: all {len(pairs)} questions with their answers are longer than max_length={max_length} "
                "tokens; raise it"
            )
        self.epoch = 0
        self.position = 0  # batches of this epoch already given out

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def order(self, epoch: int) -> list[int]:
        """Returns the rows' indices in the order of an epoch."""
        if not self.shuffle:
            return list(range(len(self.rows)))
        # Two numbers seed the order; the odd multiplier keeps (0, 1) and (1, 0) apart.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def __iter__(self) -> Iterator[Batch]:
        order = self.order(self.epoch)
        while self.position < len(self):
            first = self.position * self.batch_size
            # Counted before it is given out: a state saved while the batch is in use says it is used.
            self.position += 1
            yield collate([self.rows[index] for index in order[first : first + self.batch_size]])
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns where in which epoch the iteration stands, and what the batches hang on; JSON can hold it."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "batch_size": self.batch_size,
            "rows": len(self.rows),
            "sha256": hashlib.sha256(json.dumps(self.rows).encode()).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a state was taken.

        Raises:
            ValueError: the state is of other data, another order, batch size or seed; nothing has changed then.
        """
        ours = {key: value for key, value in self.state_dict().items() if key not in ("epoch", "position")}
        differences = [f"{key}={value}, not {state.get(key)}" for key, value in ours.items() if value != state.get(key)]
        if differences:
            raise ValueError(f"the data is not that of the saved run: it has {'; '.join(differences)}")
        self.epoch, self.position = state["epoch"], state["position"]

    def report(self) -> str:
        """Returns how many questions are used and which were left out."""
        text = f"{len(self.rows)} questions in {len(self)} batches an epoch"
        if self.skipped:
            text += f"; {len(self.skipped)} left out, longer than {self.max_length} tokens: "
            text += "; ".join(self.skipped[:3]) + (" ..." if len(self.skipped) > 3 else "")
        return text


def collate(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Returns a batch of (prompt ids, answer ids) rows, padded on the right with id 0, which attention never sees."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return Batch(input_ids, labels, sum(len(answer) for _, answer in rows))


def faq_batches(
    path: str | pathlib.Path,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 1,
    max_length: int = 512,
    seed: int = 0,
    shuffle: bool = True,
    end_of_text: str = END_OF_TEXT,
) -> FAQBatches:
    """Returns the batches of a question-answer file; see `read_faq` for the file and `FAQBatches` for the rest.

    Raises:
        FileNotFoundError, ValueError: as `read_faq` and `FAQBatches`.

    Example:
        >>> from qlite.data import ASSETS
        >>> tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
        >>> batches = qlite.faq_batches(ASSETS / "faq.json", tokenizer, batch_size=4)
        >>> next(iter(batches)).input_ids.shape[0]
        4
    """
    pairs = read_faq(path)
    options = {"batch_size": batch_size, "max_length": max_length, "seed": seed, "shuffle": shuffle}
    return FAQBatches(pairs, tokenizer, end_of_text=end_of_text, **options)
