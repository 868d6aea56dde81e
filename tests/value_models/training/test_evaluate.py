import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import OTHER_TEXT, make_contrast, make_model, make_network, make_tokenizer
from value_models.combine import add_value_logits
from value_models.connection import CONNECTIONS
from value_models.store import NetworkError
from value_models.training import TrainingError
from value_models.training.data import IGNORED, load_demonstrations
from value_models.training.evaluate import add_arguments, evaluate, main


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    make_model(root / "base", vocab_size=544)
    turns = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} works."}]
        for n in range(5)
    ]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in turns]
    (root / "data.jsonl").write_text("".join(lines))
    return root


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_the_figures_are_those_of_whole_sequences(places: Path, kind: str) -> None:
    folder = make_network(
        places / kind.replace("+", "-plus"), kind=kind, hidden_size=32, heads=1, seed=3
    )
    found = evaluate(folder, str(places / "base"), places / "data.jsonl", 0.5, batch_size=2)
    base, network = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (places / "base", folder)
    )
    tokenizer = AutoTokenizer.from_pretrained(places / "base")
    losses, right = [], []
    for example in load_demonstrations(places / "data.jsonl", tokenizer, 512).examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            base_logits = base(ids).logits
            inputs = CONNECTIONS[kind](ids, base_logits, network.get_input_embeddings())
            guided = base_logits[0].clone()
            add_value_logits(guided, network(inputs_embeds=inputs).logits[0], 0.5)
        for place, label in enumerate(example.labels[1:]):
            if label != IGNORED:
                losses.append(-guided[place].log_softmax(-1)[label])
                right.append(guided[place].argmax() == label)
    assert found.cross_entropy == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert found.guided_accuracy == pytest.approx(torch.stack(right).float().mean().item())
    assert found.conversations == 5


def test_another_tokenizer_is_refused(places: Path) -> None:
    other = make_network(
        places / "other", hidden_size=32, heads=1, tokenizer=make_tokenizer(OTHER_TEXT)
    )
    with pytest.raises(TrainingError, match="another tokenizer"):
        evaluate(other, str(places / "base"), places / "data.jsonl")


def test_what_is_no_network_is_refused(places: Path) -> None:
    with pytest.raises(NetworkError):
        evaluate(places / "base", str(places / "base"), places / "data.jsonl")


def test_an_unknown_kind_is_refused(places: Path) -> None:
    folder = make_contrast(places / "unknown", hidden_size=32, heads=1)
    with pytest.raises(TrainingError, match=r"unknown kind 'contrast'.*residual, cascade"):
        evaluate(folder, str(places / "base"), places / "data.jsonl")


def test_a_batch_has_a_conversation(places: Path) -> None:
    with pytest.raises(TrainingError, match="batch size 0"):
        evaluate(places / "none", str(places / "base"), places / "data.jsonl", batch_size=0)


def test_the_networks_chat_template_serves_a_base_without_one(places: Path) -> None:
    folder = make_network(places / "templated", hidden_size=32, heads=1)
    bare = make_model(places / "bare", vocab_size=544)
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(bare)
    data = places / "data.jsonl"
    assert evaluate(folder, str(bare), data) == evaluate(folder, str(places / "base"), data)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TrainingError, match=r"neither .* has a chat template"):
        evaluate(folder, str(bare), data)


def test_the_command(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_network(places / "command", hidden_size=32, heads=1)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base, data = ["--base", str(places / "base")], ["--data", str(places / "data.jsonl")]
    assert main(parser.parse_args([str(folder), *base, *data, "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["conversations"] == 5
    assert main(parser.parse_args([str(places / "nothing"), *base, *data])) == 1
    assert capsys.readouterr().err.startswith("trimtab evaluate: ")
