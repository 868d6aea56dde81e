"""What both adapters share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal
from server.settings import Settings
from server.token_bytes import TokenBytes
from server.worker.history import ListedHistory
from server.worker.steering import Steering

KEY = "test"


def test_a_request_reads_no_file_that_may_be_gone_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are made where an exception would end the engine."""
    file = tmp_path / "token-bytes"
    TokenBytes.write(file, [b"a", b"b"])
    settings = Settings(networks={}, key=KEY, tokenizer_fingerprint="", token_bytes=file)
    monkeypatch.setattr(Settings, "load", lambda: settings)
    nothing = SimpleNamespace(revision=0, networks=list)
    monkeypatch.setattr("server.worker.steering.Residency", lambda *_: nothing)
    config: Any = SimpleNamespace()
    steering = Steering(config, torch.device("cpu"))
    file.unlink()
    choice = Choice((ChosenNetwork("qa", "1", 1.0),), 9, until_text="b")
    params = SamplingParams(extra_args={EXTRA_ARG: seal(choice, KEY)})
    row = steering.new_row(params, ListedHistory([5], [1]))
    assert row is not None and row.control is not None
    assert not row.control.advance(1, lambda _: [1])
