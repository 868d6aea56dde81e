"""When a worker samples a step's tokens: at once, where nothing is awaited.

vLLM's engine asks its workers twice for each step: for the logits, and, once grammars' masks of
them are ready, for the tokens. In between, workers wait. Where no request of the step has a
grammar there is no mask, and the engine takes tokens that come with the first answer, as other
models' outputs do. What that spares, `python -m deploy.bench price` says.

Reads vLLM 0.32's `EngineCore.step` and V1 `GPUModelRunner`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def sample_at_once(runner: "GPUModelRunner") -> None:
    """Have a V1 runner sample in the call that computes the logits, unless a mask is to come.

    An engine that asks for the next step before it has the last one's tokens (asynchronous
    scheduling, pipeline parallelism) asks for them in any case, and is left alone; one that
    transfers KV caches, too.
    """
    config = runner.vllm_config
    if (
        config.scheduler_config.async_scheduling
        or config.parallel_config.pipeline_parallel_size > 1
        or config.kv_transfer_config is not None
        or config.ec_transfer_config is not None
    ):
        return
    execute = runner.execute_model

    def execute_model(scheduler_output: "SchedulerOutput", *args: Any, **options: Any) -> Any:
        output = execute(scheduler_output, *args, **options)
        if runner.execute_model_state is None or scheduler_output.has_structured_output_requests:
            return output  # nothing was computed that could be sampled from, or a mask is to come
        return runner.sample_tokens(None)

    runner.execute_model = execute_model
