"""QLoRA as a library: 4-bit base weights, LoRA adapters and a paged 8-bit AdamW, from scratch in PyTorch and Triton."""

from qlite.adapters import load_adapter, save_adapter
from qlite.checkpoint import load_checkpoint, load_falcon
from qlite.data import faq_batches, load_tokenizer
from qlite.falcon import Falcon, FalconConfig
from qlite.generate import generate
from qlite.head import quantize_head
from qlite.hub import push_adapter
from qlite.int8 import Int8Tensor
from qlite.linear import Linear4bit, Linear8bit
from qlite.lora import LoRAConfig, LoRALinear, add_lora, lora_parameters
from qlite.memory import estimate
from qlite.merge import merge_adapter, save_merged
from qlite.nf4 import NF4Tensor
from qlite.ops import quantize_int8, quantize_nf4
from qlite.optim import AdamW8bit, PagedAdamW8bit
from qlite.placement import place_model
from qlite.quantize import quantize_model
from qlite.saving import save_checkpoint
from qlite.switching import delete_adapter, set_adapter
from qlite.train import finetune

__all__ = [
    "AdamW8bit",
    "Falcon",
    "FalconConfig",
    "Int8Tensor",
    "Linear4bit",
    "Linear8bit",
    "LoRAConfig",
    "LoRALinear",
    "NF4Tensor",
    "PagedAdamW8bit",
    "add_lora",
    "delete_adapter",
    "estimate",
    "faq_batches",
    "finetune",
    "generate",
    "load_adapter",
    "load_checkpoint",
    "load_falcon",
    "load_tokenizer",
    "lora_parameters",
    "merge_adapter",
    "place_model",
    "push_adapter",
    "quantize_head",
    "quantize_int8",
    "quantize_model",
    "quantize_nf4",
    "save_adapter",
    "save_checkpoint",
    "save_merged",
    "set_adapter",
]
