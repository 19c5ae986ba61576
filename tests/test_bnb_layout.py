"""bitsandbytes' layout as values: there and back bit for bit, and a refusal of whatever does not hold together.

What bitsandbytes itself writes and reads is in tests/interop/test_bitsandbytes_files.py.
"""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from qlite import bnb_layout
from qlite.bnb_layout import LEVELS, STATE, check_4bit, check_8bit, from_4bit, from_8bit, to_4bit, to_8bit
from qlite.nf4 import BLOCK_SIZES, NF4Tensor
from tests.strategies import DTYPES, UNIFORM_LEVELS, weights

all_block_sizes = st.sampled_from(BLOCK_SIZES)
quant_types = st.sampled_from(sorted(LEVELS))
STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def seeded(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def bits(tensor):
    return (
        None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).tolist())
    )


def assert_same_value(one: NF4Tensor, other: NF4Tensor):
    for field in dataclasses.fields(NF4Tensor):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert bits(a) == bits(b) if isinstance(a, torch.Tensor) else a == b, field.name


def on_meta(parts):
    """What is known of the parts before the large ones are read."""
    return {part: tensor if bnb_layout.is_small(part) else tensor.to("meta") for part, tensor in parts.items()}


@given(weights(), all_block_sizes, quant_types, st.booleans())
def test_a_weight_comes_back_from_the_layout_bit_for_bit(w, block_size, quant_type, double_quant):
    options = {"block_size": block_size, "double_quant": double_quant, "levels": LEVELS[quant_type]}
    # A layer is flat where its rows are no whole blocks, and there alone: so is what is read.
    value = qlite.quantize_nf4(w, flat=w.shape[0] != 1 and w.shape[1] % block_size != 0, **options)
    parts = to_4bit(value)
    layout = check_4bit(on_meta(parts))
    assert (layout.shape, layout.dtype, layout.quant_type) == (w.shape, w.dtype, quant_type)
    assert_same_value(from_4bit(parts, layout), value)
    again = to_4bit(from_4bit(parts, layout))
    assert list(again) == list(parts) and {n: bits(t) for n, t in again.items()} == {n: bits(t) for n, t in parts.items()}


@given(weights(), all_block_sizes, quant_types, st.booleans())
def test_a_flat_weight_of_whole_blocks_has_the_same_parts_as_one_by_rows(w, block_size, quant_type, double_quant):
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % block_size))
    options = {"block_size": block_size, "double_quant": double_quant, "levels": LEVELS[quant_type]}
    flat, rows = (to_4bit(qlite.quantize_nf4(w, flat=flat, **options)) for flat in (True, False))
    assert {n: bits(t) for n, t in flat.items()} == {n: bits(t) for n, t in rows.items()}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("shape", [(8, 64), (3, 32), (16, 5)])
def test_the_packed_bytes_may_be_viewed_as_any_dtype(storage, shape):
    value = qlite.quantize_nf4(seeded(*shape), block_size=32, flat=shape[1] == 5)
    parts = to_4bit(value)
    parts["weight"] = parts["weight"].view(-1).view(storage).view(-1, 1)
    assert_same_value(from_4bit(parts, check_4bit(on_meta(parts))), value)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_parts_are_as_documented(double_quant):
    value = qlite.quantize_nf4(seeded(30, 64, dtype=torch.bfloat16), block_size=32, double_quant=double_quant)
    parts = to_4bit(value)
    text = bytes(parts.pop(STATE + "nf4").tolist()).decode()
    expected = {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [30, 64]}
    kinds = {"weight": (torch.uint8, (960, 1)), "weight.quant_map": (torch.float32, (16,))}
    if double_quant:
        kinds |= {"weight.absmax": (torch.uint8, (60,)), "weight.nested_absmax": (torch.float32, (1,))}
        kinds["weight.nested_quant_map"] = (torch.float32, (256,))
        expected |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": value.absmax_offset.item()}
    else:
        kinds["weight.absmax"] = (torch.float32, (60,))
    assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()} == kinds
    assert text == json.dumps(expected)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_offset_is_kept_to_the_last_bit_though_it_is_text(offset):
    value = qlite.quantize_nf4(seeded(8, 64))
    value = dataclasses.replace(value, absmax_offset=torch.tensor([offset]))
    parts = to_4bit(value)
    assert bits(from_4bit(parts, check_4bit(parts)).absmax_offset) == bits(value.absmax_offset)


@given(weights())
def test_an_8bit_weight_comes_back_bit_for_bit(w):
    q = qlite.quantize_int8(w)
    parts = to_8bit(q.codes, q.absmax)
    assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()} == {
        "weight": (torch.int8, tuple(w.shape)), "SCB": (torch.float32, w.shape[:1]), "weight_format": (torch.uint8, ()),
    }  # fmt: skip
    assert check_8bit(on_meta(parts)) == w.shape
    codes, absmax = from_8bit(parts)
    assert bits(codes) == bits(q.codes) and bits(absmax) == bits(q.absmax)


def test_layers_are_found_by_the_names_of_their_parts():
    names = ["a.b.weight", "a.b.weight.absmax", "a.b.weight.quant_state.bitsandbytes__nf4", "a.b.bias"]
    names += ["c.SCB", "c.weight", "c.weight_format", "norm.weight", "d.weight.extra", "SCB", "e.absmax", "f.weight.quant_map"]
    assert bnb_layout.find_layers(names) == {
        "a.b": {
            "weight": "a.b.weight",
            "weight.absmax": "a.b.weight.absmax",
            f"{STATE}nf4": "a.b.weight.quant_state.bitsandbytes__nf4",
        },
        "c": {"weight": "c.weight", "SCB": "c.SCB", "weight_format": "c.weight_format"},
        "f": {"weight.quant_map": "f.weight.quant_map"},
    }


# What is refused.


def good_4bit(double_quant=True):
    return to_4bit(qlite.quantize_nf4(seeded(8, 96), double_quant=double_quant, flat=True))


def state_of(parts, **changes):
    """The parts with another text: a key set to None is taken away."""
    values = json.loads(bytes(parts[STATE + "nf4"].tolist())) | changes
    return text_of(parts, json.dumps({key: value for key, value in values.items() if value is not None}))


def text_of(parts, text):
    return {**parts, STATE + "nf4": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def without(parts, part):
    return {name: tensor for name, tensor in parts.items() if name != part}


FAULTS_4BIT = {
    "no weight": (lambda p: without(p, "weight"), "weight is missing"),
    "no absmax": (lambda p: without(p, "weight.absmax"), r"weight\.absmax is missing"),
    "no table": (lambda p: without(p, "weight.quant_map"), r"weight\.quant_map is missing"),
    "no second table": (lambda p: without(p, "weight.nested_quant_map"), r"weight\.nested_quant_map is missing"),
    "no second scale": (lambda p: without(p, "weight.nested_absmax"), "has the keys .*nested_blocksize.*; wanted"),
    "no state": (lambda p: without(p, STATE + "nf4"), r"weight\.quant_state: found none"),
    "two states": (lambda p: {**p, STATE + "fp4": p[STATE + "nf4"]}, r"weight\.quant_state: found \["),
    "a state of another format": (
        lambda p: {**without(p, STATE + "nf4"), STATE + "int4": p[STATE + "nf4"]},
        "wanted one, .*nf4 or .*fp4",
    ),
    "a state under another name": (
        lambda p: {**without(p, STATE + "nf4"), STATE + "fp4": p[STATE + "nf4"]},
        "quant_type is 'nf4'; wanted 'fp4'",
    ),
    "a part too many": (lambda p: {**p, "SCB": torch.ones(8)}, "SCB has no meaning beside"),
    "codes of half the size": (lambda p: {**p, "weight": p["weight"][:192]}, r"weight has shape \(192, 1\); wanted \(384, 1\)"),
    "codes of twice the size": (lambda p: {**p, "weight": p["weight"].repeat(2, 1)}, r"\(768, 1\); wanted \(384, 1\)"),
    "codes by rows": (lambda p: {**p, "weight": p["weight"].view(8, 48)}, r"weight has shape \(8, 48\)"),
    "transposed codes": (lambda p: {**p, "weight": p["weight"].view(1, -1)}, r"weight has shape \(1, 384\)"),
    "floats of another size": (lambda p: {**p, "weight": p["weight"].bfloat16()}, r"\(384, 1\); wanted \(192, 1\)"),
    "codes of 16 bits": (lambda p: {**p, "weight": p["weight"].short()}, r"weight is torch\.int16"),
    "absmax that is too short": (
        lambda p: {**p, "weight.absmax": p["weight.absmax"][:11]},
        r"absmax has shape \(11,\); wanted",
    ),
    "absmax with another axis": (
        lambda p: {**p, "weight.absmax": p["weight.absmax"].view(12, 1)},
        r"absmax has shape \(12, 1\)",
    ),
    "absmax in floats": (lambda p: {**p, "weight.absmax": p["weight.absmax"].float()}, r"absmax is torch\.float32; wanted"),
    "a table of 17": (lambda p: {**p, "weight.quant_map": torch.ones(17)}, r"quant_map has shape \(17,\); wanted \(16,\)"),
    "a table of halves": (lambda p: {**p, "weight.quant_map": p["weight.quant_map"].half()}, r"quant_map is torch\.float16"),
    "a table of its own": (
        lambda p: {**p, "weight.quant_map": torch.tensor(UNIFORM_LEVELS)},
        r"weight\.quant_map is another table",
    ),
    "the other table": (lambda p: {**p, "weight.quant_map": torch.tensor(LEVELS["fp4"])}, r"weight\.quant_map is another"),
    "a table with NaN": (lambda p: {**p, "weight.quant_map": p["weight.quant_map"] * torch.nan}, r"quant_map is another table"),
    "a second table in another order": (
        lambda p: {**p, "weight.nested_quant_map": p["weight.nested_quant_map"].flip(0)},
        r"weight\.nested_quant_map is another table",
    ),
    "a second table with one bit changed": (
        lambda p: {**p, "weight.nested_quant_map": torch.nextafter(p["weight.nested_quant_map"], torch.tensor(2.0))},
        r"weight\.nested_quant_map is another table",
    ),
    "a second table that is short": (
        lambda p: {**p, "weight.nested_quant_map": torch.ones(255)},
        r"nested_quant_map has shape \(255,\)",
    ),
    "second scales too many": (lambda p: {**p, "weight.nested_absmax": torch.ones(2)}, r"nested_absmax has shape \(2,\)"),
    "second scales of 16 bits": (
        lambda p: {**p, "weight.nested_absmax": torch.ones(1).half()},
        r"nested_absmax is torch\.float16",
    ),
    "a text of floats": (lambda p: {**p, STATE + "nf4": torch.ones(80)}, "wanted a text of at most 4,096 bytes"),
    "a text with another axis": (lambda p: {**p, STATE + "nf4": p[STATE + "nf4"].view(1, -1)}, "wanted a text of at most"),
    "a text without end": (lambda p: {**p, STATE + "nf4": torch.full((5000,), 32).byte()}, "wanted a text of at most"),
    "no text": (lambda p: {**p, STATE + "nf4": torch.full((80,), 255).byte()}, "not JSON"),
    "half a text": (lambda p: {**p, STATE + "nf4": p[STATE + "nf4"][:40]}, "not JSON"),
    "an empty text": (lambda p: {**p, STATE + "nf4": p[STATE + "nf4"][:0]}, "not JSON"),
    "a deep text": (lambda p: text_of(p, "[" * 4096), "not JSON"),
    "a list": (lambda p: text_of(p, "[1]"), "holds list; wanted an object"),
    "a key twice": (lambda p: text_of(p, '{"shape": [1], "shape": [2]}'), "stands twice"),
    "a key too many": (lambda p: state_of(p, extra=1), "has the keys"),
    "no shape": (lambda p: state_of(p, shape=None), "has the keys"),
    "no offset": (lambda p: state_of(p, nested_offset=None), "has the keys"),
    "a shape of text": (lambda p: state_of(p, shape="8x96"), r"shape is '8x96'; wanted \[out_features, in_features\]"),
    "a shape of one": (lambda p: state_of(p, shape=[768]), "shape is"),
    "a negative shape": (lambda p: state_of(p, shape=[-8, -96]), "shape is"),
    "a shape of floats": (lambda p: state_of(p, shape=[8.0, 96.0]), "shape is"),
    "a shape of truths": (lambda p: state_of(p, shape=[True, 768]), "shape is"),
    "an absurd shape": (lambda p: state_of(p, shape=[2**40, 2**40]), "shape is"),
    "a large shape": (lambda p: state_of(p, shape=[2**31 - 1, 2**31 - 1]), r"weight has shape \(384, 1\); wanted \(230584"),
    "no weights": (lambda p: state_of(p, shape=[0, 96]), r"weight has shape \(384, 1\); wanted \(0, 1\)"),
    "another block size": (lambda p: state_of(p, blocksize=128), r"absmax has shape \(12,\); wanted \(6,\)"),
    "a block size that is not one": (lambda p: state_of(p, blocksize=48), "blocksize is 48; wanted one of 32, 64"),
    "a block size of nothing": (lambda p: state_of(p, blocksize=0), "blocksize is 0"),
    "a block size of text": (lambda p: state_of(p, blocksize="64"), "blocksize is '64'"),
    "a block size of a float": (lambda p: state_of(p, blocksize=64.0), "blocksize is 64.0"),
    "another format": (lambda p: state_of(p, quant_type="af4"), "quant_type is 'af4'; wanted 'nf4'"),
    "a dtype of 64 bits": (lambda p: state_of(p, dtype="float64"), "dtype is 'float64'; wanted one of"),
    "a dtype that is none": (lambda p: state_of(p, dtype="load"), "dtype is 'load'"),
    "a dtype that is a list": (lambda p: state_of(p, dtype=["float32"]), "dtype is"),
    "a second block size": (lambda p: state_of(p, nested_blocksize=128), "nested_blocksize is 128; only 256 is read"),
    "a second block size of a float": (lambda p: state_of(p, nested_blocksize=256.0), "nested_blocksize is 256.0"),
    "a second dtype": (lambda p: state_of(p, nested_dtype="float16"), "nested_dtype is 'float16'; only 'float32'"),
    "an offset that is not a number": (lambda p: state_of(p, nested_offset=float("nan")), "nested_offset is nan; wanted"),
    "an infinite offset": (lambda p: state_of(p, nested_offset=float("inf")), "nested_offset is inf"),
    "an offset beyond float32": (lambda p: state_of(p, nested_offset=1e39), r"nested_offset is 1e\+39"),
    "an offset beyond floats": (lambda p: state_of(p, nested_offset=10**400), "nested_offset is 1000"),
    "an offset of text": (lambda p: state_of(p, nested_offset="0.5"), "nested_offset is '0.5'"),
    "an offset that is a truth": (lambda p: state_of(p, nested_offset=True), "nested_offset is True"),
}


@pytest.mark.parametrize(("damage", "words"), FAULTS_4BIT.values(), ids=FAULTS_4BIT)
def test_parts_of_four_bits_that_do_not_hold_together_are_refused(damage, words):
    parts = good_4bit()
    check_4bit(on_meta(parts))
    with pytest.raises(ValueError, match=words):
        check_4bit(on_meta(damage(parts)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: {**p, "weight.nested_quant_map": torch.ones(256)}, "nested_quant_map has no meaning beside"),
        (lambda p: {**p, "weight.nested_absmax": torch.ones(1)}, "has the keys"),
        (lambda p: state_of(p, nested_offset=0.5), "has the keys"),
        (lambda p: {**p, "weight.absmax": p["weight.absmax"].byte()}, r"absmax is torch\.uint8; wanted torch\.float32"),
        (lambda p: {**p, "weight.absmax": p["weight.absmax"].bfloat16()}, r"absmax is torch\.bfloat16; wanted torch\.float32"),
    ],
)
def test_half_a_double_quantization_is_refused(damage, words):
    with pytest.raises(ValueError, match=words):
        check_4bit(on_meta(damage(good_4bit(double_quant=False))))


def test_codes_that_no_wider_number_can_hold_are_refused():
    parts = to_4bit(qlite.quantize_nf4(seeded(3, 5), flat=True))
    assert parts["weight"].shape == (8, 1)  # 15 weights
    parts = to_4bit(qlite.quantize_nf4(seeded(3, 3), flat=True))
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16, of which 5 bytes of codes are no whole number"):
        check_4bit({**parts, "weight": torch.zeros(2, 1).bfloat16()})


json_values = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5)
json_values |= st.lists(st.integers(0, 2**40) | json_values, max_size=3) | st.dictionaries(
    st.text(max_size=5), json_values, max_size=2
)
state_keys = st.sampled_from(("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"))


@given(st.dictionaries(state_keys, json_values, min_size=1, max_size=2))
def test_whatever_the_text_says_it_is_refused_or_fits_the_other_parts(changes):
    parts = good_4bit()
    values = json.loads(bytes(parts[STATE + "nf4"].tolist())) | changes
    damaged = text_of(parts, json.dumps(values))
    try:
        layout = check_4bit(on_meta(damaged))
    except ValueError:
        return
    assert layout.shape.numel() in (767, 768) and from_4bit(damaged, layout).dequantize().shape == layout.shape


FAULTS_8BIT = {
    "no weight": (lambda p: without(p, "weight"), "weight is missing"),
    "no scale": (lambda p: without(p, "SCB"), "SCB is missing"),
    "codes without a sign": (lambda p: {**p, "weight": p["weight"].byte()}, r"weight is torch\.uint8; wanted torch\.int8"),
    "floats": (lambda p: {**p, "weight": p["weight"].half()}, r"weight is torch\.float16"),
    "codes in a line": (lambda p: {**p, "weight": p["weight"].view(-1)}, r"weight has shape \(768,\)"),
    "scales too many": (lambda p: {**p, "SCB": torch.ones(96)}, r"SCB has shape \(96,\); wanted \(8,\)"),
    "scales with another axis": (lambda p: {**p, "SCB": torch.ones(8, 1)}, r"SCB has shape \(8, 1\)"),
    "scales of 16 bits": (lambda p: {**p, "SCB": torch.ones(8).half()}, r"SCB is torch\.float16"),
    "tiles of 32 columns": (lambda p: {**p, "weight_format": torch.tensor(1).byte()}, "weight_format is 1; only 0"),
    "a format of its own": (lambda p: {**p, "weight_format": torch.tensor(255).byte()}, "weight_format is 255"),
    "a format that is text": (lambda p: {**p, "weight_format": torch.tensor([114, 111, 119]).byte()}, r"has shape \(3,\)"),
    "a format of floats": (lambda p: {**p, "weight_format": torch.tensor(0.0)}, r"weight_format is torch\.float32"),
    "a part too many": (lambda p: {**p, "CB": torch.ones(8)}, "CB has no meaning beside"),
}


@pytest.mark.parametrize(("damage", "words"), FAULTS_8BIT.values(), ids=FAULTS_8BIT)
def test_parts_of_eight_bits_that_do_not_hold_together_are_refused(damage, words):
    q = qlite.quantize_int8(seeded(8, 96))
    parts = to_8bit(q.codes, q.absmax)
    assert check_8bit(without(parts, "weight_format")) == check_8bit(parts) == (8, 96)
    with pytest.raises(ValueError, match=words):
        check_8bit(on_meta(damage(parts)))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: qlite.quantize_nf4(seeded(8, 64), levels=UNIFORM_LEVELS), "it has levels of its own"),
        (lambda: qlite.quantize_nf4(seeded(8, 64).double()), r"it is torch\.float64"),
        (lambda: qlite.quantize_nf4(seeded(2, 8, 64)), r"of shape \(2, 8, 64\); wanted a matrix"),
        (lambda: qlite.quantize_nf4(seeded(64)), r"of shape \(64,\); wanted a matrix"),
        (lambda: qlite.quantize_nf4(seeded(8, 96)), "rows of 96 weights are no whole number of blocks of 64.*flat=True"),
    ],
)
def test_a_value_that_bitsandbytes_has_no_place_for_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        to_4bit(value())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_row_needs_not_be_whole_blocks(dtype):
    parts = to_4bit(qlite.quantize_nf4(seeded(1, 70, dtype=dtype)))
    assert from_4bit(parts, check_4bit(parts)).dequantize().shape == (1, 70)
