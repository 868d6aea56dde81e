import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.api.errors import ApiError
from server.api.explanation import Explanation, Spelling
from server.api.generation import CURRENT, GenerationDoor, GuidedRequest
from server.api.reasoning import Reasoning
from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal, unseal
from server.lifecycle.catalog import Catalog, Network
from server.lifecycle.leases import Leases
from tests.server.networks import Workers, report, status

KEY = "a key"
FAILURE_TOKEN = 99
QA = ChosenNetwork("qa", "3f2a91c0", 1.0)
FOREIGN = ChosenNetwork("foreign", "3f2a91c0", 1.0)


class Failed(Exception):
    pass


class Engine:
    """Stands for vLLM's engine: yields what a test has it yield, and notes what it was asked."""

    def __init__(self) -> None:
        self.stop_reasons: list[Any] = [None, 2]
        self.asked: list[Any] = []
        self.aborted = False
        self.on_abort: Callable[[], None] = lambda: None
        self.before_output: Callable[[], None] = lambda: None
        self.prompt_logprobs: Any = None

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        self.asked.append((prompt, sampling_params, request_id, options))
        try:
            for reason in self.stop_reasons:
                self.before_output()
                yield SimpleNamespace(
                    outputs=[completion(reason)], prompt_logprobs=self.prompt_logprobs
                )
        except GeneratorExit:
            self.aborted = True
            self.on_abort()
            raise


class Vocabularies:
    """Stands for `server.api.vocabularies.Vocabularies`: a network with half as long tokens, which
    scores odd ids only."""

    def __init__(self) -> None:
        self.counted = 0

    def count(self, network: Network, token_ids: Sequence[int]) -> int:
        self.counted += 1
        return 2 * len(token_ids)

    async def count_in_background(self, network: Network, token_ids: Sequence[int]) -> int:
        return self.count(network, token_ids)

    def scores(self, network: Network, token_id: int) -> bool:
        return token_id % 2 == 1


def completion(stop_reason: Any, index: int = 0) -> Any:
    """One of vLLM's outputs, of one token."""
    return SimpleNamespace(
        index=index,
        token_ids=[5, stop_reason or 6],
        logprobs=None,
        text="a",
        finish_reason="stop" if stop_reason else None,
        stop_reason=stop_reason,
    )


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def workers() -> Workers:
    return Workers(
        [
            status("qa", max_context=64),
            status("json", max_context=32),
            status("foreign", max_context=64, mapped=True),
        ]
    )


@pytest.fixture
def vocabularies() -> Vocabularies:
    return Vocabularies()


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    leases = Leases(tmp_path)
    yield leases
    leases.close()


@pytest.fixture
async def door(
    engine: Engine, workers: Workers, leases: Leases, vocabularies: Any
) -> GenerationDoor:
    catalog = Catalog(workers.call)
    await catalog.attach()
    return GenerationDoor(engine.generate, catalog, leases, vocabularies, KEY, 100, Failed)


def params(sealed: str | None = None, **changes: Any) -> Any:
    extra_args = {"other": 1} | ({EXTRA_ARG: sealed} if sealed else {})
    fields = {
        "n": 1,
        "max_tokens": 16,
        "min_tokens": 0,
        "prompt_logprobs": None,
        "allowed_token_ids": None,
        "extra_args": extra_args,
    }
    return SimpleNamespace(**fields | changes)


def guided(*networks: ChosenNetwork, **changes: Any) -> Any:
    return params(seal(Choice(networks or (QA,), FAILURE_TOKEN), KEY), **changes)


def tokens(length: int) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": [1] * length}


def as_route(*networks: ChosenNetwork, max_tokens: int | None = None) -> GuidedRequest:
    """What the route notes about a request before it hands it to vLLM."""
    request = GuidedRequest(networks or (QA,), None, max_tokens)
    CURRENT.set(request)
    return request


async def test_unguided_requests_go_straight_through(door: GenerationDoor, engine: Engine) -> None:
    asked = params(extra_args=None)
    outputs = door.generate({"prompt_embeds": ...}, asked, "r", priority=1)
    assert [output async for output in outputs]
    assert engine.asked == [({"prompt_embeds": ...}, asked, "r", {"priority": 1})]


async def test_a_guided_request_gets_its_outputs(door: GenerationDoor, engine: Engine) -> None:
    as_route(max_tokens=16)
    outputs = [output async for output in door.generate(tokens(4), guided(), "r")]
    assert [output.outputs[0].stop_reason for output in outputs] == [None, 2]


@pytest.mark.parametrize("sealed", ["forged", seal(Choice((QA,), FAILURE_TOKEN), "another key")])
def test_a_forged_choice_is_refused_at_once(
    door: GenerationDoor, engine: Engine, sealed: str
) -> None:
    with pytest.raises(ApiError) as refused:
        door.generate(tokens(4), params(sealed), "r")
    assert (refused.value.status, refused.value.param) == (400, "vllm_xargs")
    assert engine.asked == []


def test_what_exceeds_a_networks_context_is_refused_with_both_limits(door: GenerationDoor) -> None:
    request = as_route(max_tokens=30)
    door.generate(tokens(34), guided(max_tokens=30), "r")
    with pytest.raises(ApiError) as refused:
        door.generate(tokens(35), guided(max_tokens=30), "r")
    error = refused.value
    assert (error.status, error.param) == (400, "max_tokens")
    assert "qa@3f2a91c0 reads at most 64 tokens" in error.message
    assert "35 in the prompt and asks for 30 more, 65 in all" in error.message
    assert request.error is error


@pytest.mark.parametrize("allowed", [[FAILURE_TOKEN], [512, 9999], [FAILURE_TOKEN, 512]])
def test_allowed_ids_that_guidance_excludes_are_refused(
    door: GenerationDoor, allowed: list[int]
) -> None:
    as_route()
    with pytest.raises(ApiError, match="no token that the value network can score"):
        door.generate(tokens(4), guided(allowed_token_ids=allowed), "r")
    door.generate(tokens(4), guided(allowed_token_ids=[*allowed, 5]), "r")


@pytest.mark.parametrize("kind", ["embeds", "multimodal", "enc_dec"])
def test_only_prompts_of_tokens_can_be_guided(door: GenerationDoor, kind: str) -> None:
    as_route()
    with pytest.raises(ApiError, match="value networks read tokens"):
        door.generate(tokens(4) | {"type": kind}, guided(), "r")


def test_vllms_own_cap_counts_as_what_is_asked_for(door: GenerationDoor) -> None:
    as_route(max_tokens=99)
    capped = guided(max_tokens=4)
    door.generate(tokens(60), capped, "r")
    assert capped.max_tokens == 4


def test_the_shortest_context_counts(door: GenerationDoor) -> None:
    both = (QA, ChosenNetwork("json", "3f2a91c0", 1.0))
    as_route(*both, max_tokens=10)
    with pytest.raises(ApiError, match="json@3f2a91c0 reads at most 32 tokens"):
        door.generate(tokens(23), guided(*both, max_tokens=10), "r")


def test_an_open_end_is_what_the_network_can_read(door: GenerationDoor, engine: Engine) -> None:
    as_route(max_tokens=None)
    asked = guided(max_tokens=90)
    door.generate(tokens(10), asked, "r")
    assert asked.max_tokens == 54
    shorter = guided(max_tokens=5)
    door.generate(tokens(10), shorter, "r")
    assert shorter.max_tokens == 5


def test_an_open_end_needs_room_for_one_token(door: GenerationDoor) -> None:
    as_route(max_tokens=None)
    door.generate(tokens(63), guided(max_tokens=37), "r")
    with pytest.raises(ApiError, match="64 in the prompt and asks for 1 more, 65 in all"):
        door.generate(tokens(64), guided(max_tokens=36), "r")


def test_min_tokens_must_fit_too(door: GenerationDoor) -> None:
    as_route(max_tokens=None)
    with pytest.raises(ApiError, match=r"min_tokens is 55.*room for 54"):
        door.generate(tokens(10), guided(max_tokens=90, min_tokens=55), "r")


async def test_what_vllm_shortens_to_the_target_is_not_asked_for(
    engine: Engine, leases: Leases
) -> None:
    catalog = Catalog(Workers([status("qa", max_context=100)]).call)
    await catalog.attach()
    vocabularies: Any = Vocabularies()
    door = GenerationDoor(engine.generate, catalog, leases, vocabularies, KEY, 100, Failed)
    as_route(max_tokens=20)
    shortened = guided(max_tokens=10)
    door.generate(tokens(90), shortened, "r")
    assert shortened.max_tokens == 10


@pytest.mark.parametrize(
    "prompt", [{"type": "embeds"}, {"type": "embeds", "prompt_token_ids": [1]}]
)
def test_a_prompt_without_tokens_is_refused(door: GenerationDoor, prompt: dict[str, Any]) -> None:
    as_route()
    with pytest.raises(ApiError, match="embeddings"):
        door.generate(prompt, guided(), "r")


def test_a_prompt_can_be_checked_before_it_is_generated_from(door: GenerationDoor) -> None:
    CURRENT.set(None)
    door.check(tokens(1000))
    as_route(max_tokens=30)
    door.check(tokens(34))
    with pytest.raises(ApiError):
        door.check(tokens(35))


async def test_a_failure_token_becomes_an_error_that_names_the_network(
    door: GenerationDoor, engine: Engine, workers: Workers
) -> None:
    request = as_route(max_tokens=16)
    engine.stop_reasons = [None, FAILURE_TOKEN, None]
    workers.replies = [[report(status("qa", state="failed", reason="it threw"), status("json"))]]
    received = []
    with pytest.raises(Failed, match="value network qa@3f2a91c0 has failed: it threw") as failed:
        async for output in door.generate(tokens(4), guided(), "r"):
            received.append(output)
    assert len(received) == 1
    assert engine.aborted, "what is left of the request still runs"
    assert request.error is failed.value


async def test_a_failure_is_an_error_even_when_its_reason_cannot_be_had(
    door: GenerationDoor, engine: Engine, workers: Workers
) -> None:
    as_route(max_tokens=16)
    engine.stop_reasons = [FAILURE_TOKEN]
    workers.replies = [[{"error": "no processor"}]]
    with pytest.raises(Failed, match=r"qa@3f2a91c0 has failed; .*no processor"):
        async for _ in door.generate(tokens(4), guided(), "r"):
            pass


async def test_another_stop_token_is_no_failure(door: GenerationDoor, engine: Engine) -> None:
    as_route(max_tokens=16)
    engine.stop_reasons = [None, 98]
    assert len([output async for output in door.generate(tokens(4), guided(), "r")]) == 2


async def test_a_client_that_leaves_aborts_the_request(
    door: GenerationDoor, engine: Engine
) -> None:
    as_route(max_tokens=16)
    outputs = door.generate(tokens(4), guided(), "r")
    await anext(outputs)
    await outputs.aclose()
    assert engine.aborted


async def test_a_request_keeps_the_version_that_it_was_accepted_with(
    door: GenerationDoor, engine: Engine, workers: Workers
) -> None:
    as_route(max_tokens=30)
    newer = status("qa", version="00000001", order=1, max_context=32)
    workers.replies = [[report(status("qa", state="draining", max_context=64), newer)]]
    await door._catalog.refresh()
    door.generate(tokens(34), guided(max_tokens=30), "r")
    with pytest.raises(ApiError, match="qa@3f2a91c0 reads at most 64 tokens"):
        door.generate(tokens(35), guided(max_tokens=30), "r")


async def test_a_version_that_fails_while_it_is_draining_says_why(
    door: GenerationDoor, engine: Engine, workers: Workers
) -> None:
    as_route()
    engine.stop_reasons = [FAILURE_TOKEN]
    newer = status("qa", version="00000001", order=1)
    workers.replies = [[report(status("qa", state="draining", reason="it threw"), newer)]]
    with pytest.raises(Failed, match="qa@3f2a91c0 has failed: it threw"):
        async for _ in door.generate(tokens(4), guided(), "r"):
            pass


async def test_a_version_that_is_gone_is_an_error_that_can_be_tried_again(
    door: GenerationDoor, workers: Workers
) -> None:
    as_route()
    workers.replies = [[report(status("qa", version="00000001"))]]
    await door._catalog.refresh()
    with pytest.raises(ApiError, match="qa@3f2a91c0 is not resident any more") as refused:
        door.generate(tokens(4), guided(), "r")
    assert refused.value.status == 503


async def test_a_version_is_held_until_the_engine_has_let_go(
    door: GenerationDoor, engine: Engine, leases: Leases
) -> None:
    as_route()
    held: list[int] = []
    engine.on_abort = lambda: held.append(leases.count("qa@3f2a91c0"))
    outputs = door.generate(tokens(4), guided(), "r")
    await anext(outputs)
    assert leases.count("qa@3f2a91c0") == 1
    await outputs.aclose()
    assert held == [1], "the client has left, but the engine has not heard of it"
    assert leases.count("qa@3f2a91c0") == 0


def settled(engine: Engine, asked: int = -1) -> Choice:
    """The choice that reached the engine."""
    _, sampling_params, _, _ = engine.asked[asked]
    assert sampling_params.extra_args["other"] == 1
    return unseal(sampling_params.extra_args[EXTRA_ARG], KEY)


class TestReasoning:
    """Guidance that waits until the target has thought."""

    END = (7, 8)
    AFTER = Choice((QA,), FAILURE_TOKEN, after=END)

    @pytest.fixture
    def parser_kwargs(self, door: GenerationDoor) -> list[dict[str, Any]]:
        """What parsers are made with; reasoning has ended in a prompt that has a 5."""
        made: list[dict[str, Any]] = []

        def make_parser(**kwargs: Any) -> Any:
            made.append(kwargs)
            return SimpleNamespace(is_reasoning_end=lambda token_ids: 5 in token_ids)

        door._reasoning = Reasoning(self.END, make_parser)
        return made

    async def ask(self, door: GenerationDoor, asked: Any, *token_ids: int, **options: Any) -> None:
        prompt = {"type": "token", "prompt_token_ids": list(token_ids)}
        async for _ in door.generate(prompt, asked, "r", **options):
            pass

    async def test_it_begins_at_once_where_the_prompt_has_ended_reasoning(
        self, door: GenerationDoor, engine: Engine, parser_kwargs: list[dict[str, Any]]
    ) -> None:
        as_route()
        asked = params(seal(self.AFTER, KEY))
        await self.ask(door, asked, 1, 5)
        assert settled(engine) == self.AFTER._replace(after=())
        await self.ask(door, asked, 1, 2)
        assert settled(engine) == self.AFTER, "another prompt, but the same parameters"

    async def test_the_parser_knows_the_chats_template(
        self, door: GenerationDoor, parser_kwargs: list[dict[str, Any]]
    ) -> None:
        as_route()
        asked = params(seal(self.AFTER, KEY))
        await self.ask(door, asked, 1, reasoning_parser_kwargs={"chat_template_kwargs": {"a": 1}})
        await self.ask(door, asked, 1, reasoning_parser_kwargs=None)
        assert parser_kwargs == [{"chat_template_kwargs": {"a": 1}}, {}]

    async def test_nobody_parses_where_nobody_asked(
        self, door: GenerationDoor, parser_kwargs: list[dict[str, Any]]
    ) -> None:
        as_route()
        await self.ask(door, guided(), 1)
        assert parser_kwargs == []


class TestScoring:
    """Log-probabilities of the prompt."""

    SCORES = ({7: SimpleNamespace(logprob=-1.0)}, {8: SimpleNamespace(logprob=-math.inf)})
    FAILED = ({7: SimpleNamespace(logprob=math.nan)},)

    async def test_they_pass(self, door: GenerationDoor, engine: Engine) -> None:
        as_route()
        engine.prompt_logprobs = [None, *self.SCORES]
        asked = guided(prompt_logprobs=1)
        assert len([output async for output in door.generate(tokens(4), asked, "r")]) == 2
        assert engine.asked[0][1].prompt_logprobs == 1

    @pytest.mark.parametrize(
        "part", [{"after": (7,)}, {"until_tokens": 1}, {"until_text": "x"}, {"until_text": ""}]
    )
    def test_vllms_own_are_dropped_where_a_part_is_guided(
        self, door: GenerationDoor, engine: Engine, part: dict[str, Any]
    ) -> None:
        as_route()
        sealed = seal(Choice((QA,), FAILURE_TOKEN, **part), KEY)
        door.generate(tokens(4), params(sealed, prompt_logprobs=0), "r")
        assert engine.asked == []  # nobody has iterated
        asked = params(sealed, prompt_logprobs=0)
        door.generate(tokens(4), asked, "r")
        assert asked.prompt_logprobs is None

    @pytest.mark.parametrize("network", [QA, FOREIGN])
    async def test_scores_that_are_no_numbers_are_a_failure(
        self, door: GenerationDoor, engine: Engine, workers: Workers, network: ChosenNetwork
    ) -> None:
        request = as_route(network)
        engine.prompt_logprobs = [None, *self.SCORES, *self.FAILED]
        with pytest.raises(Failed, match=f"{network} has failed for this request") as failed:
            async for _ in door.generate(tokens(4), guided(network), "r"):
                pytest.fail("it has been passed on")
        assert engine.aborted
        assert request.error is failed.value
        reason = {"state": "failed", "reason": "it threw"}
        mapped = network is FOREIGN
        workers.replies = [[report(status(network.name, mapped=mapped, **reason))]]
        with pytest.raises(Failed, match=f"{network} has failed: it threw"):
            async for _ in door.generate(tokens(4), guided(network), "r"):
                pass


class TestExplaining:
    """What guidance did to each token, for clients that ask."""

    @pytest.fixture
    def explanation(self, tmp_path: Path) -> Explanation:
        folder = tmp_path / "explain"
        folder.mkdir()
        explanation = Explanation(folder, Spelling(str), [QA], choice_per_call=False)
        as_route().explanation = explanation
        return explanation

    @pytest.fixture
    def folder(self, explanation: Explanation) -> Path:
        return explanation._folder

    @staticmethod
    def write_lines(engine: Engine, folder: Path) -> None:
        """Have the workers write a line for each token of the latest request."""

        def write() -> None:
            line = {
                "request": "r-00000000",
                "kl": 0.5,
                "target": [],
                "guided": [],
                "target_probability": 0.5,
                "guided_probability": 0.5,
                "networks": [],
                "wanted": None,
                "reached": None,
                "masked": False,
                "active": True,
            }
            name = settled(engine).explain
            assert name is not None
            position = 0 if (folder / name).read_text() == "" else 2
            with (folder / name).open("a") as file:
                for token in (position, position + 1):
                    file.write(json.dumps(line | {"position": token, "token": token}) + "\n")

        engine.before_output = write

    async def test_lines_are_taken_up_with_their_tokens(
        self, door: GenerationDoor, engine: Engine, explanation: Explanation, folder: Path
    ) -> None:
        self.write_lines(engine, folder)
        told = []
        async for _ in door.generate(tokens(4), guided(), "r"):
            (entry,) = explanation.take(0)
            told.append([token["token_id"] for token in entry["tokens"]])
        assert told == [[0, 1], [2, 3]]
        assert list(folder.iterdir()) == []

    async def test_each_call_has_a_file_of_its_own(
        self, door: GenerationDoor, engine: Engine, explanation: Explanation, folder: Path
    ) -> None:
        asked = guided()
        for _ in range(2):
            async for _ in door.generate(tokens(4), asked, "r"):
                pass
        first, second = settled(engine, 0), settled(engine, 1)
        assert first.explain and second.explain and first.explain != second.explain
        assert first._replace(explain=None) == Choice((QA,), FAILURE_TOKEN)
        assert unseal(asked.extra_args[EXTRA_ARG], KEY).explain is None

    async def test_nothing_is_recorded_where_nobody_asked(
        self, door: GenerationDoor, engine: Engine, folder: Path
    ) -> None:
        as_route()
        engine.before_output = lambda: files.extend(folder.iterdir())
        files: list[Path] = []
        async for _ in door.generate(tokens(4), guided(), "r"):
            pass
        assert settled(engine).explain is None
        assert files == []

    async def test_an_answer_that_nobody_waits_for_leaves_no_file(
        self, door: GenerationDoor, engine: Engine, folder: Path
    ) -> None:
        door.generate(tokens(4), guided(), "r")  # another prompt was refused
        assert list(folder.iterdir()) == []
        outputs = door.generate(tokens(4), guided(), "r")
        await anext(outputs)
        assert len(list(folder.iterdir())) == 1
        await outputs.aclose()  # the client has left
        assert list(folder.iterdir()) == []

    async def test_a_failure_leaves_no_file(
        self, door: GenerationDoor, engine: Engine, folder: Path
    ) -> None:
        engine.stop_reasons = [FAILURE_TOKEN]
        with pytest.raises(Failed):
            async for _ in door.generate(tokens(4), guided(), "r"):
                pass
        assert list(folder.iterdir()) == []

        def die() -> None:
            raise RuntimeError("the engine is dead")

        engine.before_output = die
        with pytest.raises(RuntimeError):
            async for _ in door.generate(tokens(4), guided(), "r"):
                pass
        assert list(folder.iterdir()) == []


async def test_tokens_are_counted_by_network(door: GenerationDoor, engine: Engine) -> None:
    def counted(network: str) -> float:
        labels = {"network": network, "version": "3f2a91c0"}
        return REGISTRY.get_sample_value("trimtab_generation_tokens_total", labels) or 0.0

    both = (QA, ChosenNetwork("json", "3f2a91c0", 1.0))
    before = {name: counted(name) for name in ("qa", "json", "foreign")}
    as_route(*both)
    async for _ in door.generate(tokens(4), guided(*both), "r"):
        pass
    after = {name: counted(name) - before[name] for name in before}
    assert after == {"qa": 4, "json": 4, "foreign": 0}


class TestOtherVocabularies:
    """A network that counts in tokens of its own."""

    async def test_a_prompt_is_measured_in_the_networks_tokens(self, door: GenerationDoor) -> None:
        as_route(FOREIGN, max_tokens=90)
        await door.admit(tokens(32))
        door.generate(tokens(32), guided(FOREIGN, max_tokens=68), "r")
        message = "foreign@3f2a91c0 reads at most 64 tokens, but this prompt has 66"
        with pytest.raises(ApiError, match=message):
            await door.admit(tokens(33))
        with pytest.raises(ApiError, match=message):
            door.generate(tokens(33), guided(FOREIGN, max_tokens=67), "r")
        with pytest.raises(ApiError, match=message):
            door.check(tokens(33))

    async def test_an_admitted_prompt_is_not_measured_again(
        self, door: GenerationDoor, vocabularies: Vocabularies
    ) -> None:
        as_route(FOREIGN)
        prompt = tokens(4)
        await door.admit(prompt)
        door.check(prompt)
        door.generate(prompt, guided(FOREIGN), "r")
        assert vocabularies.counted == 1
        door.generate(tokens(4), guided(FOREIGN), "r")
        assert vocabularies.counted == 2

    async def test_other_prompts_are_not_measured(
        self, door: GenerationDoor, vocabularies: Vocabularies
    ) -> None:
        CURRENT.set(None)
        await door.admit(tokens(99))
        as_route(QA)
        await door.admit(tokens(99))
        assert vocabularies.counted == 0

    def test_the_output_is_only_limited_by_the_target_and_other_networks(
        self, door: GenerationDoor
    ) -> None:
        as_route(FOREIGN, max_tokens=None)
        asked = guided(FOREIGN, max_tokens=90)
        door.generate(tokens(10), asked, "r")
        assert asked.max_tokens == 90
        as_route(QA, FOREIGN, max_tokens=None)
        asked = guided(QA, FOREIGN, max_tokens=90)
        door.generate(tokens(10), asked, "r")
        assert asked.max_tokens == 54

    def test_allowed_ids_without_a_counterpart_are_refused(self, door: GenerationDoor) -> None:
        as_route(QA, FOREIGN)
        for allowed in ([2, 4], [2, FAILURE_TOKEN], [513]):
            with pytest.raises(ApiError, match="no token that the value network can score"):
                door.generate(tokens(4), guided(QA, FOREIGN, allowed_token_ids=allowed), "r")
        door.generate(tokens(4), guided(QA, FOREIGN, allowed_token_ids=[2, 3]), "r")

    async def test_an_outgrown_context_ends_at_length(
        self, door: GenerationDoor, engine: Engine
    ) -> None:
        request = as_route(FOREIGN)
        engine.stop_reasons = [None, FAILURE_TOKEN]
        outputs = [output async for output in door.generate(tokens(4), guided(FOREIGN), "r")]
        first, last = (output.outputs[0] for output in outputs)
        assert (first.token_ids, first.finish_reason) == ([5, 6], None)
        assert (last.token_ids, last.finish_reason, last.stop_reason) == ([5], "length", None)
        assert request.error is None

    async def test_only_the_completion_that_outgrew_it_ends(
        self, engine: Engine, door: GenerationDoor
    ) -> None:
        async def generate(*_: Any, **__: Any) -> AsyncGenerator[Any, None]:
            grown = completion(FAILURE_TOKEN)
            grown.logprobs = ["of 5", "of the failure token"]
            outputs = [grown, completion(None, index=1)]
            yield SimpleNamespace(outputs=outputs, prompt_logprobs=None)

        door._generate = generate
        as_route(FOREIGN)
        (output,) = [output async for output in door.generate(tokens(4), guided(FOREIGN), "r")]
        assert [done.finish_reason for done in output.outputs] == ["length", None]
        assert [done.token_ids for done in output.outputs] == [[5], [5, 6]]
        assert output.outputs[0].logprobs == ["of 5"]

    @pytest.mark.parametrize("failing", ["foreign", "qa"])
    async def test_a_failure_is_no_outgrown_context(
        self, door: GenerationDoor, engine: Engine, workers: Workers, failing: str
    ) -> None:
        as_route(QA, FOREIGN)
        engine.stop_reasons = [FAILURE_TOKEN]
        states = {failing: {"state": "failed", "reason": "it threw"}}
        networks = (
            status("qa", **states.get("qa", {})),
            status("foreign", mapped=True, **states.get("foreign", {})),
        )
        workers.replies = [[report(*networks)]]
        with pytest.raises(Failed, match=f"{failing}@3f2a91c0 has failed: it threw"):
            async for _ in door.generate(tokens(4), guided(QA, FOREIGN), "r"):
                pass

    async def test_another_version_in_the_workers_is_a_failure(
        self, door: GenerationDoor, engine: Engine, workers: Workers
    ) -> None:
        as_route(FOREIGN)
        outputs = door.generate(tokens(4), guided(FOREIGN), "r")
        engine.stop_reasons = [FAILURE_TOKEN]
        workers.replies = [[report(status("foreign", mapped=True, version="00000000"))]]
        with pytest.raises(Failed, match="foreign@3f2a91c0 is not resident any more"):
            async for _ in outputs:
                pass
