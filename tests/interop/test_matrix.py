"""docs/interop.md says what tests/interop/matrix.py says, and every cell of it is a test that passed when it was written."""

import pathlib
import re

from tests.interop.matrix import COMMAND, PEERS, ROWS, place

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "interop.md"
REMEDY = f"write it anew: {COMMAND}"


def test_every_cell_names_tests_that_exist():
    for cells in ROWS.values():
        assert cells and set(cells) <= set(PEERS)
        for test in (test for tests in cells.values() for test in tests):
            file, name = test.split("::")
            assert f"\ndef {name}(" in (HERE.parents[1] / place(file)).read_text(encoding="utf-8"), test


def test_the_page_is_that_of_the_table_and_every_cell_passed():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(ROWS), REMEDY
    for line, cells in zip(lines, ROWS.values(), strict=True):
        found = [cell.strip("| ") for cell in line.split(" | ")[1:]]
        assert len(found) == len(PEERS)
        for peer, cell in zip(PEERS, found, strict=True):
            if peer not in cells:
                assert cell == "-", REMEDY
                continue
            names = [f"{file}::{name}" for name, file in re.findall(r"\[(\w+)\]\([^)]+/(\w+)\.py\)", cell)]
            assert names == cells[peer] and re.match(r"[1-9]\d* passed<br>", cell), f"{line}\n{REMEDY}"
