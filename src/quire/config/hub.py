"""Where a checkpoint lies: a local folder, the bundled demo model, or a Hugging Face Hub id.

Owns: the rule which of the three a name means, the download through `huggingface_hub` (its cache and its offline mode
are honoured) and the reading of a checkpoint's small JSON files. Knows nothing of weights' contents or of tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from quire.config.files import Stored
from quire.config.schema import Config
from quire.types.errors import ClientError
from quire.utils.logging import get_logger

log = get_logger(__name__)

DEMO = "demo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")


def demo_model_path() -> Path:
    """The folder of the bundled demo model, inside the package."""
    return Path(__file__).resolve().parent.parent / "assets" / DEMO


def find_checkpoint(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    token: str | bool | None = None,
    weights: bool = True,
    config: bool = True,
) -> Path:
    """The folder that holds `model`: "demo", a local folder (or a config.json, for dummy weights), or a Hub id.

    `weights=False` fetches only the small files (configuration, tokenizer); `config=False`: config.json may be missing,
    as it is beside a tokenizer alone. Errors: `ClientError` that says what to change where nothing is found.
    """
    if not model:
        raise ClientError('model is empty: give a folder, a Hub id such as "facebook/opt-125m", or "demo"', "model")
    if model == DEMO:
        return _local_folder(demo_model_path(), model)
    path = Path(model).expanduser()
    if revision is not None and path.exists():
        log.warning("revision=%r has no effect: %s is on this machine, not on the Hub", revision, path)
    if path.is_dir():
        return _local_folder(path, model, config)
    if path.is_file() and path.suffix == ".json":
        return path
    if path.is_file():
        raise ClientError(f"model {model!r} is a file: give the folder that holds config.json", "model", model)
    if not _HUB_ID.match(model):
        raise ClientError(f"model folder {model!r} does not exist", "model", model)
    return _fetch(model, revision, download_dir, token, weights, config)


def is_local(model: str) -> bool:
    """Whether `model` is the bundled one, a folder or a file, and not a Hub id."""
    return model == DEMO or Path(model).expanduser().exists()


def remote_tensors(model: str, revision: str | None, token: str | bool | None) -> list[Stored] | None:
    """The tensors of a Hub model's safetensors, by headers alone; None where they cannot be had."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found: Any = huggingface_hub.get_safetensors_metadata(model, revision=revision, token=token)
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError, errors.HfHubHTTPError, OSError):
        return None
    files = [file for _, file in sorted(found.files_metadata.items())]
    return [Stored(n, str(t.dtype), tuple(t.shape)) for file in files for n, t in file.tensors.items()]


def tokenizer_folder(config: Config) -> Path:
    """The folder of a configuration's tokenizer, fetched if need be. Errors: `ClientError`."""
    model = config.model
    own = model.tokenizer in (model.model, "", str(model.path))
    if own and (is_local(model.model) or model.tokenizer_revision in (None, config.load.revision)):
        return model.path
    if not own and (folder := Path(model.tokenizer).expanduser()).is_dir():
        return folder
    name, revision, cache = model.model if own else model.tokenizer, model.tokenizer_revision, config.load.download_dir
    try:
        return find_checkpoint(name, revision, cache, token=model.hf_token, weights=False, config=False)
    except ClientError as e:
        raise ClientError(f"tokenizer={name!r}: {e}", "tokenizer", name) from e


def _local_folder(path: Path, model: str, config: bool = True) -> Path:
    if config and not (path / "config.json").is_file():
        raise ClientError(
            f"model folder {str(path)!r} has no config.json: give a folder in Hugging Face's checkpoint layout",
            parameter="model",
            value=model,
        )
    return path


def _fetch(
    model: str, revision: str | None, cache: str | None, token: str | bool | None, weights: bool, config: bool
) -> Path:
    """Download (or find in the cache) a Hub snapshot; .bin files only where there are no safetensors."""
    import huggingface_hub
    from huggingface_hub import errors

    # Its signature is an overload over types that it leaves unknown; a path is what it returns.
    download = cast(Callable[..., str], huggingface_hub.snapshot_download)  # pyright: ignore[reportUnknownMemberType]

    def snapshot(*patterns: str, ignored: str | None = "*/*") -> Path:
        # Checkpoints keep other formats (original/, onnx/) in subfolders; the model itself is at the top.
        where = {"revision": revision, "cache_dir": cache, "token": token}
        return Path(download(model, **where, allow_patterns=list(patterns), ignore_patterns=ignored))

    try:
        folder = snapshot(*_SMALL_FILES, *(("*.safetensors",) if weights else ()))
        if weights and not any(folder.glob("*.safetensors")):
            folder = snapshot("*.bin")
        if (folder / "modules.json").is_file():  # sentence-transformers': each module has a folder
            snapshot("*_Pooling/*", "*_Dense/*", ignored=None)
        return _local_folder(folder, model, config)
    except errors.GatedRepoError as e:
        message, cause = "is gated: accept its terms on the Hub and pass hf_token=... or set HF_TOKEN", e
    except errors.RevisionNotFoundError as e:
        message, cause = f"has no revision {revision!r} on the Hub", e
    except errors.RepositoryNotFoundError as e:
        message, cause = "is neither a local folder nor a model on the Hub (a private one needs hf_token)", e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as e:
        message, cause = "is no local folder, is not in the local cache, and the Hub cannot be reached", e
    raise ClientError(f"model {model!r} {message}", "model", model) from cause


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Errors: `ClientError` naming the file where it is no JSON object."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ClientError(f"{str(path)!r} is not valid JSON: {e}", "model", str(path)) from e
    except OSError as e:
        raise ClientError(f"cannot read {str(path)!r}: {e.strerror or e}", "model", str(path)) from e
    if not isinstance(value, dict):
        raise ClientError(f"{str(path)!r} must hold a JSON object", "model", str(path))
    return value  # pyright: ignore[reportUnknownVariableType]


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder (or the file itself, if `path` is one)."""
    return read_json(path if path.is_file() else path / "config.json")


def read_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint folder, {} where there is none."""
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}
