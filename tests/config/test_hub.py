"""Which of folder, bundled model and Hub id a name means; what is downloaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from quire.config import hub
from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.types.errors import ClientError

TINY: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
}


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


def test_a_tokenizer_of_another_revision(fake: Callable[[list[str]], FakeHub], tmp_path: Path) -> None:
    repo = fake(["config.json", "tokenizer.json", "model.safetensors"])

    def folder(**args: Any) -> list[tuple[str, str | None]]:
        repo.calls.clear()
        config = resolve(EngineArgs(model="org/name", load_format="dummy", **args))
        repo.calls.clear()
        hub.tokenizer_folder(config)
        return [(model, options["revision"]) for model, options in repo.calls]

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    repo.files.remove("config.json")
    assert folder() == [] and folder(revision="a", tokenizer_revision="a") == []
    assert folder(tokenizer_revision="b") == [("org/name", "b")]
    assert folder(tokenizer="org/other") == [("org/other", None)]
    assert folder(tokenizer="org/other", tokenizer_revision="c", revision="a") == [("org/other", "c")]
    assert "org/none" in str(refusal(lambda: folder(tokenizer="org/none"), repo))


def refusal(call: Callable[[], Any], repo: FakeHub) -> ClientError:
    """What `call` raises where the Hub has no such model."""
    plain = repo.__class__.__call__

    def missing(self: FakeHub, model: str, **kwargs: Any) -> str:
        if model == "org/none":
            raise OSError("no")
        return plain(self, model, **kwargs)

    repo.__class__.__call__ = missing  # type: ignore[method-assign]
    try:
        with pytest.raises(ClientError) as caught:
            call()
    finally:
        repo.__class__.__call__ = plain  # type: ignore[method-assign]
    return caught.value


def test_a_tokenizer_alone_needs_no_config(fake: Callable[[list[str]], FakeHub]) -> None:
    fake(["tokenizer.json"])
    assert names(hub.find_checkpoint("org/name", weights=False, config=False)) == {"tokenizer.json"}
    with pytest.raises(ClientError, match=r"no config\.json"):
        hub.find_checkpoint("org/name", weights=False)


def test_a_revision_of_a_folder_has_no_effect_and_says_so(
    make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint()
    with caplog.at_level(logging.WARNING, "quire"):
        assert hub.find_checkpoint(str(folder)) == folder and not caplog.records
        assert hub.find_checkpoint(str(folder), revision="main") == folder
    assert "revision='main' has no effect" in caplog.text
