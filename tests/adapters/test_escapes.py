"""An adapter is what was loaded: no links, no changed files, and no search on the Hub."""

import shutil

import pytest
from toy_adapters import write_adapter

from mlx_optiq_ext.adapters import Caps, Catalogue, Offer
from mlx_optiq_ext.adapters.catalogue import State
from mlx_optiq_ext.adapters.catalogue.reading import Reader
from mlx_optiq_ext.errors import InputError

from .asking import LOAD, ask, post
from .catalogue.generating import generating, version

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@pytest.fixture
def evicted(model, adapter):
    """A catalogue with one place, which A was in before B."""
    offers = [Offer(name, name, adapter(name, seed=ord(name)), closed=True) for name in "AB"]
    catalogue = Catalogue(offers, limit=1, patience=5)
    with generating(catalogue, model):
        first = version(catalogue, "A")
        version(catalogue, "B")
        assert catalogue.states() == {"A": State.ABSENT, "B": State.MOUNTED}
        yield catalogue, offers[0], first
        assert version(catalogue, "B")


def test_a_folder_that_became_a_link_is_not_followed(evicted):
    catalogue, offer, _ = evicted
    offer.folder.rename(offer.folder.with_name("moved"))
    offer.folder.symlink_to(offer.folder.with_name("moved"))
    with pytest.raises(InputError, match="no longer those that were loaded"):
        catalogue.acquire("A")


def test_another_folder_in_its_place_is_refused(evicted, adapter):
    catalogue, offer, _ = evicted
    offer.folder.rename(offer.folder.with_name("moved"))
    shutil.copytree(offer.folder.with_name("moved"), offer.folder)
    with pytest.raises(InputError, match="no longer those that were loaded"):
        catalogue.acquire("A")


def test_changed_weights_are_refused_until_they_are_loaded(evicted, adapter):
    catalogue, offer, first = evicted
    other = adapter("other", seed=9)
    shutil.copy(other / WEIGHTS, offer.folder)
    with pytest.raises(InputError, match="load it again with load_inplace"):
        catalogue.acquire("A")
    catalogue.load(offer, replace=True)
    assert version(catalogue, "A") != first
    version(catalogue, "B")
    assert version(catalogue, "A") != first


def test_rewritten_files_of_the_same_content_are_the_same(evicted):
    catalogue, offer, first = evicted
    content = (offer.folder / WEIGHTS).read_bytes()
    (offer.folder / WEIGHTS).unlink()
    (offer.folder / WEIGHTS).write_bytes(content)
    assert version(catalogue, "A") == first


def test_a_removed_folder_is_not_looked_for_on_the_hub(model, exact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_adapter(tmp_path / "adapters" / "sql", model).relative_to(tmp_path)
    # As a repository on the Hub is called.
    assert str(folder) == "adapters/sql"
    catalogue = Catalogue([Offer("a", str(folder), folder)], patience=5)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="its folder is gone"):
        catalogue.attach(model)


def test_files_that_change_while_they_are_read_are_refused(adapter):
    offer = Offer("a", "a", adapter("A"))

    def fit(found):
        (offer.folder / CONFIG).touch()
        return found

    with pytest.raises(InputError, match="changed while they were read"):
        Reader(Caps()).read(offer, fit)


def test_a_folder_that_makes_way_for_a_link_while_it_is_read_is_refused(adapter):
    offer = Offer("a", "a", adapter("A"), closed=True)
    aside, elsewhere = offer.folder.with_name("aside"), adapter("B")

    def fit(found):
        offer.folder.rename(aside)
        offer.folder.symlink_to(elsewhere)
        offer.folder.unlink()
        aside.rename(offer.folder)
        return found

    with pytest.raises(InputError, match="changed while they were read"):
        Reader(Caps()).read(offer, fit)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "optiq_lora_config.json"])
def test_a_linked_file_in_a_folder_of_clients_is_not_read(server, folder, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("password: swordfish")
    inside = shutil.copytree(folder / "33", folder / f"linked {name}")
    (inside / name).unlink(missing_ok=True)
    (inside / name).symlink_to(secret)
    status, body = post(server, LOAD, {"lora_name": "linked", "lora_path": inside.name})
    assert status == 400
    assert "is a link" in body["error"]["message"]
    assert "swordfish" not in str(body)
    assert str(secret) not in str(body)
    assert ask(server, "22") == "22"


def test_an_operator_may_link_files_as_the_hubs_cache_does(model, adapter, tmp_path):
    stored = adapter("blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for name in (WEIGHTS, CONFIG):
        (linked / name).symlink_to(stored / name)
    catalogue = Catalogue([Offer("a", "a", linked)], patience=5)
    with generating(catalogue, model):
        assert version(catalogue, "a")
