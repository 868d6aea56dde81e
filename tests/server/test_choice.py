"""A sealed choice survives the journey, and nothing else passes for one."""

import pytest

from server.choice import Choice, ChosenNetwork, seal, unseal

CHOICE = Choice((ChosenNetwork("qa", "3f2a91c0", -0.1), ChosenNetwork("guard", "00000000", 8.0)), 7)


def test_unseal_returns_what_was_sealed() -> None:
    assert unseal(seal(CHOICE, "key"), "key") == CHOICE


@pytest.mark.parametrize(
    "forged",
    [
        seal(CHOICE, "another key"),
        seal(CHOICE, "key").replace("8.0", "9.0"),
        seal(CHOICE, "key")[1:],
        seal(CHOICE, "key").partition(".")[2],
        "",
        ".",
        "é.é",
        7,
        None,
        ["qa"],
    ],
)
def test_anything_else_is_refused(forged: object) -> None:
    with pytest.raises(ValueError, match="reserved"):
        unseal(forged, "key")
