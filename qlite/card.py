"""The model card of an adapter: what it is, how it was trained, how to load it; only what its files say.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards). `training` is what `TrainResult.save` wrote, or
{}: a card without it says less, and guesses nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from qlite.lora import LoRAConfig
from qlite.nf4 import TABLES

QUESTION = "How can I create an account?"
#: The linear layers of a Falcon's blocks.
FALCON = r"transformer\.h\.\d+\.(self_attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h))"


def model_card(
    repo_id: str,
    config: LoRAConfig,
    values: dict[str, Any],
    training: dict[str, Any],
    *,
    layers: Sequence[str],
    parameters: int,
    curve: str | None,
) -> str:
    """Returns the text of README.md.

    Args:
        repo_id: of the adapter. config, values: what adapter_config.json says, its base a hub id. training: see above.
        layers: names of the adapted ones. parameters: of the adapter. curve: name of the image of the losses, if any.
    """
    base, kinds = values["base_model_name_or_path"], _kinds(training)
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter", "library_name": "peft"}
    if values.get("task_type") == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    front["tags"] = ["lora", *(["qlora"] if any("block_size" in kind for kind in kinds) else []), "qlite"]
    table = [f"| {name} | {_cell(text)} |" for name, text in _facts(config, values, training, parameters)]
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]),
        f"# {repo_id.rpartition('/')[2]}",
        f"A LoRA adapter for [{base}](https://huggingface.co/{base})" + (", trained with qlite." if training else "."),
        "\n".join(["| | |", "|---|---|", *table]),
    ]
    if curve:
        parts.append(f"![The loss of every step]({curve})")
    if "prompt" in training:
        parts += ["## Prompt", f"```\n{training['prompt']}\n```"]
        parts.append("The answer follows after a space, and ends with `<|endoftext|>`.")
    falcon = all(re.fullmatch(FALCON, name) for name in layers)
    parts += ["## With qlite", f"```python\n{_qlite_code(repo_id, values, training, falcon)}\n```"]
    parts += ["## With PEFT", f"```python\n{_peft_code(repo_id, values, training)}\n```"]
    if kinds and falcon:
        parts.append(
            "The base is dense here, as transformers loads a Falcon even with a BitsAndBytesConfig (seen in 5.24); the adapter "
            "was trained over the encoded one, so its answers may differ."
        )
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _kinds(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the options of each kind of encoded layer that the base had; none if it was dense, or nobody knows."""
    return [{key: value for key, value in kind.items() if key != "count"} for kind in training.get("layers", [])]


def _facts(config: LoRAConfig, values: dict[str, Any], training: dict[str, Any], parameters: int) -> list[tuple[str, str]]:
    """Returns the rows of the table."""
    targets, revision = values["target_modules"], values.get("revision")
    kind = "".join(f"{name}, " for name, used in (("rsLoRA", config.rslora), ("DoRA", config.dora)) if used)
    patterns = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "saved whole": config.modules_to_save,
    }
    others = "".join(f"; {name} {json.dumps(value)}" for name, value in patterns.items() if value)
    where = targets if isinstance(targets, str) else ", ".join(targets)
    rows = [
        ("base", f"`{values['base_model_name_or_path']}`" + (f" at `{revision}`" if revision else "")),
        (
            "adapter",
            f"{kind}r={config.r}, alpha={config.alpha:g}, dropout {config.dropout:g}; {parameters:,} parameters{others}",
        ),
        ("on", f"`{where}`"),
    ]
    if not training:
        return rows
    kinds, optimizer, loss = _kinds(training), training["optimizer"], training["loss"]
    encoded = "; ".join(", ".join(f"{key} {value}" for key, value in kind.items() if key != "levels") for kind in kinds)
    rows.append(("base in training", f"{encoded or 'dense'}; computed in {training['dtype'].removeprefix('torch.')}"))
    batch = f"{training['batch_size']} rows" if "batch_size" in training else "rows"
    if "questions" in training:
        rows.append(("data", f"{training['questions']} questions with answers, which are not part of this repository"))
    clipped = "" if training["max_grad_norm"] is None else f", gradients clipped to norm {training['max_grad_norm']:g}"
    others = "".join(f", {key} {value}" for key, value in optimizer.items() if key not in ("name", "lr"))
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items() if version)
    return [
        *rows,
        ("optimizer", f"{optimizer['name']}, learning rate {optimizer['lr']:g}{others}"),
        ("schedule", f"{training['schedule']}, warm-up over {100 * training['warmup']:g} % of the steps{clipped}"),
        ("steps", f"{training['steps']} of {training['accumulate']} x {batch}; seed {training['seed']}"),
        ("loss per answer token", f"{loss['first']:.4f} in the first step, {loss['last']:.4f} in the last"),
        ("made with", versions),
    ]


def _from(values: dict[str, Any]) -> str:
    """Returns the arguments that name the base."""
    revision = values.get("revision")
    return json.dumps(values["base_model_name_or_path"]) + (f", revision={json.dumps(revision)}" if revision else "")


def _quantize_argument(kinds: list[dict[str, Any]]) -> tuple[str, str]:
    """Returns the argument that encodes the base as in training, and what it needs imported; "" for a dense base."""
    if kinds == [{"format": "int8"}]:
        return ", quantize=qlite.Linear8bit", ""
    if len(kinds) != 1 or kinds[0]["format"] not in TABLES:
        return "", ""
    default = {"block_size": 64, "double_quant": True, "search": False}
    found = {**default, **kinds[0]}
    options = [f"{key}={found[key]}" for key in default if found[key] != default[key]]
    if kinds[0]["format"] != "nf4":
        options.append(f"levels={json.dumps(kinds[0]['format'])}")
    if not options:
        return ", quantize=qlite.Linear4bit", ""
    return f", quantize=functools.partial(qlite.Linear4bit, {', '.join(options)})", "import functools\n"


def _qlite_code(repo_id: str, values: dict[str, Any], training: dict[str, Any], falcon: bool) -> str:
    if not falcon:
        return f"import qlite\n\nmodel = ...  # the base, dense or quantized\nqlite.load_adapter(model, {json.dumps(repo_id)})"
    quantize, imports = _quantize_argument(_kinds(training))
    dtype = f", dtype={training['dtype']}" if training else ""
    lines = [
        f"{imports}import torch\nimport qlite",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"model = qlite.load_falcon({_from(values)}{quantize}, device=device{dtype})",
        f"qlite.load_adapter(model, {json.dumps(repo_id)})",
    ]
    if "prompt" in training:
        lines[0] += "\nfrom qlite.data import encode_prompt"
        lines.append(f"tokenizer = qlite.load_tokenizer({_from(values)})")
        lines.append(f"print(tokenizer.decode(qlite.generate(model, encode_prompt(tokenizer, {json.dumps(QUESTION)}))))")
    return "\n".join(lines)


def _peft_code(repo_id: str, values: dict[str, Any], training: dict[str, Any]) -> str:
    """Returns code for a dense base: transformers encodes no layer of a Falcon (they are a subclass of nn.Linear)."""
    dtype = training.get("dtype", "torch.bfloat16")
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if "prompt" in training else "")
    lines = [
        f"import torch\nfrom peft import PeftModel\nfrom transformers import {names}",
        "",
        f'base = AutoModelForCausalLM.from_pretrained({_from(values)}, dtype={dtype}, device_map="auto")',
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo_id)}).eval()",
    ]
    if "prompt" in training:
        prompt = training["prompt"].replace("{question}", QUESTION)
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({_from(values)})",
            f'inputs = tokenizer({json.dumps(prompt)}, return_tensors="pt", return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=64)[0]))",
        ]
    return "\n".join(lines)
