"""A resident value network: one model beside the target, or two whose logits make one opinion."""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig

from server.worker.blocks import BlockPool, KVShape, TokensOf
from server.worker.compilation import CompiledForwards
from server.worker.loading import Pieces
from server.worker.model import NetworkModel, Rows
from server.worker.translation import Readers, Translator
from value_models.fusion import divergence
from value_models.store import NetworkFolder, Role


class Scores(NamedTuple):
    """A network's opinion on some positions."""

    value: torch.Tensor
    """Float `[num_positions, vocab_size]`: a residual network's logits in their own dtype, or
    float32 expert minus antiexpert, over the ids that both have a logit for."""
    distances: torch.Tensor | None
    """Float32 `[num_wanted]`, nats: KL(softmax(expert) || softmax(base)) over the ids that both
    models have, at the positions where it was wanted, in order; None: it was not wanted."""


class ValueNetwork:
    """One value network in a worker.

    Made by `build`, then bound to pools of KV blocks by `bind`; from then on it scores rows. Its
    models read the same tokens, but each keeps a table of its own: a reference reads the rows that
    want distances and no others.

    Attributes:
        failure: why it must not be used any more, or None. Set once, never cleared.
        translator: reads rows for a network of another vocabulary than the target's, or None.
        models: "value"; "value" and "reference"; or "expert" and "antiexpert".
        knows_base: whether it can tell distances.
        max_context: tokens of the longest sequence that all of its models can read.
        weights_bytes: memory of the weights in this worker.
        seconds: of decoding steps that were spent on it.
        last_used: when rows were last scored, Unix time; None: never.
    """

    @classmethod
    def build(
        cls,
        folder: NetworkFolder,
        target_config: VllmConfig,
        target_fingerprint: str,
        readers: Readers,
        forwards: CompiledForwards,
        may_compile: bool,
        device: torch.device,
    ) -> Generator[None, None, "ValueNetwork"]:
        """Load a network in short pieces; the generator returns it.

        Args:
            folder: checked by `value_models.store`; not read any more once this has ended.
            target_config: the engine's own configuration; it is not changed.
            target_fingerprint: of the target's tokenizer; the folder fits it.
            readers: all of the worker's.
            forwards: those compiled in the worker; `bind` may add this network's.
            may_compile: take the seconds to compile, if no network of this architecture has.
            device: where the target's logits are.

        Raises:
            ValueError: the folder's map for this target cannot be used, or one of its models; see
                `NetworkModel.build`.
        """
        translator = None
        if folder.manifest.tokenizer_fingerprint != target_fingerprint:
            translator = Translator(readers.load(folder.path, target_fingerprint), device)
            yield
        models: dict[Role, NetworkModel] = {}
        translated = translator is not None
        try:
            for model in folder.models:
                models[model.role] = yield from NetworkModel.build(
                    model, target_config, translated, forwards, may_compile, device
                )
            return cls(folder, models, translator)
        except BaseException:  # also when it is not to be loaded any more
            for built in models.values():
                built.free()
            raise

    def __init__(
        self,
        folder: NetworkFolder,
        models: dict[Role, NetworkModel],
        translator: Translator | None,
    ) -> None:
        self.folder = folder
        self.models = models
        self.translator = translator
        self.failure: str | None = None
        self.seconds = 0.0
        self.last_used: float | None = None
        self.max_context = min(model.longest for model in models.values())
        self.weights_bytes = sum(model.weights_bytes for model in models.values())
        self.knows_base = len(models) == 2

    def __str__(self) -> str:
        return f"{self.folder.name}@{self.folder.version}"

    @property
    def num_tokens(self) -> int:
        """Tokens that its models have computed."""
        return sum(model.num_tokens for model in self.models.values())

    @property
    def kv_shapes(self) -> list[KVShape]:
        """What pools it takes blocks from; models of one shape share one."""
        return list(dict.fromkeys(model.kv_shape for model in self.models.values()))

    @property
    def pools(self) -> list[BlockPool]:
        """Where its KV blocks are, the first model's first; none before it is bound."""
        pools = {id(model.pool): model.pool for model in self.models.values()}
        return [pool for pool in pools.values() if pool is not None]

    def bind(
        self, pools: dict[KVShape, BlockPool], forwards: CompiledForwards, load_id: int
    ) -> Pieces:
        """Take KV blocks, then run each model once or twice, in pieces.

        Args:
            pools: for each of `kv_shapes` one that holds `max_context` tokens. That is enough for
                two models too: they run one after the other, and take blocks from each other.
            forwards: as given to `build`.
            load_id: unique in the worker's life, so that no cached block outlives its network.

        Raises:
            RuntimeError: vLLM's kernels cannot run a model's shape.
        """
        for role, model in self.models.items():
            model.bind(pools[model.kv_shape], self.max_context, f"{self}/{role}#{load_id}")
        for model in self.models.values():
            yield from model.warm_up(forwards)

    def free(self) -> None:
        """Give back weights and KV blocks. The network must not be used any more."""
        for model in self.models.values():
            model.free()

    def fail(self, reason: str) -> None:
        """Mark the network as failed, for good."""
        self.failure = reason
        for pool in self.pools:
            pool.tainted = True

    def release(self, slot: int) -> None:
        """Forget a slot's history. Its full blocks stay in the prefix cache."""
        for model in self.models.values():
            model.release(slot)

    def rewind(self, slot: int, length: int) -> None:
        """Compute a slot's history anew behind its first `length` tokens: they were rewritten."""
        for model in self.models.values():
            model.rewind(slot, length)

    def read(self, rows: Rows) -> None:
        """Bring rows' histories into the KV cache, for steps to come.

        A reference reads with the rows that want distances, when they do.
        """
        for role, model in self.models.items():
            if role != "reference":
                model.read(rows)

    def score(self, rows: Rows, distances_of: np.ndarray | None = None) -> Scores:
        """Say what the network thinks of each row's next token.

        Args:
            rows: those that it steers in this step.
            distances_of: bool `[num_rows]`, the rows that want to know how far the expert is from
                the base; only of a network that knows its base.
        """
        wanted = distances_of is not None and bool(distances_of.any())
        some: slice | torch.Tensor = slice(None)
        if wanted and not distances_of.all():
            some = torch.from_numpy(np.flatnonzero(distances_of))
        if "value" in self.models:
            value = self.models["value"].score(rows)
            if not wanted:
                return Scores(value, None)
            read = rows if isinstance(some, slice) else rows.at(some)
            return Scores(value, _distances(self.models["reference"].score(read), value[some]))
        expert, base = _in_common(
            self.models["expert"].score(rows), self.models["antiexpert"].score(rows)
        )
        return Scores(expert - base, divergence(expert[some], base[some]) if wanted else None)

    def score_history(
        self, slot: int, tokens: TokensOf, start: int, stop: int, with_distances: bool
    ) -> Scores:
        """Say what the network thinks of what follows each of a row's tokens.

        The positions are those from `start` to before `stop`; their number decides how much memory
        it takes. For the arguments see `NetworkModel.score_history`.
        """
        span = slot, tokens, start, stop
        if "value" in self.models:
            value = self.models["value"].score_history(*span)
            if not with_distances:
                return Scores(value, None)
            return Scores(value, _distances(self.models["reference"].score_history(*span), value))
        expert, base = _in_common(
            self.models["expert"].score_history(*span),
            self.models["antiexpert"].score_history(*span),
        )
        return Scores(expert - base, divergence(expert, base) if with_distances else None)


def _distances(reference: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return how far value logits move their reference: float32 `[num_rows]`, nats."""
    reference, value = _in_common(reference, value)
    return divergence(reference + value, reference)


def _in_common(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 logits of the ids that both have: either vocabulary may be padded."""
    covered = min(first.shape[-1], second.shape[-1])
    return first[:, :covered].float(), second[:, :covered].float()
