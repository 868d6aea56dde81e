from dataclasses import replace
from pathlib import Path

import pytest

from value_models.store import NetworkError
from value_models.training import TrainingError
from value_models.training.settings import Settings

SETTINGS = Settings(base="base", data=Path("a.jsonl"), out=Path("tab"))


def test_the_defaults_are_sound():
    SETTINGS.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "contrast"}, "kind 'contrast'.*residual, cascade"),
        ({"kind": "cascade", "reference": True}, "only a network of kind residual"),
        ({"objective": "kl"}, "objective 'kl'.*cross_entropy"),
        ({"norm": "l3"}, "norm 'l3'.*l1, l2"),
        ({"precision": "float16"}, "precision"),
        ({"dtype": "int8"}, "dtype"),
        ({"base_quantization": "2bit"}, "base quantization"),
        ({"base_device_map": "balanced"}, "base device map"),
        ({"default_scale": 8.5}, "default scale"),
        ({"default_scale": float("nan")}, "default scale"),
        ({"beta": 0.0}, "beta"),
        ({"held_out_share": 1.0}, "held-out share"),
        ({"epochs": 0.0}, "epochs 0.0: it must be above 0"),
        ({"max_steps": 0}, "max steps 0: it must be at least 1"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("inf")}, "learning rate inf.*finite"),
        ({"batch_size": 0}, "batch size"),
        ({"gradient_accumulation": 0}, "gradient accumulation"),
        ({"max_length": 0}, "max length"),
        ({"save_steps": 0}, "save steps"),
        ({"held_out_steps": 0}, "held-out steps"),
        ({"warmup_share": 1.0}, "warmup share"),
        ({"warmup_share": -0.1}, "warmup share"),
        ({"weight_decay": -0.1}, "weight decay"),
        ({"norm_weight": float("nan")}, "norm weight"),
        ({"kl_weight": float("inf")}, "kl weight"),
        ({"held_out_share": 0.1, "held_out": Path("b.jsonl")}, "not both"),
    ],
)
def test_what_no_run_could_satisfy_is_refused(change, message):
    with pytest.raises(TrainingError, match=message):
        replace(SETTINGS, **change).check()


def test_a_name_that_no_request_could_say_is_refused_before_training():
    with pytest.raises(NetworkError, match="no name for a value network"):
        replace(SETTINGS, out=Path("cascade+")).check()


def test_the_record_names_no_place(tmp_path):
    (tmp_path / "base").mkdir()
    places = {"base": str(tmp_path / "base"), "log_dir": tmp_path, "held_out": tmp_path}
    recorded = replace(SETTINGS, **places).recorded()
    assert str(tmp_path) not in str(recorded)
    assert recorded["start"] == "base"
