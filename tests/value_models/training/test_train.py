import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import OTHER_TEXT, make_model, make_tokenizer
from value_models.manifest import tokenizer_fingerprint
from value_models.store import check_fits, check_network
from value_models.training import TrainingError
from value_models.training import train as training
from value_models.training.train import ResidualTrainer, Settings, add_arguments, main, run, train


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


def test_nothing_of_this_machine_is_written(settings, tmp_path):
    train(settings)
    for file in settings.out.iterdir():
        content = file.read_bytes()
        for trace in (str(tmp_path), str(Path.home()), str(settings.data.parent)):
            assert trace.encode() not in content, file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tab"]


def test_the_loss_falls_and_the_base_stays_as_it_was(settings, base, monkeypatch):
    seen = {}

    class Watched(ResidualTrainer):
        def train(self, *arguments, **options):
            self.args.logging_steps = self.state.logging_steps = 1
            result = super().train(*arguments, **options)
            seen["base"] = {name: p.cpu() for name, p in self._base.state_dict().items()}
            seen["losses"] = [log["loss"] for log in self.state.log_history if "loss" in log]
            return result

    monkeypatch.setattr(training, "ResidualTrainer", Watched)
    train(replace(settings, max_steps=20, norm_weight=0.0))
    assert seen["losses"][-1] < seen["losses"][0]
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    assert all(torch.equal(untouched[name], tensor) for name, tensor in seen["base"].items())
    trained = weights(settings.out)
    assert any(not torch.equal(untouched[name], tensor) for name, tensor in trained.items())


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

    step = ResidualTrainer.training_step
    steps = []

    def interrupting(self, *arguments, **options):
        if len(steps) == 5:
            raise Interrupted
        steps.append(self.state.global_step)
        return step(self, *arguments, **options)

    monkeypatch.setattr(ResidualTrainer, "training_step", interrupting)
    with pytest.raises(Interrupted):
        train(settings)
    assert not settings.out.exists()

    def counting(self, *arguments, **options):
        steps.append(self.state.global_step)
        return step(self, *arguments, **options)

    monkeypatch.setattr(ResidualTrainer, "training_step", counting)
    # Killed while it wrote a checkpoint: that one must not be resumed from.
    (settings.out.with_name("tab.training") / "checkpoint-5").mkdir()
    train(settings)
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    resumed, expected = weights(settings.out), weights(undisturbed.out)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_other_settings_do_not_take_over_an_interrupted_run(settings, monkeypatch):
    def interrupting(self, *arguments, **options):
        raise Interrupted

    monkeypatch.setattr(ResidualTrainer, "training_step", interrupting)
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
