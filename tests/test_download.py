"""From a path or a hub id to a folder, through the real client and a hub on this machine: what arrives, what is refused."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import qlite
from qlite import cli
from qlite.adapters import CONFIG
from qlite.data import ASSETS
from qlite.download import commit_of, hub_errors, is_repo_id, resolve_folder
from tests.adapted import adapt, base_of, logits
from tests.hub_server import TOKEN, environment

ROOT = pathlib.Path(__file__).parents[1]
#: Large enough that a transfer that is cut has something before and after the cut.
WEIGHTS = bytes(range(256)) * 4000
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
REAL_ID = "owner/name"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cached_files():
    """Every file in the cache's blobs, whole or not."""
    return [path for path in pathlib.Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.is_file()]


# What is a folder, what is an id.


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_folder_that_exists_is_used_as_it_is(kind, tmp_path, hub, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder(kind(tmp_path)) == tmp_path
    assert resolve_folder(kind("owner/name")) == pathlib.Path("owner/name")
    assert resolve_folder(kind("owner/../owner/name")).samefile(tmp_path / "owner" / "name")
    assert not hub.requests


def test_a_folder_has_no_revision(tmp_path, hub):
    with pytest.raises(ValueError, match="which has no revision 'main'"):
        resolve_folder(tmp_path, revision="main")


@pytest.mark.parametrize(
    "text",
    [
        "absent", "./absent", "../absent", "a/..", "../b", "a/..b", "a/b/c", "/absent", "/absent/b", "a/", "/b", "a b/c",
        "a/b\n", "a/b?x", "~/b", "C:\\a\\b", "\\\\host\\b", "http://a/b", "a\0b", "a/b\0", "x" * 5000,
        "a--b/c", "a/b--c", "a/-b", "a/b.", "a/" + "b" * 200,
    ],
)  # fmt: skip
def test_what_is_neither_a_folder_nor_an_id_never_reaches_the_hub(text, hub):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        resolve_folder(text)
    assert not is_repo_id(text) and not hub.requests


def test_a_file_is_no_folder(tmp_path, hub, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        resolve_folder("owner/name")
    assert not hub.requests


# What arrives.


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_an_id_is_downloaded_bit_for_bit(kind, hub):
    hub.add("own-er_1/na.me-7b", FILES)
    folder = resolve_folder(kind("own-er_1/na.me-7b"))
    assert contents(folder) == FILES
    assert commit_of(folder) == hub.repositories["own-er_1/na.me-7b"].refs["main"]


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, {"config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"}),
        ({"names": ("tokenizer.json",)}, {"tokenizer.json"}),
    ],
)
def test_only_files_of_the_top_folder_that_are_no_code_are_downloaded(options, taken, hub):
    code = ["modeling_falcon.py", "pytorch_model.bin", "model.pt", "README.md"]
    nested = ["onnx/config.json", "coreml/a/b/model.safetensors", "checkpoint-5/tokenizer.json"]
    plain = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    hub.add(REAL_ID, {name: name.encode() for name in [*code, *nested, *plain]})
    assert set(contents(resolve_folder(REAL_ID, **options))) == taken
    assert {request.path.rpartition("/")[2] for request in hub.asked("/resolve/")} == taken


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    repository = hub.add(REAL_ID, {"config.json": b"first"})
    first = repository.refs["main"]
    repository.commit({"config.json": b"second"})
    repository.refs["refs/pr/1"] = repository.refs["v1"] = first
    wanted = {None: b"second", "main": b"second", "v1": b"first", "refs/pr/1": b"first", first: b"first"}
    folders = {revision: resolve_folder(REAL_ID, revision=revision) for revision in wanted}
    assert {revision: contents(folder)["config.json"] for revision, folder in folders.items()} == wanted
    assert {commit_of(folders[revision]) for revision in ("v1", "refs/pr/1", first)} == {first}
    assert commit_of(folders[None]) == commit_of(folders["main"]) == repository.refs["main"]


def test_what_is_in_the_cache_is_not_downloaded_again(hub):
    hub.add(REAL_ID, FILES)
    folder = resolve_folder(REAL_ID)
    hub.requests.clear()
    assert resolve_folder(REAL_ID) == folder
    assert not hub.asked("/resolve/") and hub.asked("/api/models/")  # the branch may have moved, and that is asked


def test_the_stored_token_is_sent_and_opens_what_is_private(hub, tmp_path):
    hub.add(REAL_ID, FILES, private=True)
    (tmp_path / "token").write_text(TOKEN)
    assert contents(resolve_folder(REAL_ID)) == FILES


@pytest.mark.parametrize("folder", ["snapshots/main", "other/" + "a" * 40, "snapshots/" + "A" * 40, "snapshots/" + "a" * 39])
def test_other_folders_are_no_snapshots_of_a_commit(folder, tmp_path):
    assert commit_of(tmp_path / folder) is None
    assert commit_of(tmp_path / "snapshots" / ("a" * 40)) == "a" * 40


# The three that load.


def test_base_tokenizer_and_adapter_load_by_id_and_revision(hub, tmp_path):
    repository = hub.add("me/tiny", {path.name: path.read_bytes() for path in (ASSETS / "tiny-falcon").iterdir()})
    commit = repository.refs["v1"] = repository.refs["main"]
    repository.commit({"config.json": b"{}", "tokenizer.json": b"{}"})
    model = qlite.load_falcon("me/tiny", revision="v1", quantize=qlite.Linear4bit)
    assert (model.base_id, model.base_revision) == ("me/tiny", commit)
    assert model.base_fingerprint == qlite.load_falcon(ASSETS / "tiny-falcon").base_fingerprint
    assert qlite.load_tokenizer("me/tiny", revision="v1").encode("Hello").ids
    with pytest.raises(ValueError, match=r"is not a tokenizer|has no token"):
        qlite.load_tokenizer("me/tiny")
    with pytest.raises(ValueError, match=r"config\.json"):
        qlite.load_falcon("me/tiny", revision="main")


@pytest.mark.filterwarnings("ignore:save_adapter. every lora_B is zero")
def test_an_adapter_trained_from_the_shell_remembers_id_and_commit_of_its_base(hub, tmp_path):
    repository = hub.add("me/tiny", {path.name: path.read_bytes() for path in (ASSETS / "tiny-falcon").iterdir()})
    commit = repository.refs["v1"] = repository.refs["main"]
    options = cli.parser(dict.fromkeys(cli.VERBS)).parse_args(
        ["finetune", "--base", "me/tiny", "--revision", "v1", "--device", "cpu"]
    )
    model, _ = cli._load(options)
    qlite.add_lora(model, qlite.LoRAConfig(r=1, targets=["query_key_value"]))
    stored = json.loads((qlite.save_adapter(model, tmp_path / "adapter") / CONFIG).read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("me/tiny", commit)


def test_a_base_from_a_folder_has_no_revision():
    assert qlite.load_falcon(ASSETS / "tiny-falcon").base_revision is None


def test_an_adapter_loads_by_id_and_revision(hub, tmp_path):
    good, other, again = base_of(), base_of(), base_of()
    adapt(good, seed=1)
    adapt(other, seed=2)
    first, second = (contents(qlite.save_adapter(model, tmp_path / name)) for model, name in ((good, "a"), (other, "b")))
    repository = hub.add("me/faq", first)
    repository.refs["v1"] = repository.refs["main"]
    repository.commit(second)
    qlite.load_adapter(again, "me/faq", revision="v1")
    assert torch.equal(logits(again), logits(good))
    qlite.load_adapter(again, "me/faq")
    assert torch.equal(logits(again), logits(other))


# What does not arrive. Each is one line: what was done, to which id, what the hub said, what to do.


def refused(kind, repo_id=REAL_ID, **options):
    with pytest.raises(kind) as caught:
        resolve_folder(repo_id, **options)
    said = str(caught.value)
    assert type(caught.value) is kind and said.startswith(f"downloading {repo_id}") and len(said.splitlines()) == 1
    assert caught.value.__cause__ is not None and TOKEN not in said
    return said


@pytest.mark.parametrize("token", [None, "hf_wrong", TOKEN])
def test_a_repository_that_is_not_there(token, hub, tmp_path):
    if token:
        (tmp_path / "token").write_text(token)
    if token == TOKEN:
        assert "there is no such repository, or not for you (404, Repository not found)" in refused(FileNotFoundError)
    else:  # a stranger is not told whether there is one
        said = refused(PermissionError)
        assert "private, or not there, or the token is not valid (401, " in said and "log in with `hf auth login`" in said
        assert "hf_wrong" not in said


def test_a_private_repository_without_a_login_looks_like_none(hub):
    hub.add(REAL_ID, FILES, private=True)
    assert "private, or not there" in refused(PermissionError)


def test_a_gated_repository_says_that_there_are_terms(hub):
    hub.add(REAL_ID, FILES, gated=True)
    said = refused(PermissionError)
    assert "gated (401, Access to this model is restricted): agree to its terms" in said
    assert not cached_files()


def test_a_token_that_may_not(hub):
    hub.add(REAL_ID, FILES)
    hub.fault("GET /api/models/", status=403)
    assert "not allowed (403" in refused(PermissionError)


@pytest.mark.parametrize("revision", ["v9", "a" * 40])
def test_a_revision_that_is_not_there(revision, hub):
    hub.add(REAL_ID, FILES)
    said = refused(FileNotFoundError, revision=revision)
    assert f"{REAL_ID} at revision {revision}: there is no such revision (404" in said


@pytest.mark.parametrize(
    ("load", "missing"),
    [
        (lambda: qlite.load_falcon(REAL_ID), "has no config.json"),
        (lambda: qlite.load_tokenizer(REAL_ID), "has no tokenizer.json"),
        (lambda: qlite.load_adapter(base_of(), REAL_ID), f"has no {CONFIG}"),
    ],
    ids=["falcon", "tokenizer", "adapter"],
)
def test_a_file_that_is_not_there(load, missing, hub):
    hub.add(REAL_ID, {"README.md": b"# nothing"})
    with pytest.raises(FileNotFoundError, match=missing):
        load()


def test_a_file_that_goes_while_it_is_asked_for(hub):
    hub.add(REAL_ID, FILES)
    hub.fault(r"/resolve/\w+/model\.safetensors", status=404, headers={"X-Error-Code": "EntryNotFound"})
    assert "a file is not there (404" in refused(FileNotFoundError)


def test_a_rate_limit_says_how_long_to_wait(hub):
    hub.add(REAL_ID, FILES)
    hub.fault("GET /api/models/", status=429, headers={"Retry-After": "17"})
    assert "too many requests (429, a fault): try again in 17 seconds" in refused(ConnectionError)
    hub.faults.clear()
    hub.fault("GET /api/models/", status=429)
    assert "try again in some minutes" in refused(ConnectionError)


def test_a_rate_limit_on_a_file_is_waited_out(hub):
    hub.add(REAL_ID, FILES)
    hub.fault(r"GET .*/model\.safetensors", status=429, headers={"Retry-After": "17"}, times=2)
    assert contents(resolve_folder(REAL_ID)) == FILES
    assert hub.waits == [18, 18]  # the client's own patience: a second more than was asked


def test_a_hub_that_is_not_well(hub):
    hub.add(REAL_ID, FILES)
    hub.fault("GET /api/models/", status=503)
    assert "the hub answered 503, a fault: try again later" in refused(ConnectionError)


def test_nobody_there(hub, monkeypatch):
    hub.add(REAL_ID, FILES)
    hub.shutdown()
    hub.server_close()
    said = refused(ConnectionError)
    assert f"no connection to {hub.url}, or it broke" in said and "try again" in said


def test_a_hub_that_does_not_answer_in_time(hub, monkeypatch):
    hub.add(REAL_ID, FILES)
    hub.fault(r"GET .*/config\.json", delay=0.4)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    assert "timed out" in refused(ConnectionError)


def test_a_full_disk_is_told_as_it_is(hub, monkeypatch):
    hub.add(REAL_ID, FILES)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(OSError, match="No space left on device: '/disk'") as caught:
        resolve_folder(REAL_ID)
    assert caught.value.errno == errno.ENOSPC


def test_mistakes_of_the_caller_pass_as_they_are():
    with pytest.raises(ValueError, match="mine"), hub_errors("pushing"):
        raise ValueError("mine")
    with (
        pytest.raises(ConnectionError, match=r"^pushing: the transfer failed: lost a thread; try again$"),
        hub_errors("pushing"),
    ):
        raise RuntimeError("lost\n  a thread")


# Transfers that break.


@pytest.mark.parametrize(("cuts", "each"), [(1, 300_000), (3, 300_000), (8, 100_000)])
def test_a_cut_transfer_goes_on_where_it_was_cut(cuts, each, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # 10 MiB: the client goes on from the last whole chunk
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before each of its tries, more than five while bytes come
    hub.add(REAL_ID, FILES)
    hub.fault(r"GET .*/model\.safetensors", cut=each, times=cuts)
    assert contents(resolve_folder(REAL_ID)) == FILES
    ranges = [request.headers.get("range") for request in hub.asked(r"GET .*/model\.safetensors")]
    assert ranges == [None, *(f"bytes={each * (cut + 1)}-" for cut in range(cuts))]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_transfer_that_stays_cut_leaves_no_part_of_a_file(reset, hub):
    hub.add(REAL_ID, FILES)
    hub.fault(r"GET .*/model\.safetensors", cut=0 if not reset else 300_000, reset=reset)
    assert "no connection to" in refused(ConnectionError)
    assert [path.read_bytes() for path in cached_files()] == [FILES["config.json"]]
    hub.faults.clear()
    hub.requests.clear()
    assert contents(resolve_folder(REAL_ID)) == FILES
    assert len(hub.asked(r"GET .*/model\.safetensors")) == 1 and not hub.asked(r"GET .*/config\.json")


def test_a_file_of_another_size_than_was_announced_is_not_used(hub):
    hub.add(REAL_ID, FILES)
    hub.fault(r"HEAD .*/model\.safetensors", headers={"X-Linked-Size": str(len(WEIGHTS) + 1)})
    assert "the transfer failed: Consistency check failed" in refused(ConnectionError)
    assert [path.read_bytes() for path in cached_files()] == [FILES["config.json"]]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_arrives_damaged_is_removed_and_comes_whole_the_next_time(name, hub):
    hub.add(REAL_ID, FILES)
    hub.fault(rf"GET .*/{name}", spoil=lambda body: body[:-1] + b"?", times=1)
    with pytest.raises(ConnectionError, match=f"downloading {REAL_ID}: {name} arrived damaged and was removed; run it again"):
        resolve_folder(REAL_ID)
    assert contents(resolve_folder(REAL_ID)) == FILES
    assert len(hub.asked(rf"GET .*/{name}")) == 2


def test_checksums_are_computed_once_after_the_download(hub, monkeypatch):
    hub.add(REAL_ID, FILES)
    resolve_folder(REAL_ID)
    monkeypatch.setattr("qlite.download.hashlib", None)
    assert contents(resolve_folder(REAL_ID)) == FILES


# Without a network.


def test_offline_the_cache_answers_and_nothing_is_asked(hub, monkeypatch):
    repository = hub.add(REAL_ID, FILES)
    commit = repository.refs["v1"] = repository.refs["main"]
    for revision in (None, "v1"):
        resolve_folder(REAL_ID, revision=revision)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folders = [resolve_folder(REAL_ID, revision=revision) for revision in (None, "main", "v1", commit)]
    assert {commit_of(folder) for folder in folders} == {commit} and contents(folders[0]) == FILES
    assert not hub.requests


@pytest.mark.parametrize("had", [None, "tokenizer.json", "config.json"])
def test_offline_a_cache_that_has_not_all_says_so(had, hub, monkeypatch):
    hub.add(REAL_ID, {**FILES, "tokenizer.json": b"{}"})
    if had:
        resolve_folder(REAL_ID, names=(had,))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and the cache does not hold all of it" in refused(FileNotFoundError)


def test_without_a_connection_a_whole_cache_answers(hub):
    hub.add(REAL_ID, FILES)
    resolve_folder(REAL_ID)
    hub.fault("GET /api/models/", status=503)
    assert contents(resolve_folder(REAL_ID)) == FILES


def test_the_shell_says_in_one_line_what_is_not_in_the_cache(hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["generate", "Hello?", "--base", "me/absent", "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qlite generate: downloading me/absent: HF_HUB_OFFLINE is set") and not hub.requests


SCRIPT = """
from qlite.download import resolve_folder
print(resolve_folder("me/tiny"))
try:
    resolve_folder("me/absent")
except OSError as error:
    print(repr(error))
"""


def test_the_environment_alone_turns_a_process_to_the_hub_and_offline(hub, tmp_path):
    hub.add("me/tiny", FILES)

    def run(**more):
        settings = {**environment(hub, tmp_path / "home"), "PYTHONPATH": str(ROOT), **more}
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=120, check=True
        ).stdout.splitlines()

    online = run()
    asked = len(hub.requests)
    offline = run(HF_HUB_OFFLINE="1")
    assert offline[0] == online[0] and contents(pathlib.Path(online[0])) == FILES and len(hub.requests) == asked > 0
    assert pathlib.Path(online[0]).is_relative_to(tmp_path / "home" / "hub")
    assert online[1].startswith("PermissionError") and offline[1].startswith("FileNotFoundError")
