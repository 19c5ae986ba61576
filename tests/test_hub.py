"""Pushing to a hub on this machine through the real client: what goes, what never does, and what is said when it cannot."""

import json
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard, constants

import qlite
from qlite import cli
from qlite.adapters import CONFIG, TENSORS
from qlite.data import ASSETS, FAQBatches, read_faq
from qlite.hub import CARD, CURVE, TRAINING
from tests.adapted import A, B, adapt, base_of, edit, edit_tensors, logits, stored_bytes
from tests.hub_server import TOKEN

# The client's own, where it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    model = base_of()
    adapt(model)
    model.base_id = "tiiuae/falcon-7b"
    return qlite.save_adapter(model, tmp_path / "faq-lora")


def push(folder, repo_id="me/faq", **options):
    return qlite.push_adapter(folder, repo_id, **{"token": TOKEN, **options})


# What goes.


def test_the_adapter_and_its_card_go_to_a_private_repository_and_nothing_else(folder, hub):
    for name in (".env", "optimizer.pt", "state.safetensors", f".{TENSORS}.tmp", "metrics.jsonl", "tokenizer.json"):
        (folder / name).write_text("secret")
    (folder / "checkpoint-000002").mkdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = push(folder)
    there = hub.repositories["me/faq"]
    assert there.private and set(there.files) == {".gitattributes", CONFIG, TENSORS, CARD}
    assert {name: there.files[name] for name in (CONFIG, TENSORS)} == {n: before[folder / n] for n in (CONFIG, TENSORS)}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert report.url == f"{hub.url}/me/faq/commit/{there.refs['main']}" and report.private and not report.kept
    assert report.files == {name: len(there.files[name]) for name in (CONFIG, TENSORS, CARD)}


def test_what_a_run_left_goes_too(folder, hub):
    (folder / TRAINING).write_text("{}")
    (folder / CURVE).write_bytes(b"\x89PNG")
    push(folder)
    files = hub.repositories["me/faq"].files
    assert set(files) == {".gitattributes", CONFIG, TENSORS, CARD, TRAINING, CURVE} and files[CURVE] == b"\x89PNG"
    assert f"]({CURVE})" in files[CARD].decode()


def test_what_was_pushed_loads_back_by_its_id(folder, hub, tmp_path):
    push(folder)
    (tmp_path / "token").write_text(TOKEN)
    model, again, fresh = base_of(), base_of(), base_of()
    qlite.load_adapter(model, folder)
    qlite.load_adapter(again, "me/faq")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(fresh), logits(model))


def test_a_second_push_is_a_second_commit_with_the_new_weights(folder, hub):
    first = push(folder)
    model = base_of()
    adapt(model, seed=5)
    qlite.save_adapter(model, folder, base_id="tiiuae/falcon-7b")
    second = push(folder)
    repository = hub.repositories["me/faq"]
    assert first.url != second.url and repository.files[TENSORS] == (folder / TENSORS).read_bytes()
    assert len(repository.commits) == 3  # the hub's own first one too


# Private or public.


def test_a_repository_is_public_when_that_is_asked_for(folder, hub):
    assert not push(folder, private=False).private
    assert not hub.repositories["me/faq"].private


def test_a_repository_that_is_public_is_not_written_to_by_default(folder, hub):
    repository = hub.add("me/faq", {})
    before = repository.refs["main"]
    with pytest.raises(ValueError, match=r"me/faq is there and public; pass private=False \(--public\)"):
        push(folder)
    assert repository.refs["main"] == before and not hub.asked("/preupload/|/lfs/|/commit/")
    push(folder, private=False)
    assert TENSORS in repository.files


def test_a_repository_that_is_private_stays_so_and_the_report_says_it(folder, hub):
    hub.add("me/faq", {}, private=True)
    report = push(folder, private=False)
    assert report.private and "me/faq (private)" in str(report) and hub.repositories["me/faq"].private


# The card that was there.


def test_a_card_in_the_folder_is_pushed_as_it_is(folder, hub):
    (folder / CARD).write_text("# mine")
    assert push(folder).card is None
    assert hub.repositories["me/faq"].files[CARD] == b"# mine" == (folder / CARD).read_bytes()


@pytest.mark.parametrize("own", [True, False])
def test_a_card_in_the_repository_is_never_replaced(own, folder, hub):
    hub.add("me/faq", {CARD: b"# theirs"}, private=True)
    if own:
        (folder / CARD).write_text("# mine")
    report = push(folder)
    assert hub.repositories["me/faq"].files[CARD] == b"# theirs"
    assert report.kept and report.card is None and CARD not in report.files
    assert "README.md of the repository was kept" in str(report)


def test_a_card_that_comes_in_between_is_not_replaced_either(folder, hub, monkeypatch):
    repository = hub.add("me/faq", {}, private=True)
    from huggingface_hub import HfApi

    info = HfApi.model_info

    def meanwhile(self, repo_id):
        answer = info(self, repo_id)
        repository.commit({CARD: b"# theirs"})
        return answer

    monkeypatch.setattr(HfApi, "model_info", meanwhile)
    with pytest.raises(ConnectionError, match=r"pushing to me/faq: the repository was changed meanwhile \(412"):
        push(folder)
    assert repository.files[CARD] == b"# theirs" and TENSORS not in repository.files


# The base is named by a hub id, and nothing tells of this machine.


@pytest.mark.parametrize("base", [None, "/models/falcon", "falcon", "a/b/c", "./falcon/7b", ["a/b"], "tests/falcons", "C:\\f"])
def test_a_base_without_a_hub_id_is_refused_unless_one_is_given(base, folder, hub, monkeypatch):
    (folder / "tests" / "falcons").mkdir(parents=True)
    monkeypatch.chdir(folder)
    edit(folder, base_model_name_or_path=base)
    with pytest.raises(ValueError, match=r"which is no hub id, or a folder here; .* pass base_id='owner/name' \(--base\)"):
        push(folder)
    assert not hub.requests
    edit(folder, revision="a" * 40)
    push(folder, base_id="me/tiny")
    files = hub.repositories["me/faq"].files
    stored = json.loads(files[CONFIG])
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("me/tiny", None) and stored["r"] == 3
    assert ModelCard(files[CARD].decode()).data.base_model == "me/tiny"
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == base


def test_a_base_that_is_given_leaves_the_keys_of_a_pattern_in_their_order(folder, hub):
    # The first key that matches counts; sorted, the wider one would come first.
    model = base_of()
    adapt(model, targets=["dense_h_to_4h"], alpha_pattern={r"h\.0\.mlp\..*": 3.0, "dense_h_to_4h": 5.0})
    qlite.save_adapter(model, folder, base_id="tiiuae/falcon-7b")
    push(folder, base_id="me/tiny")
    pushed = json.loads(hub.repositories["me/faq"].files[CONFIG])
    assert list(pushed["alpha_pattern"]) == [r"h\.0\.mlp\..*", "dense_h_to_4h"]


def test_a_base_that_is_given_again_changes_nothing(folder, hub):
    edit(folder, revision="a" * 40)
    push(folder, base_id="tiiuae/falcon-7b")
    assert hub.repositories["me/faq"].files[CONFIG] == (folder / CONFIG).read_bytes()


@pytest.mark.parametrize("argument", ["base_id", "repo_id"])
@pytest.mark.parametrize("text", ["faq", "/me/faq", "me/faq/x", "me/fa q", "me--you/faq", ""])
def test_an_id_of_another_form_is_refused(argument, text, folder, hub):
    with pytest.raises(ValueError, match=f"{argument} is {text!r}; wanted a hub id of the form owner/name"):
        push(folder, **{argument: text})
    assert not hub.requests


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (
            lambda f: edit(f, auto_mapping={"parent_library": "/home/me/code"}),
            f"{CONFIG} .*auto_mapping.parent_library = '/home",
        ),
        (lambda f: edit(f, eva_config={"a": [1, "~/x"]}), r"eva_config\.a\[1\] = '~/x'"),
        (lambda f: edit(f, loftq_config={"a": "C:\\Users\\me"}), "loftq_config.a"),
        (lambda f: (f / TRAINING).write_text('{"data": "/data/faq.json"}'), f"{TRAINING} .*data = '/data/faq.json'"),
    ],
)
def test_a_path_of_this_machine_does_not_leave_it(plant, where, folder, hub):
    plant(folder)
    with pytest.raises(ValueError, match=where):
        push(folder)
    assert not hub.requests


@pytest.mark.parametrize("content", ['{"layers": 1}', '{"steps": 3}', '{"prompt": 5}', "[]", "{"])
def test_a_record_of_training_that_is_none_is_refused(content, folder, hub):
    (folder / TRAINING).write_text(content)
    with pytest.raises(ValueError, match=TRAINING):
        push(folder)
    assert not hub.requests


# What must not go at all.


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: os.truncate(f / TENSORS, 3000),
        lambda f: (f / TENSORS).write_bytes(b""),
        lambda f: edit_tensors(f, {A: None}),
        lambda f: edit_tensors(f, {B: torch.full((192, 3), float("nan"))}),
        lambda f: edit(f, r=4),
        lambda f: edit(f, use_dora=True),
        lambda f: (f / CONFIG).write_text("{"),
    ],
    ids=["short", "empty", "half", "not finite", "another rank", "not supported", "no JSON"],
)
def test_nothing_is_pushed_of_a_damaged_folder(damage, folder, hub):
    damage(folder)
    with pytest.raises(ValueError):
        push(folder)
    assert not hub.requests


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_nothing_is_pushed_of_half_a_folder(missing, folder, hub):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        push(folder)
    assert not hub.requests


# A dry run.


def test_a_dry_run_lists_what_would_go_and_contacts_nothing(folder, hub):
    (folder / TRAINING).write_text("{}")
    before = stored_bytes(folder)
    report = push(folder, dry_run=True)
    assert report.url is None and not hub.requests and not hub.repositories and stored_bytes(folder) == before
    assert str(report).startswith("a dry run, nothing was sent; to me/faq (private) would go:")
    assert [line.split()[0] for line in str(report).splitlines()[1:5]] == [CONFIG, TENSORS, TRAINING, CARD]
    pushed = push(folder)
    assert pushed.files == report.files and pushed.card == report.card


def test_a_dry_run_finds_what_a_push_would_refuse(folder):
    edit(folder, base_model_name_or_path="/models/falcon")
    with pytest.raises(ValueError, match="pass base_id"):
        push(folder, dry_run=True)


# What the hub refuses. Each is one line, and what was there stays.


def refused(kind, folder, repo_id="me/faq", **options):
    with pytest.raises(kind) as caught:
        push(folder, repo_id, **options)
    said = str(caught.value)
    assert type(caught.value) is kind and said.startswith(f"pushing to {repo_id}: ") and len(said.splitlines()) == 1
    assert TOKEN not in said and "hf_wrong" not in said
    return said


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_login_it_says_how_to_log_in(token, folder, hub):
    said = refused(PermissionError, folder, token=token)
    assert "(401, " in said and "log in with `hf auth login`, or set HF_TOKEN" in said
    assert not hub.repositories


def test_the_repository_of_someone_else(folder, hub):
    said = refused(PermissionError, folder, "you/faq")
    assert "not allowed (403, You don't have the rights to create a model under the namespace you)" in said


@pytest.mark.parametrize(
    ("pattern", "status", "kind", "words"),
    [
        ("POST /api/repos/create", 429, ConnectionError, "too many requests (429, a fault): try again in 9 seconds"),
        ("POST /api/models/.*/commit/", 429, ConnectionError, "too many requests"),
        ("POST /api/models/.*/commit/", 403, PermissionError, "not allowed (403"),
        ("POST /api/models/.*/preupload/", 503, ConnectionError, "the hub answered 503"),
        ("POST /me/faq.git/info/lfs/", 500, ConnectionError, "the hub answered 500"),
        ("PUT /lfs/", 403, PermissionError, "not allowed (403"),
        ("PUT /lfs/", 503, ConnectionError, "the hub answered 503"),
        ("GET /api/models/me/faq", 404, FileNotFoundError, "there is no such repository"),
    ],
)
def test_a_push_that_breaks_off_leaves_no_half_of_an_adapter(pattern, status, kind, words, folder, hub):
    hub.fault(pattern, status=status, headers={"Retry-After": "9"})
    assert words in refused(kind, folder)
    assert all(set(repository.files) == {".gitattributes"} for repository in hub.repositories.values())
    hub.faults.clear()
    assert push(folder).url and TENSORS in hub.repositories["me/faq"].files


def test_an_upload_that_is_told_to_wait_waits(folder, hub):
    hub.fault("PUT /lfs/", status=429, headers={"Retry-After": "9"}, times=1)
    assert push(folder).url and hub.waits == [10]


def test_nobody_there(folder, hub):
    hub.shutdown()
    hub.server_close()
    assert f"no connection to {hub.url}" in refused(ConnectionError, folder)


def test_offline_nothing_is_pushed(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(ConnectionError, folder)
    assert not hub.requests


def test_a_card_that_the_hub_would_not_have(folder, hub):
    (folder / CARD).write_text("---\nbase_model: /home/me/falcon\n---\n# mine\n")
    with pytest.raises(ValueError, match="is not valid"):
        push(folder)
    assert set(hub.repositories["me/faq"].files) == {".gitattributes"}


# From the shell.


def test_the_verb_pushes_privately_with_the_stored_token(folder, hub, tmp_path, capsys):
    (tmp_path / "token").write_text(TOKEN)
    assert cli.main(["push", str(folder), "me/faq"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"pushed to me/faq (private): {hub.url}/me/faq/commit/") and TOKEN not in said.out + said.err
    assert hub.repositories["me/faq"].private
    assert cli.main(["push", str(folder), "me/open", "--public", "--base", "me/tiny"]) == 0
    opened = hub.repositories["me/open"]
    assert not opened.private and json.loads(opened.files[CONFIG])["base_model_name_or_path"] == "me/tiny"


def test_the_verb_shows_in_a_dry_run_the_files_and_the_card(folder, hub, capsys):
    assert cli.main(["push", str(folder), "me/faq", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was sent" in said and TENSORS in said and "base_model: " in said and not hub.requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent", "me/faq"], f"absent has no {CONFIG}"),
        (["faq-lora", "faq"], "wanted a hub id of the form owner/name"),
        (["faq-lora", "me/faq"], "log in with `hf auth login`"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_status_two(arguments, words, folder, hub, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    assert cli.main(["push", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("qlite push: ") and words in said and len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter's folder with what a short run over the tiny base left there."""
    base = ASSETS / "tiny-falcon"
    model = qlite.load_falcon(base, quantize=qlite.Linear4bit, dtype=torch.float32)
    qlite.add_lora(model, qlite.LoRAConfig(r=2), seed=0)
    batches = FAQBatches(read_faq(ASSETS / "faq.json")[:2], qlite.load_tokenizer(base))
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=5e-3)
    result = qlite.finetune(model, batches, optimizer, steps=3, accumulate=1, progress=False)
    folder = qlite.save_adapter(model, tmp_path_factory.mktemp("run") / "adapter")
    assert result.save(folder) == [folder / TRAINING, folder / CURVE]
    return folder


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, which speak their minds
@pytest.mark.parametrize(("heading", "kind"), [("With qlite", qlite.Linear4bit), ("With PEFT", None)])
def test_the_code_of_the_card_loads_what_was_pushed_and_answers(heading, kind, trained, hub, tmp_path, capsys):
    hub.add("me/tiny", {path.name: path.read_bytes() for path in (ASSETS / "tiny-falcon").iterdir()})
    (tmp_path / "token").write_text(TOKEN)
    card = push(trained, base_id="me/tiny").card
    names = {}
    exec(re.search(rf"^## {heading}\n\n```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)[1], names)
    assert len(capsys.readouterr().out.split()) > 3  # it printed an answer
    wanted = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=kind, dtype=torch.float32)
    qlite.load_adapter(wanted, trained)
    ids = torch.arange(40).view(2, 20) + 300
    logits = names["model"](ids)
    # float32 on both sides; PEFT's sums are in another order. Over the base of the other kind they are off by more than 1.
    torch.testing.assert_close(getattr(logits, "logits", logits), wanted(ids), rtol=1e-4, atol=1e-4)
