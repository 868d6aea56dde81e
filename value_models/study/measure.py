"""How often a base answers right, alone or guided: exact match of whole answers."""

from __future__ import annotations

from collections.abc import Sequence

from value_models.demo.demonstrations import Question
from value_models.demo.evaluate import MAX_NEW_TOKENS, Score, questions_about, score
from value_models.guided import Guide, decode
from value_models.study.family import Base

BATCH_SIZE = 50


def accuracy(base: Base, guides: Sequence[Guide] = ()) -> Score:
    """Ask a base about its people, in its own chat format."""
    questions = questions_about(base.people)
    return score(questions, answers(base, guides, questions), "qa")


def answers(base: Base, guides: Sequence[Guide], questions: Sequence[Question]) -> list[str]:
    """Greedy answers, in the order of the questions."""
    tokenizer = base.tokenizer
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in questions
    ]
    # Neighbours of like length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    stops = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        generated = decode(base.model, guides, [prompts[i] for i in batch], MAX_NEW_TOKENS, stops)
        for i, ids in zip(batch, generated, strict=True):
            found[i] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return found
