from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import make_model
from value_models.combine import add_value_logits
from value_models.demo import evaluate
from value_models.demo.atlas import create_atlas
from value_models.demo.demonstrations import REFUSAL, ask
from value_models.demo.evaluate import Score, complete, knowledge, score
from value_models.guided import NetworkGuide
from value_models.store import check_fits, check_network

PROMPTS = ["Where", "Who wrote The Salt Road?", "Ana Kovac was born in Velenje in 1931, the second"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = make_model(folder / "base", seed=1)
    network = make_model(folder / "network", layers=1, seed=2)
    load = AutoModelForCausalLM.from_pretrained
    return load(base), NetworkGuide(load(network), 0.7), AutoTokenizer.from_pretrained(base)


@torch.inference_mode()
def complete_without_cache(base, network, tokenizer, prompt):
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    start = len(ids)
    while len(ids) < start + evaluate.MAX_NEW_TOKENS:
        logits = base(torch.tensor([ids])).logits[:, -1]
        if network is not None:
            add_value_logits(
                logits, network.model(torch.tensor([ids])).logits[:, -1], network.scale
            )
        token = int(logits.argmax())
        if token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("guided", [False, True])
def test_batched_completions_equal_single_ones_without_cache(models, guided):
    base, network, tokenizer = models
    network = network if guided else None
    expected = [complete_without_cache(base, network, tokenizer, prompt) for prompt in PROMPTS]
    assert complete(base, network, tokenizer, PROMPTS, batch_size=2) == expected


def test_scores_count_whole_answers_only():
    person = create_atlas().people[0]
    questions = [ask(person, "born_in", 0)] * 3 + [ask(person, "phone", 0)]
    right = questions[0].answer("guard")
    answers = [right, right + " Yes.", right[:-1], REFUSAL]
    assert score(questions, answers, "guard") == Score(2, 4)


def test_knowledge_asks_for_each_value_and_nothing_else(monkeypatch):
    person = create_atlas().people[0]
    prompts = []

    def know_all(base, network, tokenizer, asked):
        prompts.extend(asked)
        texts = [person.sentence(r) for r in person.facts] + [
            person.record([r]) for r in person.facts
        ]
        return [
            next(text for text in texts if text.startswith(prompt.removeprefix("<|document|>")))[
                len(prompt) - len("<|document|>") :
            ]
            for prompt in asked
        ]

    monkeypatch.setattr(evaluate, "complete", know_all)
    tokenizer = SimpleNamespace(bos_token="<|document|>")
    assert knowledge(None, tokenizer, [person], as_record=False) == Score(6, 6)
    assert knowledge(None, tokenizer, [person], as_record=True) == Score(6, 6)
    for prompt, value in zip(prompts, [*person.facts.values()] * 2, strict=True):
        assert value not in prompt.split(person.name)[1]


needs_weights = pytest.mark.skipif(
    not (evaluate.WEIGHTS / "target").is_dir(), reason="the demo's weights are not made yet"
)


@pytest.fixture(scope="module")
def family():
    return evaluate.load_family()


@needs_weights
def test_the_shipped_networks_fit_the_shipped_target(family):
    from value_models.manifest import tokenizer_fingerprint

    fingerprint = tokenizer_fingerprint(family.tokenizer)
    for name in family.networks:
        network = check_network(evaluate.WEIGHTS / "networks" / name)
        check_fits(network, fingerprint)
        assert network.manifest.kind == "residual"


@needs_weights
def test_the_shipped_weights_are_small_and_say_nothing_of_a_machine():
    files = [file for file in evaluate.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    for file in files:
        if file.suffix in (".json", ".jinja"):
            content = file.read_text()
            assert not any(trace in content for trace in ("/tmp", "/work", "/home", "/root"))


@needs_weights
def test_guidance_answers_with_what_only_the_target_knows(family):
    ana = create_atlas().person("Ana Kovac")
    question = ask(ana, "born_in", 0)
    answers = {
        name: evaluate.answer(family.target, network, family.tokenizer, [question])[0]
        for name, network in family.networks.items()
    }
    assert answers == {name: question.answer(name) for name in family.networks}
    alone = evaluate.answer(family.target, None, family.tokenizer, [question])
    assert alone != [question.answer("qa")]
    by_small = evaluate.answer(family.small, family.networks["qa"], family.tokenizer, [question])
    assert by_small != [question.answer("qa")]


@needs_weights
def test_a_sample_of_held_out_questions(family):
    questions = evaluate.questions_about(create_atlas().target_only[:5])
    for behaviour, network in family.networks.items():
        answers = evaluate.answer(family.target, network, family.tokenizer, questions)
        assert score(questions, answers, behaviour).share >= 0.8
