"""vLLM's V2 model runner on a CPU, where Triton, which its kernels are written in, is not.

It is the runner itself that follows requests, puts batches together, samples and keeps state, with
its own sampler and prompt scores. Its kernels are written out here in plain torch, as far as these
tests need them: greedy, without penalties or drafts. Left out are streams, graphs, and the target's
forward, which transformers computes; what the runner takes for hidden states are logits.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedModel
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import Request
from vllm.v1.worker.gpu import buffer_utils, model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample import prompt_logprob, sampler
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from server.plugin import LOGITS_PROCESSOR
from server.settings import Settings
from server.token_bytes import TokenBytes
from server.worker.extension import ValueNetworkWorker
from server.worker.processor_v2 import V2Processor
from tests.server.worker.engine import KEY, Ask, Reference
from value_models.manifest import tokenizer_fingerprint
from value_models.vocabulary.tokens import Vocabulary, load_tokenizer

CPU = torch.device("cpu")


class CPURunner(GPUModelRunner):
    """The runner, made as its own `__init__` and `load_model` do, of what these tests use."""

    def __init__(self, vllm_config: VllmConfig, target: PreTrainedModel) -> None:
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        self.vllm_config, self.model_config = vllm_config, model
        self.parallel_config = vllm_config.parallel_config
        self.device, self.max_num_reqs = CPU, scheduler.max_num_seqs
        self.vocab_size, self.decode_query_len = model.get_vocab_size(), 1
        self.is_last_pp_rank, self.use_pp = True, False
        self.pooling_runner = self.pp_handler = self.encoder_cache = None
        self.adaptive_verification = self.kv_block_zeroer = self.pcp_manager = None
        self.fast_prefill = self.batch_sharder = self.rejection_sampler = None
        self.block_tables = Mock()
        self.model_state = Mock(num_new_sampled_tokens_per_step=1)
        self.lora_state = LoraState(self.max_num_reqs)
        self.req_states = RequestState(
            max_num_reqs=self.max_num_reqs,
            max_model_len=model.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            num_speculative_steps=0,
            vocab_size=self.vocab_size,
            device=CPU,
        )
        self.input_buffers = InputBuffers(self.max_num_reqs, scheduler.max_num_batched_tokens, CPU)
        self.prompt_logprobs_worker = PromptLogprobsWorker(self.max_num_reqs, CPU)
        processors = build_custom_logits_processors(
            vllm_config, self.req_states, False, [LOGITS_PROCESSOR]
        )
        self.sampler = Sampler(
            vllm_config,
            self.max_num_reqs,
            self.vocab_size,
            CPU,
            self.req_states,
            custom_logits_processors=processors,
        )
        self.model = SimpleNamespace(compute_logits=torch.clone)
        self._target = target

    def run(self, scheduled: SchedulerOutput) -> tuple[InputBatch, Any, dict[str, LogprobsTensors]]:
        """Do one step, as `execute_model` and `sample_tokens` do.

        Returns:
            The batch, what the sampler returned, and prompt scores that are ready.
        """
        self.finish_requests(scheduled)
        self.add_requests(scheduled)
        self.update_requests(scheduled)
        state, _ = self.gather_batch_req_state(scheduled, dummy_run=False)
        uncaptured = BatchExecutionDescriptor(CUDAGraphMode.NONE, state.num_tokens, None)
        batch = self.prepare_inputs(scheduled, state, uncaptured, 0)
        hidden_states = self._forward(batch)
        output, num_sampled, num_rejected = self.sample(hidden_states, batch, None)
        scores = self.prompt_logprobs_worker.compute_prompt_logprobs(
            self.model.compute_logits,
            hidden_states,
            batch,
            self.req_states.all_token_ids.gpu,
            self.req_states.num_computed_tokens.gpu,
            self.req_states.prompt_len.np,
        )
        scores |= self.prompt_logprobs_worker.compute_prompt_token_id_logprobs(
            self.model.compute_logits, hidden_states, batch, self.req_states.prompt_len.np
        )
        self.postprocess_sampled(
            batch.idx_mapping,
            output.sampled_token_ids,
            num_sampled,
            num_rejected,
            batch.query_start_loc,
        )
        return batch, output, scores

    def _forward(self, batch: InputBatch) -> torch.Tensor:
        logits = []
        for index, slot in enumerate(batch.idx_mapping_np.tolist()):
            length = int(batch.seq_lens[index])
            first, last = batch.query_start_loc_np[index : index + 2].tolist()
            tokens = self.req_states.all_token_ids.gpu[slot, :length].long()
            start = length - (last - first)
            assert torch.equal(batch.input_ids[first:last].long(), tokens[start:])
            logits.append(self._target(tokens[None]).logits[0, start:])
        return torch.cat(logits)


class V2Engine(Reference):
    """A V2 runner with value networks, scheduled by the test: which request gets how many tokens.

    Attributes:
        output: tokens of each request, by name.
        scores: log-probabilities of each prompt that asked, by name.
        logits: what the sampler was called with in the last step, by name.
    """

    def __init__(
        self, config: VllmConfig, target: Path, networks: dict[str, Path], run_dir: Path
    ) -> None:
        tokenizer = load_tokenizer(target)
        file = run_dir / "token-bytes"
        TokenBytes.write(file, Vocabulary.of(tokenizer).tokens)
        super().__init__(target, networks, TokenBytes.load(file))
        Settings(
            networks=networks,
            key=KEY,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            run_dir=run_dir,
            token_bytes=file,
            value_memory_gb=0.1,
        ).export()
        self.runner = CPURunner(config, self.target)
        self.worker = ValueNetworkWorker()
        self.worker.model_runner, self.worker.use_v2_model_runner = self.runner, True
        self.output: dict[str, list[int]] = {}
        self.scores: dict[str, Any] = {}
        self.logits: dict[str, torch.Tensor] = {}
        self._asks: dict[str, Ask] = {}
        self._requests: dict[str, Request] = {}
        self._computed: dict[str, int] = {}  # of those that have a slot
        self._leaving: set[str] = set()
        self._preempted: set[str] = set()

    @property
    def processor(self) -> V2Processor:
        processor = self.runner.sampler.logits_processors[-1]
        assert isinstance(processor, V2Processor)
        return processor

    def slot(self, name: str) -> int:
        return int(self.runner.req_states.req_id_to_index[name])

    def attach(self) -> None:
        reply = self.worker.trimtab_attach()
        assert "error" not in reply, reply

    def ask(self, name: str, ask: Ask) -> None:
        self._asks[name] = ask
        self._requests[name] = Request(name, ask.prompt, self.params(ask), None)
        self.output[name] = []

    def step(self, *names: str, **chunks: int) -> None:
        """Run one step of these requests: all tokens of a prompt that are left, or so many."""
        tokens = {
            name: chunks.get(name, self._requests[name].num_tokens - self._computed.get(name, 0))
            for name in [*names, *chunks]
        }
        batch, output, scores = self._run(tokens)
        self.scores |= scores
        sampled = output.sampled_token_ids[:, 0].tolist()
        for name, token in zip(batch.req_ids, sampled, strict=True):
            self._computed[name] += tokens[name]
            if self._computed[name] == self._requests[name].num_tokens:
                self._requests[name].append_output_token_ids(token)
                self.output[name].append(token)

    def finish(self, *names: str) -> None:
        """Run requests to their end, together. They leave with the next step."""
        while going := [n for n in names if len(self.output[n]) < self._asks[n].max_tokens]:
            self.step(*going)
        for name in names:
            self.leave(name)

    def leave(self, name: str) -> None:
        """Have a request ended in the next step."""
        del self._computed[name]
        self._leaving.add(name)

    def preempt(self, name: str) -> None:
        """Have a request lose its slot in the next step; it comes back when it is scheduled."""
        del self._computed[name]
        self._preempted.add(name)

    def assert_exact_all(self) -> None:
        """Every token of every request is what transformers says."""
        outputs: list[Any] = [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.output[name])])
            for name in self._asks
        ]
        self.assert_exact(list(self._asks.values()), outputs)

    def _run(self, tokens: Mapping[str, int]) -> tuple[InputBatch, Any, dict[str, Any]]:
        scheduled = SchedulerOutput.make_empty()
        scheduled.finished_req_ids, self._leaving = self._leaving, set()
        scheduled.preempted_req_ids, self._preempted = self._preempted, set()
        cached = CachedRequestData.make_empty()
        for name in tokens:
            request = self._requests[name]
            if name in self._computed:
                cached.req_ids.append(name)
                cached.num_computed_tokens.append(self._computed[name])
                cached.num_output_tokens.append(request.num_output_tokens)
                cached.new_block_ids.append(None)
            else:
                self._computed[name] = 0
                scheduled.scheduled_new_reqs.append(
                    NewRequestData.from_request(request, (), list(request.all_token_ids))
                )
        scheduled.scheduled_cached_reqs = cached
        scheduled.num_scheduled_tokens = dict(tokens)
        scheduled.total_num_scheduled_tokens = sum(tokens.values())
        return self.runner.run(scheduled)


@contextlib.contextmanager
def v2_engine(
    config: VllmConfig, target: Path, networks: dict[str, Path], run_dir: Path
) -> Iterator[V2Engine]:
    """Make a runner that has just loaded: nothing is guided before `attach`."""
    with (
        pytest.MonkeyPatch.context() as patch,
        set_current_vllm_config(config),
        torch.inference_mode(),
    ):
        _write_out_kernels(patch)
        engine = V2Engine(config, target, networks, run_dir)
        try:
            yield engine
        finally:
            for network in engine.processor.steering.residency.networks():
                network.free()


def _write_out_kernels(patch: pytest.MonkeyPatch) -> None:
    # Unified addressing is claimed for the CPU, but memory cannot be pinned without a device.
    patch.setattr(buffer_utils, "is_uva_available", lambda: False)
    patch.setattr(buffer_utils.StagedWriteTensor, "apply_write", _apply_write)
    for module, kernels in (
        (
            model_runner,
            [
                prepare_prefill_inputs,
                prepare_pos_seq_lens,
                combine_sampled_and_draft_tokens,
                post_update,
            ],
        ),
        (sampler, [get_num_sampled_and_rejected, gumbel_sample, compute_topk_scores]),
        (
            prompt_logprob,
            [get_prompt_logprobs_token_ids, compute_topk_scores, compute_token_logprobs],
        ),
    ):
        for kernel in kernels:
            assert hasattr(module, kernel.__name__)
            patch.setattr(module, kernel.__name__, kernel)


def _apply_write(self: buffer_utils.StagedWriteTensor) -> None:
    rows, begin = self.gpu.view(self.num_rows, -1), 0
    places = zip(
        self._staged_write_indices,
        self._staged_write_starts,
        self._staged_write_cu_lens,
        strict=True,
    )
    for index, start, end in places:
        contents = torch.tensor(self._staged_write_contents[begin:end], dtype=self.dtype)
        rows[index, start : start + len(contents)] = contents
        begin = end
    self.clear_staged_writes()


def prepare_prefill_inputs(
    input_ids: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    prefill_len: torch.Tensor,
    num_computed_tokens: torch.Tensor,
) -> None:
    for index, slot in enumerate(idx_mapping.tolist()):
        computed = int(num_computed_tokens[slot])
        if computed < prefill_len[slot]:
            first, last = query_start_loc[index : index + 2].tolist()
            tokens = all_token_ids[slot, computed : computed + last - first]
            input_ids[first:last] = tokens


def prepare_pos_seq_lens(
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    pos: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    seq_lens.zero_()
    for index, slot in enumerate(idx_mapping.tolist()):
        first, last = query_start_loc[index : index + 2].tolist()
        computed = int(num_computed_tokens[slot])
        seq_lens[index] = computed + last - first
        pos[first:last] = torch.arange(computed, computed + last - first)


def combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor,
    idx_mapping: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_len: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    last = query_start_loc[1 : len(idx_mapping) + 1].long() - 1
    decoding = seq_lens[: len(idx_mapping)] > prefill_len[idx_mapping]
    input_ids[last[decoding]] = last_sampled_tokens[idx_mapping[decoding], 0].int()
    return last


def post_update(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor,
    sampled_tokens: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
) -> None:
    for index, slot in enumerate(idx_mapping.tolist()):
        if num_sampled[index]:
            token = int(sampled_tokens[index, 0])
            last_sampled_tokens[slot] = token
            all_token_ids[slot, int(total_len[slot])] = token
            output_bin_counts[slot, token] += 1
            total_len[slot] += 1
        num_computed_tokens[slot] += query_start_loc[index + 1] - query_start_loc[index]


def get_num_sampled_and_rejected(
    num_sampled: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    prefill_len: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_sampled[seq_lens[: len(idx_mapping)] < prefill_len[idx_mapping]] = 0
    return num_sampled, torch.zeros_like(num_sampled)


def gumbel_sample(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return logits.argmax(-1)


def compute_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, token_ids)


def compute_topk_scores(
    logits: torch.Tensor, num_logprobs: int, sampled_token_ids: torch.Tensor, *_: Any, **__: Any
) -> LogprobsTensors:
    sampled = sampled_token_ids[:, None]
    token_ids = torch.cat((sampled, logits.topk(num_logprobs, dim=-1).indices), dim=1)
    ranks = (logits >= logits.gather(-1, sampled)).sum(-1)
    return LogprobsTensors(token_ids, compute_token_logprobs(logits, token_ids), ranks)


def get_prompt_logprobs_token_ids(
    num_tokens: int,
    query_start_loc: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    all_token_ids: torch.Tensor,
) -> torch.Tensor:
    token_ids = torch.empty(num_tokens, dtype=torch.int64)
    for index, slot in enumerate(idx_mapping.tolist()):
        first, last = query_start_loc[index : index + 2].tolist()
        computed = int(num_computed_tokens[slot])
        next_ids = all_token_ids[slot, computed + 1 : computed + 1 + last - first]
        token_ids[first : first + len(next_ids)] = next_ids
    return token_ids


def dummy_batch(runner: GPUModelRunner, num_reqs: int) -> tuple[torch.Tensor, InputBatch]:
    """Return what vLLM's profiling calls the sampler with."""
    batch = InputBatch.make_dummy(num_reqs, num_reqs, runner.input_buffers)
    return torch.randn(num_reqs, runner.vocab_size), batch
