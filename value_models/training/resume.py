"""What lies beside an unfinished network, so that its run can go on after any interruption."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from value_models.training import TrainingError
from value_models.training.settings import Settings

STATE_FILE = "settings.json"
WITHOUT_EFFECT = ("log_dir",)
"""Settings that may differ when a run goes on."""


class State:
    """The folder `<out>.training`: a run's settings and checkpoints, until its network is done."""

    def __init__(self, settings: Settings) -> None:
        self.out = settings.out.resolve()
        self.folder = self.out.with_name(self.out.name + ".training")
        self.unfinished = self.folder / "network"
        """Where the network is written before it appears under its own name, whole."""
        self._settings = settings

    def is_finished(self) -> bool:
        """Whether this very run has written its network, and was killed while it tidied up.

        Raises:
            TrainingError: another network has that name.
        """
        if not self.out.exists():
            return False
        if self._read().items() >= self._described().items():
            return True
        raise TrainingError(
            f"{self._settings.out} is already there; remove it or choose another --out"
        )

    def claim(self, fingerprints: list[str | None]) -> None:
        """Make the folder, or make sure that it belongs to this very run on these data.

        Raises:
            TrainingError: it belongs to another run, or to people.
        """
        run = self._described() | {"data_fingerprints": fingerprints}
        if (self.folder / STATE_FILE).is_file():
            if self._read() != run:
                raise TrainingError(
                    f"{self.folder} holds a run with other settings or data; repeat its command "
                    "to go on, or remove that folder to begin anew"
                )
            return
        if self._is_foreign():
            raise TrainingError(
                f"{self.folder} is no folder of an unfinished run, but checkpoints would go there; "
                "move it or choose another --out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{STATE_FILE}.{os.getpid()}"
        draft.write_text(json.dumps(run, indent=2, sort_keys=True), encoding="utf-8")
        draft.replace(self.folder / STATE_FILE)

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint; a run may have been killed while it wrote one."""
        whole = [
            folder
            for folder in self.folder.glob("checkpoint-*")
            # Trainer writes this file last.
            if _is_json(folder / "trainer_state.json")
        ]
        if not whole:
            return None
        return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])))

    def finish(self) -> None:
        """Let the network appear under its own name, and remove everything else."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished.replace(self.out)
        self.remove()

    def remove(self) -> None:
        """Remove the folder and all that is left in it."""
        # The settings go last: only as long as they lie there does a rerun know whose the rest is.
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != STATE_FILE:
                path.unlink()
        shutil.rmtree(self.folder)

    def _is_foreign(self) -> bool:
        """Whether something of that name, without settings, is not what a killed `claim` left."""
        if not self.folder.is_dir():
            return self.folder.exists()
        return not all(path.match(f"{STATE_FILE}.[0-9]*") for path in self.folder.iterdir())

    def _described(self) -> dict[str, object]:
        fields = {
            name: value
            for name, value in asdict(self._settings).items()
            if name not in WITHOUT_EFFECT
        }
        described: dict[str, object] = json.loads(json.dumps(fields, default=str))
        return described

    def _read(self) -> dict[str, object]:
        try:
            content = json.loads((self.folder / STATE_FILE).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True
