"""Which of folder, bundled model and Hub id a name means; what is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from quire.config import hub
from quire.types.errors import ClientError


class FakeHub:
    """Stands in for `snapshot_download`: a repository of files, written into a cache as patterns ask for them."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files, self.calls = folder, files, []

    def __call__(self, model: str, **kwargs: Any) -> str:
        self.calls.append((model, kwargs))
        for name in self.files:
            path = Path(name)
            if any(path.match(p) for p in kwargs["allow_patterns"]) and "/" not in name:
                (self.folder / name).write_text("{}")
        return str(self.folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], FakeHub]:
    def make(files: list[str]) -> FakeHub:
        fake = FakeHub(tmp_path, files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    return make


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_safetensors_are_preferred(fake: Callable[[list[str]], FakeHub]) -> None:
    repo = fake(["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "original/params.json"])
    folder = hub.find_checkpoint("org/name", revision="main")
    assert names(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert repo.calls[0][0] == "org/name" and repo.calls[0][1]["revision"] == "main"
    assert len(repo.calls) == 1


def test_bin_files_where_there_is_nothing_else(fake: Callable[[list[str]], FakeHub]) -> None:
    fake(["config.json", "pytorch_model.bin"])
    assert names(hub.find_checkpoint("org/name")) == {"config.json", "pytorch_model.bin"}


def test_no_weights_for_dummies(fake: Callable[[list[str]], FakeHub]) -> None:
    fake(["config.json", "model.safetensors", "pytorch_model.bin"])
    assert names(hub.find_checkpoint("org/name", weights=False)) == {"config.json"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("no"), "cannot be reached"),
        (OSError("no route"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("off"), "cannot be reached"),
    ],
)
def test_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ClientError, match=words) as caught:
        hub.find_checkpoint("org/name")
    assert caught.value.__cause__ is error


def test_a_local_folder_goes_before_the_hub(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(name="org-name")
    monkeypatch.chdir(folder.parent)
    assert hub.find_checkpoint("org-name") == Path("org-name")


def test_the_demo_model_lies_in_the_package() -> None:
    import quire.config

    assert hub.demo_model_path().parent.parent == Path(quire.config.__file__).parent.parent
