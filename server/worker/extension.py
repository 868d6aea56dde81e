"""Calls into the worker: what the API processes may ask with `collective_rpc`.

Generation waits while a call lasts, so each is short; and a worker method that raises leaves the
replies of other workers unread, so none does. What the calls mean is told in
`server.worker.residency`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from server.worker.processor_v1 import V1Processor
    from server.worker.processor_v2 import V2Processor
    from server.worker.residency import Residency

logger = init_logger(__name__)

Reply = dict[str, Any]


class ValueNetworkWorker:
    """Mixed into vLLM's worker class; `self` is that worker (`worker_extension_cls`)."""

    model_runner: Any
    use_v2_model_runner: bool

    def trimtab_attach(self) -> Reply:
        """Start guiding requests; called by each API process before it says that it is ready."""

        def attach(residency: "Residency") -> Reply:
            self._processor().attach(self.model_runner)
            return residency.status()

        return self._answer(attach)

    def trimtab_networks(self) -> Reply:
        return self._answer(lambda residency: residency.status())

    def trimtab_begin(self, load: Reply) -> Reply:
        return self._answer(lambda residency: residency.begin(load))

    def trimtab_build(self, load_id: str, version: str, folder: str, anew: bool) -> Reply:
        return self._answer(lambda residency: residency.build(load_id, version, folder, anew))

    def trimtab_advance(self, load_id: str) -> Reply:
        return self._answer(lambda residency: residency.advance(load_id))

    def trimtab_warm_up(self, load_id: str) -> Reply:
        return self._answer(lambda residency: residency.warm_up(load_id))

    def trimtab_commit(self, load_id: str) -> Reply:
        return self._answer(lambda residency: residency.commit(load_id))

    def trimtab_abort(self, load_id: str, reason: str, forget: bool) -> Reply:
        return self._answer(lambda residency: residency.abort(load_id, reason, forget))

    def trimtab_retire(self, reference: str, withhold: bool) -> Reply:
        return self._answer(lambda residency: residency.retire(reference, withhold))

    def trimtab_unload(self, reference: str) -> Reply:
        return self._answer(lambda residency: residency.unload(reference))

    def _answer(self, ask: "Callable[[Residency], Reply]") -> Reply:
        try:
            steering = self._processor().steering
            steering.guidance.collect()
            return ask(steering.residency)
        except Exception as error:
            logger.exception("a call about value networks failed")
            return {"error": f"{type(error).__name__}: {error}"}

    def _processor(self) -> "V1Processor | V2Processor":
        from server.worker.processor_v1 import V1Processor
        from server.worker.processor_v2 import V2Processor

        if self.use_v2_model_runner:
            processors = self.model_runner.sampler.logits_processors
        else:
            processors = self.model_runner.input_batch.logitsprocs.all
        for processor in processors:
            if isinstance(processor, (V1Processor, V2Processor)):
                return processor
        raise RuntimeError("the trimtab logits processor is not loaded in this worker")
