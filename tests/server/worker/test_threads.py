from collections.abc import Iterator

import pytest
import torch

from server.worker.threads import ALONE, threads_for


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("available", "num_rows", "used"),
    [(2, 1, 1), (2, 4, 1), (2, 5, 2), (3, 1, 1), (4, 1, 4), (1, 1, 1)],
)
@pytest.mark.usefixtures("threads")
def test_small_steps_on_small_machines_take_one_thread(
    available: int, num_rows: int, used: int
) -> None:
    torch.set_num_threads(available)
    with threads_for(ALONE // 4, num_rows):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == available


@pytest.mark.usefixtures("threads")
def test_a_step_that_throws_leaves_the_threads_as_they_were() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ValueError), threads_for(ALONE, 1):
        raise ValueError
    assert torch.get_num_threads() == 2
