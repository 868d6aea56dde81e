"""Calls into the worker: what the API processes may ask with `collective_rpc`.

A worker method that raises leaves the replies of other workers unread, so these never do.
"""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from server.worker.processor import ValueGuidance

logger = init_logger(__name__)


class ValueNetworkWorker:
    """Mixed into vLLM's worker class; `self` is that worker (`worker_extension_cls`)."""

    model_runner: Any

    def trimtab_attach(self) -> dict[str, Any]:
        """Start guiding requests; called by each API process before it says that it is ready."""
        try:
            processor = self._value_guidance()
            processor.attach(self.model_runner)
            return {"networks": processor.guidance.status()}
        except Exception as error:
            logger.exception("trimtab_attach")
            return {"error": f"{type(error).__name__}: {error}"}

    def trimtab_networks(self) -> dict[str, Any]:
        """Describe the resident value networks; see `Guidance.status`."""
        try:
            return {"networks": self._value_guidance().guidance.status()}
        except Exception as error:
            logger.exception("trimtab_networks")
            return {"error": f"{type(error).__name__}: {error}"}

    def _value_guidance(self) -> "ValueGuidance":
        from server.worker.processor import ValueGuidance

        for processor in self.model_runner.input_batch.logitsprocs.all:
            if isinstance(processor, ValueGuidance):
                return processor
        raise RuntimeError("the trimtab logits processor is not loaded in this worker")
