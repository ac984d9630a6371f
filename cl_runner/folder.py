"""A run's folder: what lies in it and in what state the run is."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml


class RunFolder:
    """The folder of one run. `status.json` is the truth about it: pending, running, done or failed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json")

    def update_status(self, **fields: Any) -> None:
        write_atomically(self.path / "status.json", json.dumps({**self.status, **fields}, indent=2))

    @property
    def done(self) -> bool:
        return self.status.get("state") == "done"

    @property
    def results(self) -> dict[str, Any]:
        return read_json(self.path / "results.json")

    def start(self, **fields: Any) -> None:
        """The run begins or goes on: of what was said before, only its name stays."""
        kept = {key: value for key, value in self.status.items() if key == "id"}
        write_atomically(self.path / "status.json", json.dumps({**kept, "state": "running", **fields}, indent=2))

    def fail(self, error: BaseException, trace: str) -> None:
        """Leave word of what ended the run; its traceback is for `run.log` too."""
        logging.getLogger("cl_runner").debug("%s", trace)
        self.update_status(state="failed", error=f"{type(error).__name__}: {error}", traceback=trace)

    def write_config(self, config: dict[str, Any]) -> None:
        """The resolved configuration, as YAML."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def move_aside(self) -> Path:
        """Rename the folder, contents and all, to the first free `<name>.<n>`."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        return self.path.rename(target)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file in one motion: a reader sees the old content or the new, whatever happens meanwhile."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
