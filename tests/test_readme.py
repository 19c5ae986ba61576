"""The README keeps its word: it is short, its code runs, its commands and links exist."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

from qlite.data import ASSETS, read_faq

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_its_two_commands_are_targets_of_the_makefile():
    commands = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    for _, target in commands:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_the_makefile_runs_the_demo_and_the_whole_suite():
    recipes = dict(re.findall(r"^(demo|test):.*\n\t(.*)$", MAKEFILE, re.MULTILINE))
    assert recipes["demo"].endswith("/qlite finetune")
    # No path, no -k, no -m: all that testpaths names.
    assert re.search(r"-m pytest( -q)?( -n 2 --dist loadfile)?$", recipes["test"])


def test_there_is_one_block_of_code_for_the_main_job_and_one_for_each_task():
    assert len(blocks("python")) == 1 + len(re.findall(r"^\*\*\d\. ", README, re.MULTILINE)) == 6
    assert len(blocks("python")[0].splitlines()) <= 14  # twelve lines and what they import


@pytest.mark.skipif(not (ASSETS / "tiny-falcon" / "model.safetensors").is_file(), reason="needs the tiny base in qlite/assets")
def test_its_code_runs_from_top_to_bottom_and_the_main_job_learns_the_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n".join(blocks("python")), "README.md", "exec"), {})
    assert (tmp_path / "faq-lora" / "adapter_model.safetensors").is_file()
    assert dict(read_faq(ASSETS / "faq.json"))["How can I create an account?"] in capsys.readouterr().out


def test_the_code_of_the_page_on_asking_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n".join(code), "generation.md", "exec"), {})


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_to_a_heading_lead_to_one(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        there = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (target, anchor)


def test_files_named_in_the_pages_exist():
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`((?:kernels/)?test_\w+\.py|tests/\w+\.py)`", page.read_text(encoding="utf-8")):
            assert (ROOT / "tests" / name.removeprefix("tests/")).is_file(), f"{page.name}: {name}"
