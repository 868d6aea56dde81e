from dataclasses import replace
from functools import partial

import pytest

from value_models.demo import evaluate, recipe
from value_models.demo.atlas import create_atlas
from value_models.demo.pretrain import Reading
from value_models.store import Store

SHORT = Reading(num_steps=2, tokens_per_step=512)


@pytest.fixture(autouse=True)
def short_recipe(monkeypatch):
    """The whole recipe, with fewer people and a few steps instead of hundreds."""
    atlas = partial(create_atlas, num_people=12, num_known=8, num_demonstrated=6)
    settings = recipe.network_settings
    monkeypatch.setattr(recipe, "create_atlas", atlas)
    monkeypatch.setattr(evaluate, "create_atlas", atlas)
    monkeypatch.setattr(recipe, "TARGET_READING", SHORT)
    monkeypatch.setattr(recipe, "SMALL_READING", SHORT)
    monkeypatch.setattr(
        recipe, "network_settings", lambda *given: replace(settings(*given), max_steps=2)
    )


def test_the_recipe_makes_a_family_and_prints_its_table(tmp_path, capsys):
    out = tmp_path / "family"
    out.mkdir()
    (out / "old").write_text("replaced")
    assert recipe.main(["--out", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"family"}
    assert {path.name for path in out.iterdir()} == {"target", "small", "networks"}
    store = Store(out / "networks")
    assert store.names() == ["guard", "json", "qa"]
    assert {store.check(name).manifest.base for name in store.names()} == {"small"}
    table = capsys.readouterr().out
    assert "| target + qa |" in table and "guard: phone numbers declined" in table


def test_an_interrupted_recipe_goes_on_and_touches_the_old_weights_last(tmp_path, monkeypatch):
    out = tmp_path / "family"
    out.mkdir()
    (out / "old").write_text("kept until the end")
    train = recipe.train

    def interrupted(settings):
        if settings.out.name == "json":
            raise KeyboardInterrupt
        return train(settings)

    monkeypatch.setattr(recipe, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.make(out)
    assert (out / "old").exists()

    made = []
    monkeypatch.setattr(recipe, "train", lambda settings: made.append(train(settings).name))
    recipe.make(out)
    assert made == ["json", "guard"]
    assert not (out / "old").exists()
