import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from server import initial
from server.initial import Chosen, LaunchError, Memory, NoRoom, Plan, copy_networks, plan
from server.lifecycle.state_file import RememberedNetwork, State, read_state, write_state
from server.settings import Settings
from tests.models import OTHER_TEXT, make_contrast, make_network, make_tokenizer
from tests.server.conftest import SMALL
from value_models.manifest import tokenizer_fingerprint
from value_models.snapshot import snapshot
from value_models.store import DirectoryError, NetworkError, NetworkFolder, check_network

GIB = 1 << 30


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `json` and `qa`, which nobody has touched for long."""
    store = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(("json", "qa")):
        make_network(store / name, **SMALL, seed=seed)
    for path in store.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return store


@pytest.fixture
def store(networks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(networks, tmp_path / "store"))


def flags(**changes: object) -> Namespace:
    given = {
        "value_network": [],
        "value_network_dir": None,
        "state_file": None,
        "uds": None,
        "host": "127.0.0.1",
        "port": 8000,
    }
    return Namespace(**given | changes)


@pytest.fixture
def state_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "state.json"


def remember(file: Path, *names: str, withheld: tuple[str, ...] = ()) -> None:
    networks = tuple(RememberedNetwork(name=n, source=n, version="3f2a91c0") for n in names)
    write_state(file, State(networks=networks, withheld=withheld))


class Start:
    """Chooses and copies the networks of one start, as `server.launch` does."""

    def __init__(self, tmp_path: Path, gigabytes: float = 2.0, **taken: str) -> None:
        self.notes: list[str] = []
        self.taken = taken
        self.settings = Settings(
            networks={},
            key="key",
            tokenizer_fingerprint=tokenizer_fingerprint(make_tokenizer()),
            run_dir=tmp_path / "run",
            value_memory_gb=gigabytes,
        )
        self.memory = Memory(int(gigabytes * GIB), 2, 1, 512)
        self.plan: Plan

    def __call__(self, **given: object) -> Chosen:
        self.plan = plan(flags(**given), self.taken, self.notes)
        return copy_networks(self.plan, self.settings, self.taken, self.memory, self.notes)


def test_at_first_all_sound_networks_of_the_store_are_loaded(
    store: Path, state_file: Path, tmp_path: Path
) -> None:
    start = Start(tmp_path)
    chosen = start(value_network_dir=str(store), state_file=str(state_file))
    assert chosen.sources == {"json": "json", "qa": "qa"}
    assert chosen.networks["qa"].path.parent == tmp_path / "run" / "networks"
    assert check_network(chosen.networks["qa"].path, "qa") == chosen.networks["qa"]
    assert not chosen.unloadable and not start.notes


def test_an_empty_store_is_a_start(state_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    chosen = Start(tmp_path)(value_network_dir=str(tmp_path / "empty"))
    assert not chosen.networks


def test_no_store_is_refused(state_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match="no such directory"):
        Start(tmp_path)(value_network_dir=str(tmp_path / "none"))


def test_after_a_restart_those_are_loaded_that_were(
    store: Path, state_file: Path, tmp_path: Path
) -> None:
    remember(state_file, "qa", withheld=("json",))
    start = Start(tmp_path)
    chosen = start(value_network_dir=str(store), state_file=str(state_file))
    assert chosen.sources == {"qa": "qa"}
    assert start.plan.withheld == ("json",)
    remember(state_file)
    assert not Start(tmp_path)(value_network_dir=str(store), state_file=str(state_file)).networks


def test_a_name_may_come_from_a_folder_of_another(
    store: Path, state_file: Path, tmp_path: Path
) -> None:
    entry = RememberedNetwork(name="answers", source="qa", version="3f2a91c0")
    write_state(state_file, State(networks=(entry,)))
    chosen = Start(tmp_path)(value_network_dir=str(store), state_file=str(state_file))
    assert chosen.sources == {"answers": "qa"}
    assert chosen.networks["answers"].name == "answers"


def test_what_was_removed_or_spoilt_meanwhile_is_told_and_left_out(
    store: Path, state_file: Path, tmp_path: Path
) -> None:
    remember(state_file, "gone", "json", "qa")
    entry = RememberedNetwork(name="answers", source="gone-2", version="3f2a91c0")
    known = read_state(state_file)
    assert known is not None
    write_state(state_file, State(networks=(*known.networks, entry)))
    (store / "json" / "model.safetensors").write_bytes(b"12345678901")
    start = Start(tmp_path)
    chosen = start(value_network_dir=str(store), state_file=str(state_file))
    assert list(chosen.networks) == ["qa"]
    assert "no such folder" in chosen.unloadable["gone"]
    assert "truncated" in chosen.unloadable["json"]
    assert "no such folder" in chosen.unloadable["answers"]
    assert chosen.sources["answers"] == "gone-2", "it would be tried again from another folder"
    assert [note.startswith("Not loaded: value network") for note in start.notes] == [True] * 3


def test_what_cannot_steer_the_target_is_told_and_not_copied(
    store: Path, state_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_network(store / "other", **SMALL, tokenizer=make_tokenizer(OTHER_TEXT, 400))
    copied: list[str] = []

    def recorded(folder: Path, name: str, *rest: Any) -> NetworkFolder:
        copied.append(name)
        return snapshot(folder, name, *rest)

    monkeypatch.setattr(initial, "snapshot", recorded)
    chosen = Start(tmp_path)(value_network_dir=str(store), state_file=str(state_file))
    assert list(chosen.networks) == copied == ["json", "qa"]
    assert "trimtab align" in chosen.unloadable["other"]


def test_a_copy_of_what_cannot_steer_the_target_is_deleted(
    store: Path, state_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(network: NetworkFolder, target_fingerprint: str) -> None:
        if network.name == "qa" and network.path.is_relative_to(tmp_path / "run"):
            raise NetworkError("it was replaced meanwhile")

    monkeypatch.setattr(initial, "check_servable", changed)
    chosen = Start(tmp_path)(value_network_dir=str(store), state_file=str(state_file))
    assert chosen.unloadable == {"qa": "it was replaced meanwhile"}
    copies = (tmp_path / "run" / "networks").iterdir()
    assert [copy.name.partition("@")[0] for copy in copies] == ["json"]


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 9}', "[]"])
def test_a_state_file_that_is_not_one_is_kept_and_passed_over(
    store: Path, state_file: Path, tmp_path: Path, content: str
) -> None:
    state_file.write_text(content)
    start = Start(tmp_path)
    chosen = start(value_network_dir=str(store), state_file=str(state_file))
    assert list(chosen.networks) == ["json", "qa"]
    assert len(start.notes) == 1 and "not usable" in start.notes[0]
    assert state_file.with_name("state.json.corrupt").read_text() == content


def test_a_state_file_that_cannot_be_read_is_passed_over(
    store: Path, state_file: Path, tmp_path: Path
) -> None:
    state_file.mkdir()
    start = Start(tmp_path)
    assert start(value_network_dir=str(store), state_file=str(state_file)).networks
    assert "cannot be read" in start.notes[0]


def test_a_state_file_needs_a_store(state_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="--value-network-dir"):
        Start(tmp_path)(state_file=str(state_file))


def test_each_store_and_address_has_a_state_file_of_its_own(
    store: Path, state_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "alias").symlink_to(store)
    (tmp_path / "other").mkdir()

    def chosen(directory: str, **where: object) -> Path | None:
        return plan(flags(value_network_dir=str(tmp_path / directory), **where), {}, []).state_file

    usual = chosen("store")
    assert usual is not None and usual.parent == tmp_path / "home" / "trimtab"
    assert chosen("alias") == usual
    others = [chosen("other"), chosen("store", port=8001), chosen("store", uds="a"), usual]
    assert len(set(others)) == 4


def test_without_a_home_nothing_is_remembered(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    start = Start(tmp_path)
    assert start(value_network_dir=str(store)).networks
    assert start.plan.state_file is None and "--state-file" in start.notes[0]


def test_flags_come_before_the_store(store: Path, state_file: Path, tmp_path: Path) -> None:
    remember(state_file, "json", "qa", withheld=("qa", "x"))
    make_network(tmp_path / "mine", **SMALL, seed=9)
    start = Start(tmp_path)
    chosen = start(
        value_network=[f"qa={tmp_path / 'mine'}"],
        value_network_dir=str(store),
        state_file=str(state_file),
    )
    assert list(chosen.networks) == ["qa", "json"]
    assert chosen.sources == {"json": "json"}
    assert chosen.networks["qa"].version == check_network(tmp_path / "mine").version
    assert start.plan.withheld == ("x",)
    assert "--value-network qa is served" in start.notes[0]


def test_a_bad_network_of_a_flag_is_refused(store: Path, state_file: Path, tmp_path: Path) -> None:
    manifest = store / "qa" / "value_network.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "cascade"}))
    with pytest.raises(NetworkError, match="'cascade' cannot be served"):
        Start(tmp_path)(value_network=[f"qa={store / 'qa'}"])


def test_names_of_others_are_not_networks(store: Path, state_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="'qa' is the target's too"):
        Start(tmp_path, qa="the target's")(value_network=[f"qa={store / 'qa'}"])
    chosen = Start(tmp_path, qa="the target's")(value_network_dir=str(store))
    assert list(chosen.networks) == ["json"]
    assert "the target's too" in chosen.unloadable["qa"]


def test_what_does_not_fit_is_left_for_later(store: Path, state_file: Path, tmp_path: Path) -> None:
    make_network(store / "large", hidden_size=512, layers=2)
    facts = check_network(store / "large", with_version=False)
    gigabytes = facts.num_parameters * 2 / GIB
    start = Start(tmp_path, gigabytes)
    chosen = start(value_network_dir=str(store), state_file=str(state_file))
    assert list(chosen.networks) == ["json", "qa"]
    assert "'large' needs about" in chosen.unloadable["large"]
    assert "'large' needs about" in start.notes[0] and "--value-memory-gb" in start.notes[0]
    with pytest.raises(NoRoom, match="'large' needs about"):
        Start(tmp_path, gigabytes)(value_network=[f"large={store / 'large'}"])


def test_networks_of_one_shape_share_a_cache(networks: Path) -> None:
    qa = check_network(networks / "qa", with_version=False)
    weights, pool = 2 * qa.num_parameters, (512 + 32) * qa.kv_bytes_per_token
    memory = Memory(2 * weights + pool, 2, 1, 1000)
    memory.check(qa, False)
    memory.add(qa, False)
    memory.check(qa, False)
    memory.add(qa, False)
    with pytest.raises(NoRoom):
        memory.check(qa, False)
    with pytest.raises(NoRoom):
        Memory(weights + pool - 1, 2, 1, 1000).check(qa, False)
    Memory(weights + 2 * pool, 4, 2, 1000).check(qa, False)  # twice the size, on two workers


def test_each_model_takes_its_own(tmp_path: Path) -> None:
    two = {"hidden_size": 32, "heads": 1, "max_position_embeddings": 256}
    shared = check_network(make_contrast(tmp_path / "shared", **two))
    apart = check_network(make_contrast(tmp_path / "apart", **two, antiexpert={"layers": 1}))
    for network, pools in ((shared, 1), (apart, 2)):
        caches = {model.kv_shape: model.kv_bytes_per_token for model in network.models}
        assert len(caches) == pools
        needed = 2 * network.num_parameters + (256 + 32) * sum(caches.values())
        Memory(needed, 2, 1, 1000).check(network, False)
        with pytest.raises(NoRoom):
            Memory(needed - 1, 2, 1, 1000).check(network, False)
    memory = Memory(2 * needed, 2, 1, 1000)
    memory.add(apart, False)
    memory.check(apart, False)


def test_a_short_target_needs_a_short_cache(networks: Path) -> None:
    qa = check_network(networks / "qa", with_version=False)
    room = 2 * qa.num_parameters + (64 + 32) * qa.kv_bytes_per_token
    Memory(room, 2, 1, 64).check(qa, False)
    with pytest.raises(NoRoom):
        Memory(room, 2, 1, 64).check(qa, True)  # whose history may be longer, in its own tokens
    Memory(2 * qa.num_parameters, 2, 1, None).check(qa, False)
