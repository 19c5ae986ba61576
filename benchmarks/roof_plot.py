"""The picture of a results file: time over floor against rows, one panel for each layer, drawn without a GPU."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

#: Column: (label, colour, marker); the colours are Okabe and Ito's, which the colour-blind tell apart.
STYLES = {
    "qlite_us": ("qlite", "#0072B2", "o"),
    "cublas_us": ("cuBLAS bf16", "#000000", "s"),
    "bitsandbytes_us": ("bitsandbytes", "#D55E00", "^"),
    "torchao_int4_us": ("torchao int4 (tinygemm)", "#009E73", "D"),
    "torchao_nf4_us": ("torchao NF4", "#56B4E9", "v"),
    "gemlite_int4_us": ("gemlite int4", "#CC79A7", "P"),
}
#: A layer by these; the newest line for each number of rows counts.
PANEL = ("model", "layer", "direction")


def panels(rows: Iterable[dict], device: str | None = None) -> dict[tuple, dict[int, dict]]:
    """Returns {(model, layer, direction): {rows: line}} of one device, that of the last line unless it is named."""
    lines = [row for row in rows if row.get("floor_us")]
    if not lines:
        raise ValueError("no line with a floor_us to draw")
    device = device or lines[-1]["device"]
    found: dict[tuple, dict[int, dict]] = {}
    for row in lines:
        if row["device"] == device:
            found.setdefault(tuple(row[key] for key in PANEL), {})[row["rows"]] = row
    if not found:
        raise ValueError(f"no line of {device}; there are {sorted({row['device'] for row in lines})}")
    return found


def ratios(lines: dict[int, dict], column: str) -> tuple[list[int], list[float]]:
    """Returns (rows, time over floor) of one column, where it was measured."""
    measured = sorted(rows for rows, line in lines.items() if line.get(column))
    return measured, [lines[rows][column] / lines[rows]["floor_us"] for rows in measured]


def draw(rows: Iterable[dict], path: pathlib.Path, device: str | None = None) -> None:
    """Writes the picture of `rows` (lines of a results file) to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    found = panels(rows, device)
    device = next(iter(next(iter(found.values())).values()))["device"]
    across = min(2, len(found))
    down = -(-len(found) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(6.4 * across, 3.9 * down + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    handles = {}
    for axis, (panel, lines) in zip(axes.flat, found.items()):
        for column, (label, colour, marker) in STYLES.items():
            measured, values = ratios(lines, column)
            if measured:
                options = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2 if column == "qlite_us" else 1.2}
                handles[label] = axis.plot(measured, values, label=label, **options)[0]
        axis.axhline(1, color="0.5", linewidth=1, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        line = next(iter(lines.values()))
        model, layer, direction = panel
        axis.set_title(f"{model} {layer}, {line['out_features']} x {line['in_features']}, {direction}", fontsize=10)
        axis.set_xlabel("rows (tokens)")
        axis.set_ylabel("time / floor")
        axis.grid(True, which="major", color="0.9")
    figure.suptitle(f"Time over the floor (measured copy bandwidth, measured bf16 peak), {device}", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
