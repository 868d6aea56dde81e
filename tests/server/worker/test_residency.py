"""Networks come and go in a real worker while others decode."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vllm import RequestOutput

from tests.models import make_contrast, make_model, make_network
from tests.server.worker.engine import Ask, GuidedEngine, guided_engine
from value_models.store import check_network

CONTEXT = 256


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("residency")
    make_model(root / "target", max_position_embeddings=CONTEXT)
    for seed, name in enumerate(("first", "second", "third"), start=1):
        make_network(root / name, seed=seed, max_position_embeddings=CONTEXT)
    other = {"hidden_size": 96, "heads": 3, "kv_heads": 3, "max_position_embeddings": CONTEXT}
    make_network(root / "mistral", architecture="mistral", seed=4, **other)
    large = {"vocab_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": CONTEXT}
    make_network(root / "tied", layers=1, seed=6, **large)  # most of it is its vocabulary
    make_network(root / "gemma", architecture="gemma", seed=5, max_position_embeddings=CONTEXT)
    make_contrast(root / "contrast", seed=7, max_position_embeddings=CONTEXT)
    # Two models that share nothing: neither a KV shape nor a context.
    mixed = {"heads": 3, "kv_heads": 3, "hidden_size": 96, "max_position_embeddings": 512}
    make_contrast(root / "mixed", seed=8, antiexpert=mixed, max_position_embeddings=CONTEXT)
    # Two that share a pool of their own.
    make_contrast(root / "wide", seed=11, **other)
    small = {"reference": {"seed": 10}, "max_position_embeddings": CONTEXT}
    make_network(root / "referenced", seed=9, **small)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[GuidedEngine]:
    networks = {"stays": root / "first", "other": root / "third"}
    with guided_engine(
        root / "target", networks, value_memory_gb=0.05, max_num_seqs=8, prefix_caching=True
    ) as engine:
        yield engine


def load(engine: GuidedEngine, name: str, folder: Path) -> None:
    for _ in engine.load(name, folder):
        pass


def unload(engine: GuidedEngine, reference: str) -> dict[str, Any]:
    engine.call("retire", reference, False)
    name = reference.partition("@")[0]
    for network in engine.call("networks")["networks"]:
        if network["name"] == name and network["state"] == "draining":
            engine.call("unload", f"{name}@{network['version']}")
    return engine.call("networks")


def asks(seed: int, networks: list[str | None], max_tokens: int = 60) -> list[Ask]:
    rng = random.Random(seed)
    return [
        Ask([rng.randrange(10, 500) for _ in range(rng.randrange(3, 70))], max_tokens, network)
        for network in networks
    ]


def run_while(engine: GuidedEngine, asked: list[Ask], work: Iterator[None]) -> list[RequestOutput]:
    """Decode; before each step, do one piece of `work`, which must end first."""
    llm = engine.llm.llm_engine
    for number, ask in enumerate(asked):
        llm.add_request(f"ask-{number}", {"prompt_token_ids": ask.prompt}, engine.params(ask))
    finished: dict[str, RequestOutput] = {}
    pieces = steps_with_work = 0
    while llm.has_unfinished_requests():
        if next(work, "ended") != "ended":
            pieces += 1
            steps_with_work += bool(len(finished) < len(asked))
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = output
    assert next(work, "ended") == "ended", "the requests ended before the load"
    assert steps_with_work > 5
    return [finished[key] for key in sorted(finished, key=lambda key: int(key.split("-")[1]))]


@pytest.mark.parametrize(
    "folder", ["second", "mistral", "gemma", "tied", "contrast", "mixed", "referenced"]
)
def test_a_load_while_others_decode_changes_none_of_their_tokens(
    engine: GuidedEngine, root: Path, folder: str
) -> None:
    asked = asks(1, ["stays", None, "other", "stays", None])
    work = engine.load("new", root / folder)
    engine.assert_exact(asked, run_while(engine, asked, work))
    after = asks(2, ["new", "stays", None, "new"])
    engine.assert_exact(after, engine.run(after))
    unload(engine, "new")


def test_a_replaced_version_steers_its_requests_to_their_end(
    engine: GuidedEngine, root: Path
) -> None:
    load(engine, "qa", root / "second")
    old = asks(3, ["qa"] * 3, max_tokens=100)
    reference = engine.networks["qa"]
    outputs = run_while(engine, old, engine.load("qa", root / "mistral"))
    versions = {n["version"]: n["state"] for n in networks_named(engine, "qa")}
    assert versions == {
        check_network(root / "second").version: "draining",
        check_network(root / "mistral").version: "ready",
    }
    new, engine.networks["qa"] = engine.networks["qa"], reference
    engine.assert_exact(old, outputs)
    engine.networks["qa"] = new
    after = asks(3, ["qa"] * 3)
    engine.assert_exact(after, engine.run(after))
    unload(engine, "qa")


def networks_named(engine: GuidedEngine, name: str) -> list[dict[str, Any]]:
    return [n for n in engine.call("networks")["networks"] if n["name"] == name]


def test_blocks_never_cross_loads_of_one_name(engine: GuidedEngine, root: Path) -> None:
    prompt = list(range(20, 180))
    for folder in ("second", "third", "second"):
        load(engine, "qa", root / folder)
        again = [Ask(prompt, 20, "qa"), Ask(prompt, 20, "qa")]
        for ask in again:
            engine.assert_exact([ask], engine.run([ask]))
        assert networks_named(engine, "qa")[-1]["prefix_hits"] > 0
        unload(engine, "qa")


def test_memory_comes_back(engine: GuidedEngine, root: Path) -> None:
    before = engine.call("networks")["memory"]
    for folder in ("second", "mistral", "gemma", "contrast", "wide", "mixed", "referenced"):
        load(engine, "qa", root / folder)
        during = engine.call("networks")["memory"]
        assert during["weights_bytes"] > before["weights_bytes"]
        engine.run(asks(5, ["qa", "stays"], max_tokens=5))
        after = unload(engine, "qa")
        assert after["memory"] == before
        assert not networks_named(engine, "qa")


def of_size(folder: Path, num_parameters: int) -> list[dict[str, Any]]:
    """What a load says of its models, who claim to be so large together."""
    fields = ("role", "num_parameters", "kv_shape", "vocab_size", "max_context")
    models = check_network(folder).models
    described = [{field: getattr(model, field) for field in fields} for model in models]
    rest = sum(model.num_parameters for model in models[1:])
    return [described[0] | {"num_parameters": num_parameters - rest}, *described[1:]]


def test_what_does_not_fit_is_refused_before_it_is_read(engine: GuidedEngine, root: Path) -> None:
    before = engine.call("networks")
    refused = engine.begin("big", root / "second", models=of_size(root / "second", 10**9))
    assert refused["refused"] == "memory"
    assert refused["needed"] >= 4 * 10**9 > refused["total"] > refused["free"] > 0
    assert engine.call("networks") == before


def test_a_load_reserves_its_memory_at_once(engine: GuidedEngine, root: Path) -> None:
    free = engine.call("networks")["memory"]["free_bytes"]
    large = {"models": of_size(root / "contrast", int(0.7 * free / 4))}
    assert "refused" not in engine.begin("a", root / "contrast", **large)
    assert engine.begin("b", root / "contrast", **large)["refused"] == "memory"
    # One that supersedes it has its memory too.
    assert "refused" not in engine.begin("a", root / "contrast", **large, id="a2")
    engine.call("abort", "a2", "", True)
    assert engine.call("networks")["memory"]["free_bytes"] == free


@pytest.mark.parametrize("folder", ["contrast", "mixed", "referenced"])
def test_a_promise_covers_what_all_models_take(
    engine: GuidedEngine, root: Path, folder: str
) -> None:
    free = engine.call("networks")["memory"]["free_bytes"]
    promised = free - engine.begin("qa", root / folder)["memory"]["free_bytes"]
    weights = 4 * check_network(root / folder).num_parameters
    pool = 4 * 2 * 2 * 3 * 32 * (CONTEXT + 32)  # K and V, layers, heads, head size, tokens
    assert promised == weights + (pool if folder == "mixed" else 0)
    load(engine, "qa", root / folder)
    (network,) = networks_named(engine, "qa")
    assert weights <= network["weights_bytes"] <= 1.2 * weights
    assert network["max_context"] == CONTEXT
    assert unload(engine, "qa")["memory"]["free_bytes"] == free


def test_a_second_load_of_a_name_waits_or_supersedes(engine: GuidedEngine, root: Path) -> None:
    engine.begin("qa", root / "second", id="one")
    assert engine.begin("qa", root / "third", id="two", supersede=False)["refused"] == "loading"
    version = check_network(root / "second").version
    engine.call("build", "one", version, str(root / "second"), False)
    engine.call("advance", "one")
    engine.begin("qa", root / "third", id="two")
    assert engine.call("advance", "one")["state"] == "gone"
    assert [load["id"] for load in engine.call("networks")["loads"]] == ["two"]
    engine.call("retire", "qa", False)
    assert engine.call("networks")["loads"] == []
    assert engine.call("build", "two", version, str(root / "third"), False)["state"] == "gone"
    assert "qa" not in engine.status()


@pytest.mark.parametrize("folder", ["mistral", "wide"])
def test_what_a_superseded_load_held_comes_back(
    engine: GuidedEngine, root: Path, folder: str
) -> None:
    """Its pool too, which nobody else can use."""
    before = engine.call("networks")["memory"]
    engine.begin("qa", root / folder, id="one")
    version = check_network(root / folder).version
    engine.call("build", "one", version, str(root / folder), False)
    while engine.call("advance", "one")["state"] != "built":
        pass
    engine.call("warm_up", "one")
    assert engine.call("networks")["memory"]["kv_cache_bytes"] > before["kv_cache_bytes"]
    everything = of_size(root / "second", before["free_bytes"] // 4)
    assert "refused" not in engine.begin("qa", root / "second", id="two", models=everything)
    assert engine.call("networks")["memory"]["kv_cache_bytes"] == before["kv_cache_bytes"]
    engine.call("abort", "one", "superseded", True)
    engine.call("abort", "two", "", True)
    assert engine.call("networks")["memory"] == before


def test_a_load_that_ends_between_its_models_frees_the_first(
    engine: GuidedEngine, root: Path
) -> None:
    version = check_network(root / "contrast").version
    engine.begin("qa", root / "contrast")
    engine.call("build", "qa", version, str(root / "contrast"), False)
    while engine.llm.collective_rpc(models_built, args=("qa",)) != [1]:
        assert engine.call("advance", "qa")["state"] == "building"
    engine.llm.collective_rpc(remember_first_model, args=("qa",))
    engine.call("abort", "qa", "a test said so", True)
    assert engine.llm.collective_rpc(remembered_bytes) == [0]


def models_built(worker: Any, name: str) -> int:
    return len(models_of(worker, name))


def remember_first_model(worker: Any, name: str) -> None:
    worker.remembered = models_of(worker, name)["expert"]._model


def models_of(worker: Any, name: str) -> dict[str, Any]:
    """The models of a network that is being built: a local of the generator that builds it."""
    pieces = worker._processor().steering.residency._loads[name].pieces
    frame = pieces.gi_yieldfrom and pieces.gi_yieldfrom.gi_frame
    return frame.f_locals.get("models", {}) if frame else {}


def remembered_bytes(worker: Any) -> int:
    return sum(parameter.nbytes for parameter in worker.remembered.parameters())


def test_only_weights_that_the_index_lists_are_loaded(
    engine: GuidedEngine, root: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(root / "second", tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "listed.safetensors", metadata={"format": "pt"})
    other = {name: tensor + 1 for name, tensor in weights.items()}
    save_file(other, folder / "unlisted.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "listed.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load(engine, "qa", folder)
    asked = asks(9, ["qa", None], max_tokens=10)
    engine.networks["qa"] = engine.load_reference(root / "second")
    engine.assert_exact(asked, engine.run(asked))
    unload(engine, "qa")


def test_a_version_can_be_built_anew(engine: GuidedEngine, root: Path) -> None:
    """It has failed in another engine, and is to be sound in all."""
    load(engine, "qa", root / "second")
    before = networks_named(engine, "qa")[0]
    engine.begin("qa", root / "second")
    build = ("build", "qa", before["version"], str(root / "second"), True)
    assert engine.call(*build)["state"] == "building"
    while engine.call("advance", "qa")["state"] != "built":
        pass
    while engine.call("warm_up", "qa")["state"] != "prepared":
        pass
    engine.call("commit", "qa")
    (after,) = networks_named(engine, "qa")
    assert after["order"] > before["order"] and after["state"] == "ready"
    again = asks(7, ["qa"], max_tokens=10)
    engine.assert_exact(again, engine.run(again))
    unload(engine, "qa")


def test_a_version_that_is_resident_is_not_loaded_again(engine: GuidedEngine, root: Path) -> None:
    load(engine, "qa", root / "second")
    before = networks_named(engine, "qa")[0]
    engine.call("retire", "qa", True)
    assert networks_named(engine, "qa")[0]["state"] == "draining"
    assert "qa" in engine.call("networks")["withheld"]
    engine.begin("qa", root / "second")
    assert engine.call("build", "qa", before["version"], "nowhere", False)["state"] == "ready"
    engine.call("commit", "qa")
    (after,) = networks_named(engine, "qa")
    assert after["state"] == "ready" and after["loaded_at"] == before["loaded_at"]
    assert "qa" not in engine.call("networks")["withheld"]
    unload(engine, "qa")


def spoil(folder: Path, kind: str) -> None:
    """Damage a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    if kind == "missing":
        del weights["model.layers.0.mlp.up_proj.weight"]
    elif kind == "foreign":
        weights["model.layers.0.mlp.other.weight"] = weights["model.norm.weight"].clone()
    elif kind == "shape":
        weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    elif kind == "huge":
        config = (folder / "config.json").read_text()
        size = '"intermediate_size": '
        head, _, tail = config.partition(size)
        rest = tail[tail.index(",") :]
        (folder / "config.json").write_text(f"{head}{size}{10**9}{rest}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["missing", "foreign", "shape", "huge"])
@pytest.mark.parametrize("folder", ["second", "contrast", "referenced"])
def test_a_load_that_fails_leaves_the_old_version_and_all_memory(
    engine: GuidedEngine, root: Path, tmp_path: Path, folder: str, kind: str
) -> None:
    """Whichever of its models is at fault."""
    before = engine.call("networks")["memory"]
    bad = shutil.copytree(root / folder, tmp_path / "bad")
    spoil(bad / {"contrast": "antiexpert", "referenced": "reference"}.get(folder, ""), kind)
    engine.begin("stays", bad)
    state = engine.call("build", "stays", "0bad0bad", str(bad), False)["state"]
    while state == "building":
        reply = engine.call("advance", "stays")
        state = reply["state"]
    assert state == "failed" and reply["reason"]
    (failed,) = engine.call("networks")["loads"]
    assert (failed["name"], failed["state"]) == ("stays", "failed")
    assert engine.call("networks")["memory"] == before
    assert engine.status()["stays"]["state"] == "ready"
    again = asks(6, ["stays", None], max_tokens=10)
    engine.assert_exact(again, engine.run(again))
    engine.call("abort", "stays", "", True)


def test_a_network_that_failed_can_be_loaded_again(engine: GuidedEngine, root: Path) -> None:
    load(engine, "qa", root / "second")
    engine.llm.collective_rpc(fail, args=("qa",))
    assert engine.status()["qa"]["state"] == "failed"
    load(engine, "qa", root / "second")
    (network,) = networks_named(engine, "qa")
    assert network["state"] == "ready"
    again = asks(7, ["qa"], max_tokens=10)
    engine.assert_exact(again, engine.run(again))
    unload(engine, "qa")


def fail(worker: Any, name: str) -> None:
    guidance = worker._processor().steering.guidance
    network = next(n for n in guidance.residency.networks() if n.folder.name == name)
    guidance.fail("a test said so", network)


def test_a_row_whose_version_is_gone_ends_and_nothing_else(
    engine: GuidedEngine, root: Path
) -> None:
    """A client's process has died with its lease: its row may still be in the batch."""
    load(engine, "qa", root / "second")

    def go() -> Iterator[None]:
        yield from [None] * 8
        unload(engine, "qa")
        yield

    asked = asks(8, ["qa", "stays", None], max_tokens=50)
    gone, *others = run_while(engine, asked, go())
    assert gone.outputs[0].stop_reason == engine.failure_token_id
    engine.assert_exact(asked[1:], others)


def test_a_load_is_not_ready_before_it_was_tried(engine: GuidedEngine, root: Path) -> None:
    """vLLM #8559: the first request after a load was slow, since nothing was warmed up."""
    version = check_network(root / "mistral").version
    engine.begin("qa", root / "mistral")
    engine.call("commit", "qa")
    engine.call("build", "qa", version, str(root / "mistral"), False)
    while engine.call("advance", "qa")["state"] != "built":
        engine.call("commit", "qa")
        assert not networks_named(engine, "qa")
    engine.call("commit", "qa")
    assert engine.llm.collective_rpc(tokens_run, args=("qa",)) == [0]
    ran = []
    while engine.call("warm_up", "qa")["state"] != "prepared":
        engine.call("commit", "qa")
        ran += engine.llm.collective_rpc(tokens_run, args=("qa",))
        assert not networks_named(engine, "qa")
    assert max(ran) > 0
    engine.call("commit", "qa")
    (network,) = networks_named(engine, "qa")
    assert network["state"] == "ready"
    assert (network["forward_tokens"], network["last_used"]) == (0, None)
    unload(engine, "qa")


def tokens_run(worker: Any, name: str) -> int:
    """Tokens of the longest row that a network has run before it is ready."""
    (model,) = worker._processor().steering.residency._loads[name].network.models.values()
    rows = model._forward._decode_rows if hasattr(model, "_forward") else None
    # They are tried as rows of one token, two, ..., and have one more each once they have run.
    return 0 if rows is None else int(rows.longest) * (rows.longest > len(rows.slots))
