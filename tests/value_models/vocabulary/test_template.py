"""The network reads a target's conversation as its own template would have written it."""

import copy
import random
from itertools import product

import pytest
from transformers import PreTrainedTokenizerFast

from tests.value_models.vocabulary.test_reading import check_follows, make_reader
from tests.value_models.vocabulary.tokenizers import CHATML_TEMPLATE, tokenizer
from value_models.vocabulary.stream import START, special
from value_models.vocabulary.template import Template, TurnRules, turn_rules
from value_models.vocabulary.tokens import Vocabulary

CONTENTS = ("Where was Ana born?", "\n\n  1. In Velenje, 東京 🚢.\n", " x <|> \n\n", "It's")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}"
    "{% endif %}" + CHATML_TEMPLATE
)
EMPTY_THINKING = CHATML_TEMPLATE.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content'] +",
)
FAMILIES = ("byte-level", "qwen", "tekken", "sentencepiece legacy", "sentencepiece first")
MARKED = ("byte-level", "qwen", "tekken")  # with special tokens in every turn marker


def conversation(*roles: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": CONTENTS[number % len(CONTENTS)]}
        for number, role in enumerate(roles)
    ]


def rendered(vocabulary: Vocabulary, messages: list[dict[str, str]]) -> list[int]:
    return vocabulary.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def rules_between(target: str, value: str) -> tuple[Vocabulary, Vocabulary, TurnRules]:
    there, here = Vocabulary.of(tokenizer(target)), Vocabulary.of(tokenizer(value))
    return there, here, turn_rules(Template(there, there.prefix), Template(here))


@pytest.mark.parametrize(
    ("target", "value", "roles"),
    [
        (target, value, roles)
        for target, value, roles in product(MARKED, FAMILIES, ("u", "uau", "uauau", "su", "suau"))
        if value in MARKED or "s" not in roles  # the others' template has no system role
    ],
)
def test_turns_are_read_in_the_networks_own_template(target: str, value: str, roles: str) -> None:
    there, here, turns = rules_between(target, value)
    reader = make_reader(there, here, *turns.rules)
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = conversation(*(names[role] for role in roles))
    reading = reader.read(rendered(there, messages))
    assert list(reading.ids) == rendered(here, messages)
    assert not reading.waiting


@pytest.mark.parametrize(("target", "value"), product(FAMILIES, FAMILIES))
def test_growing_conversations_are_read_as_the_whole(target: str, value: str) -> None:
    there, here, turns = rules_between(target, value)
    reader = make_reader(there, here, *turns.rules)
    for seed in range(4):
        chance = random.Random(f"{target} {value} {seed}")
        ids = rendered(there, conversation("user", "assistant", "user", "assistant", "user"))
        ids += [
            chance.choice([chance.randrange(len(there.tokens)), *there.specials]) for _ in range(30)
        ]
        check_follows(reader, ids, chance)


def test_a_network_without_a_system_role_reads_the_systems_words_with_the_users() -> None:
    there, here, turns = rules_between("qwen", "sentencepiece legacy")
    reader = make_reader(there, here, *turns.rules)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    joined = [{"role": "user", "content": "Be kind.\n\nWho?"}]
    assert list(reader.read(rendered(there, messages)).ids) == rendered(here, joined)


def test_a_target_without_a_system_role_has_its_users_turns_read_as_such() -> None:
    """As Mistral's, which put the system's words before the first user's."""
    merging = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|im_start|>' + message['content'] + '\n\n' }}{% elif message['role'] == 'user' %}"
        "{{ ('' if loop.index0 and messages[loop.index0 - 1]['role'] == 'system'"
        " else '<|im_start|>') + message['content'] + '<|im_end|>' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    there, here = Vocabulary.of(with_template(merging)), Vocabulary.of(tokenizer("byte-level"))
    turns = turn_rules(Template(there), Template(here))
    reader = make_reader(there, here, *turns.rules)
    messages = conversation("user", "assistant", "user")
    assert list(reader.read(rendered(there, messages)).ids) == rendered(here, messages)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    joined = [{"role": "user", "content": "Be kind.\n\nWho?"}]
    assert list(reader.read(rendered(there, messages)).ids) == rendered(here, joined)


def test_a_default_system_prompt_is_the_networks_own_or_none() -> None:
    """As Qwen 2.5 has one; a conversation that brings its own keeps it."""
    there, here = Vocabulary.of(with_template(DEFAULT_SYSTEM)), Vocabulary.of(tokenizer("qwen"))
    turns = turn_rules(Template(there), Template(here))
    reader = make_reader(there, here, *turns.rules)
    for roles in (["user"], ["system", "user"]):
        messages = conversation(*roles)
        assert list(reader.read(rendered(there, messages)).ids) == rendered(here, messages)


def test_a_prompt_that_history_continues_is_not_waited_at() -> None:
    """As Qwen 3, whose history has an empty <think> block where the prompt has nothing."""
    there, here = Vocabulary.of(with_template(EMPTY_THINKING)), Vocabulary.of(tokenizer("tekken"))
    turns = turn_rules(Template(there), Template(here))
    reader = make_reader(there, here, *turns.rules)
    messages = conversation("user")
    reading = reader.read(rendered(there, messages))
    assert not reading.waiting
    assert list(reading.ids) == rendered(here, messages)


def test_turns_of_tools_are_kept_apart() -> None:
    there, here, turns = rules_between("qwen", "byte-level")
    reader = make_reader(there, here, *turns.rules)
    messages = conversation("user", "assistant", "tool", "assistant", "tool")
    assert list(reader.read(rendered(there, messages)).ids) == rendered(here, messages)


def test_tools_that_a_template_wraps_are_read_as_a_users_words() -> None:
    """As Mistral's do, in JSON that names the call."""
    wrapping = CHATML_TEMPLATE.replace(
        "message['content'] +", "message['content'] + message.get('tool_call_id', '') +"
    )
    there, here = Vocabulary.of(tokenizer("byte-level")), Vocabulary.of(with_template(wrapping))
    turns = turn_rules(Template(there), Template(here))
    reader = make_reader(there, here, *turns.rules)
    messages = conversation("user", "assistant", "tool")
    as_users = [*messages[:2], messages[2] | {"role": "user"}]
    assert list(reader.read(rendered(there, messages)).ids) == rendered(here, as_users)


def test_a_marker_is_read_by_what_stood_before() -> None:
    """A network that ends a user's turn unlike the assistant's, under a target that does not."""
    _, _, turns = rules_between("qwen", "sentencepiece legacy")
    close = special(2) + "\n"
    assert {rule.before: rule.output for rule in turns.rules if rule.pattern == close} == {
        "": (2,),
        **dict.fromkeys(("system", "user", "tool"), (" [/INST]",)),
    }


def test_markers_of_plain_text_stay_text() -> None:
    _, _, turns = rules_between("sentencepiece legacy", "qwen")
    assert turns.generation is None
    assert "no special tokens in its turn markers" in turns.warnings[0]
    assert all(rule.pattern[0] in (START, special(2)) for rule in turns.rules)


def test_no_template_no_rules() -> None:
    bare = Vocabulary.of(with_template(None))
    chatting = Vocabulary.of(tokenizer("qwen"))
    assert turn_rules(Template(bare), Template(chatting)) == TurnRules((), None, ())
    rules, _, (warning,) = turn_rules(Template(chatting), Template(bare))
    assert not rules and "network has no chat template" in warning


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer("qwen"))
    changed.chat_template = template
    return changed
