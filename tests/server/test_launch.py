import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from server import run_directory
from server.launch import LaunchError, prepare
from server.settings import ENVIRONMENT_VARIABLE, Settings, key_digest
from server.token_bytes import TokenBytes
from tests.models import (
    OTHER_TEXT,
    make_contrast,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.conftest import SMALL
from value_models.manifest import tokenizer_fingerprint
from value_models.store import NetworkError


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what is set for the processes that vLLM would start, and keep to the test's folder."""
    monkeypatch.setattr(run_directory, "SHARED_MEMORY", tmp_path)
    with mock.patch.dict(os.environ, XDG_STATE_HOME=str(tmp_path / "state")):
        for variable in (ENVIRONMENT_VARIABLE, "VLLM_API_KEY", "TRIMTAB_ADMIN_API_KEY"):
            os.environ.pop(variable, None)
        yield


@pytest.fixture
def target(checkpoints: Path) -> str:
    return str(checkpoints / "target")


@pytest.fixture
def qa(checkpoints: Path) -> str:
    return f"qa={checkpoints / 'networks' / 'qa'}"


def refusal(*arguments: object) -> str:
    with pytest.raises((LaunchError, NetworkError)) as refused:
        prepare([str(argument) for argument in arguments])
    assert ENVIRONMENT_VARIABLE not in os.environ
    return str(refused.value)


def test_networks_are_named_or_found_in_a_store(target: str, qa: str, checkpoints: Path) -> None:
    store = checkpoints / "networks"
    _, launched = prepare([target, "--value-network", f"other={store / 'qa'}"])
    assert launched.networks["other"].startswith("other@")
    _, launched = prepare([target, "--value-network-dir", str(store)])
    assert {"qa", "json", "short"} < set(launched.networks)
    _, launched = prepare([target])
    assert launched.networks == {}


def test_settings_reach_vllms_processes(target: str, qa: str) -> None:
    prepare([target, "--value-network", qa, "--value-memory-gb", "0.5", "--max-body-mb", "2"])
    settings = Settings.load()
    assert list(settings.networks) == ["qa"] and settings.networks["qa"].is_absolute()
    assert (settings.value_memory_gb, settings.max_body_bytes) == (0.5, 2 << 20)
    assert (settings.evict_idle, settings.load_on_demand, settings.load_timeout) == (
        False,
        True,
        30,
    )
    assert len(settings.key) == 64 and settings.key not in repr(settings)
    assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["DO_NOT_TRACK"] == "1"


def test_vllm_is_plugged_into_and_its_flags_pass(target: str, qa: str) -> None:
    own = ["--logits-processors", "users.own:Processor"]
    args, launched = prepare([target, "--value-network", qa, "--port=8123", *own])
    assert args.logits_processors[1:] == ["users.own:Processor"]
    assert args.logits_processors[0].startswith("server.worker.")
    assert args.worker_extension_cls.startswith("server.worker.")
    assert (args.model, args.port, launched.target) == (target, 8123, target)
    assert launched.url == "http://127.0.0.1:8123"


def test_defaults_are_safe_and_can_be_changed(target: str) -> None:
    args, _ = prepare([target])
    assert (args.host, args.shutdown_timeout) == ("127.0.0.1", 30)
    args, launched = prepare([target, "--host", "::", "--shutdown_timeout", "5"])
    assert (args.host, args.shutdown_timeout) == ("::", 5)
    assert launched.url == "http://[::1]:8000"


def test_other_plugins_still_load(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    prepare([target])
    assert os.environ["VLLM_PLUGINS"] == "theirs,trimtab"
    monkeypatch.delenv("VLLM_PLUGINS")
    prepare([target])
    plugins = os.environ["VLLM_PLUGINS"].split(",")
    assert "lora_filesystem_resolver" in plugins  # vLLM's own
    assert plugins.count("trimtab") == 1


@pytest.mark.parametrize(
    "flags",
    [
        "--pipeline-parallel-size 2",
        "-pp 2",
        "--pipeline_parallel_size=2",
        "--decode-context-parallel-size 2",
        "--prefill-context-parallel-size 2",
        '--speculative-config {"method":"ngram","num_speculative_tokens":2}',
        "--enable-batch-sharded-sampling",
        "--runner pooling",
        "--worker-extension-cls theirs.Worker",
        "--skip-tokenizer-init",
        "--headless",
        "--grpc",
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(target: str, flags: str) -> None:
    message = refusal(target, *flags.split())
    assert "cannot be honoured" in message and "\n" not in message


@pytest.mark.parametrize("variable", ["VLLM_SERVER_DEV_MODE", "VLLM_USE_RUST_FRONTEND"])
def test_environments_that_cannot_be_honoured_are_refused(
    target: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    assert refusal(target).startswith(f"{variable} cannot be honoured")


@pytest.mark.parametrize("wanted", ["0", "1", None])
def test_which_model_runner_is_vllms_or_the_users_choice(
    target: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if wanted is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", wanted)
    prepare([target])
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == wanted


def test_a_flag_in_a_configuration_file_is_refused_too(target: str, tmp_path: Path) -> None:
    (tmp_path / "vllm.yaml").write_text("pipeline-parallel-size: 2\n")
    assert "--pipeline-parallel-size" in refusal(target, "--config", tmp_path / "vllm.yaml")


def test_mistyped_flags_are_refused(target: str) -> None:
    assert "--no-such-flag" in refusal(target, "--no-such-flag")
    assert "--value-memory-gb" in refusal(target, "--value-memory-gb", "much")
    assert "which model?" in refusal()


def test_help_finds_vllms_flags_and_trimtabs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare(["--help=all"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "--max-model-len" in output and "--value-network-dir" in output


def test_networks_that_cannot_be_served_are_refused(
    target: str, checkpoints: Path, tmp_path: Path
) -> None:
    assert "NAME=DIR" in refusal(target, "--value-network", "qa")
    assert "no such folder" in refusal(target, "--value-network", f"qa={tmp_path / 'none'}")
    assert "without a manifest" in refusal(target, "--value-network", f"qa={target}")
    assert "no such directory" in refusal(target, "--value-network-dir", tmp_path / "none")
    make_network(tmp_path / "other", **SMALL, tokenizer=make_tokenizer(OTHER_TEXT, 400))
    assert "trimtab align" in refusal(target, "--value-network", f"qa={tmp_path / 'other'}")


@pytest.mark.parametrize("kind", ["cascade", "cascade+"])
def test_kinds_that_cannot_be_served_are_refused_in_a_line(
    target: str, tmp_path: Path, kind: str
) -> None:
    network = make_network(tmp_path / "network", **SMALL, kind=kind)
    message = refusal(target, "--value-network", f"qa={network}")
    assert f"'{kind}' cannot be served yet" in message and "\n" not in message


def test_networks_of_several_models_are_served(target: str, tmp_path: Path) -> None:
    proxy = make_contrast(tmp_path / "proxy", **SMALL)
    moved = make_network(tmp_path / "moved", **SMALL, reference={"seed": 1})
    _, launched = prepare(
        [target, "--value-network", f"proxy={proxy}", "--value-network", f"moved={moved}"]
    )
    assert re.search(r", contrast, [0-9,]+ parameters in 2 models$", launched.networks["proxy"])
    assert re.search(r", residual, [0-9,]+ parameters in 2 models$", launched.networks["moved"])
    copied = Settings.load().networks["proxy"]
    assert (copied / "antiexpert" / "model.safetensors").is_file()


def test_a_network_of_another_vocabulary_is_served_through_its_map(
    target: str, qa: str, tmp_path: Path
) -> None:
    network = make_mapped_network(
        tmp_path / "other", make_tokenizer(), **SMALL, tokenizer=make_sentencepiece_tokenizer()
    )
    _, launched = prepare([target, "--value-network", qa, "--value-network", f"other={network}"])
    assert launched.networks["other"].endswith("parameters, through a vocabulary map")
    assert launched.networks["qa"].endswith("parameters")
    assert Settings.load().tokenizer_fingerprint == tokenizer_fingerprint(make_tokenizer())


def test_a_map_of_another_tokenizer_than_the_folders_is_refused(
    target: str, tmp_path: Path
) -> None:
    network = make_mapped_network(
        tmp_path / "other", make_tokenizer(), **SMALL, tokenizer=make_sentencepiece_tokenizer()
    )
    make_sentencepiece_tokenizer(size=400).save_pretrained(network)
    message = refusal(target, "--value-network", f"other={network}")
    assert "'other'" in message and "put back the tokenizer" in message


def test_names_are_unique(target: str, qa: str) -> None:
    assert "the target's too" in refusal(
        target, "--served-model-name", "t", "qa", "--value-network", qa
    )
    assert "another value network's too" in refusal(target, *["--value-network", qa] * 2)
    assert "LoRA" in refusal(target, "--value-network", qa, "--lora-modules", "qa=somewhere")


def test_how_networks_come_and_go_can_be_chosen(target: str, checkpoints: Path) -> None:
    store = checkpoints / "networks"
    prepare(
        f"{target} --value-network-dir {store} --evict-idle --no-load-on-demand "
        "--load-timeout 2.5 --state-file state.json".split()
    )
    settings = Settings.load()
    assert (settings.evict_idle, settings.load_on_demand, settings.load_timeout) == (
        True,
        False,
        2.5,
    )
    assert (settings.store, settings.state_file) == (store, Path("state.json").absolute())


@pytest.mark.parametrize(
    "flags",
    [
        "--value-memory-gb 0",
        "--value-memory-gb nan",
        "--load-timeout -1",
        "--max-body-mb 0",
        "--max-networks-per-request 0",
        "--max-networks-per-request 9",
    ],
)
def test_numbers_that_make_no_sense_are_refused(target: str, flags: str) -> None:
    message = refusal(target, *flags.split())
    assert message.startswith(flags.split()[0]) and "\n" not in message


def test_a_server_has_a_private_directory_that_it_holds(target: str, qa: str) -> None:
    _, launched = prepare([target, "--value-network", qa])
    settings = Settings.load()
    assert launched.run_dir == settings.run_dir is not None
    assert settings.run_dir.stat().st_mode & 0o777 == 0o700
    assert settings.networks["qa"].parent == settings.run_dir / "networks"
    with (settings.run_dir / "alive").open() as alive, pytest.raises(BlockingIOError):
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_how_many_networks_a_request_may_combine_can_be_chosen(target: str) -> None:
    prepare([target])
    assert Settings.load().max_networks == 4
    prepare([target, "--max-networks-per-request", "2"])
    assert Settings.load().max_networks == 2


def test_what_the_targets_tokens_spell_is_written_down(target: str) -> None:
    prepare([target])
    settings = Settings.load()
    assert settings.run_dir is not None
    assert settings.token_bytes == settings.run_dir / "token-bytes"
    ids = make_tokenizer()("Ana Kovac, 東京")["input_ids"]
    assert TokenBytes.load(settings.token_bytes).text(ids) == "Ana Kovac, 東京".encode()


def test_a_target_whose_tokens_spell_nothing_known_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="b")
    prepare([str(make_model(tmp_path / "words", vocab_size=64, tokenizer=tokenizer))])
    settings = Settings.load()
    assert settings.token_bytes is None and settings.run_dir is not None
    assert not (settings.run_dir / "token-bytes").exists()


def test_a_refused_start_leaves_nothing(target: str, tmp_path: Path) -> None:
    network = make_network(tmp_path / "network", **SMALL, kind="cascade")
    refusal(target, "--value-network", f"qa={network}")
    assert not list(tmp_path.glob("trimtab-*"))


@pytest.mark.parametrize("given", ["flag", "environment", "file"])
def test_keys_go_to_settings_as_digests_only(
    target: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [target, "--api-key", "theirs", "others"]
    if given == "flag":
        arguments += ["--admin-api-key", "mine"]
    elif given == "file":
        (tmp_path / "vllm.yaml").write_text("admin-api-key: mine\n")
        arguments += ["--config", str(tmp_path / "vllm.yaml")]
    else:
        monkeypatch.setenv("TRIMTAB_ADMIN_API_KEY", "mine")
    args, launched = prepare(arguments)
    settings = Settings.load()
    assert settings.admin_key_digest == hashlib.sha256(b"mine").hexdigest()
    assert settings.client_key_digests == (key_digest("theirs"), key_digest("others"))
    assert settings.admin_key_digest not in repr(settings)
    assert "mine" not in [str(value) for value in vars(args).values()]
    assert "mine" not in os.environ.values()
    assert "mine" not in launched.model_dump_json()


def test_vllms_own_variable_is_a_clients_key(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert "a client's key too" in refusal(target, "--admin-api-key", "theirs")
    prepare([target])
    assert Settings.load().client_key_digests == (key_digest("theirs"),)
    assert Settings.load().admin_key_digest is None


def test_an_empty_admin_key_is_none(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--admin-api-key is empty" in refusal(target, "--admin-api-key", "")
    monkeypatch.setenv("TRIMTAB_ADMIN_API_KEY", "")
    prepare([target])
    assert Settings.load().admin_key_digest is None


def test_a_target_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "the target's tokenizer: " in refusal(tmp_path)


def test_a_network_may_bring_an_example(target: str, qa: str, tmp_path: Path) -> None:
    for name, example in (("first", ""), ("second", "Who was Ana?")):
        manifest = make_network(tmp_path / name, **SMALL) / "value_network.json"
        fields = json.loads(manifest.read_text()) | {"example": example}
        manifest.write_text(json.dumps(fields))
    _, launched = prepare([target, "--value-network-dir", str(tmp_path)])
    assert (launched.example_model, launched.example) == ("second", "Who was Ana?")
    assert prepare([target, "--value-network", qa])[1].example_model == "qa"
    assert prepare([target, "--served-model-name", "t"])[1].example_model == "t"


def test_a_cpu_is_settled_before_vllm_starts(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cpu.num_cores", lambda: 2)
    for variable in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    args, launched = prepare([target])
    assert args.enforce_eager and "no-such-compiler" in launched.notes[0]
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_a_faster_number_format_is_named(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.precision._multiplies", lambda dtype: dtype == torch.float32)
    for options in ([], ["--dtype", "bfloat16"], ["--dtype", "half"]):
        (note,) = prepare([target, *options])[1].notes
        assert "--dtype float32" in note
    assert not prepare([target, "--dtype", "float32"])[1].notes


def test_the_parent_learns_whether_the_target_chats(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(OTHER_TEXT, 300)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    make_model(tmp_path / "base", tokenizer=tokenizer)
    tokenizer.chat_template = template
    assert not prepare([str(tmp_path / "base")])[1].chats
