"""QLoRA as a library: 4-bit base weights, LoRA adapters and a paged 8-bit AdamW, from scratch in PyTorch and Triton."""

from qlite.linear import Linear4bit, Linear8bit, quantize_model
from qlite.lora import LoRAConfig, LoRALinear, add_lora, lora_parameters
from qlite.ops import quantize_int8, quantize_nf4

__all__ = [
    "Linear4bit",
    "Linear8bit",
    "LoRAConfig",
    "LoRALinear",
    "add_lora",
    "lora_parameters",
    "quantize_int8",
    "quantize_model",
    "quantize_nf4",
]
