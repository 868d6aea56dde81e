import json
import random
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.models import make_model
from value_models.store import check_network
from value_models.training import TrainingError
from value_models.training.resume import STATE_FILE, State
from value_models.training.settings import Settings
from value_models.training.train import train

NUM_KILLS = 3


@pytest.fixture
def settings(tmp_path) -> Settings:
    base = make_model(tmp_path / "base", hidden_size=32, heads=1)
    config = json.loads((base / "config.json").read_text())
    # Dropout: the random numbers of training have to go on where they were, too.
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    data = tmp_path / "demonstrations.jsonl"
    lines = [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}."}]}
        for n in range(60)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Settings(
        base=str(base),
        data=data,
        out=tmp_path / "tab",
        max_steps=30,
        batch_size=2,
        gradient_accumulation=2,
        packing=True,
        max_length=48,
        held_out_share=0.1,
        held_out_steps=4,
        learning_rate=3e-3,
        dtype="float32",
        save_steps=3,
    )


def steps_saved(settings: Settings) -> int:
    folder = settings.out.with_name(settings.out.name + ".training")
    found = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")]
    return max(found, default=0)


def test_killed_at_random_moments_it_ends_as_if_undisturbed(settings):
    """With SIGKILL, soon after it began to write a checkpoint: often while it still does."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["value_models.training.train"])
    settings = replace(settings, reference=True)
    undisturbed = replace(settings, out=settings.out.with_name("undisturbed"))

    def start(settings: Settings) -> BaseProcess:
        process = context.Process(target=train, args=(settings,))
        process.start()
        return process

    def finish(settings: Settings) -> None:
        # Never in this process: it may have fewer threads, and on some CPUs other sums by that.
        process = start(settings)
        process.join()
        assert process.exitcode == 0

    finish(undisturbed)
    moments = []
    for _ in range(NUM_KILLS):
        begun = steps_saved(settings)
        process = start(settings)
        while process.is_alive() and steps_saved(settings) == begun:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        moments.append(steps_saved(settings))
    assert 0 < moments[0] < 30, moments  # else nothing was tried
    finish(settings)
    for file in ("model.safetensors", "value_network.json", "reference/model.safetensors"):
        assert (settings.out / file).read_bytes() == (undisturbed.out / file).read_bytes(), moments
    assert not settings.out.with_name("tab.training").exists()


def test_killed_while_it_tidied_up_it_has_finished(settings):
    network = train(replace(settings, max_steps=1))
    state = State(replace(settings, max_steps=1, precision="float32"))
    state.claim(["some"])
    (state.folder / "checkpoint-1").mkdir()
    assert train(replace(settings, max_steps=1)) == network
    assert not state.folder.exists()
    with pytest.raises(TrainingError, match="already there"):
        train(replace(settings, max_steps=1))


def test_a_network_that_another_run_wrote_is_not_taken_for_its_own(settings):
    train(replace(settings, max_steps=1))
    State(replace(settings, max_steps=2, precision="float32")).claim(["some"])
    with pytest.raises(TrainingError, match="already there"):
        train(replace(settings, max_steps=1))
    assert check_network(settings.out).manifest.training["steps"] == 1


def test_killed_while_it_claimed_its_folder_it_begins_again(settings):
    state = State(settings)
    state.folder.mkdir()
    (state.folder / f"{STATE_FILE}.123").write_text('{"base": ')
    state.claim(["some"])
    State(settings).claim(["some"])
    with pytest.raises(TrainingError, match="other settings or data"):
        State(settings).claim(["other"])


def test_a_folder_of_somebody_is_left_alone(settings):
    state = State(settings)
    own = state.folder / "checkpoint-1" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(TrainingError, match="no folder of an unfinished run"):
        state.claim(["some"])
    settings.out.mkdir()
    with pytest.raises(TrainingError, match="already there"):
        state.is_finished()
    assert own.read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(settings):
    State(settings).folder.write_text("mine")
    with pytest.raises(TrainingError, match="no folder of an unfinished run"):
        State(settings).claim(["some"])


def test_killed_at_any_moment_of_tidying_up_it_still_knows_its_network(settings, monkeypatch):
    """The settings are the last file to go."""
    state = State(settings)
    state.claim(["some"])
    settings.out.mkdir()
    for name in ("a.bin", "z.bin", f"{STATE_FILE}.123"):
        (state.folder / name).write_text("")
    (state.folder / "checkpoint-1").mkdir()

    def killed(folder: Path) -> None:
        if folder == state.folder:
            raise KeyboardInterrupt
        folder.rmdir()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("value_models.training.resume.shutil.rmtree", killed)
        state.remove()
    assert [path.name for path in state.folder.iterdir()] == [STATE_FILE]
    assert State(settings).is_finished()
    state.remove()
    assert not state.folder.exists()


def test_logs_may_move_while_a_run_is_interrupted(settings, tmp_path):
    State(settings).claim(["some"])
    State(replace(settings, log_dir=tmp_path / "logs")).claim(["some"])


def test_the_newest_whole_checkpoint_is_taken(settings):
    state = State(settings)
    assert state.last_checkpoint() is None
    for step, content in ((3, "{}"), (6, "{}"), (9, '{"global'), (12, None)):
        folder = state.folder / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert state.last_checkpoint() == str(state.folder / "checkpoint-6")
