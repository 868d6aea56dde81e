import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import OTHER_TEXT, make_contrast, make_network, make_tokenizer
from value_models.manifest import MANIFEST_FILE, tokenizer_fingerprint
from value_models.store import (
    DirectoryError,
    NetworkError,
    NoSuchNetwork,
    Store,
    check_fits,
    check_network,
    files_that_count,
)
from value_models.vocabulary.align import align_vocabularies
from value_models.vocabulary.tokens import Vocabulary, load_tokenizer

WEIGHTS = "model.safetensors"
COUNTING = (
    MANIFEST_FILE,
    WEIGHTS,
    "config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    return make_network(tmp_path_factory.mktemp("pristine") / "tab", tie_word_embeddings=True)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tab"))


@pytest.fixture(scope="session")
def pristine_contrast(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "proxy"
    small = {"hidden_size": 32, "heads": 1, "layers": 3, "max_position_embeddings": 256}
    return make_contrast(path, vocab_size=576, antiexpert=small)


@pytest.fixture
def contrast(pristine_contrast, tmp_path) -> Path:
    return Path(shutil.copytree(pristine_contrast, tmp_path / "proxy"))


@pytest.fixture(scope="session")
def pristine_referenced(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "moved"
    return make_network(path, reference={"seed": 1, "layers": 1, "max_position_embeddings": 300})


@pytest.fixture
def referenced(pristine_referenced, tmp_path) -> Path:
    return Path(shutil.copytree(pristine_referenced, tmp_path / "moved"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path, name: str | None = None) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(NetworkError) as caught:
        check_network(folder, name)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_sound_network_is_described(folder):
    network = check_network(folder)
    tensors = load_file(folder / WEIGHTS)
    assert network.name == "tab"
    assert network.path == folder.resolve()
    assert network.manifest.kind == "residual"
    assert re.fullmatch("[0-9a-f]{8}", network.version)
    assert network.vocab_size == len(make_tokenizer())
    assert network.max_context == 512
    assert network.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert network.num_bytes == (folder / WEIGHTS).stat().st_size
    assert network.kv_bytes_per_token == 2 * 2 * 2 * 1 * 32  # numbers, bytes, layers, heads, size
    assert network.vocabulary_maps == ()


def test_the_version_follows_the_content_and_nothing_else(folder, tmp_path):
    version = check_network(folder).version
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "README.md").write_text("notes")
    assert check_network(copy, "other").version == version
    for file in (MANIFEST_FILE, "config.json", "tokenizer.json"):
        changed = shutil.copytree(folder, tmp_path / file)
        (changed / file).write_bytes((changed / file).read_bytes() + b"\n")
        assert check_network(changed, "tab").version != version


def test_one_changed_weight_changes_the_version(folder):
    version = check_network(folder).version
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert check_network(folder).version != version


def test_no_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")


def test_a_file_is_no_folder(folder):
    assert "no such folder" in refusal(folder / "config.json", "x")


def test_a_folder_without_a_manifest_is_no_network(folder):
    (folder / MANIFEST_FILE).unlink()
    line = refusal(folder)
    assert str(folder) in line and "a folder without a manifest is no network" in line


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{}", "format_version"),
    ],
)
def test_an_unreadable_manifest(folder, content, named):
    (folder / MANIFEST_FILE).write_bytes(content)
    line = refusal(folder)
    assert MANIFEST_FILE in line and named in line


@pytest.mark.parametrize(
    ("field", "value"),
    [("format_version", 2), ("kind", "magic"), ("default_scale", 9), ("surprise", 1)],
)
def test_an_invalid_manifest_names_the_field(folder, field, value):
    edit_json(folder / MANIFEST_FILE, **{field: value})
    assert field in refusal(folder)


def test_a_manifest_with_a_scale_that_is_no_number(folder):
    text = (
        (folder / MANIFEST_FILE).read_text().replace('"default_scale": 1.0', '"default_scale": NaN')
    )
    (folder / MANIFEST_FILE).write_text(text)
    assert "default_scale" in refusal(folder)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "no safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "extra.PT", "a.pth", "b.ckpt", "c.pkl"])
def test_pickled_weights_are_refused_even_beside_safetensors(folder, name):
    (folder / name).write_bytes(b"\x80\x04.")
    assert name in refusal(folder)


def test_pickled_weights_in_a_sub_folder(folder):
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"\x80\x04.")
    assert "consolidated.00.pth" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_weights(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    assert "truncated or corrupt" in refusal(folder)


def test_weights_with_bytes_too_many(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    assert "truncated or corrupt" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_corrupt_headers(folder, header):
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    assert "truncated or corrupt" in refusal(folder)


def test_a_header_that_claims_to_be_huge(folder):
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "truncated or corrupt" in refusal(folder)


def test_weights_without_tensors(folder):
    save_file({}, folder / WEIGHTS)
    assert "no tensors" in refusal(folder)


def test_code_in_the_config_is_refused(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "auto_map" in refusal(folder)


def test_code_in_the_tokenizer_is_refused(folder):
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]})
    assert "auto_map" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_an_unreadable_config(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_a_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("value", [0, -5, "many", None])
def test_a_config_without_a_usable_size(folder, value):
    edit_json(folder / "config.json", max_position_embeddings=value)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("where", ["outside", "tab/inside", "/nowhere/at/all"])
def test_links_are_refused(folder, tmp_path, where):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / where)
    if not where.startswith("/"):
        (tmp_path / where).write_bytes(content)
    assert f"{WEIGHTS} is a link" in refusal(folder)


def test_a_linked_sub_folder_is_refused(folder, tmp_path):
    (tmp_path / "maps").mkdir()
    (folder / "vocabulary_maps").symlink_to(tmp_path / "maps")
    assert "vocabulary_maps is a link" in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "notes"])
def test_a_pipe_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is neither a file nor a folder" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 300}, "vocab_size 300"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"hidden_size": 8192}, "hidden_size 8,192"),
        ({"num_hidden_layers": 80}, "num_hidden_layers 80"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers"),
        ({"num_key_value_heads": 2}, "KV heads * head size 64"),
        ({"head_dim": 4096}, "KV heads * head size 4,096"),
        ({"num_labels": 1 << 40}, "num_labels"),
        ({"num_attention_heads": -1}, "config.json"),
    ],
)
def test_a_config_that_the_weights_belie(folder, change, named):
    edit_json(folder / "config.json", **change)
    line = refusal(folder)
    assert "config.json" in line and named in line


def test_a_manifest_that_names_another_tokenizer_than_the_folders(folder):
    make_tokenizer(OTHER_TEXT, 300).save_pretrained(folder)
    line = refusal(folder)
    assert MANIFEST_FILE in line and "put back the tokenizer" in line


def test_a_folder_without_a_tokenizer_is_a_network(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    assert check_network(folder).vocab_size == 512


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}'])
def test_an_unreadable_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocabulary_maps/a.safetensors"])
def test_a_file_that_is_too_large_to_be_read_is_not_read(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.truncate(300 << 20)
    assert "bytes, more than any network's" in refusal(folder)


def test_without_the_version_neither_weights_nor_tokenizer_are_read(folder):
    whole = check_network(folder)
    make_tokenizer(OTHER_TEXT, 300).save_pretrained(folder)
    quick = check_network(folder, with_version=False)
    assert quick.version == "" and quick.at_version(whole.version) == whole


def test_what_it_needs_for_its_cache_is_told(folder):
    assert check_network(folder).models[0].kv_shape == (2, 1, 32)
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "KV heads * head size 64" in refusal(folder)  # 2 heads of 32, as transformers has it


def shard(folder: Path) -> dict[str, str]:
    """Split the weights in two, with an index; returns its weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    half = len(tensors) // 2
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_sharded_weights(folder):
    whole = check_network(folder)
    shard(folder)
    sharded = check_network(folder)
    assert sharded.num_parameters == whole.num_parameters
    assert sharded.version != whole.version


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_a_truncated_shard_is_named(folder):
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert "model-00002-of-00002.safetensors is truncated" in refusal(folder)


def test_a_shard_without_its_tensor(folder):
    weight_map = shard(folder)
    file = "model-00001-of-00002.safetensors"
    tensor = next(name for name, listed in weight_map.items() if listed == file)
    save_file({"another": torch.zeros(1)}, folder / file)
    assert "lacks the tensor" in refusal(folder)
    assert tensor


def test_shards_without_an_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in refusal(folder)


def test_one_shard_alone(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "is one of several" in refusal(folder)


def test_an_index_that_leads_out_of_the_folder(folder):
    index = {"weight_map": {"a": "../tab/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not there" in refusal(folder)


def test_another_tokenizer_does_not_fit(folder):
    network = check_network(folder)
    check_fits(network, tokenizer_fingerprint(make_tokenizer()))
    with pytest.raises(NetworkError, match=r"another tokenizer .* `trimtab align --value"):
        check_fits(network, "sha256:" + "0" * 64)


def add_map(folder: Path, **changes) -> Path:
    """Put a map to targets of another tokenizer into the folder; returns its file."""
    network = Vocabulary.of(make_tokenizer())
    target = Vocabulary.of(make_tokenizer(OTHER_TEXT))
    built = align_vocabularies(network, target, [OTHER_TEXT])
    return dataclasses.replace(built, **changes).save(folder)


def test_a_map_makes_another_tokenizer_fit(folder):
    plain = check_network(folder)
    target = tokenizer_fingerprint(make_tokenizer(OTHER_TEXT))
    file = add_map(folder)
    network = check_network(folder)
    assert network.vocabulary_maps == (target,)
    check_fits(network, target)
    check_fits(network, network.manifest.tokenizer_fingerprint)
    with pytest.raises(NetworkError, match="another tokenizer"):
        check_fits(network, "sha256:" + "0" * 64)
    assert network.num_parameters == plain.num_parameters
    assert network.version != plain.version
    file.unlink()
    assert check_network(folder).version == plain.version


def test_the_version_follows_the_maps(folder):
    add_map(folder)
    version = check_network(folder).version
    add_map(folder, report={})
    assert check_network(folder).version != version


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_map(folder, kept):
    file = add_map(folder)
    file.write_bytes(file.read_bytes()[:kept])
    line = refusal(folder)
    assert file.name in line and "trimtab align" in line


def test_a_map_of_another_network(folder):
    add_map(folder, value_fingerprint="sha256:" + "0" * 64)
    assert "another network's tokenizer" in refusal(folder)


def test_a_map_under_another_name(folder):
    file = add_map(folder)
    file.rename(file.with_name("a.safetensors"))
    assert "not named for its target" in refusal(folder)


def test_a_map_to_more_than_the_network_has_logits_for(folder):
    add_map(folder, num_value_ids=2000, value_prefix=(1999,))
    assert "no logits for" in refusal(folder)


def test_a_pickled_map(folder):
    file = add_map(folder)
    file.with_suffix(".pt").write_bytes(b"\x80\x04.")
    assert "looks like pickled" in refusal(folder)


def test_a_map_that_leads_out_of_the_folder(folder, tmp_path):
    file = add_map(folder)
    file.symlink_to(file.rename(tmp_path / "outside.safetensors"))
    assert "is a link" in refusal(folder)


def test_a_kind_that_cannot_be_served_does_not_fit(folder):
    edit_json(folder / MANIFEST_FILE, kind="cascade")
    network = check_network(folder)
    with pytest.raises(NetworkError, match="'cascade' cannot be served"):
        check_fits(network, network.manifest.tokenizer_fingerprint)


def test_a_store_lists_only_folders_with_a_manifest(folder):
    store = folder.parent
    (store / "notes").mkdir()
    (store / "file").write_text("")
    (store / ".hidden").mkdir()
    (store / ".hidden" / MANIFEST_FILE).write_text("{}")
    assert Store(store).names() == ["tab"]
    assert Store(store).check("tab").name == "tab"


@pytest.mark.parametrize("name", ["", ".", "..", "../tab", "a/b", "/etc", "-x", "a" * 65, "tab\n"])
def test_names_cannot_lead_out_of_the_store(folder, name):
    with pytest.raises(NetworkError, match="no name for a value network"):
        Store(folder.parent).check(name)


def test_a_name_may_be_a_link_within_the_store_only(folder, tmp_path):
    store = Store(folder.parent)
    (store.directory / "alias").symlink_to("tab")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.copytree(folder, outside)
    (store.directory / "out").symlink_to(outside)
    (store.directory / "loop").symlink_to("loop")
    assert store.names() == ["alias", "tab"]
    assert store.check("alias").path == folder
    with pytest.raises(NetworkError, match="a link out of the directory"):
        store.check("out")
    with pytest.raises(NetworkError, match="symbolic links"):
        store.check("loop")


def test_what_is_not_there_is_told_from_what_is_bad(folder):
    store = Store(folder.parent)
    with pytest.raises(NoSuchNetwork, match="no such folder"):
        store.check("nothing")
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(NetworkError) as caught:
        store.check("tab")
    assert not isinstance(caught.value, NoSuchNetwork)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(NoSuchNetwork, match="no value_network"):
        store.check("tab")


def test_a_store_needs_a_directory(tmp_path):
    with pytest.raises(DirectoryError, match="no such directory"):
        Store(tmp_path / "nothing")


def test_a_store_that_goes_away(folder, tmp_path):
    store = Store(folder.parent)
    folder.parent.rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(DirectoryError, match="cannot be read"):
        store.names()
    with pytest.raises(DirectoryError, match="no such directory"):
        store.check("tab")


def test_a_tokenizer_that_transformers_adds_tokens_to_is_the_manifests(tmp_path: Path) -> None:
    folder = make_network(tmp_path / "qwen", architecture="qwen2")
    manifest = json.loads((folder / "value_network.json").read_text())
    assert manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(load_tokenizer(folder))
    assert check_network(folder).version


def test_a_contrast_network_is_described(contrast):
    network = check_network(contrast)
    expert, antiexpert = network.models
    assert (expert.role, antiexpert.role) == ("expert", "antiexpert")
    assert (expert.path, antiexpert.path) == (contrast / "expert", contrast / "antiexpert")
    assert (expert.kv_shape, antiexpert.kv_shape) == ((2, 1, 32), (3, 1, 32))
    assert network.vocab_size == min(expert.vocab_size, antiexpert.vocab_size) < 600
    assert network.max_context == antiexpert.max_context == 256 < expert.max_context
    assert network.num_parameters == expert.num_parameters + antiexpert.num_parameters
    assert network.num_bytes == sum(file.stat().st_size for file in contrast.glob(f"*/{WEIGHTS}"))
    assert network.kv_bytes_per_token == 2 * 2 * (2 + 3) * 1 * 32
    assert network.knows_base
    check_fits(network, tokenizer_fingerprint(make_tokenizer()))


def test_a_network_with_a_reference_is_described(referenced):
    network = check_network(referenced)
    value, reference = network.models
    assert (value.role, reference.role) == ("value", "reference")
    assert (value.path, reference.path) == (referenced, referenced / "reference")
    assert network.vocab_size == value.vocab_size
    assert network.max_context == reference.max_context == 300
    assert network.num_parameters == value.num_parameters + reference.num_parameters
    assert network.knows_base


def test_without_a_reference_the_base_is_not_known(folder):
    network = check_network(folder)
    assert [model.role for model in network.models] == ["value"]
    assert not network.knows_base


def test_a_reference_of_fewer_logits_does_not_narrow_the_network(tmp_path):
    folder = make_network(tmp_path / "tab", vocab_size=640, reference={"vocab_size": 512})
    assert check_network(folder).vocab_size == 640


def test_a_renamed_network_has_its_models_there(contrast, tmp_path):
    moved = check_network(contrast).moved(tmp_path / "elsewhere")
    contrast.rename(tmp_path / "elsewhere")
    assert check_network(tmp_path / "elsewhere", "proxy") == moved


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_the_version_covers_all_models(contrast, role, file):
    version = check_network(contrast).version
    if file == WEIGHTS:
        content = bytearray((contrast / role / file).read_bytes())
        content[-1] ^= 1
        (contrast / role / file).write_bytes(content)
    else:
        (contrast / role / file).write_bytes((contrast / role / file).read_bytes() + b"\n")
    assert check_network(contrast).version != version


def test_what_models_are_swapped_is_another_version(contrast):
    version = check_network(contrast).version
    (contrast / "expert").rename(contrast / "other")
    (contrast / "antiexpert").rename(contrast / "expert")
    (contrast / "other").rename(contrast / "antiexpert")
    assert check_network(contrast).version != version


def test_the_version_is_the_one_that_it_always_was(folder):
    """Clients have pinned it: names of files and digests of their contents, sorted."""
    digest = hashlib.sha256()
    for name in sorted(path.name for path in folder.iterdir() if path.name in COUNTING):
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    assert check_network(folder).version == digest.hexdigest()[:8]


def test_files_of_all_models_count(contrast, referenced, folder):
    (contrast / "expert" / "generation_config.json").write_text("{}")
    assert [name for name in files_that_count(contrast) if "/" in name] == [
        "antiexpert/config.json",
        f"antiexpert/{WEIGHTS}",
        "expert/config.json",
        f"expert/{WEIGHTS}",
    ]
    assert f"reference/{WEIGHTS}" in files_that_count(referenced)
    assert not [name for name in files_that_count(folder) if "/" in name]


@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_a_missing_model_is_named(contrast, role):
    shutil.rmtree(contrast / role)
    line = refusal(contrast)
    assert f"no folder {role}/" in line and "trimtab pair" in line
    (contrast / role).write_text("a file")
    assert f"no folder {role}/" in refusal(contrast)


def test_weights_beside_the_manifest_of_a_contrast_network(contrast):
    shutil.copy(contrast / "expert" / WEIGHTS, contrast)
    line = refusal(contrast)
    assert f"{WEIGHTS} lies beside" in line and "expert/ and antiexpert/" in line


def test_a_residual_network_that_calls_itself_a_contrast(folder):
    edit_json(folder / MANIFEST_FILE, kind="contrast")
    assert "no folder expert/" in refusal(folder)


def test_a_reference_that_is_missing(referenced):
    shutil.rmtree(referenced / "reference")
    line = refusal(referenced)
    assert "no folder reference/" in line and "trimtab train" in line


def test_a_reference_that_the_manifest_does_not_name(referenced):
    edit_json(referenced / MANIFEST_FILE, reference=False)
    assert '("reference": true) or remove it' in refusal(referenced)


def test_a_model_that_its_kind_does_not_have(contrast, folder):
    shutil.copytree(contrast / "expert", contrast / "reference")
    assert "a folder reference/" in refusal(contrast)
    shutil.copytree(contrast / "expert", folder / "expert")
    line = refusal(folder)
    assert "a folder expert/" in line and "remove it" in line


def test_a_contrast_network_has_no_reference(contrast):
    edit_json(contrast / MANIFEST_FILE, reference=True)
    assert "only kind 'residual' has a reference" in refusal(contrast)


def spoil_weights(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1])


def ask_for_code(model: Path) -> None:
    edit_json(model / "config.json", auto_map={"AutoConfig": "evil.Config"})


def lie(model: Path) -> None:
    edit_json(model / "config.json", vocab_size=100_000)


def claim_many_layers(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=10**9)


def pickle(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"\x80")


def link_weights(model: Path) -> None:
    (model / WEIGHTS).rename(model.parent / "moved.tensors")
    (model / WEIGHTS).symlink_to(model.parent / "moved.tensors")


def grow_config(model: Path) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(300 << 20)


def drop_config(model: Path) -> None:
    (model / "config.json").unlink()


def drop_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()


def leave_a_shard(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_weights, "truncated or corrupt"),
        (ask_for_code, "asks for code from the checkpoint"),
        (lie, "says vocab_size 100,000, but the weights have"),
        (claim_many_layers, "no usable num_hidden_layers"),
        (pickle, "looks like pickled weights"),
        (link_weights, "is a link"),
        (grow_config, "more than any network's"),
        (drop_config, "no config.json"),
        (drop_weights, "no safetensors weights"),
        (leave_a_shard, "is one of several"),
    ],
)
@pytest.mark.parametrize("role", ["expert", "antiexpert", "reference"])
def test_each_model_is_checked_as_one_alone(contrast, referenced, role, spoil, named):
    folder = referenced if role == "reference" else contrast
    spoil(folder / role)
    line = refusal(folder)
    assert named in line and f"{role}/" in line


def test_a_configuration_beside_the_tokenizer_is_checked_too(contrast):
    shutil.copy(contrast / "expert" / "config.json", contrast)
    check_network(contrast)
    edit_json(contrast / "config.json", num_labels=10**9)
    assert "no usable num_labels" in refusal(contrast)
    (contrast / "config.json").unlink()
    edit_json(contrast / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Tokenizer"})
    assert "asks for code" in refusal(contrast)


def test_another_tokenizer_than_a_contrast_networks_is_refused(contrast):
    make_tokenizer(OTHER_TEXT, 300).save_pretrained(contrast)
    assert "put back the tokenizer" in refusal(contrast)


@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_both_models_have_logits_for_all_tokens(tmp_path, role):
    few = {"vocab_size": len(make_tokenizer()) - 1}
    if role == "expert":
        folder = make_contrast(tmp_path / "proxy", **few, antiexpert={"vocab_size": 600})
    else:
        folder = make_contrast(tmp_path / "proxy", antiexpert=few)
    line = refusal(folder)
    assert f"{role}/" in line and "use models of that tokenizer" in line


def test_a_map_names_ids_that_both_models_have(contrast, tmp_path):
    own = Vocabulary.of(make_tokenizer())
    align_vocabularies(own, own, OTHER_TEXT.splitlines()).save(contrast)
    assert check_network(contrast).vocabulary_maps == (own.fingerprint,)
