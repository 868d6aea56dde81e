"""What the host knows of a row, when."""

from server.worker.history import ListedHistory


def test_a_token_that_is_still_on_the_device_ends_what_is_known() -> None:
    """vLLM's V1 runner holds its place with -1, and puts it there later."""
    output = [8, -1]
    history = ListedHistory([5, 6, 7], output)
    assert history.prompt_length == 3
    assert history.tokens(1, 5) == [6, 7, 8]
    assert history.awaited(0, 5) == [5, 6, 7, 8]
    output[1] = 9
    assert history.tokens(4, 5) == [9]
