"""A model of transformers, trained in 4 bits by qlite's loop: a tiny Llama of random weights, offline, on the CPU.

    python examples/02_transformers_model.py

With transformers installed. For a real one, take `from_pretrained` and its tokenizer; the rest stays as it is.
"""

import pathlib
import tempfile

import torch
import transformers

import qlite
from qlite.data import ASSETS, encode_prompt, read_faq


def main(steps: int = 25) -> list[float]:
    """Trains on two questions, asks one of them before and after, and returns the losses."""
    tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    print(qlite.quantize_model(model, qlite.Linear4bit))
    print(qlite.add_lora(model, qlite.LoRAConfig(r=32, alpha=64, dropout=0.0), seed=0))

    pairs = read_faq(ASSETS / "faq.json")[:2]
    batches = qlite.data.FAQBatches(pairs, tokenizer, batch_size=2)
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=1e-2, weight_decay=0.0)
    prompt = torch.tensor([encode_prompt(tokenizer, pairs[0][0])])

    def ask() -> str:
        answer = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
        return tokenizer.decode(answer[0, prompt.shape[1] :].tolist())

    print("before:", ask())
    result = qlite.finetune(model, batches, optimizer, steps=steps, accumulate=1, progress=False)
    print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f} in {result.seconds:.1f} s")
    print("after: ", ask())

    with tempfile.TemporaryDirectory() as folder:
        files = qlite.save_adapter(model, pathlib.Path(folder) / "adapter")
        print("an adapter in PEFT's layout:", sorted(path.name for path in files.iterdir()))
    return result.losses


if __name__ == "__main__":
    main()
