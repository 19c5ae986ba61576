"""The hub: what is pushed, and what never is."""

import os
import types

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

import qlite
from qlite.adapters import CONFIG, TENSORS
from qlite.hub import CARD
from tests.adapted import A, B, adapt, base_of, edit, edit_tensors, stored_bytes


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what it is told and holds the files of `has`. Nothing leaves the machine."""

    class Hub:
        has: tuple[str, ...] = ()
        token = created = repository = files = None

        def __call__(self, token=None):
            self.token = token
            return self

        def create_repo(self, repo_id, **options):
            self.created = (repo_id, options)

        def file_exists(self, repo_id, filename):
            return filename in self.has

        def create_commit(self, repo_id, operations, **options):
            self.repository = repo_id
            self.files = {}
            for operation in operations:
                with operation.as_file() as file:
                    self.files[operation.path_in_repo] = file.read()
            return types.SimpleNamespace(commit_url="https://hub/commit/1")

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


@pytest.fixture
def folder(tmp_path):
    model = base_of()
    adapt(model)
    model.base_id = "tiiuae/falcon-7b"
    return qlite.save_adapter(model, tmp_path / "faq-lora")


def test_three_files_are_pushed_to_a_private_repository_and_nothing_else(folder, hub):
    for name in (".env", "optimizer.pt", "state.safetensors", f".{TENSORS}.tmp"):
        (folder / name).write_text("secret")
    before = stored_bytes(folder)
    assert qlite.push_adapter(folder, "me/faq", token="t") == "https://hub/commit/1"
    assert hub.created == ("me/faq", {"private": True, "exist_ok": True}) and hub.repository == "me/faq" and hub.token == "t"
    assert set(hub.files) == {CONFIG, TENSORS, CARD}
    assert {name: hub.files[name] for name in (CONFIG, TENSORS)} == {name: before[name] for name in (CONFIG, TENSORS)}
    assert stored_bytes(folder) == before


def test_a_repository_can_be_public_when_that_is_asked_for(folder, hub):
    qlite.push_adapter(folder, "me/faq", private=False)
    assert hub.created[1]["private"] is False and hub.token is None


def test_a_card_of_ones_own_is_pushed_as_it_is(folder, hub):
    (folder / CARD).write_text("# mine")
    qlite.push_adapter(folder, "me/faq")
    assert hub.files[CARD] == b"# mine"


def test_a_card_that_the_repository_has_is_not_overwritten(folder, hub):
    hub.has = (CARD,)
    qlite.push_adapter(folder, "me/faq")
    assert set(hub.files) == {CONFIG, TENSORS} and not (folder / CARD).exists()


def test_the_card_names_the_base_and_what_the_adapter_is(folder, hub):
    qlite.push_adapter(folder, "me/faq")
    card = ModelCard(hub.files[CARD].decode())
    assert card.data.base_model == "tiiuae/falcon-7b" and card.data.library_name == "peft"
    assert set(card.data.tags) == {"lora", "qlora", "qlite"}
    assert "r=3, alpha=8.0, on dense, dense_4h_to_h, dense_h_to_4h, query_key_value." in card.text


@pytest.mark.parametrize("base", [None, "/models/falcon", "falcon", "a/b/c", "./falcon/7b", ["a/b"], "tests/falcons"])
def test_a_base_that_is_no_hub_id_is_not_claimed_to_be_one(base, folder, hub, monkeypatch):
    # The hub refuses a card whose base_model is not of the form of an id.
    (folder / "tests" / "falcons").mkdir(parents=True)
    monkeypatch.chdir(folder)
    edit(folder, base_model_name_or_path=base)
    qlite.push_adapter(folder, "me/faq")
    assert ModelCard(hub.files[CARD].decode()).data.base_model is None


def test_a_card_can_be_made_from_the_little_that_peft_needs(folder, hub):
    model = base_of()
    adapt(model, r=8)
    qlite.save_adapter(model, folder)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ".*dense"}')
    qlite.push_adapter(folder, "me/faq")
    assert "a base that its config does not name: r=8, alpha=8, on .*dense." in hub.files[CARD].decode()


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
        qlite.push_adapter(folder, "me/faq")
    assert hub.created is None and hub.files is None


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_nothing_is_pushed_of_half_a_folder(missing, folder, hub):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        qlite.push_adapter(folder, "me/faq")
    assert hub.created is None and hub.files is None
