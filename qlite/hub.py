"""Adapters on the hub: pushed with a model card.

Downloads are in storage.py. Not done here: whole models, data sets.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from qlite.adapters import CONFIG, TENSORS, read_config, read_tensors
from qlite.lora import LoRAConfig

CARD = "README.md"


def _card(config: LoRAConfig, values: dict[str, Any]) -> str:
    base, targets = values.get("base_model_name_or_path"), values["target_modules"]
    # The hub refuses a card whose base_model is not of the form of an id, such as the path of a folder.
    known = isinstance(base, str) and re.fullmatch(r"[\w\-]+/[\w.\-]+", base) and not pathlib.Path(base).exists()
    front = {"base_model": base if known else None, "library_name": "peft", "tags": ["lora", "qlora", "qlite"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    return "\n".join(
        [
            "---", *lines, "---", "",
            f"LoRA adapter for {base or 'a base that its config does not name'}: r={config.r}, "
            f"alpha={config.alpha}, on {targets if isinstance(targets, str) else ', '.join(targets)}.", "",
            "Load it with `qlite.load_adapter(model, ...)`, or with PEFT.", "",
        ]
    )  # fmt: skip


def push_adapter(folder: str | pathlib.Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Returns the address of a commit on the hub that holds the adapter of a folder.

    Only adapter_config.json, adapter_model.safetensors and README.md are uploaded. A README.md is made where the folder
    has none; the folder itself is left as it is.

    Args:
        folder: as save_adapter wrote it. repo_id: "owner/name", created where it is not there.
        private: of a repository that is created. token: of the hub; default: the one huggingface_hub has stored.

    Raises:
        FileNotFoundError, ValueError: the folder holds no whole adapter; nothing was uploaded.

    Example:
        >>> qlite.push_adapter("faq-lora/", "me/falcon-7b-faq")  # doctest: +SKIP
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = pathlib.Path(folder)
    config, values = read_config(folder)
    read_tensors(folder, config)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, str(folder / name)) for name in (CONFIG, TENSORS)]
    if (folder / CARD).is_file():
        operations.append(CommitOperationAdd(CARD, str(folder / CARD)))
    elif not api.file_exists(repo_id, CARD):
        operations.append(CommitOperationAdd(CARD, _card(config, values).encode()))
    return api.create_commit(repo_id, operations, commit_message="Upload a LoRA adapter").commit_url
