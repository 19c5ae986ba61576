"""The tables of docs/migration.md, run row after row: both columns where no GPU or network is needed, ours always."""

import pathlib
import re

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers

import qlite
from qlite.data import ASSETS, encode_prompt
from qlite.lora import LoRALinear
from qlite.nf4 import FP4_LEVELS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "migration.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:save_adapter. every lora_B is zero:UserWarning"),
]


def rows(heading):
    """The code of each row of the table under a heading: (theirs, ours), a cell without code as ""."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [tuple("\n".join(re.findall(r"`([^`]+)`", cell)) for cell in row[:2]) for row in cells]


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def names_for(folder):
    """What the rows of one side find when they begin."""
    torch.manual_seed(0)
    return {
        "bnb": bnb, "peft": peft, "qlite": qlite, "torch": torch, "transformers": transformers, "FP4_LEVELS": FP4_LEVELS,
        "w": torch.randn(32, 64), "parameters": [torch.nn.Parameter(torch.ones(64, 64))],
        "net": llama(), "fresh": llama, "folder": str(folder),
    }  # fmt: skip


def run(table, side, names):
    """Runs a column; returns the names as they are after each row."""
    after = []
    for row in table:
        exec(row[side], names)
        after.append(dict(names))
    return after


# bitsandbytes, of a weight on the CPU; and that it pages nothing there.
@pytest.mark.filterwarnings("ignore:.*[Pp]aged:UserWarning")
def test_every_row_of_the_bitsandbytes_table_runs_and_both_sides_hold_the_same(tmp_path):
    llama().save_pretrained(tmp_path)
    table = rows("From bitsandbytes")
    assert len(table) == 10
    theirs, ours = (run(table, side, names_for(tmp_path)) for side in (0, 1))
    assert torch.equal(theirs[0]["q"].flatten(), ours[0]["q"].codes.flatten())
    # The double-quantized scales of bitsandbytes on the CPU are those of a table with gaps.
    torch.testing.assert_close(theirs[1]["w_hat"], ours[1]["w_hat"], rtol=1e-3, atol=1e-3)
    agree = theirs[2]["q"].flatten() == ours[2]["q"].codes.flatten()
    assert agree.float().mean() > 0.9  # bitsandbytes has a second code of zero
    assert torch.equal(theirs[3]["codes"], ours[3]["q"].codes) and torch.equal(theirs[3]["scb"], ours[3]["q"].absmax.flatten())
    x, (their_layer, our_layer) = torch.randn(5, 64), (side[5]["layer"] for side in (theirs, ours))
    torch.testing.assert_close(their_layer(x) - their_layer.bias, our_layer(x) - our_layer.bias, rtol=1e-2, atol=1e-2)
    assert isinstance(ours[6]["layer"], qlite.Linear8bit)
    assert isinstance(theirs[9]["net"].model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert isinstance(ours[9]["net"].model.layers[0].mlp.up_proj, qlite.Linear4bit)


def adapted(net):
    """The layers with an adapter, and its rank, however the model is wrapped."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, LoRALinear):
            found[name] = (module.lora_A.shape[0], module.scaling)
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            found[name.removeprefix("base_model.model.")] = (module.r["default"], module.scaling["default"])
    return found


def test_every_row_of_the_peft_table_runs_and_both_sides_adapt_the_same_layers(tmp_path):
    table = rows("From PEFT")
    assert len(table) == 16
    configs = [row for row in table if row[0].startswith("config =")]
    assert len(configs) == 6
    for row in configs:
        theirs, ours = (run([row], side, names_for(tmp_path))[0]["config"] for side in (0, 1))
        net = llama()
        qlite.add_lora(net, ours)
        assert adapted(net) == adapted(peft.get_peft_model(llama(), theirs)), row
    rest = [configs[0], *(row for row in table if row not in configs and "push" not in row[0])]
    theirs = run(rest, 0, names_for(tmp_path / "theirs"))[-1]
    ours = run(rest, 1, names_for(tmp_path / "ours"))[-1]
    ids = torch.arange(8)[None]
    torch.testing.assert_close(theirs["net"](ids).logits, ours["net"](ids).logits)
    assert "q_proj" in (tmp_path / "ours" / "adapter_config.json").read_text()


def test_the_right_column_of_the_tutorial_runs(tmp_path):
    table = rows("From the 2023 Falcon tutorials")
    assert len(table) == 11
    names = {
        "qlite": qlite, "encode_prompt": encode_prompt, "base": ASSETS / "tiny-falcon", "faq": ASSETS / "faq.json",
        "device": "cpu", "steps": 1, "run": tmp_path / "run", "adapter": tmp_path / "adapter",
    }  # fmt: skip
    names = run(table, 1, names)[-1]
    assert names["again"].lora_config.r == 16 and (tmp_path / "run" / "metrics.jsonl").is_file()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
