"""The real engine with guidance, offline, and what transformers says it should have sampled."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from vllm import LLM, RequestOutput, SamplingParams

from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal
from server.settings import Settings
from value_models.combine import add_value_logits
from value_models.manifest import tokenizer_fingerprint
from value_models.store import check_network
from value_models.vocabulary.reading import Reader

KEY = "test"


@dataclass
class Ask:
    """One request: greedy, by prompt token ids."""

    prompt: list[int]
    max_tokens: int
    network: str | None = None
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    also: dict[str, float] = field(default_factory=dict)
    """More networks, and their scales."""

    @property
    def scales(self) -> dict[str, float]:
        return {} if self.network is None else {self.network: self.scale} | self.also


class GuidedEngine:
    """vLLM's `LLM` with trimtab's plug points set, as `trimtab serve` sets them."""

    def __init__(self, target: Path, networks: dict[str, Path], **options: Any) -> None:
        settings = {
            name: options.pop(name)
            for name in ("value_memory_gb", "prefix_caching")
            if name in options
        }
        settings |= {"sources": options.pop("sources", {})}
        fingerprint = tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(target))
        Settings(networks=networks, key=KEY, tokenizer_fingerprint=fingerprint, **settings).export()
        folders = {name: check_network(path, name) for name, path in networks.items()}
        self.versions = {name: folder.version for name, folder in folders.items()}
        self.mapped = {
            name: Reader.load(folder.path, fingerprint)
            for name, folder in folders.items()
            if folder.manifest.tokenizer_fingerprint != fingerprint
        }
        self.target = _load(target)
        self.networks = {name: _load(path) for name, path in networks.items()}
        # The last id is made the failure token; `_load`ed models mask it in the same way.
        self.failure_token_id = self.target.config.vocab_size - 1
        self.llm = LLM(
            str(target),
            dtype="float32",
            logits_processors=["server.worker.processor:ValueGuidance"],
            worker_extension_cls="server.worker.extension.ValueNetworkWorker",
            **{"enforce_eager": True, **options},
        )
        self.call("attach")

    def call(self, method: str, *args: Any) -> dict[str, Any]:
        """Ask all workers, which must answer alike, but for times and the pace of a load."""
        replies: list[dict[str, Any]] = self.llm.collective_rpc(f"trimtab_{method}", args=args)
        assert not any("error" in reply for reply in replies), replies
        states = [reply.get("state", reply.get("refused")) for reply in replies]
        if method == "advance" and set(states) == {"building", "built"}:
            return replies[states.index("building")]
        assert len(set(states)) == 1, states
        return replies[0]

    def status(self) -> dict[str, dict[str, Any]]:
        return {network["name"]: network for network in self.call("networks")["networks"]}

    def begin(self, name: str, folder: Path, **changes: Any) -> dict[str, Any]:
        """Ask for the memory of a load, whose id is the name."""
        checked = check_network(folder, name)
        load = {
            "id": name,
            "name": name,
            "source": folder.name,
            "owner": "test",
            "num_parameters": checked.num_parameters,
            "kv_shape": list(checked.kv_shape),
            "vocab_size": checked.vocab_size,
            "max_context": checked.max_context,
            "mapped": False,
            "supersede": True,
        }
        return self.call("begin", load | changes)

    def load(self, name: str, folder: Path, mapped: bool = False) -> Iterator[None]:
        """Load a network as an API process would; each `next` is one call."""
        version = check_network(folder, name).version
        assert "refused" not in self.begin(name, folder, mapped=mapped)
        yield
        state = self.call("build", name, version, str(folder), False)["state"]
        yield
        while state == "building":
            reply = self.call("advance", name)
            state = reply["state"]
            yield
        if state == "built":
            state = "warming"
        while state == "warming":
            reply = self.call("warm_up", name)
            state = reply["state"]
            yield
        assert state in ("prepared", "ready"), reply
        self.call("commit", name)
        self.versions[name] = version
        self.networks[name] = _load(folder)

    def load_reference(self, folder: Path) -> PreTrainedModel:
        return _load(folder)

    def params(self, ask: Ask) -> SamplingParams:
        options: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": ask.max_tokens,
            "ignore_eos": True,
            "detokenize": False,
        } | ask.options
        if ask.network is not None:
            chosen = [ChosenNetwork(n, self.versions[n], s) for n, s in ask.scales.items()]
            choice = Choice(tuple(chosen), self.failure_token_id)
            options["extra_args"] = {EXTRA_ARG: seal(choice, KEY)}
            options["stop_token_ids"] = [self.failure_token_id]
        return SamplingParams(**options)

    def run(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """Run all requests together."""
        return self.llm.generate(
            [{"prompt_token_ids": ask.prompt} for ask in asks],
            [self.params(ask) for ask in asks],
            use_tqdm=False,
        )

    @torch.no_grad()
    def reference_logits(self, ask: Ask, sampled: Sequence[int]) -> torch.Tensor:
        """`target + scale * value` over the whole sequence, for each sampled token.

        A network of another vocabulary reads the whole sequence anew for each of them.

        Returns:
            float32 `[len(sampled), vocab_size]`
        """
        ids = torch.tensor([[*ask.prompt, *sampled]])
        guided = self.target(ids).logits[0, len(ask.prompt) - 1 : -1]
        for network, scale in ask.scales.items():
            guided[:, self.failure_token_id] = float("-inf")
            if network in self.mapped:
                for position, row in enumerate(guided):
                    history = [*ask.prompt, *sampled[:position]]
                    self._add_mapped(row[None], network, scale, history)
                continue
            value = self.networks[network](ids).logits[0, len(ask.prompt) - 1 : -1]
            guided[:, : value.shape[1]] += scale * value[:, : guided.shape[1]]
            guided[:, value.shape[1] :] = float("-inf")
        return guided

    def _add_mapped(
        self, logits: torch.Tensor, network: str, scale: float, history: list[int]
    ) -> None:
        reading = self.mapped[network].read(history)
        if not reading.waiting:
            value = self.networks[network](torch.tensor([list(reading.ids)])).logits[:, -1]
            columns = self.mapped[network].map.columns[-1 if reading.at_start else 0]
            add_value_logits(logits, value, scale, None, columns)

    def assert_exact(self, asks: Sequence[Ask], outputs: Sequence[RequestOutput]) -> None:
        """Every sampled token is the argmax of the reference, given those before it."""
        for ask, output in zip(asks, outputs, strict=True):
            for sampled in {tuple(completion.token_ids) for completion in output.outputs}:
                expected = self.reference_logits(ask, sampled).argmax(-1).tolist()
                assert list(sampled) == expected, (ask, output.outputs)
                assert len(sampled) == ask.max_tokens


@contextlib.contextmanager
def guided_engine(
    target: Path, networks: dict[str, Path], **options: Any
) -> Iterator[GuidedEngine]:
    """Start an engine and shut it down again."""
    engine = GuidedEngine(target, networks, **options)
    try:
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()


def one_context_gb(networks: dict[str, Path], max_model_len: int, block_size: int = 32) -> float:
    """The least memory for these networks, whose KV pools then hold one context each."""
    num_bytes = 0.0
    pools = {}
    for name, path in networks.items():
        network = check_network(path, name)
        num_bytes += 4.2 * network.num_parameters  # float32, and vocabularies are padded
        longest = min(network.max_context, 4 * max_model_len)
        blocks = -(-longest // block_size) + 1
        pools[network.kv_shape, longest] = blocks * block_size * 8 * math.prod(network.kv_shape)
    return (num_bytes + sum(pools.values())) / 2**30


def _load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # collective_rpc with functions
