"""The promise: every public name exists, is typed, has an example that runs, and is in the documentation."""

from __future__ import annotations

import doctest
import inspect
import io
import json
import pathlib
import re

import pytest
import torch

import qlite
from qlite.data import ASSETS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
names = pytest.mark.parametrize("name", qlite.__all__)
#: What the examples take for granted; their files are theirs to name.
GLOBALS = {"qlite": qlite, "torch": torch, "json": json}


def examples_of(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(qlite, name)) or "")


def signatures_of(name: str) -> dict[str, inspect.Signature]:
    """The signature of a function; of a class, those of its constructor and its own public methods."""
    public = getattr(qlite, name)
    if not inspect.isclass(public):
        return {name: inspect.signature(public)}
    own = {key: member for key, member in vars(public).items() if inspect.isfunction(member)}
    wanted = {key: member for key, member in own.items() if key == "__init__" or not key.startswith("_")}
    return {f"{name}.{key}": inspect.signature(member) for key, member in wanted.items()}


def test_the_names_are_sorted_and_nothing_else_is_public():
    assert qlite.__all__ == sorted(qlite.__all__) and len(set(qlite.__all__)) == len(qlite.__all__)
    visible = {name for name, value in vars(qlite).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert visible == {name for name in qlite.__all__ if not inspect.ismodule(getattr(qlite, name))}


@names
def test_a_public_name_is_a_function_or_a_class_of_ours(name):
    public = getattr(qlite, name)
    # `generate` is also the name of a file: the function must be the one that stands.
    assert inspect.isfunction(public) or inspect.isclass(public)
    assert public.__module__.startswith("qlite.")


@names
def test_a_public_name_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(getattr(qlite, name)) or ""
    assert "." in text.split("\n\n")[0]
    assert "Example:" in text and examples_of(name)


@names
def test_signatures_are_typed(name):
    for where, signature in signatures_of(name).items():
        for parameter in signature.parameters.values():
            if parameter.name not in ("self", "cls"):
                assert parameter.annotation is not parameter.empty, f"{where}: {parameter.name}"
        assert where.endswith("__init__") or signature.return_annotation is not signature.empty, where


@names
def test_options_are_keyword_only(name):
    """Beyond what a dataclass or a constructor after PyTorch's pattern needs, an argument with a default has a name."""
    if inspect.isclass(getattr(qlite, name)):
        pytest.skip("constructors follow torch.nn and torch.optim")
    positional = [
        parameter.name
        for parameter in inspect.signature(getattr(qlite, name)).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty
    ]
    assert positional in ([], ["kind"])  # quantize_model(model, Linear8bit) reads as one phrase


@names
def test_the_example_runs(name, tmp_path, monkeypatch):
    examples = examples_of(name)
    for example in examples:
        compile(example.source, f"<example of {name}>", "exec")
    has_tiny_base = (ASSETS / "tiny-falcon" / "model.safetensors").is_file()
    if not has_tiny_base and any("tiny-falcon" in example.source for example in examples):
        pytest.skip("needs the tiny base in qlite/assets")
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    test = doctest.DocTest(examples, dict(GLOBALS), name, None, None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.write)
    assert result.failed == 0, said.getvalue()


@names
def test_the_name_is_in_the_documentation(name):
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert re.search(rf"\b{name}\b", text), f"{name} is in none of {', '.join(page.name for page in PAGES)}"


def test_most_examples_are_run_and_not_only_read():
    skipped = [n for n in qlite.__all__ if all(e.options.get(doctest.SKIP) for e in examples_of(n))]
    # What needs a trained model, a folder to write to or the hub.
    assert set(skipped) <= {"finetune", "generate", "load_adapter", "push_adapter", "save_checkpoint"}
