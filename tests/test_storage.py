"""Reading files that others wrote, refusing files that are damaged, and writing files whole."""

import json
import os
import pathlib
import tempfile
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from qlite import storage
from qlite.storage import (
    DTYPES,
    WRITTEN,
    TensorToWrite,
    check_free,
    new_folder,
    read_bytes,
    read_header,
    read_json,
    read_metadata,
    read_tensor,
    replace_file,
    same_bytes,
    stored_tensors,
    write_shards,
    write_tensors,
)

# Safetensors.

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
metadata = st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), min_size=1, max_size=3)


@st.composite
def tensors(draw):
    """A tensor of any shape, 0-d and empty ones too, whose bytes are random: NaN payloads, subnormals and -0 occur."""
    shape, dtype = draw(shapes), draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bytes_of(tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.fixture
def folder():
    """As tmp_path, for tests whose hypothesis draws many examples: the file is written anew by each."""
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def written(content, folder=None):
    path = pathlib.Path(folder or tempfile.mkdtemp()) / "model.safetensors"
    path.write_bytes(content)
    return path


def by_hand(header, data=b"", *, length=None):
    """The bytes of a safetensors file whose header is an object, a text or bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    encoded = header.encode() if isinstance(header, str) else header
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def entry(start, stop, shape=(4,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


SMALL = save({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.uint8), "c": torch.empty(0, 3)}, {"k": "v"})


@given(st.dictionaries(names, tensors(), max_size=4), metadata)
def test_a_file_that_the_safetensors_package_wrote_reads_as_what_it_was_made_from(expected, kept):
    with tempfile.TemporaryDirectory() as folder:
        path = written(save(expected, kept), folder)
        header = read_header(path)
        assert {name: bytes_of(read_tensor(stored)) for name, stored in header.items()} == {
            name: bytes_of(tensor) for name, tensor in expected.items()
        }
        assert all(stored.file == path and stored.shape == expected[name].shape for name, stored in header.items())
        assert read_metadata(path) == (kept or {})


@given(st.dictionaries(names, tensors(), max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_the_entries_in_the_header_says_nothing(expected, random):
    content = save(expected)
    length = int.from_bytes(content[:8], "little")
    entries = list(json.loads(content[8 : 8 + length]).items())
    random.shuffle(entries)
    with tempfile.TemporaryDirectory() as folder:
        header = read_header(written(by_hand(dict(entries), content[8 + length :]), folder))
        assert {name: bytes_of(read_tensor(stored)) for name, stored in header.items()} == {
            name: bytes_of(tensor) for name, tensor in expected.items()
        }


@given(tensors(), st.data())
def test_any_piece_of_a_tensor_can_be_read(tensor, data):
    with tempfile.TemporaryDirectory() as folder:
        stored = read_header(written(save({"other": torch.arange(3.0), "x": tensor}), folder))["x"]
        start = data.draw(st.integers(0, stored.size))
        size = data.draw(st.integers(0, stored.size - start))
        assert bytes(read_bytes(stored, start, size).tolist()) == bytes_of(tensor)[2][start : start + size]


@given(st.sampled_from((torch.int64, torch.int32, torch.bool, torch.float8_e4m3fn)), shapes)
def test_a_dtype_that_is_not_read_still_has_its_place_in_the_header(dtype, shape):
    tensor = torch.zeros(shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        stored = read_header(written(save({"x": tensor, "y": torch.ones(2)}), folder))
        assert stored["x"].size == tensor.numel() * dtype.itemsize and stored["x"].dtype not in DTYPES
        assert torch.equal(read_tensor(stored["y"]), torch.ones(2))


def test_a_tensor_that_was_read_does_not_change_with_its_file(folder):
    path = written(SMALL, folder)
    tensor = read_tensor(read_header(path)["a"])
    path.write_bytes(bytes(len(SMALL)))
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_every_truncation_is_refused(length, folder):
    path = written(SMALL[:length], folder)
    with pytest.raises(ValueError, match=str(path)):
        read_header(path)


def test_a_byte_too_many_is_refused(folder):
    with pytest.raises(ValueError, match=r"damaged.* its header says"):
        read_header(written(SMALL + b"\0", folder))


@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_leaves_tensors_that_lie_inside_the_file_and_side_by_side(position, change):
    content = bytearray(SMALL)
    content[position] ^= change
    with tempfile.TemporaryDirectory() as folder:
        path = written(bytes(content), folder)
        try:
            stored = sorted(read_header(path).values(), key=lambda tensor: (tensor.start, tensor.size))
        except ValueError as error:
            assert str(path) in str(error)
            return
        ends = [tensor.start + tensor.size for tensor in stored]
        assert [tensor.start for tensor in stored][1:] == ends[:-1] and ends[-1] == len(SMALL)


FOUR, EIGHT = b"\1\2\3\4", b"\1\2\3\4\5\6\7\x08"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"PK\3\4\x14\0\0\0" + bytes(20), "not safetensors"),
        (by_hand({}, length=2**63), "header of 9,223,372,036,854,775,808 bytes"),
        (by_hand(b" " * 4, length=storage.LARGEST_HEADER + 1), "header of 16,777,217 bytes"),
        (by_hand({}, length=500), "truncated"),
        (by_hand(""), "header"),
        (by_hand(json.dumps({"a": entry(0, 4)}).encode("utf-16"), FOUR), "header"),
        (by_hand(b'{"\xff": 1}'), "header"),
        (by_hand("\ufeff{}"), "header"),
        (by_hand("[" * 100_000), "header"),
        (by_hand('{"a": ' + "9" * 5000 + "}"), "header"),
        (by_hand("[]"), "it is list"),
        (by_hand("null"), "it is NoneType"),
        (by_hand({"a": entry(0, 4), "b": entry(2, 6)}, FOUR + b"56"), "b begins at byte"),
        (by_hand({"a": entry(0, 4), "b": entry(0, 4)}, FOUR), "b begins at byte"),
        (by_hand({"a": entry(0, 4), "b": entry(8, 12)}, EIGHT + FOUR), "b begins at byte"),
        (by_hand({"a": entry(4, 8)}, EIGHT), "a begins at byte"),
        (by_hand({"a": entry(0, 8, (8,)), "b": entry(4, 4, (0,))}, EIGHT), "b begins at byte"),
        (by_hand({"a": entry(0, 4)}, FOUR + b"5"), "its header says"),
        (by_hand({"a": entry(0, 4)}, FOUR[:3]), "its header says"),
        (by_hand({"a": entry(0, 3)}, FOUR[:3]), r"shape \(4,\) of U8 in 3 bytes"),
        (by_hand({"a": entry(0, 4, (1,), "F64")}, FOUR), r"shape \(1,\) of F64 in 4 bytes"),
        (by_hand({"a": entry(0, 0, (2**62, 4), "U8")}), "in 0 bytes"),
        (by_hand({"a": entry(0, 0, (2**63, 0), "U8")}), "shape"),
        (by_hand({"a": entry(-4, 0)}, FOUR), "bytes -4 to 0"),
        (by_hand({"a": entry(0, 4, (-2, -2))}, FOUR), r"shape \(-2, -2\)"),
        (by_hand({"a": entry(0, 8, (1,), "I64"), "b": entry(8, 0, (1,), "I64")}), "bytes 8 to 0"),
        (by_hand({"a": entry(0, 10**4299, (1,), "I64")}), "bytes 0 to 1000"),
        (by_hand({"a": entry(0, 1, (True,))}, b"1"), "shape"),
        (by_hand({"a": entry(False, 4)}, FOUR), "bytes False to 4"),
        (by_hand({"a": entry(0, 4.0)}, FOUR), r"bytes 0 to 4\.0"),
        (by_hand({"a": entry(0, 4, (4.0,))}, FOUR), "shape"),
        (by_hand({"a": entry("0", "4")}, FOUR), "bytes 0 to 4"),
        (by_hand({"a": entry(0, 4, "4")}, FOUR), "shape"),
        (by_hand({"a": entry(0, 1, (1,) * 9)}, b"1"), "shape"),
        (by_hand({"a": entry(0, 4, dtype=None)}, FOUR), "dtype None"),
        (by_hand({"a": entry(0, 4, dtype=["U8"])}, FOUR), "dtype"),
        (by_hand({"a": {**entry(0, 4), "shape": None}}, FOUR), "header"),
        (by_hand({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, FOUR), "header"),
        (by_hand({"a": {"dtype": "U8", "shape": [4]}}, FOUR), "data_offsets"),
        (by_hand({"a": []}, FOUR), "header"),
        (by_hand('{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)),) * 2), FOUR), "'a' stands twice"),
        (by_hand('{"a": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', FOUR), "'dtype' stands twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_faulty_header_is_refused_with_the_name_of_the_file(content, words, folder):
    path = written(content, folder)
    with pytest.raises(ValueError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [["a"], "a", 5, {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_that_is_no_table_of_texts_is_refused(kept, folder):
    path = written(by_hand({"__metadata__": kept}), folder)
    with pytest.raises(ValueError, match=rf"{path}.*metadata"):
        read_metadata(path)


def test_a_key_that_stands_twice_in_the_metadata_is_refused(folder):
    with pytest.raises(ValueError, match="'a' stands twice"):
        read_metadata(written(by_hand('{"__metadata__": {"a": "1", "a": "2"}}'), folder))


@pytest.mark.parametrize("read", [read_header, read_metadata, read_json])
def test_a_file_that_is_not_there_or_is_a_folder_is_not_found(read, folder):
    (folder / "inner").mkdir()
    with pytest.raises(FileNotFoundError, match="absent"):
        read(folder / "absent")
    with pytest.raises(FileNotFoundError, match="inner"):
        read(folder / "inner")


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error_and_not_garbage(folder):
    path = written(SMALL, folder)
    stored = read_header(path)["a"]
    path.write_bytes(SMALL[:-10])
    with pytest.raises(ValueError, match=rf"{path}: truncated while"):
        read_tensor(stored)


def stored_pair(folder, one, other):
    (folder / "other").mkdir()
    return read_header(written(save({"x": one}), folder))["x"], read_header(written(save({"x": other}), folder / "other"))["x"]


@given(tensors(), st.data())
def test_tensors_are_stored_alike_exactly_where_dtype_shape_and_all_bytes_are(tensor, data):
    other = tensor.clone()
    flat = other.view(-1).view(torch.uint8)
    changed = data.draw(st.booleans()) and flat.numel() > 0
    if changed:
        flat[data.draw(st.integers(0, flat.numel() - 1))] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as name:
        assert same_bytes(*stored_pair(pathlib.Path(name), tensor, other)) is not changed


@pytest.mark.parametrize(
    "other", [torch.zeros(4, 1), torch.zeros(2, 2), torch.zeros(8).half(), torch.zeros(4).view(torch.int32)]
)
def test_another_shape_or_dtype_of_the_same_bytes_is_not_alike(other, folder):
    assert not same_bytes(*stored_pair(folder, torch.zeros(4), other))


def test_large_tensors_are_compared_to_the_last_byte_and_never_held_whole(folder, monkeypatch):
    one = torch.zeros(16 * 2**20 + 5, dtype=torch.uint8)
    other = one.clone()
    other[-1] = 1
    pair = stored_pair(folder, one, other)
    pieces = []
    monkeypatch.setattr(storage, "read_bytes", lambda *arguments: pieces.append(arguments[2]) or read_bytes(*arguments))
    assert not same_bytes(*pair) and same_bytes(pair[0], pair[0])
    assert max(pieces) <= 16 * 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 12_345])
def test_on_cuda_a_tensor_arrives_whole_wherever_its_pieces_are_cut(size, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PIECE", 1000)
    values = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    save_file({"a": values, "b": values.flip(0).contiguous()}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    found = [read_tensor(header[name], device="cuda").cpu() for name in ("a", "b")]
    assert torch.equal(found[0], values) and torch.equal(found[1], values.flip(0))


# JSON.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4), st.booleans())
def test_any_json_object_reads_as_it_was_written(content, ascii_only):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "config.json"
        replace_file(path, json.dumps(content, ensure_ascii=ascii_only))
        assert read_json(path) == content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        ("\ufeff{}".encode(), "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        (b'{"outer": {"b": 1, "b": 1}}', "'b' stands twice"),
        (b"[1]", "holds list; wanted an object"),
        (b"null", "holds NoneType; wanted an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faulty_json_is_refused_with_the_name_of_the_file(content, words, folder):
    path = folder / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_json_file_beyond_the_limit_is_refused_before_it_is_read(folder, monkeypatch):
    path = folder / "config.json"
    with path.open("wb") as file:
        file.truncate(storage.LARGEST_HEADER + 1)  # a hole: no disk, no memory
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"16,777,217 bytes; at most 16,777,216 are read"):
        read_json(path)


# Writing tensors.


def to_write(tensors):
    return {name: TensorToWrite(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}


@st.composite
def writable(draw):
    """A tensor of any dtype that is written, contiguous or a transposed view."""
    dtype, shape = draw(st.sampled_from(list(WRITTEN))), draw(shapes)
    size = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    most = 2 if dtype == torch.bool else 256
    tensor = torch.randint(most, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    return tensor.mT if tensor.ndim >= 2 and draw(st.booleans()) else tensor


# One tensor at least: without any, and with empty metadata, the package writes a header that is no JSON. One text at most: it
# keeps texts in no order.
@given(
    st.dictionaries(names, writable(), min_size=1, max_size=8),
    st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=1),
)
def test_a_file_has_the_bytes_that_the_safetensors_package_writes(expected, kept):
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pathlib.Path(folder) / "ours", pathlib.Path(folder) / "theirs"
        write_tensors(ours, to_write(expected), metadata=kept)
        save_file({name: tensor.contiguous() for name, tensor in expected.items()}, theirs, metadata=kept)
        assert ours.read_bytes() == theirs.read_bytes()
        assert {path.name for path in ours.parent.iterdir()} == {"ours", "theirs"}


def test_no_two_tensors_are_in_memory_together_and_each_is_made_once(folder):
    alive, most, made = weakref.WeakSet(), [], []

    def make(i):
        tensor = torch.full((100,), float(i))
        made.append(i)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    tensors = {f"{i}": TensorToWrite(torch.float32, (100,), lambda i=i: make(i)) for i in range(5)}
    write_tensors(folder / "a.safetensors", tensors)
    assert most == [1] * 5 and sorted(made) == list(range(5))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            TensorToWrite(torch.float32, (3,), lambda: torch.zeros(4)),
            r"a came as torch.float32 \(4,\); torch.float32 \(3,\) was",
        ),
        (
            TensorToWrite(torch.float16, (2,), lambda: torch.zeros(1)),
            r"a came as torch.float32 \(1,\); torch.float16 \(2,\) was",
        ),
        (TensorToWrite(torch.complex64, (2,), lambda: torch.zeros(2)), r"a is torch.complex64; wanted one of torch.int64"),
    ],
    ids=["shape", "dtype of the same size", "a dtype that is not written"],
)
def test_a_tensor_that_is_not_what_was_said_of_it_leaves_the_old_file_whole(said, words, folder):
    path = written(SMALL, folder)
    with pytest.raises(ValueError, match=words):
        write_tensors(path, {"a": said})
    assert path.read_bytes() == SMALL and list(folder.iterdir()) == [path]


@pytest.mark.parametrize(("module", "step"), [(pathlib.Path, "open"), (os, "fsync"), (pathlib.Path, "replace")])
def test_whatever_step_of_writing_tensors_fails_the_old_file_is_whole(module, step, folder, monkeypatch):
    path = written(SMALL, folder)

    def fails(*arguments, **options):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(module, step, fails)
        write_tensors(path, to_write({"a": torch.zeros(3)}))
    assert path.read_bytes() == SMALL and list(folder.iterdir()) == [path]


def test_the_tensors_are_on_the_disk_before_the_name_is(folder, monkeypatch):
    path, seen, fsync = written(SMALL, folder), [], os.fsync
    new = save({"a": torch.zeros(3)})

    def noted(descriptor):
        seen.append((os.fstat(descriptor).st_size, path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_tensors(path, to_write({"a": torch.zeros(3)}))
    assert seen == [(len(new), SMALL)] and path.read_bytes() == new


@given(st.dictionaries(names, writable(), min_size=1, max_size=8), st.integers(1, 800))
def test_shards_hold_every_tensor_once_and_no_more_than_was_asked_for(expected, most):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_shards(folder, to_write(expected), max_shard_bytes=most)
        files = sorted(folder.glob("*.safetensors"))
        headers = [read_header(path) for path in files]
        assert sorted(name for header in headers for name in header) == sorted(expected)
        for header in headers:
            assert len(header) == 1 or sum(entry.size for entry in header.values()) <= most
        if len(files) == 1:
            assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        else:
            index = read_json(folder / "model.safetensors.index.json")
            assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in expected.values())}
            assert list(index["weight_map"]) == list(expected) and set(index["weight_map"].values()) == {p.name for p in files}
        assert stored_tensors(folder).keys() == expected.keys()  # which also checks that each is where the index says
        for name, stored in stored_tensors(folder).items():
            content = bytes(read_bytes(stored, 0, stored.size).tolist())
            assert content == bytes_of(expected[name].contiguous())[2] and stored.shape == tuple(expected[name].shape)


# Whole folders.


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
def test_a_new_folder_has_its_name_only_when_it_is_whole(there, folder):
    if there:
        (folder / "new").mkdir()
    with new_folder(folder / "new") as inside:
        (inside / "a").write_text("whole")
        assert not (folder / "new").exists() or not any((folder / "new").iterdir())
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))] == ["new", "new/a"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_a_new_folder_that_is_not_finished_leaves_nothing(error, folder):
    (folder / "other").write_text("mine")
    with pytest.raises(type(error)), new_folder(folder / "new") as inside:
        (inside / "a").write_text("half")
        raise error
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_the_files_of_a_new_folder_are_on_the_disk_before_its_name_is(folder, monkeypatch):
    seen, sync = [], storage.sync

    def noted(path):
        seen.append((path.name, (folder / "new").exists()))
        sync(path)

    monkeypatch.setattr(storage, "sync", noted)
    with new_folder(folder / "new") as inside:
        (inside / "a").write_text("whole")
    assert seen == [("a", False), (".new.tmp", False), (folder.name, True)]


@pytest.mark.parametrize("kind", ["a folder with a file", "a file", "a link to nothing"])
def test_what_stands_under_the_name_of_a_new_folder_is_left_alone(kind, folder):
    path = folder / "new"
    if kind == "a folder with a file":
        path.mkdir()
        (path / "mine").touch()
    elif kind == "a file":
        path.touch()
    else:
        path.symlink_to(folder / "nothing")
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileExistsError, match="new holds something already; choose another folder"):
        check_free(path)
    with pytest.raises(FileExistsError, match="holds something"), new_folder(path):
        raise AssertionError("it was given away")
    assert sorted(folder.rglob("*")) == before


# Whole writes.


@given(st.text(max_size=50), st.text(max_size=50))
def test_a_replaced_file_holds_the_new_text_and_nothing_lies_beside_it(old, new):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "log.jsonl"
        for text in (old, new):
            replace_file(path, text)
            assert path.read_bytes() == text.encode()
        assert list(path.parent.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name_is(folder, monkeypatch):
    path = folder / "state.json"
    path.write_text("old")
    seen = []
    sync = storage.sync

    def noted(synced):
        seen.append((synced.read_text(), path.read_text()))
        sync(synced)

    monkeypatch.setattr(storage, "sync", noted)
    replace_file(path, "new")
    assert seen == [("new", "old")] and path.read_text() == "new"


@pytest.mark.parametrize("step", ["write_text", "sync", "replace"])
def test_whatever_step_fails_the_old_text_is_whole(step, folder, monkeypatch):
    path = folder / "state.json"
    path.write_text("old")

    def fails(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage if step == "sync" else pathlib.Path, step, fails)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, "new")
    assert path.read_bytes() == b"old"
