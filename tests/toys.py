"""Small models, data and optimizers for the tests of the training loop and of its checkpoints."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

import qlite
from qlite.data import ASSETS, FAQBatches, collate, load_tokenizer, read_faq


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small, and threads that wait for each other on cores that others use take 30 times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TOKENIZER = load_tokenizer(ASSETS / "tiny-falcon")
PAIRS = read_faq(ASSETS / "faq.json")
OPTIMIZERS = {"adamw_8bit": qlite.AdamW8bit, "paged_adamw_8bit": qlite.PagedAdamW8bit, "adamw": torch.optim.AdamW}
VOCABULARY = 12


class Toy(nn.Module):
    """The least that can be trained: what a token is followed by. Some tokens are made to spoil a step."""

    BAD_LOSS, BAD_GRADIENT = 10, 11

    def __init__(self, dropout=0.0, dtype=torch.float32, gain=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator).to(dtype), requires_grad=False)
        self.base[self.BAD_LOSS] = torch.nan
        self.shift = nn.Parameter(torch.randn(8, generator=generator))
        self.factor = nn.Parameter(torch.rand(8, generator=generator) + 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.lm_head = nn.Linear(8, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
        self.lm_head.weight.copy_(torch.randn(VOCABULARY, 8, generator=generator))
        self.dropout, self.gain = nn.Dropout(dropout), gain
        self.modes = []

    def hidden_states(self, input_ids):
        self.modes.append(self.training)
        x = self.base[input_ids]
        y = self.dropout(x) * self.factor.to(x.dtype) + self.shift.to(x.dtype)
        if bool((input_ids == self.BAD_GRADIENT).any()):
            y = (y * 0).sqrt()  # the root of 0 is 0 and its gradient infinite; times the zero before it, NaN
        return y * self.gain


def batch_of(*rows):
    """A batch of (ids before the answer, ids of the answer)."""
    return collate([(list(prompt), list(answer)) for prompt, answer in rows])


GOOD = [batch_of(([i % 9 + 1], [(i * 7) % 9 + 1, (i * 5) % 9 + 1])) for i in range(24)]
BAD_LOSS = batch_of(([Toy.BAD_LOSS], [3, 4]))
BAD_GRADIENT = batch_of(([Toy.BAD_GRADIENT], [3, 4]))


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model, lr=0.1):
    return torch.optim.SGD(trained_parameters(model), lr=lr)


def tune(model, batches, optimizer=None, **options):
    options = {"accumulate": 1, "schedule": "constant", "warmup": 0.0, "progress": False, **options}
    return qlite.finetune(model, batches, optimizer or sgd(model), **options)


def bits(tensors):
    """A digest of every tensor by name, for comparisons bit for bit: NaN equals itself there."""
    return {name: hashlib.sha256(t.detach().reshape(-1).view(torch.uint8).numpy()).hexdigest() for name, t in tensors.items()}


def tiny_falcon(*, quantize=qlite.Linear4bit, dropout=0.1, dtype=torch.float32, r=4):
    """A small random Falcon in the vocabulary of the packaged tokenizer, with adapters."""
    config = qlite.FalconConfig(vocab_size=4096, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    model = qlite.Falcon(config, dtype=dtype).init_weights_(seed=0)
    if quantize is not None:
        qlite.quantize_model(model, quantize)
    qlite.add_lora(model, qlite.LoRAConfig(r=r, dropout=dropout), seed=0)
    return model


def faq(pairs=PAIRS[:20], **options):
    return FAQBatches(pairs, TOKENIZER, **options)
