"""The picture of what four bits add to a loss: the share of NF4's gap that a format keeps, with its interval, by model."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

#: Colours of Okabe and Ito, which the colour-blind tell apart; markers for those who print.
STYLES = {
    "nf4 searched": ("#0072B2", "o"),
    "ls4 searched": ("#009E73", "s"),
    "nf4 blocks of 32": ("#E69F00", "^"),
    "fp4": ("#D55E00", "D"),
}


def newest(rows: Iterable[dict], text: str) -> dict[str, dict[str, dict]]:
    """Returns {model: {format: line}} of the newest lines on a kind of text that have a share, models in order of size.

    Raises:
        ValueError: there is none.
    """
    lines = [row for row in rows if row["text"] == text and "share" in row]
    if not lines:
        raise ValueError(f"no line on {text!r} with a share to draw")
    found: dict[str, dict[str, dict]] = {}
    for row in sorted(lines, key=lambda row: row["parameters"]):  # a stable sort: among equals the newest stays last
        found.setdefault(row["model"], {})[row["format"]] = row
    return found


def bars(found: dict[str, dict[str, dict]], form: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Returns (numbers of the models, shares, [lengths below, lengths above]) of one format, where it was measured."""
    lines = [(number, forms[form]) for number, forms in enumerate(found.values()) if form in forms]
    below = [max(0.0, line["share"] - line["share_low"]) for _, line in lines]
    above = [max(0.0, line["share_high"] - line["share"]) for _, line in lines]
    return [number for number, _ in lines], [line["share"] for _, line in lines], [below, above]


def draw(rows: Iterable[dict], path: pathlib.Path, text: str = "library") -> None:
    """Writes the picture of `rows` (lines of results) to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = newest(rows, text)
    figure, axis = pyplot.subplots(figsize=(6.4, 3.9), layout="constrained")
    for position, (form, (colour, marker)) in enumerate(STYLES.items()):
        numbers, shares, lengths = bars(found, form)
        places = [number + 0.16 * (position - (len(STYLES) - 1) / 2) for number in numbers]
        axis.errorbar(places, shares, yerr=lengths, color=colour, marker=marker, linestyle="", capsize=4, label=form)
    axis.axhline(1, color="0.5", linewidth=1, linestyle=":")
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.5, 0.75, 1, 1.5, 2, 3], ["0.5", "0.75", "1", "1.5", "2", "3"])
    labels = []
    for name, forms in found.items():
        line = next(iter(forms.values()))
        labels.append(f"{name}, {line['parameters'] / 1e6:.0f} M")
    axis.set_xticks(range(len(found)), labels)
    axis.set_xlim(-0.5, len(found) - 0.5)
    axis.set_ylabel("gap to dense / gap of NF4")
    axis.set_title(f"Loss on held-out text ({text}) that four bits cost, over NF4's; 95 % of bootstrap samples", fontsize=9)
    axis.grid(True, axis="y", color="0.9")
    figure.legend(loc="outside lower center", ncols=len(STYLES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
