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
from server.run_directory import EXPLAIN
from server.settings import Settings
from server.token_bytes import TokenBytes
from value_models.guided import Opinion, combine
from value_models.manifest import tokenizer_fingerprint
from value_models.store import check_network, model_path
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.tokens import Vocabulary

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
    choice: dict[str, Any] = field(default_factory=dict)
    """More of `Choice`: dynamic, floor, after, ..."""

    @property
    def scales(self) -> dict[str, float]:
        return {} if self.network is None else {self.network: self.scale} | self.also

    @property
    def sampling(self) -> dict[str, Any]:
        """Of vLLM's `SamplingParams`, what has nothing to do with guidance."""
        return {
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "detokenize": False,
        } | self.options


class Reference:
    """What transformers says should have been sampled, of a target and its networks."""

    def __init__(
        self, target: Path, networks: dict[str, Path], spelling: TokenBytes | None = None
    ) -> None:
        """`spelling`: of the target's tokens, for requests that end guidance at a text."""
        fingerprint = tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(target))
        folders = {name: check_network(path, name) for name, path in networks.items()}
        self.versions = {name: folder.version for name, folder in folders.items()}
        self.mapped = {
            name: Reader.load(folder.path, fingerprint)
            for name, folder in folders.items()
            if folder.manifest.tokenizer_fingerprint != fingerprint
        }
        self.spelling = spelling
        self.target = _load(target)
        self.networks = {name: _load_network(path) for name, path in networks.items()}
        # The last id is made the failure token; `_load`ed models mask it in the same way.
        self.failure_token_id = self.target.config.vocab_size - 1

    def params(self, ask: Ask) -> SamplingParams:
        options = ask.sampling
        if ask.network is not None:
            chosen = [ChosenNetwork(n, self.versions[n], s) for n, s in ask.scales.items()]
            choice = Choice(tuple(chosen), self.failure_token_id, **ask.choice)
            options["extra_args"] = {EXTRA_ARG: seal(choice, KEY)}
            options["stop_token_ids"] = [self.failure_token_id]
        return SamplingParams(**options)

    @torch.no_grad()
    def reference_logits(self, ask: Ask, sampled: Sequence[int]) -> torch.Tensor:
        """What guides each sampled token, computed over the whole sequence.

        Returns:
            float32 `[len(sampled), vocab_size]`
        """
        first = len(ask.prompt) - 1
        guided = self._combine(ask, [*ask.prompt, *sampled], first)[:-1]
        unguided = self.target(torch.tensor([[*ask.prompt, *sampled]])).logits[0, first:-1]
        for position in range(len(sampled)):
            if not self._guides(ask, sampled[:position]):
                guided[position] = unguided[position]
        if ask.scales:
            guided[:, self.failure_token_id] = float("-inf")
        return guided

    def reference_prompt_logits(self, ask: Ask) -> torch.Tensor:
        """Guided logits behind every token of the prompt, float32 `[len(prompt), vocab_size]`."""
        return self._combine(ask, ask.prompt, 0)

    @torch.no_grad()
    def _combine(self, ask: Ask, tokens: list[int], first: int) -> torch.Tensor:
        """Return guided logits behind the tokens from `first` on."""
        target = self.target(torch.tensor([tokens])).logits[0, first:]
        scales = {name: scale for name, scale in ask.scales.items() if scale}
        opinions = [self._opinions(name, scale, tokens, first) for name, scale in scales.items()]
        guided = [
            combine(
                logits,
                [of[position] for of in opinions if of[position] is not None],
                dynamic=ask.choice.get("dynamic", False),
                floor=ask.choice.get("floor", 0.0),
            )
            for position, logits in enumerate(target)
        ]
        return torch.stack(guided).float() if scales else target.clone()

    def _opinions(
        self, name: str, scale: float, tokens: list[int], first: int
    ) -> list[Opinion | None]:
        """Return what a network thinks behind each token from `first` on.

        One of another vocabulary reads the whole sequence anew for each of them.
        """
        network = self.networks[name]
        if name not in self.mapped:
            value, base = network.logits(tokens)
            return [
                Opinion(value[position], scale, None if base is None else base[position])
                for position in range(first, len(tokens))
            ]
        opinions: list[Opinion | None] = []
        for length in range(first + 1, len(tokens) + 1):
            reading = self.mapped[name].read(tokens[:length])
            if reading.waiting:
                opinions.append(None)
                continue
            value, base = network.logits(list(reading.ids))
            columns = self.mapped[name].map.columns[-1 if reading.at_start else 0]
            last = None if base is None else base[-1]
            opinions.append(Opinion(value[-1], scale, last, columns))
        return opinions

    def _guides(self, ask: Ask, generated: Sequence[int]) -> bool:
        """Whether the token behind these is guided."""
        after = list(ask.choice.get("after", ()))
        begins = [
            end
            for end in range(len(after), len(generated) + 1)
            if list(generated[end - len(after) : end]) == after
        ]
        if not begins:
            return False
        guided = generated[begins[0] :]
        until_tokens, until_text = (ask.choice.get(k) for k in ("until_tokens", "until_text"))
        if until_tokens is not None and len(guided) >= until_tokens:
            return False
        if until_text is None:
            return True
        assert self.spelling is not None
        return until_text.encode() not in self.spelling.text(guided)

    def assert_exact(self, asks: Sequence[Ask], outputs: Sequence[RequestOutput]) -> None:
        """Every sampled token is the argmax of the reference, given those before it."""
        wrong = []
        for ask, output in zip(asks, outputs, strict=True):
            for sampled in {tuple(completion.token_ids) for completion in output.outputs}:
                assert len(sampled) == ask.max_tokens, (ask, output)
                expected = self.reference_logits(ask, sampled)
                behind = expected.amax(-1) - expected[range(len(sampled)), list(sampled)]
                wrong += [(p, d, ask) for p, d in enumerate(behind.tolist()) if d]
        assert not wrong, "\n".join(
            f"token {position} is {behind:.3g} behind: {ask}" for position, behind, ask in wrong
        )


class GuidedEngine(Reference):
    """vLLM's `LLM` with trimtab's plug points set, as `trimtab serve` sets them."""

    def __init__(self, target: Path, networks: dict[str, Path], **options: Any) -> None:
        settings = {
            name: options.pop(name)
            for name in ("value_memory_gb", "prefix_caching")
            if name in options
        }
        settings |= {"sources": options.pop("sources", {}), "run_dir": options.pop("run_dir", None)}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
        fingerprint = tokenizer_fingerprint(tokenizer)
        spelling = None
        if settings["run_dir"] is not None:
            (settings["run_dir"] / EXPLAIN).mkdir()
            settings["token_bytes"] = settings["run_dir"] / "token-bytes"
            tokens = Vocabulary.of(tokenizer).tokens
            TokenBytes.write(settings["token_bytes"], tokens)
            spelling = TokenBytes.load(settings["token_bytes"])
            self.explanations = settings["run_dir"] / EXPLAIN
        Settings(networks=networks, key=KEY, tokenizer_fingerprint=fingerprint, **settings).export()
        super().__init__(target, networks, spelling)
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
            "models": [
                {
                    "role": model.role,
                    "num_parameters": model.num_parameters,
                    "kv_shape": list(model.kv_shape),
                    "vocab_size": model.vocab_size,
                    "max_context": model.max_context,
                }
                for model in checked.models
            ],
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
        self.networks[name] = _load_network(folder)

    def load_reference(self, folder: Path) -> "ReferenceNetwork":
        return _load_network(folder)

    def run(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """Run all requests together."""
        return self.llm.generate(
            [{"prompt_token_ids": ask.prompt} for ask in asks],
            [self.params(ask) for ask in asks],
            use_tqdm=False,
        )


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
        for model in check_network(path, name).models:
            num_bytes += 4.2 * model.num_parameters  # float32, and vocabularies are padded
            longest = min(model.max_context, 4 * max_model_len)
            blocks = -(-longest // block_size) + 1
            pools[model.kv_shape, longest] = blocks * block_size * 8 * math.prod(model.kv_shape)
    return (num_bytes + sum(pools.values())) / 2**30


@dataclass(frozen=True)
class ReferenceNetwork:
    """A network's models, in transformers."""

    models: dict[str, PreTrainedModel]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return value logits and those of the network's base, `[num_tokens, vocab_size]` each."""
        ids = torch.tensor([tokens])
        of = {role: model(ids).logits[0] for role, model in self.models.items()}
        if "expert" not in of:
            return of["value"], of.get("reference")
        covered = min(logits.shape[1] for logits in of.values())
        base = of["antiexpert"][:, :covered]
        return of["expert"][:, :covered] - base, base


def _load_network(path: Path) -> ReferenceNetwork:
    models = check_network(path, "network").models
    return ReferenceNetwork({model.role: _load(model_path(path, model.role)) for model in models})


def _load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # collective_rpc with functions
