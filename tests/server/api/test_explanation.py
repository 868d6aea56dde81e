import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.api.explanation import (
    LINES_AT_ONCE,
    Explanation,
    Record,
    Spelling,
    explain_stream,
)
from server.choice import ChosenNetwork

NETWORKS = (ChosenNetwork("qa", "3f2a91c0", 1.0), ChosenNetwork("json", "00000001", -1.0))


def line(position: int, request: str = "cmpl-1-0-abcdef01", **changes: Any) -> str:
    """A worker's, of a token whose id is ten times its position."""
    fields = {
        "request": request,
        "position": position,
        "token": 10 * position,
        "kl": 0.25,
        "target": [[1, 0.75], [2, 0.25]],
        "guided": [[2, 0.5], [1, 0.5]],
        "target_probability": 0.25,
        "guided_probability": 0.5,
        "networks": [[0, 1.0, 0.75], [1, -1.0, -0.125]],
        "wanted": None,
        "reached": None,
        "masked": False,
        "active": True,
    }
    return json.dumps(fields | changes) + "\n"


def output(*num_tokens: int) -> Any:
    """One of vLLM's, with so many new tokens of each answer."""
    outputs = [SimpleNamespace(index=i, token_ids=[7] * n) for i, n in enumerate(num_tokens)]
    return SimpleNamespace(outputs=outputs)


def write(folder: Path, record: Record, *lines: str) -> None:
    with (folder / record.name).open("a") as file:
        file.writelines(lines)


def explanation(folder: Path, *, choice_per_call: bool = False) -> Explanation:
    spelling = Spelling(lambda token_id: f"<{token_id}>")
    return Explanation(folder, spelling, NETWORKS, choice_per_call=choice_per_call)


def told(entries: Iterable[dict[str, Any]]) -> dict[int, list[int]]:
    """The tokens of each choice."""
    return {entry["index"]: [t["token_id"] for t in entry["tokens"]] for entry in entries}


async def test_a_token_is_described_in_words_of_the_api(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0, wanted=0.5, reached=0.4995, masked=True))
        await record.passed(output(1))
    ((entry,),) = [explained.take_all()]
    assert entry == {
        "index": 0,
        "tokens": [
            {
                "token": "<0>",
                "token_id": 0,
                "probability": 0.5,
                "target_probability": 0.25,
                "kl": 0.25,
                "guided": True,
                "grammar": True,
                "target_top": [
                    {"token": "<1>", "token_id": 1, "probability": 0.75},
                    {"token": "<2>", "token_id": 2, "probability": 0.25},
                ],
                "guided_top": [
                    {"token": "<2>", "token_id": 2, "probability": 0.5},
                    {"token": "<1>", "token_id": 1, "probability": 0.5},
                ],
                "networks": [
                    {"name": "qa@3f2a91c0", "weight": 1.0, "contribution": 0.75},
                    {"name": "json@00000001", "weight": -1.0, "contribution": -0.125},
                ],
                "distance": {"wanted": 0.5, "reached": 0.4995, "solved": True},
            }
        ],
    }


async def test_what_was_not_so_is_said_too(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0, active=False, networks=[]))
        write(tmp_path, record, line(1, wanted=0.5, reached=0.49))
        await record.passed(output(2))
    ((entry,),) = [explained.take_all()]
    unguided, unsolved = entry["tokens"]
    assert (unguided["guided"], unguided["grammar"], unguided["networks"]) == (False, False, [])
    assert "distance" not in unguided
    assert unsolved["distance"] == {"wanted": 0.5, "reached": 0.49, "solved": False}


async def test_a_token_is_told_when_it_has_left_and_only_once(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0), line(1), line(2))
        await record.passed(output(1))
        assert told(explained.take(0)) == {0: [0]}
        assert explained.take(0) == []
        await record.passed(output(0))
        assert explained.take(0) == []
        await record.passed(output(2))
        assert told(explained.take(0)) == {0: [10, 20]}


async def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    whole = line(1)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0), whole[:30])
        await record.passed(output(1))
        write(tmp_path, record, whole[30:])
        await record.passed(output(1))
    assert told(explained.take_all()) == {0: [0, 10]}


async def test_of_a_token_that_was_computed_twice_the_later_line_counts(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0), line(1, token=5), line(1, token=6))
        await record.passed(output(2))
    assert told(explained.take_all()) == {0: [0, 6]}


async def test_a_line_of_which_a_full_disk_took_a_part_costs_only_what_it_says(
    tmp_path: Path,
) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0), line(1)[:30], line(2), line(3))
        await record.passed(output(4))
    assert told(explained.take_all()) == {0: [0, 30]}


async def test_a_token_that_was_taken_back_is_not_told(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0), line(1))
        await record.passed(output(1))  # the second, a failure token, was dropped
    assert told(explained.take_all()) == {0: [0]}


async def test_a_long_answer_lets_others_go_on(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    with explained.begin(1) as record:
        write(tmp_path, record, *map(line, range(3 * LINES_AT_ONCE)))
        await record.passed(output(3 * LINES_AT_ONCE))
    task.cancel()
    assert turns == 3
    assert told(explained.take_all()) == {0: [10 * i for i in range(3 * LINES_AT_ONCE)]}


async def test_answers_are_told_apart_by_the_request_ids_of_their_children(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(3) as record:
        lines = [line(0, f"{i}_my_3_id-0-abcdef01", token=i) for i in (2, 0, 1)]
        write(tmp_path, record, *lines)
        await record.passed(output(1, 0, 1))
        assert told(explained.take_all()) == {0: [0], 2: [2]}
        await record.passed(output(0, 1, 0))
        assert told(explained.take_all()) == {1: [1]}


async def test_a_request_id_that_looks_like_a_childs_is_none(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0, "7_mine"))
        await record.passed(output(1))
    assert told(explained.take_all()) == {0: [0]}


async def test_choices_of_several_prompts_are_counted_on(tmp_path: Path) -> None:
    explained = explanation(tmp_path, choice_per_call=True)
    with explained.begin(2) as first, explained.begin(2) as second:
        write(tmp_path, second, line(0, "1_b", token=4), line(0, "0_b", token=3))
        await second.passed(output(1, 1))
        write(tmp_path, first, line(0, "1_a", token=2), line(0, "0_a", token=1))
        await first.passed(output(1, 1))
    assert told(explained.take_all()) == {0: [1], 1: [2], 2: [3], 3: [4]}


async def test_calls_that_continue_each_other_are_of_one_choice(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    for token in (1, 2):
        with explained.begin(1) as record:
            write(tmp_path, record, line(0, token=token))
            await record.passed(output(1))
    assert told(explained.take_all()) == {0: [1, 2]}


def test_the_file_is_there_from_start_to_end(tmp_path: Path) -> None:
    record = explanation(tmp_path).begin(1)
    assert not (tmp_path / record.name).exists()
    with pytest.raises(RuntimeError), record:
        assert (tmp_path / record.name).stat().st_mode & 0o777 == 0o600
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_somebody_removed_harms_nobody(tmp_path: Path) -> None:
    with explanation(tmp_path).begin(1) as record:
        (tmp_path / record.name).unlink()


async def test_numbers_have_the_digits_of_float32(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0, networks=[[0, 0.699999988079071, 1.25e-12]]))
        await record.passed(output(1))
    ((entry,),) = [explained.take_all()]
    (network,) = entry["tokens"][0]["networks"]
    assert (network["weight"], network["contribution"]) == (0.7, 1.25e-12)


async def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    explained = explanation(tmp_path)
    with explained.begin(1) as record:
        write(tmp_path, record, line(0, kl=float("inf"), wanted=float("nan"), reached=0.0))
        await record.passed(output(1))
    ((entry,),) = [explained.take_all()]
    assert entry["tokens"][0]["kl"] is None
    assert "distance" not in entry["tokens"][0]


class TestStreams:
    """Each chunk carries what is new about the choices that are in it."""

    @staticmethod
    async def streamed(events: list[str], explained: Explanation) -> list[str]:
        async def stream() -> AsyncIterator[str]:
            for event in events:
                yield event

        return [event async for event in explain_stream(stream(), explained)]

    @pytest.fixture
    async def explained(self, tmp_path: Path) -> Explanation:
        """One token of each of two choices is new."""
        explained = explanation(tmp_path)
        with explained.begin(2) as record:
            write(tmp_path, record, line(0, "0_a", token=1), line(0, "1_a", token=2))
            await record.passed(output(1, 1))
        return explained

    async def test_chunks_of_completions(self, explained: Explanation) -> None:
        chunk = 'data: {"choices": [{"index": 1, "text": "ž"}]}\n\n'
        first, second = await self.streamed([chunk, chunk], explained)
        fields = json.loads(first.removeprefix("data: "))
        assert first.endswith("}\n\n")
        assert fields["choices"] == [{"index": 1, "text": "ž"}]
        assert told(fields["value_explanation"]) == {1: [2]}
        assert second == chunk

    async def test_chunks_of_chats_that_carry_text(self, explained: Explanation) -> None:
        role = (
            'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
        )
        text = 'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
        first, second = await self.streamed([role, text], explained)
        assert first == role
        assert told(json.loads(second.removeprefix("data: "))["value_explanation"]) == {0: [1]}

    async def test_events_of_responses(self, explained: Explanation) -> None:
        def event(kind: str) -> str:
            return f'event: {kind}\ndata: {{"type": "{kind}"}}\n\n'

        kinds = ("response.created", "response.output_text.delta", "response.completed")
        created, delta, completed = await self.streamed([event(kind) for kind in kinds], explained)
        assert created == event("response.created")
        assert completed == event("response.completed")
        head, _, data = delta.partition("data: ")
        assert head == "event: response.output_text.delta\n"
        assert told(json.loads(data)["value_explanation"]) == {0: [1]}

    async def test_what_no_text_has_carried_comes_at_the_end_of_a_response(
        self, explained: Explanation
    ) -> None:
        events = ['event: x\ndata: {"type": "response.completed", "response": {}}\n\n']
        (completed,) = await self.streamed(events, explained)
        fields = json.loads(completed.partition("data: ")[2])
        assert told(fields["value_explanation"]) == {0: [1]}

    async def test_other_events_pass_as_they_are(self, explained: Explanation) -> None:
        events = [
            'data: {"choices": [], "usage": {}}\n\n',
            'data: {"error": {"code": 500}}\n\n',
            "data: [DONE]\n\n",
        ]
        assert await self.streamed(events, explained) == events
