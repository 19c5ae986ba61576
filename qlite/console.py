"""What `qlite generate` prints while tokens come."""

from __future__ import annotations

import time

from tokenizers import Tokenizer


class Telling:
    """Prints an answer as its tokens come, and keeps the time: an `on_token` of `generate`.

    What is printed is what tokenizer.decode(all).strip() would be. A character whose bytes have not all come ends in U+FFFD,
    and spaces may turn out to be at the end: both wait.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer, self.tokens, self.told = tokenizer, [], ""
        self.start, self.first = time.perf_counter(), 0.0

    def __call__(self, row: int, token: int) -> None:
        if not self.tokens:
            self.first = time.perf_counter() - self.start
        self.tokens.append(token)
        if self.tokenizer is not None:
            self.tell(self.tokenizer.decode(self.tokens).strip())

    def tell(self, text: str, end: bool = False) -> None:
        """Prints what is new of the answer so far; `end`: this is all of it."""
        if end or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self.told) :], end="\n" if end else "", flush=True)
            self.told = text

    def stats(self) -> str:
        """Returns how many tokens came, and when, in a line."""
        seconds = time.perf_counter() - self.start
        rate = f"{len(self.tokens) / seconds:,.1f} tokens/s"
        return f"{len(self.tokens)} tokens in {seconds:.2f} s, {rate}; the first after {self.first:.2f} s"
