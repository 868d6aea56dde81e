"""A server whose networks have another vocabulary than its target."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.vocabularies import SHORT_PROMPT, Vocabularies
from server.lifecycle.catalog import Catalog
from tests.models import (
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.api.test_routes import (
    CHAT,
    COMPLETIONS,
    INPUTS,
    LIMITS,
    RESPONSES,
    answer,
    error,
    events_of,
    post,
    streamed_text,
    text_of,
)
from tests.server.conftest import SMALL
from tests.server.networks import Workers, report, status
from tests.server.serving import Served, serving
from value_models.manifest import tokenizer_fingerprint
from value_models.vocabulary.tokens import VocabularyError

BRIEF = 64
"""Tokens that the network "brief" reads."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`foreign` and `brief` read SentencePiece-style tokens, `qa` the target's own."""
    store = tmp_path_factory.mktemp("networks")
    own, other = make_tokenizer(), make_sentencepiece_tokenizer()
    make_mapped_network(store / "foreign", own, **SMALL, seed=1, tokenizer=other)
    make_mapped_network(
        store / "brief", own, **SMALL, seed=2, tokenizer=other, max_position_embeddings=BRIEF
    )
    make_network(store / "qa", **SMALL, seed=3)
    return store


@pytest.fixture(scope="module")
def server(networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("server")
    target = make_model(directory / "target", vocab_size=544)
    with serving(directory, target, "--value-network-dir", networks) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=None) as client:
        yield client


def test_the_ready_line_says_so(server: Served) -> None:
    lines = server.output.read_text().splitlines()
    mapped = {
        line.split("@")[0].split()[-1] for line in lines if "through a vocabulary map" in line
    }
    assert mapped == {"foreign", "brief"}


@pytest.mark.parametrize("path", INPUTS)
class TestEveryEndpoint:
    def test_it_is_steered(self, client: httpx.Client, path: str, server: Served) -> None:
        guided = post(client, path, model="foreign")
        assert guided.headers["x-value-networks"].startswith(server.references["foreign"])
        assert text_of(guided.json()) != text_of(answer(client, path))
        stream = post(client, path, model="foreign", stream=True)
        assert streamed_text(events_of(stream)) == text_of(guided.json())

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_prompt_that_it_cannot_read_is_refused(
        self, client: httpx.Client, path: str, stream: bool
    ) -> None:
        text = "The quick brown fox jumps over the lazy dog. " * 5
        prompt: dict[str, Any] = {
            CHAT: {"messages": [{"role": "user", "content": text}]},
            COMPLETIONS: {"prompt": text},
            RESPONSES: {"input": text},
        }[path]
        refused = error(post(client, path, model="brief", stream=stream, **prompt))
        assert refused["code"] == 400
        assert f"reads at most {BRIEF} tokens, but this prompt has" in refused["message"]
        assert "in that network's own vocabulary" in refused["message"]
        assert post(client, path, model="foreign", stream=stream, **prompt).is_success

    def test_an_outgrown_context_ends_at_length(self, client: httpx.Client, path: str) -> None:
        fields = {"model": "brief", LIMITS[path]: 300, "ignore_eos": True}
        whole = answer(client, path, **fields)
        text = text_of(whole)
        assert text
        if path == RESPONSES:
            assert whole["status"] == "incomplete"
            assert whole["incomplete_details"]["reason"] == "max_output_tokens"
        else:
            (choice,) = whole["choices"]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
            assert 0 < whole["usage"]["completion_tokens"] < 300
        events = events_of(post(client, path, stream=True, **fields))
        assert streamed_text(events) == text
        assert not any("error" in event for event in events)
        if path != RESPONSES:
            reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
            assert [reason for reason in reasons if reason] == ["length"]


def test_each_of_several_choices_ends_by_itself(client: httpx.Client) -> None:
    fields = {"model": "brief", "n": 3, "temperature": 1, "seed": 5, "ignore_eos": True}
    whole = answer(client, CHAT, **fields, max_tokens=300, logprobs=True)
    lengths = [len(choice["logprobs"]["content"]) for choice in whole["choices"]]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
    assert len(set(lengths)) > 1, "texts of one length would make this test blind"
    assert sum(lengths) == whole["usage"]["completion_tokens"]


def test_nothing_else_ends_with_it(client: httpx.Client) -> None:
    text_before = text_of(answer(client, CHAT, model="foreign"))
    answer(client, CHAT, model="brief", max_tokens=300, ignore_eos=True)
    assert text_of(answer(client, CHAT, model="foreign")) == text_before
    states = client.get("/health/value_networks").json()["networks"]
    assert set(states.values()) == {"ready"}


def test_allowed_ids_without_a_counterpart_are_refused(client: httpx.Client) -> None:
    allowed = {"allowed_token_ids": [540], "model": "foreign"}
    assert error(post(client, CHAT, **allowed))["param"] == "allowed_token_ids"
    tokenizer = make_tokenizer()
    allowed["allowed_token_ids"] += tokenizer("a").input_ids[-1:]
    assert text_of(answer(client, CHAT, **allowed)) == "a" * 12


def test_structured_outputs(client: httpx.Client) -> None:
    choice = {"structured_outputs": {"choice": ["Velenje", "Ljubljana"]}}
    assert text_of(answer(client, CHAT, model="foreign", **choice)) in ("Velenje", "Ljubljana")


class TestVocabularies:
    @pytest.fixture
    def workers(self, networks: Path) -> Workers:
        return Workers(
            [
                status(name, mapped=True, folder=str(networks / name))
                for name in ("foreign", "brief")
            ]
        )

    @pytest.fixture
    async def catalog(self, workers: Workers) -> Catalog:
        catalog = Catalog(workers.call)
        await catalog.attach()
        return catalog

    @pytest.fixture
    def vocabularies(self, catalog: Catalog) -> Vocabularies:
        return Vocabularies(catalog, tokenizer_fingerprint(make_tokenizer()))

    async def test_prompts_are_counted_in_the_networks_tokens(
        self, catalog: Catalog, vocabularies: Vocabularies
    ) -> None:
        foreign, brief = catalog.find("foreign"), catalog.find("brief")
        text = "Where was Ana Kovac born? 東京"
        ids = make_tokenizer()(text).input_ids
        expected = len(make_sentencepiece_tokenizer()(text).input_ids)
        assert vocabularies.count(foreign, ids) == expected
        assert await vocabularies.count_in_background(foreign, ids) == expected
        long = ids * SHORT_PROMPT
        counted = await vocabularies.count_in_background(brief, long)
        assert counted == vocabularies.count(brief, long)

    async def test_ids_are_scored_that_have_a_counterpart(
        self, catalog: Catalog, vocabularies: Vocabularies
    ) -> None:
        foreign = catalog.find("foreign")
        tokenizer = make_tokenizer()
        (letter,) = tokenizer("a", add_special_tokens=False).input_ids
        assert vocabularies.scores(foreign, letter)
        assert not vocabularies.scores(foreign, len(tokenizer))
        assert not vocabularies.scores(foreign, tokenizer.pad_token_id)
        assert not vocabularies.scores(foreign, -1)

    async def test_each_version_has_its_own_until_it_is_gone(
        self, catalog: Catalog, vocabularies: Vocabularies, workers: Workers, networks: Path
    ) -> None:
        (letter,) = make_tokenizer()("a", add_special_tokens=False).input_ids
        old = catalog.find("foreign")
        assert vocabularies.scores(old, letter)
        unmapped = status("foreign", version="00000001", order=1, folder=str(networks / "qa"))
        draining = old.model_dump() | {"state": "draining"}
        workers.replies = [[report(draining, unmapped)]]
        await catalog.refresh()
        with pytest.raises(VocabularyError):
            vocabularies.scores(catalog.find("foreign"), letter)
        assert vocabularies.scores(old, letter)

        workers.replies = [[report(unmapped)]]
        await catalog.refresh()
        gone = old.model_copy(update={"folder": str(networks / "no such folder")})
        with pytest.raises(VocabularyError):
            vocabularies.scores(gone, letter)
