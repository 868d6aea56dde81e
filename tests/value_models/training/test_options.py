import argparse
from pathlib import Path

import pytest

from value_models.training.options import STUDIED, add_arguments, settings_from
from value_models.training.settings import Settings

REQUIRED = ["--base", "base", "--data", "org/set:train", "--out", "store/tab"]


def parsed(*options: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from(parser.parse_args([*REQUIRED, *options]))


def test_without_options_the_settings_are_the_defaults_with_logs_beside_the_network():
    expected = Settings(
        base="base", data="org/set:train", out=Path("store/tab"), log_dir=Path("store/tab.logs")
    )
    assert parsed() == expected


def test_every_setting_has_an_option_unless_only_the_study_wants_it():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {action.dest for action in parser._actions} - {"help"}
    assert options == Settings.__dataclass_fields__.keys() - STUDIED


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ("--kind cascade+", "kind", "cascade+"),
        ("--from-scratch", "from_scratch", True),
        ("--norm l2 --norm-weight 1", "norm", "l2"),
        ("--max-steps 7", "max_steps", 7),
        ("--packing", "packing", True),
        ("--held-out h.jsonl", "held_out", Path("h.jsonl")),
        ("--log-dir runs", "log_dir", Path("runs")),
        ("--base-quantization 4bit", "base_quantization", "4bit"),
    ],
)
def test_options_become_settings(options, field, value):
    assert getattr(parsed(*options.split()), field) == value
