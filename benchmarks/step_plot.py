"""The picture of training_step's results: tokens a second and the peak of GPU memory, by size of batch, drawn without a GPU."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

#: (whose, checkpointing): (label, colour, hatch); the colours are Okabe and Ito's, which the colour-blind tell apart.
STYLES = {
    ("qlite", False): ("qlite, none", "#0072B2", ""),
    ("qlite", "selective"): ("qlite, selective", "#56B4E9", ""),
    ("qlite", True): ("qlite, full", "#009E73", ""),
    ("qlite", "offload"): ("qlite, offload", "#F0E442", ""),
    ("peers", False): ("transformers + peft + bitsandbytes, none", "#D55E00", "//"),
    ("peers", True): ("transformers + peft + bitsandbytes, full", "#E69F00", "//"),
}
#: Key of a line: the panel's title.
PANELS = {"tokens_per_second": "tokens a second", "peak_gib": "peak of GPU memory, GiB"}


def chosen(rows: Iterable[dict], device: str | None = None) -> dict[tuple, dict[tuple[int, int], dict]]:
    """Returns {(whose, checkpointing): {(rows, tokens): line}} of one device, that of the last line unless it is named.

    The newest line of each counts; those of fewer layers than the last line's, and of a part of the card, do not.

    Raises:
        ValueError: there is no such line.
    """
    lines = [row for row in rows if row.get("tokens_per_second") and not row.get("cap_gib")]
    if not lines:
        raise ValueError("no line with tokens_per_second to draw")
    device = device or lines[-1]["device"]
    found: dict[tuple, dict[tuple[int, int], dict]] = {}
    for row in lines:
        if row["device"] == device and row["layers"] == lines[-1]["layers"]:
            series = "peers" if "peer" in row else "qlite", row["checkpointing"]
            found.setdefault(series, {})[row["rows"], row["tokens"]] = row
    if not found:
        raise ValueError(f"no line of {device}; there are {sorted({row['device'] for row in lines})}")
    return {series: found[series] for series in STYLES if series in found}


def draw(rows: Iterable[dict], path: pathlib.Path, device: str | None = None) -> None:
    """Writes the picture of `rows` (lines of a results file) to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    series = chosen(rows, device)
    first = next(iter(next(iter(series.values())).values()))
    settings = sorted({setting for lines in series.values() for setting in lines}, key=lambda one: (one[0] * one[1], one))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 4.8), layout="constrained")
    width = 0.84 / len(series)
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for number, (name, lines) in enumerate(series.items()):
            label, colour, hatch = STYLES[name]
            there = [(place, lines[setting][key]) for place, setting in enumerate(settings) if setting in lines]
            places = [place + (number - (len(series) - 1) / 2) * width for place, _ in there]
            bars = axis.bar(places, [value for _, value in there], width, label=label, color=colour, hatch=hatch)
            axis.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}", fontsize=6, rotation=90)
        axis.margins(y=0.15)
        axis.set_xticks(range(len(settings)), [f"{rows} x {tokens}" for rows, tokens in settings])
        axis.set_xlabel("rows x tokens of a batch")
        axis.set_title(title, fontsize=10)
        axis.grid(True, axis="y", color="0.9")
        axis.set_axisbelow(True)
    figure.suptitle(
        f"A training step of Falcon-{first['model'].upper()} in 4 bits, by checkpointing, {first['device']}", fontsize=11
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
