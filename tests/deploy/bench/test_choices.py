from pathlib import Path

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear

from deploy.bench.checkpoints import Checkpoints
from deploy.bench.choices import (
    ASKED,
    IN_TARGETS_DTYPE,
    LOADED,
    LOOKED_UP,
    NAMES,
    ONEDNNS,
    VLLMS_ATTENTION,
    Steps,
    _add_in_two_passes,
    steps,
    undone,
)
from server.worker import guidance, precision
from tests.models import make_model, make_network
from tests.server.worker.alone import process_group
from value_models.combine import add_value_logits


def test_each_choice_can_be_undone_and_is_back_afterwards(tmp_path: Path) -> None:
    small = {"layers": 1, "max_position_embeddings": 128, "dtype": "bfloat16"}
    target = make_model(tmp_path / "target", **small)
    networks = {"guiding": make_network(tmp_path / "network", **small)}
    checkpoints = Checkpoints(target, networks, "bfloat16")
    with process_group(tmp_path), steps(checkpoints) as as_is:
        forward, model = as_is.model._forward, type(as_is.model)
        whole = model._make_room, forward.goes_on, guidance.add_value_logits, forward.eager
        for name in NAMES:
            with undone(name, as_is):
                changed = model._make_room, forward.goes_on, guidance.add_value_logits
                assert (*changed, forward.eager) != whole or name in LOADED, name
                assert as_is.run(2, 12, 0) > 0
            after = model._make_room, forward.goes_on, guidance.add_value_logits, forward.eager
            assert after == whole
        assert as_is.network.failure is None
        with steps(checkpoints, IN_TARGETS_DTYPE) as in_dtype:
            assert in_dtype.dtype == "bfloat16"
        assert as_is.model._is_direct
        with steps(checkpoints, VLLMS_ATTENTION) as with_vllms:
            assert not with_vllms.model._is_direct
        assert as_is.dtype == str(precision.network_dtype(torch.bfloat16, "cpu"))[6:]
        assert as_is.model._forward.bound is not None
        with steps(checkpoints, LOOKED_UP) as looking, steps(checkpoints) as another:
            assert looking.model._forward.bound is None
            assert another.model._forward.bound is not None
        assert not asks_for_its_head(as_is)
        with steps(checkpoints, ASKED) as asking:
            assert asks_for_its_head(asking)
        with steps(checkpoints, ONEDNNS) as on_onednn:
            has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
            if has_bfloat16 and not torch.cpu._is_amx_tile_supported():
                assert (kernel_of(as_is), kernel_of(on_onednn)) == ("packed_weight", "handler")


def asks_for_its_head(which: Steps) -> bool:
    head: object = which.model._forward.head
    return head == which.model._model.compute_logits


def kernel_of(which: Steps) -> str:
    """Return what vLLM's call of a layer's kernel holds on to."""
    (layer,) = (m for m in which.model._model.modules() if type(m) is QKVParallelLinear)
    names = set(layer.cpu_linear.__code__.co_freevars) & {"packed_weight", "handler"}
    return names.pop()


def test_two_passes_come_to_the_same() -> None:
    value, scale = torch.randn(3, 6), torch.tensor([[0.5], [1.0], [2.0]])
    one, two = torch.randn(2, 3, 8)[0].repeat(2, 1, 1)
    add_value_logits(one, value, scale)
    _add_in_two_passes(two, value, scale)
    torch.testing.assert_close(one, two)
