"""The benchmarks start, a figure in the README is one that a benchmark printed, and what they compute without a GPU is right:
floors, the parity that comes before a number, rotation, the picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import weakref

import pytest
import torch

import qlite
from benchmarks import (
    adamw_8bit,
    chip,
    common,
    flops,
    instructions,
    linear_int8,
    linear_nf4,
    nf4_codec,
    roof_plot,
    small_scales,
    step_plot,
    training_step,
)  # fmt: skip
from qlite import nf4, ops, recompute
from tests.falcons import FLAVOURS

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
MODULES = [path.stem for path in FILES if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
UP = (18176, 4544)
WEIGHTS = 18176 * 4544
ENVIRONMENT = {"device", "torch", "triton", "commit"}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()]


def figures() -> list[tuple[str, str, str, str]]:
    """(value, results file, condition, key) of each row of the README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| [^|]+ \| ([^|]+) \| `(\w+)`(?: `([^`]+=[^`]+)`)? `(\w+)` \|$", text, re.MULTILINE)


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
    wanted = dict(part.split("=") for part in condition.split(",")) if condition else {}
    row = [row for row in rows(name) if all(str(row.get(k)) == v for k, v in wanted.items())][-1]
    number = re.match(r"[\d,]+(?:\.(\d+))?", shown)
    assert number is not None, shown
    value = float(row[key]) * (100 if f"{number[0]} %" in shown else 1)
    assert float(number[0].replace(",", "")) == round(value, len(number[1] or ""))


# What the kernels' benchmarks compute without a GPU.


def test_benchmarks_are_of_a_readable_size():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name


# Floors.


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(4, 64), (3, 129), (300, 128)])
def test_the_bytes_of_a_coded_weight_are_those_of_its_tensors(shape, double_quant):
    q = qlite.quantize_nf4(torch.randn(shape), double_quant=double_quant)
    parts = [part for part in (q.codes, q.absmax, q.absmax_scale, q.absmax_offset) if part is not None]
    assert common.coded_bytes(*shape, double_quant) == sum(part.numel() * part.element_size() for part in parts)


def test_a_row_is_bound_by_memory_and_a_thousand_by_arithmetic():
    one = linear_nf4.floor_us(1, *UP, bandwidth=4e12, peak=8e14)
    bytes_moved = WEIGHTS / 2 + WEIGHTS / 64 + 4 * WEIGHTS / 64 / 256 + 4 + 2 * (18176 + 4544)
    assert one == pytest.approx(bytes_moved / 4e12 * 1e6, rel=1e-6)
    assert linear_nf4.floor_us(1024, *UP, bandwidth=4e12, peak=8e14) == pytest.approx(2 * 1024 * WEIGHTS / 8e14 * 1e6)
    assert linear_nf4.floor_us(1024, *UP, bandwidth=1e10, peak=8e14) > 4000  # and by memory again where that is slow


@pytest.mark.parametrize(("dtype", "nbytes"), [(torch.float32, 16.0625), (torch.bfloat16, 10.0625)])
def test_a_step_of_adamw_moves_the_bytes_of_its_tensors(dtype, nbytes):
    (param,) = adamw_8bit.parameters([(4096, 16)], dtype, "cpu")
    optimizer = qlite.AdamW8bit([param])
    optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[param].values() if torch.is_tensor(value))
    assert adamw_8bit.step_bytes(dtype) == nbytes == (2 * param.nbytes + param.grad.nbytes + 2 * state) / param.numel()


def test_the_table_of_adamw_shows_ratios_and_leaves_out_what_failed():
    line = {"job": "lora", "optimizer": "qlite", "dtype": "float32", "elements": 8, "floor_us": 20.0}
    lines = adamw_8bit.shown([{**line, "gpu_us": 30.0, "wall_us": 50.0}, {**line, "optimizer": "other"}]).splitlines()
    assert lines[1].split()[-4:] == ["30.0", "1.50", "50.0", "2.50"] and lines[2].split()[-4:] == ["-"] * 4


def test_a_codec_is_bound_by_its_bytes():
    with_double = nf4_codec.floor_us(*UP, True, 2, bandwidth=4e12)
    assert with_double == pytest.approx((2.5 + 1 / 64 + 1 / 4096) * WEIGHTS / 4e12 * 1e6, rel=1e-6)
    without = nf4_codec.floor_us(*UP, False, 4, bandwidth=4e12)
    assert without == pytest.approx((4.5 + 4 / 64) * WEIGHTS / 4e12 * 1e6, rel=1e-6)


def test_an_int8_layer_is_bound_by_its_bytes_and_then_by_arithmetic():
    one = linear_int8.floor_us(1, *UP, bandwidth=4e12, peak=1.5e15)
    assert one == pytest.approx((WEIGHTS + 4 * 18176 + 2 * (18176 + 4544)) / 4e12 * 1e6)
    assert linear_int8.floor_us(4096, *UP, bandwidth=4e12, peak=1.5e15) == pytest.approx(2 * 4096 * WEIGHTS / 1.5e15 * 1e6)


@pytest.mark.parametrize("nbytes", [1, 2**20, 10 * 2**20, 42 * 2**20, 500 * 2**20])
def test_a_rotation_passes_the_cache_before_a_buffer_comes_round(nbytes):
    count = common.rotation(nbytes)
    assert count >= 4
    assert (count - 1) * nbytes >= common.PAST_L2


def test_results_that_are_kept_are_as_many_as_pass_the_cache():
    made: list[weakref.ref] = []

    def call() -> torch.Tensor:
        result = torch.empty(1)
        made.append(weakref.ref(result))
        return result

    for kept in common.keeping([call] * 9, 50 * 2**20):
        kept()
    assert [reference() is not None for reference in made] == [False] * 6 + [True] * 3


# Parity before a number.


def measured(monkeypatch, factor: float) -> dict:
    """The line of a layer whose result is `factor` times the right one."""
    monkeypatch.setattr(linear_nf4, "cuda_graph_time", lambda calls: 7.0)
    x, weight = torch.randn(8, 64), torch.randn(32, 64)
    calls = {"qlite": [lambda x: (x @ weight.T * factor).bfloat16()], "cublas": [lambda x: x @ weight.T]}
    expected = x.double() @ weight.double().T
    layer = types.SimpleNamespace(
        x=x, model="m", name="l", direction="forward", shape=(32, 64), calls=calls, expected=expected
    )  # fmt: skip
    return linear_nf4.Layer.measure(layer, 4, 4e12, 8e14)


def test_a_layer_that_is_right_is_timed(monkeypatch):
    line = measured(monkeypatch, 1.0)
    assert line["correct"] and line["qlite_us"] == line["cublas_us"] == 7.0
    assert line["error"] < linear_nf4.MOST_ERROR


def test_a_layer_that_is_one_percent_off_gets_no_number(monkeypatch):
    line = measured(monkeypatch, 1.01)
    assert not line["correct"] and line["qlite_us"] is None and line["cublas_us"] == 7.0
    assert "RED" in linear_nf4.shown([line])


@pytest.mark.parametrize("dtype", nf4_codec.DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_codec_is_held_against_the_reference_bit_for_bit(monkeypatch, dtype, double_quant):
    q = qlite.quantize_nf4(torch.randn(320, 128), double_quant=double_quant)
    coded = (q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels)
    assert nf4_codec.decodes_exactly(coded, 128, dtype)
    right = nf4_codec.decode(coded, 128, dtype)
    right[255, 127] = torch.nextafter(right[255, 127], right.new_tensor(9.0))
    monkeypatch.setattr(nf4_codec, "decode", lambda *arguments: right)
    assert not nf4_codec.decodes_exactly(coded, 128, dtype)


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_encoder_that_takes_another_level_is_seen(monkeypatch, double_quant):
    weight, levels = torch.randn(16, 128).bfloat16(), ops.levels_tensor(nf4.NF4_LEVELS, "cpu")
    assert nf4_codec.encodes_exactly(weight, levels, double_quant)
    codes, *rest = nf4_codec.encode(weight, levels, double_quant)
    codes[3, 5] ^= 0x10
    monkeypatch.setattr(nf4_codec, "encode", lambda *arguments: (codes, *rest))
    assert not nf4_codec.encodes_exactly(weight, levels, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_search_that_takes_another_scale_is_seen(monkeypatch, double_quant):
    weight, levels = torch.randn(16, 128).bfloat16(), ops.levels_tensor("nf4", "cpu")
    assert nf4_codec.searches_exactly(weight, levels, double_quant)
    codes, absmax, *rest = nf4_codec.encode_searched(weight, levels, double_quant)
    absmax.view(torch.uint8)[3, 1] ^= 1
    monkeypatch.setattr(nf4_codec, "encode_searched", lambda *arguments: (codes, absmax, *rest))
    assert not nf4_codec.searches_exactly(weight, levels, double_quant)


@pytest.mark.parametrize("bits", [4, 5, 7])
def test_numbers_of_few_bits_are_packed_without_a_gap(bits):
    numbers = torch.randint(2**bits, (3, 71), generator=torch.Generator().manual_seed(0))
    content = small_scales.packed(numbers, bits)
    assert content.dtype == torch.uint8 and content.numel() == -(-numbers.numel() * bits // 8)
    assert torch.equal(small_scales.unpacked(content, bits, numbers.numel()), numbers.flatten())


def test_scales_of_few_bits_are_the_best_of_their_table_and_decode_from_their_bytes():
    w = torch.randn(4, 640, generator=torch.Generator().manual_seed(1))
    levels, scales = torch.tensor(nf4.LS4_LEVELS), torch.cat((-torch.linspace(1.5, 3.5, 8), torch.linspace(1.5, 3.5, 8)))
    decoded, nbytes = small_scales.in_small_blocks(w, 4, levels, scales)
    assert nbytes == 4 * 320 + 80 // 2 + 4 * 2  # codes, scales of half a byte for 80 blocks, float16 for 4 rows
    size = w.square().mean(dim=1).sqrt().half().float().repeat_interleave(20)
    blocks = w.view(80, 32)
    grid = (levels[:, None] * scales[None]).T[None] * size[:, None, None]  # (80, 16 scales, 16 levels)
    least = (blocks[:, None, :, None] - grid[:, :, None, :]).square().amin(dim=3).sum(dim=2).amin(dim=1)
    assert torch.allclose((decoded.view(80, 32) - blocks).square().sum(dim=1), least, rtol=1e-3)
    log, nbytes = small_scales.with_log_scales(w, levels)
    assert nbytes == 4 * 320 + 40 + 4 * 4
    assert (log - w).square().mean() < 1.02 * qlite.quantize_nf4(w, levels="ls4", search=True).squared_error(w) / w.numel()


def test_an_int8_product_is_known_by_what_x_was_for_it():
    x, weight = torch.randn(16, 256).bfloat16(), torch.randn(256, 8).double()
    assert linear_int8.errors(x.double() @ weight, x, weight) == (0.0, "bf16")
    error, kind = linear_int8.errors(linear_int8.rounded_rows(x) @ weight, x, weight)
    assert (error, kind) == (0.0, "int8")
    assert linear_int8.errors((x.double() @ weight) * 1.01, x, weight)[0] > linear_int8.MOST_ERROR


# The experiments of the chip.


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_panel_decodes_to_its_rows_of_the_whole(double_quant):
    q = qlite.quantize_nf4(torch.randn(700, 192), double_quant=double_quant)
    coded = (q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels)
    whole = chip.dequantize(coded, 192)
    assert torch.equal(chip.dequantize(chip.rows_of(coded, 256, 600), 192), whole[256:600])


def test_a_panel_that_begins_inside_a_group_is_refused():
    q = qlite.quantize_nf4(torch.randn(700, 192))
    with pytest.raises(ValueError, match="inside a group"):
        chip.rows_of((q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels), 100, 600)


@pytest.mark.parametrize("of", [of for of in instructions.INSTRUCTIONS if of.words], ids=lambda of: of.name)
def test_a_chain_through_a_table_stays_in_it_and_conflicts_as_it_says(of):
    following, starts = instructions.places(of, torch.Generator().manual_seed(0))
    assert following.shape == (of.words,)
    assert starts.shape == (instructions.THREADS,)
    table = dict(enumerate(following.tolist()))
    visited = set(itertools.islice(cycle(table, starts[0].item()), of.words))
    if "no conflict" in of.name:
        assert visited == {starts[0].item()}
        assert len(set((starts[:32] // 4).tolist())) == 32
    else:
        assert visited == {4 * i for i in range(of.words)}


def cycle(table: dict[int, int], at: int):
    while True:
        yield at
        at = table[at // 4]


# The picture.


def synthetic(device: str, scale: float = 1.0) -> list[dict]:
    rows = []
    for direction in ("forward", "gradient"):
        for count in (1, 16, 256, 4096):
            line = {"model": "falcon7b", "layer": "dense", "direction": direction, "rows": count, "device": device}
            line |= {"out_features": 4544, "in_features": 4544, "floor_us": 10.0, "qlite_us": 15.0 * scale, "cublas_us": 40.0}
            rows.append(line | ({"gemlite_int4_us": 29.0} if count == 16 else {"bitsandbytes_us": None}))
    return rows


def test_the_newest_line_of_the_newest_device_is_drawn():
    rows = [*synthetic("old"), *synthetic("new"), *synthetic("new", 2.0), {"device": "new", "direction": "lora", "rows": 512}]
    panels = roof_plot.panels(rows)
    assert set(panels) == {("falcon7b", "dense", "forward"), ("falcon7b", "dense", "gradient")}
    lines = panels["falcon7b", "dense", "forward"]
    assert roof_plot.ratios(lines, "qlite_us") == ([1, 16, 256, 4096], [3.0] * 4)
    assert roof_plot.ratios(lines, "gemlite_int4_us") == ([16], [2.9])
    assert roof_plot.ratios(lines, "bitsandbytes_us") == ([], [])
    old = roof_plot.panels(rows, "old")["falcon7b", "dense", "forward"]
    assert roof_plot.ratios(old, "qlite_us")[1] == [1.5] * 4


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no line"):
        roof_plot.panels([{"device": "x", "rows": 1}])
    with pytest.raises(ValueError, match="there are"):
        roof_plot.panels(synthetic("x"), "y")


def test_the_picture_is_drawn_without_a_gpu(tmp_path):
    results, picture = tmp_path / "linear_nf4.jsonl", tmp_path / "linear.png"
    results.write_text("\n".join(map(json.dumps, synthetic("NVIDIA H200"))))
    command = [sys.executable, "-m", "benchmarks.linear_nf4", "--plot", str(picture), "--plot-only", "--results", str(results)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


# The training step: its operations, its kernels, its picture.


@pytest.mark.parametrize("flavour", ["7b", "40b", "11b"])
def test_what_is_computed_again_is_counted_product_by_product(flavour):
    config = dataclasses.replace(FLAVOURS[flavour], num_hidden_layers=3, max_position_embeddings=512)
    rows, tokens, r = 2, 256, 4
    lora = qlite.LoRAConfig(r=r, targets=("query_key_value",))
    found = {mode: flops.hardware_flops(config, rows, tokens, mode, lora) for mode in (False, True, "selective", "offload")}
    hidden, fused = config.hidden_size, (config.num_attention_heads + 2 * config.kv_heads) * config.head_dim
    projection = 2 * rows * tokens * (hidden * fused + r * (hidden + fused))
    attention = 2 * rows * tokens**2 * hidden
    wide = 2 * rows * tokens * hidden * config.ffn
    assert found["selective"] - found[False] == 3 * (projection + attention)
    # Nothing in the first block's MLP needs a gradient.
    assert found[True] - found[False] == 3 * (projection + attention) + 2 * wide
    assert found["offload"] == found[True]


def test_a_step_makes_the_products_of_the_model_and_of_its_adapters():
    config = dataclasses.replace(FLAVOURS["7b"], num_hidden_layers=3, max_position_embeddings=512)
    hidden, fused, ffn, tokens, r = config.hidden_size, config.hidden_size + 2 * config.head_dim, config.ffn, 256, 4
    weights = 3 * hidden * (fused + hidden + 2 * ffn) + config.vocab_size * hidden
    assert flops.weights_multiplied(config) == weights
    attention = 2 * tokens**2 * hidden
    assert flops.model_flops(config, 1, tokens) == 4 * weights * tokens + 9 * attention
    found = flops.hardware_flops(config, 1, tokens, False, qlite.LoRAConfig(r=r, targets=("query_key_value",)))
    # An adapter multiplies forward, and for the gradients of its input and weights; the first block's input needs none.
    adapters = 2 * tokens * r * (3 * 3 * (hidden + fused) - hidden)
    absent = 2 * tokens * hidden * (fused + 2 * ffn)
    assert found == 4 * weights * tokens - absent + adapters + 3 * attention + 3 * attention * 5 // 2


COSTS = re.findall(
    r"^\| (\d+) x (\d+) \| (none|full|selective|offload)\b[^|]*\| (.*) \|$", (ROOT / "docs/speed.md").read_text(), re.M
)


def test_the_page_has_the_costs_of_every_way():
    assert [(rows, tokens, name) for rows, tokens, name, _ in COSTS] == [
        (*setting, name) for setting in (("1", "512"), ("4", "2048")) for name in ("none", "full", "selective", "offload")
    ]


@pytest.mark.parametrize(("rows", "tokens", "name", "shown"), COSTS)
def test_costs_in_the_page_are_those_that_are_counted(rows, tokens, name, shown):
    found = flops.costs(qlite.FalconConfig(), int(rows), int(tokens), recompute.MODES[name])
    assert shown.split(" | ") == list(found)


def test_kernels_are_listed_by_time_with_their_share_and_written_with_where_it_was(tmp_path, monkeypatch, capsys):
    text = training_step.kernel_table([("short", 1000.0, 2.0), ("long", 3000.0, 1.0), ("least", 0.0, 1.0)], most=2)
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["4.000", "100%", "all"], ["3.000", "1.0", "75.0%", "long"], ["1.000", "2.0", "25.0%", "short"],
    ]  # fmt: skip
    monkeypatch.setattr(training_step, "RESULTS", tmp_path)
    training_step.write_profile("7b-1x512-full", text, "abc")
    head, _, *rest = (tmp_path / "training_step_kernels" / "7b-1x512-full.txt").read_text().splitlines()
    assert json.loads(head)["commit"] == "abc" and "\n".join(rest) == text
    assert text in capsys.readouterr().out


def steps_of(device: str, scale: float = 1.0) -> list[dict]:
    rows = []
    for peer, modes in (({}, (False, True, "selective", "offload")), ({"peer": "theirs"}, (False, True))):
        for mode in modes:
            line = {"device": device, "model": "7b", "layers": 32, "rows": 1, "tokens": 512, "checkpointing": mode, **peer}
            rows.append({**line, "tokens_per_second": 1000 * scale, "peak_gib": 5.0})
    return rows


def test_the_newest_steps_of_the_newest_device_are_drawn_for_each_way():
    other = {**steps_of("new")[0], "tokens_per_second": 1}
    rows = [*steps_of("old"), *steps_of("new"), {**other, "layers": 2}, {**other, "cap_gib": 15.0}, *steps_of("new", 2.0)]
    found = step_plot.chosen(rows)
    assert list(found) == list(step_plot.STYLES)
    assert all(list(lines) == [(1, 512)] and lines[1, 512]["tokens_per_second"] == 2000 for lines in found.values())
    assert step_plot.chosen(rows, "old")["qlite", True][1, 512]["tokens_per_second"] == 1000
    with pytest.raises(ValueError, match="no line of y"):
        step_plot.chosen(rows, "y")
    with pytest.raises(ValueError, match="no line with"):
        step_plot.chosen([{"device": "x"}])


def test_the_picture_of_steps_is_drawn_without_a_gpu(tmp_path):
    results, picture = tmp_path / "training_step.jsonl", tmp_path / "step.png"
    results.write_text("\n".join(map(json.dumps, steps_of("NVIDIA H200"))))
    command = [
        sys.executable,
        "-m",
        "benchmarks.training_step",
        "--plot",
        str(picture),
        "--plot-only",
        "--results",
        str(results),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
