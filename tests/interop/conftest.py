"""`--matrix docs/interop.md` writes what the peers can do with our files, and we with theirs; matrix.py has the command."""

import collections
import importlib.metadata
import pathlib

from tests.interop.matrix import COMMAND, PEERS, ROWS, place


def pytest_addoption(parser):
    parser.addoption("--matrix", metavar="FILE", help="write the table of tests/interop/matrix.py with what its tests did")


def pytest_configure(config):
    if config.getoption("--matrix", None):
        config.pluginmanager.register(Matrix(pathlib.Path(config.getoption("--matrix"))))


class Matrix:
    """Counts what became of each test function, and writes the page at the end."""

    def __init__(self, path):
        self.path, self.outcomes = path, collections.defaultdict(collections.Counter)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            file, _, name = report.nodeid.split("[")[0].rpartition("::")
            self.outcomes[f"{pathlib.Path(file).stem}::{name}"][report.outcome] += 1

    def pytest_sessionfinish(self):
        self.path.write_text(page(self.outcomes), encoding="utf-8")


def cell(tests, outcomes):
    """What a cell says: how many cases of its tests passed, or what else became of them."""
    total = sum((outcomes[test] for test in tests), collections.Counter())
    counts = [f"{total[word]} {word}" for word in ("failed", "skipped", "passed") if total[word]]
    names = "<br>".join(f"[{test.split('::')[1]}](../{place(test.split('::')[0])})" for test in tests)
    return f"{', '.join(counts) or 'not run'}<br><sub>{names}</sub>"


def page(outcomes):
    """The page, from the outcomes of each test."""
    versions = [f"{peer} {importlib.metadata.version(peer)}" for peer in PEERS]
    lines = [
        "# What works with whom",
        "",
        f"Written by `{COMMAND}`; a dash where the peer has no such thing.",
        "",
        f"| | {' | '.join(versions)} |",
        f"|---|{'---|' * len(PEERS)}",
    ]
    for capability, cells in ROWS.items():
        lines.append(f"| {capability} | {' | '.join(cell(cells[p], outcomes) if p in cells else '-' for p in PEERS)} |")
    return "\n".join(lines) + "\n"
