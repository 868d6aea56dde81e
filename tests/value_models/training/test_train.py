import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import OTHER_TEXT, make_model, make_tokenizer
from value_models.manifest import tokenizer_fingerprint
from value_models.store import check_fits, check_network
from value_models.training import TrainingError
from value_models.training import train as training
from value_models.training.objective import guided_loss
from value_models.training.train import Settings, add_arguments, main, run, train
from value_models.training.trainer import ValueTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("bases") / "tiny-base", hidden_size=32, heads=1)


@pytest.fixture
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"{number} is a number."},
            ]
        }
        for number in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def settings(base, data, tmp_path) -> Settings:
    return Settings(
        base=str(base),
        data=data,
        out=tmp_path / "tab",
        max_steps=6,
        batch_size=4,
        learning_rate=3e-3,
        norm_weight=0.1,
        dtype="float32",
        save_steps=2,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_training_writes_a_network_that_the_server_takes(settings, base):
    network = train(settings)
    assert network == check_network(settings.out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    check_fits(network, tokenizer_fingerprint(tokenizer))
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(settings.out)) == (
        network.manifest.tokenizer_fingerprint
    )
    AutoModelForCausalLM.from_pretrained(settings.out)
    record = network.manifest.training
    assert network.manifest.base == "tiny-base"
    assert record["steps"] == 6
    assert record["settings"]["norm_weight"] == 0.1
    assert record["data"]["conversations"] == 40
    assert record["data"]["fingerprint"].startswith("sha256:")
    assert set(record["versions"]) == {"torch", "transformers", "accelerate"}
    assert record["metrics"]["demonstrations"]["conversations"] == 40


def test_the_base_is_kept_as_reference(settings, base):
    without = train(replace(settings, out=settings.out.with_name("without")))
    network = train(replace(settings, reference=True))
    assert network == check_network(settings.out)
    assert network.knows_base and not without.knows_base
    assert [model.role for model in network.models] == ["value", "reference"]
    reference = settings.out / "reference"
    assert {file.name for file in reference.iterdir()} == {"config.json", "model.safetensors"}
    assert (reference / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    AutoModelForCausalLM.from_pretrained(reference)
    check_fits(network, without.manifest.tokenizer_fingerprint)
    # The network itself is the one that it would have been without.
    assert all(torch.equal(a, weights(without.path)[n]) for n, a in weights(settings.out).items())
    assert network.manifest.training["settings"] == without.manifest.training["settings"]
    for path in (reference, *reference.iterdir()):
        assert path.stat().st_mode & 0o444 == 0o444


def test_a_base_that_no_server_could_load_is_not_trained_with_a_reference(
    settings, base, tmp_path, monkeypatch
):
    twice = tmp_path / "bases" / "twice"
    shutil.copytree(base, twice)
    shutil.copy(twice / "model.safetensors", twice / "consolidated.safetensors")
    monkeypatch.setattr(training, "load_base", None)
    with pytest.raises(TrainingError, match="cannot be kept as reference: 2 safetensors files"):
        train(replace(settings, base=str(twice), reference=True))


def test_nothing_of_this_machine_is_written(settings, tmp_path):
    train(replace(settings, reference=True))
    for file in settings.out.rglob("*.*"):
        content = file.read_bytes()
        for trace in (str(tmp_path), str(Path.home()), str(settings.data.parent)):
            assert trace.encode() not in content, file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tab"]


def test_the_loss_falls_and_the_base_stays_as_it_was(settings, base, monkeypatch):
    seen = {}

    class Watched(ValueTrainer):
        def train(self, *arguments, **options):
            self.args.logging_steps = self.state.logging_steps = 1
            result = super().train(*arguments, **options)
            seen["base"] = {name: p.cpu() for name, p in self._base.state_dict().items()}
            seen["losses"] = [log["loss"] for log in self.state.log_history if "loss" in log]
            return result

    monkeypatch.setattr(training, "ValueTrainer", Watched)
    train(replace(settings, max_steps=20, norm_weight=0.0))
    assert seen["losses"][-1] < seen["losses"][0]
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    assert all(torch.equal(untouched[name], tensor) for name, tensor in seen["base"].items())
    trained = weights(settings.out)
    assert any(not torch.equal(untouched[name], tensor) for name, tensor in trained.items())


def test_the_base_runs_under_inference_mode_in_every_kind(settings, monkeypatch):
    seen = []

    def watched(base_logits, *arguments, **options):
        seen.append(base_logits.is_inference())
        return guided_loss(base_logits, *arguments, **options)

    monkeypatch.setattr("value_models.training.trainer.guided_loss", watched)
    for kind in ("residual", "cascade", "cascade+"):
        out = settings.out.with_name(kind.replace("+", "-plus"))
        train(replace(settings, kind=kind, out=out, kl_weight=0.1, max_steps=1))
    assert seen == [True] * 3


def test_the_norm_term_makes_the_network_more_silent(settings, base):
    def loudness(norm_weight: float) -> float:
        out = settings.out.with_name(f"norm-{norm_weight}")
        train(replace(settings, out=out, norm_weight=norm_weight, max_steps=15))
        network = AutoModelForCausalLM.from_pretrained(out)
        ids = AutoTokenizer.from_pretrained(out)("What is 7?", return_tensors="pt").input_ids
        return network(ids).logits.abs().mean().item()

    assert loudness(1.0) < loudness(0.0)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_weights(settings, monkeypatch):
    undisturbed = replace(settings, out=settings.out.with_name("undisturbed"))
    train(undisturbed)

    step = ValueTrainer.training_step
    steps = []

    def interrupting(self, *arguments, **options):
        if len(steps) == 5:
            raise Interrupted
        steps.append(self.state.global_step)
        return step(self, *arguments, **options)

    monkeypatch.setattr(ValueTrainer, "training_step", interrupting)
    with pytest.raises(Interrupted):
        train(settings)
    assert not settings.out.exists()

    def counting(self, *arguments, **options):
        steps.append(self.state.global_step)
        return step(self, *arguments, **options)

    monkeypatch.setattr(ValueTrainer, "training_step", counting)
    # Killed while it wrote a checkpoint: that one must not be resumed from.
    (settings.out.with_name("tab.training") / "checkpoint-5").mkdir()
    train(settings)
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    resumed, expected = weights(settings.out), weights(undisturbed.out)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_other_settings_do_not_take_over_an_interrupted_run(settings, monkeypatch):
    def interrupting(self, *arguments, **options):
        raise Interrupted

    monkeypatch.setattr(ValueTrainer, "training_step", interrupting)
    with pytest.raises(Interrupted):
        train(settings)
    with pytest.raises(TrainingError, match="other settings or data"):
        train(replace(settings, learning_rate=1.0))
    settings.data.write_text(settings.data.read_text() * 2)
    with pytest.raises(TrainingError, match="other settings or data"):
        train(settings)


def test_a_finished_network_is_never_overwritten(settings):
    settings.out.mkdir()
    with pytest.raises(TrainingError, match="already there"):
        train(settings)


def test_a_start_from_another_family_is_refused(settings, tmp_path):
    other = make_model(tmp_path / "other", tokenizer=make_tokenizer(OTHER_TEXT))
    with pytest.raises(TrainingError, match="different tokenizers"):
        train(replace(settings, start=str(other)))


def test_a_smaller_start_of_the_same_family(settings, tmp_path):
    start = make_model(tmp_path / "start", hidden_size=32, heads=1, layers=1)
    network = train(replace(settings, start=str(start), max_steps=2))
    assert network.manifest.training["settings"]["start"] == "start"
    assert json.loads((settings.out / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_base_of_another_architecture(settings, tmp_path):
    base = make_model(tmp_path / "qwen", architecture="qwen2", hidden_size=32, heads=1, layers=1)
    network = train(replace(settings, base=str(base), max_steps=2))
    assert network.manifest.base == "qwen"


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_small_models_of_any_architecture_become_networks(settings, tmp_path, architecture, more):
    shape = {"hidden_size": 32, "heads": 1, "layers": 1, "architecture": architecture}
    base = make_model(tmp_path / "base", **shape | more)
    network = train(replace(settings, base=str(base), packing=True, max_steps=2))
    assert network.manifest.kind == "residual"
    assert network.num_parameters == check_parameters(base)
    AutoModelForCausalLM.from_pretrained(settings.out)


def check_parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in weights(folder).values())


@pytest.mark.parametrize("kind", ["residual", "cascade", "cascade+"])
def test_every_kind_learns(settings, tmp_path, kind):
    # Of two paddings: the network's vocabulary is wider than the base's.
    start = make_model(tmp_path / "start", hidden_size=32, heads=1, vocab_size=544)
    network = train(
        replace(settings, kind=kind, start=str(start), max_steps=60, learning_rate=1e-2)
    )
    assert network.manifest.kind == kind
    metrics = network.manifest.training["metrics"]["demonstrations"]
    assert metrics["guided_accuracy"] > 0.4 > 0.1 > metrics["base_accuracy"]


def test_from_scratch_is_recorded(settings):
    network = train(replace(settings, from_scratch=True, max_steps=1))
    assert network.manifest.training["settings"]["from_scratch"] is True


@pytest.mark.parametrize(
    "change",
    [{"norm": "l2"}, {"kl_weight": 5.0}, {"objective": "chi2", "beta": 5.0}, {"norm_weight": 1.0}],
)
def test_each_dial_of_the_objective_changes_the_weights(settings, change):
    train(settings)
    other = replace(settings, out=settings.out.with_name("other"), **change)
    train(other)
    assert not all(
        torch.equal(tensor, weights(settings.out)[name])
        for name, tensor in weights(other.out).items()
    )


def test_gradient_checkpointing_changes_memory_only(settings):
    for kind in ("residual", "cascade+"):
        outs = [settings.out.with_name(f"{kind[:4]}-{on}") for on in (False, True)]
        for on, out in enumerate(outs):
            train(replace(settings, kind=kind, out=out, gradient_checkpointing=bool(on)))
        plain, checkpointed = map(weights, outs)
        for name, tensor in plain.items():
            torch.testing.assert_close(checkpointed[name], tensor)


def test_what_is_held_out_is_measured_and_not_trained_on(settings, data, tmp_path, monkeypatch):
    seen = []

    class Watched(ValueTrainer):
        def compute_loss(self, model, inputs, **options):
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                seen.append(tuple(row[mask.bool()].tolist()))
            return super().compute_loss(model, inputs, **options)

    monkeypatch.setattr(training, "ValueTrainer", Watched)
    logs = tmp_path / "logs"
    network = train(
        replace(settings, held_out_share=0.2, held_out_steps=3, log_dir=logs, max_steps=40)
    )
    record = network.manifest.training
    assert record["held_out"] == {"share": 0.2, "examples": 8}
    assert record["metrics"]["held_out"]["conversations"] == 8
    assert record["metrics"]["demonstrations"]["conversations"] == 32
    assert len(set(seen)) == 32

    scalars = read_scalars(logs)
    for tag in ("loss", "cross_entropy", "value_norm", "kl_from_base"):
        assert list(scalars[f"train/{tag}"]) == [20, 40]
    assert list(scalars["eval/guided_accuracy"]) == [*range(3, 40, 3), 40]
    assert scalars["eval/base_accuracy"][3] == scalars["eval/base_accuracy"][39]
    assert scalars["train/cross_entropy"][40] < scalars["train/cross_entropy"][20]


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    (file,) = folder.iterdir()
    content = file.read_bytes()
    scalars: dict[str, dict[int, float]] = {}
    while content:
        # A TFRecord: its length, a checksum of that, the data, a checksum of those.
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_a_file_to_hold_out(settings, data, tmp_path):
    other = tmp_path / "held-out.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    record = train(replace(settings, held_out=other, max_steps=1)).manifest.training
    assert record["held_out"]["file"] == "held-out.jsonl"
    assert record["metrics"]["held_out"]["conversations"] == 3


def test_measuring_leaves_no_trace_in_the_weights(settings, tmp_path):
    other = tmp_path / "held-out.jsonl"
    other.write_text(settings.data.read_text())
    train(settings)
    measured = replace(settings, out=settings.out.with_name("m"), held_out=other, held_out_steps=1)
    train(measured)
    for name, tensor in weights(settings.out).items():
        assert torch.equal(weights(measured.out)[name], tensor)


def test_packing_puts_conversations_together(settings, capsys):
    train(replace(settings, packing=True, max_length=128, max_steps=1))
    assert "packed into " in capsys.readouterr().err


def test_two_processes_train_one_network(settings):
    """As `accelerate launch` runs it on several GPUs; here on CPUs."""
    arguments = ["--base", settings.base, "--data", settings.data, "--out", settings.out]
    options = ["--max-steps", "3", "--held-out-share", "0.1", "--kind", "cascade+"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "value_models.training", *map(str, arguments), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    record = check_network(settings.out).manifest.training
    assert record["processes"] == 2
    assert record["metrics"]["held_out"]["conversations"] == 4
    assert record["metrics"]["demonstrations"]["conversations"] == 36


def test_a_default_scale_is_kept_for_the_server(settings):
    network = train(replace(settings, max_steps=1, default_scale=1.5))
    assert network.manifest.default_scale == 1.5


@pytest.mark.parametrize("scale", [8.5, -9.0, float("nan"), float("inf")])
def test_a_default_scale_out_of_bounds_is_refused_before_training(settings, scale):
    with pytest.raises(TrainingError, match="default scale"):
        train(replace(settings, default_scale=scale))


def test_weights_are_stored_in_bfloat16_by_default(settings):
    train(replace(settings, dtype=Settings.dtype, max_steps=1))
    assert {tensor.dtype for tensor in weights(settings.out).values()} == {torch.bfloat16}


def test_a_base_that_is_not_there(settings, tmp_path, capsys):
    with pytest.raises(TrainingError, match="tokenizer"):
        train(replace(settings, base=str(tmp_path / "nothing")))


def test_the_command(settings, capsys):
    arguments = ["--base", settings.base, "--data", str(settings.data), "--out", str(settings.out)]
    assert run([*arguments, "--max-steps", "1", "--description", "counts"]) == 0
    assert "--value-network tab=" in capsys.readouterr().out
    assert check_network(settings.out).manifest.description == "counts"
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("trimtab train: ") and error.count("\n") == 1


def test_the_command_names_a_bad_line(settings, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--base", settings.base, "--data", str(bad), "--out", str(settings.out)]
    assert main(parser.parse_args(arguments)) == 1
    assert f"{bad}:1: " in capsys.readouterr().err
    bad.write_text(settings.data.read_text())
    assert main(parser.parse_args([*arguments, "--max-steps", "1"])) == 0
