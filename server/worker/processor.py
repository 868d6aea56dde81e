"""The logits processor that vLLM is given by name: the door to guidance' adapters.

vLLM has two model runners, with a processor interface each, and the name is given before it is
known which of them will run. vLLM also imports this class in the API processes, to validate
requests: nothing heavy at the top.
"""

from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

from server.choice import carried
from server.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from server.worker.processor_v1 import V1Processor
    from server.worker.processor_v2 import V2Processor


class ValueGuidance(V1LogitsProcessor, V2LogitsProcessor):
    """Passes for a processor of either interface; to call it makes the runner's adapter.

    Each runner's loader asks whether the class is a subclass of its own interface, and then calls
    it: V1 with `(vllm_config, device, is_pin_memory)`, V2 with `(vllm_config, req_states)`.
    """

    def __new__(cls, vllm_config: "VllmConfig", *given: Any) -> "V1Processor | V2Processor":
        if isinstance(given[0], LogitsProcRequestState):
            from server.worker.processor_v2 import V2Processor

            return V2Processor(vllm_config, *given)
        from server.worker.processor_v1 import V1Processor

        return V1Processor(vllm_config, *given)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Let only choices pass that a route of this server has resolved and signed.

        Raises:
            ValueError: a client filled the reserved key itself.
        """
        carried(sampling_params.extra_args, Settings.load().key)
