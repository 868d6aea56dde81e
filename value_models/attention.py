"""Attention of transformers' models as their configurations say it."""

from typing import TypeVar

from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def attend_as_configured(model: Model) -> Model:
    """Have a model cap its attention logits if its configuration caps them, as Gemma 2's does.

    vLLM does. torch's kernels, which transformers takes by default, know no cap, and it is left out
    without a word: what is computed or trained like that is another model than the one served.

    Returns:
        The model.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model
