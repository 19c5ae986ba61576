"""The benchmarks start, and a figure in the README is one that a benchmark printed."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("__init__", "common"))
ENVIRONMENT = {"device", "torch", "triton", "commit"}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()]


def figures() -> list[tuple[str, str, str, str]]:
    """(value, results file, condition, key) of each row of the README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| [^|]+ \| ([^|]+) \| `(\w+)`(?: `(\w+=\w+)`)? `(\w+)` \|$", text, re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_tells_its_use_and_is_in_the_page(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert f"python -m benchmarks.{name}" in done.stdout
    assert f"python -m benchmarks.{name}" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_line_of_results_says_where_it_was_measured(path):
    assert path.stem in MODULES
    for row in rows(path.stem):
        assert row.keys() >= ENVIRONMENT and row.keys() - ENVIRONMENT


def test_what_is_timed_as_an_instruction_is_compiled_to_it_alone():
    # In a process of its own: this one may have Triton's interpreter.
    script = (
        "import json; from benchmarks.instructions import INSTRUCTIONS, compiled_for\n"
        "print(json.dumps([[of.name, of.counted, compiled_for(90, of)] for of in INSTRUCTIONS]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300, env=environment)
    for name, counted, opcodes in json.loads(done.stdout):
        links = sum(opcodes.get(opcode, 0) for opcode in counted)
        assert links in (64, 256), (name, opcodes)  # 8 chains of 8 links, as they are or unrolled four times
        others = sum(opcodes.values()) - links
        assert others <= (40 if "LDS.64" in name else 24), (name, opcodes)


def test_the_readme_has_figures():
    assert len(figures()) >= 8


@pytest.mark.parametrize(("shown", "name", "condition", "key"), figures(), ids=lambda value: str(value))
def test_a_figure_of_the_readme_is_in_the_newest_line_of_its_results(shown, name, condition, key):
    wanted = dict([condition.split("=")]) if condition else {}
    row = [row for row in rows(name) if all(str(row[k]) == v for k, v in wanted.items())][-1]
    number = re.match(r"[\d,]+(?:\.(\d+))?", shown)
    assert number is not None, shown
    value = float(row[key]) * (100 if f"{number[0]} %" in shown else 1)
    assert float(number[0].replace(",", "")) == round(value, len(number[1] or ""))
