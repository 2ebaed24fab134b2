"""Plugins are found, limited, checked and, where they fail, left out; registrations travel or say why not."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire import plugins
from quire.config.args import EngineArgs
from quire.config.resolve import resolve
from quire.engine.process import ProcessClient
from quire.models.llama import LlamaForCausalLM
from quire.models.registry import ModelRegistry, travelling
from quire.parsers.registry import Parsers
from quire.plugins.models import CALL, Registry
from quire.runner.processors import processor_classes
from quire.types.errors import ClientError

sys.path.insert(0, str(Path(__file__).parent))

from packages import install

Make = Callable[..., None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Installs a package, for this test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(name: str, points: dict[str, dict[str, str]], **modules: str) -> None:
        install(tmp_path, name, points, **modules)

    monkeypatch.setattr(sys, "modules", sys.modules)
    yield make  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


GOOD = """
from quire.models.llama import LlamaForCausalLM
class Good(LlamaForCausalLM): pass
"""


def test_a_class_is_imported_when_it_is_asked_for_and_a_function_registers(package: Make) -> None:
    package("one", {"quire.models": {"GoodForCausalLM": "plug_good:Good"}}, plug_good=GOOD)
    register = (
        "from quire import ModelRegistry\ndef register(): ModelRegistry.register_model('Two', 'plug_good:Good')\n"
    )
    package("two", {"quire.models": {"two": "plug_two:register"}}, plug_two=register)
    registry = Registry()
    assert "GoodForCausalLM" in registry.get_supported_archs()
    assert "plug_good" not in sys.modules
    assert registry.resolve("GoodForCausalLM").__name__ == "Good"
    assert "'GoodForCausalLM' of one 1.0" in str(registry.origin("GoodForCausalLM"))


def test_what_the_program_registers_ranks_above_plugins_and_those_above_quire(package: Make) -> None:
    points = {
        "quire.models": {"LlamaForCausalLM": "plug_good:Good", "Mine": "plug_good:Good", "Other": "plug_good:Good"}
    }
    package("one", points, plug_good=GOOD)
    registry = Registry()
    registry.register_built_in({"LlamaForCausalLM": "quire.models.llama:LlamaForCausalLM"})
    registry.register_model("Mine", LlamaForCausalLM)
    assert registry.resolve("LlamaForCausalLM").__name__ == "Good"
    assert registry.resolve("Mine") is LlamaForCausalLM
    registry.register_model("Other", LlamaForCausalLM)
    assert registry.resolve("Other") is LlamaForCausalLM and registry.origin("Other") == CALL


def test_a_plugin_that_fails_is_named_and_harms_nobody(package: Make, caplog: pytest.LogCaptureFixture) -> None:
    package("good", {"quire.models": {"GoodForCausalLM": "plug_good:Good"}}, plug_good=GOOD)
    package("bad", {"quire.models": {"bad": "plug_bad:register"}}, plug_bad="import no_such_library\n")
    package(
        "quits", {"quire.models": {"quits": "plug_quits:register"}}, plug_quits="def register(): raise SystemExit(3)"
    )
    package("late", {"quire.models": {"Late": "plug_bad:Late"}})
    registry = Registry()
    with caplog.at_level(logging.WARNING, "quire"):
        assert registry.get_supported_archs() == ["GoodForCausalLM", "Late"]
    (bad, quits) = [r.getMessage() for r in caplog.records]
    assert "'bad' of bad 1.0" in bad and "no_such_library" in bad and "left out" in bad
    assert "'quits' of quits 1.0" in quits and "SystemExit: 3" in quits
    with pytest.raises(ClientError, match=r"no implementation of Bad.*'bad' of bad 1\.0.*no_such_library"):
        registry.resolve("Bad")
    with pytest.raises(ClientError, match=r"Late comes from a plugin that fails.*no_such_library"):
        registry.resolve("Late")
    assert registry.resolve("GoodForCausalLM").__name__ == "Good"


def test_only_the_plugins_that_the_environment_allows(
    package: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package("one", {"quire.models": {"A": "plug_good:Good", "B": "plug_good:Good"}}, plug_good=GOOD)
    package("two", {"quire.models": {"C": "plug_good:Good"}})
    for value, expected in ((None, "ABC"), ("", ""), ("B", "B"), ("one", "AB"), (" two , A", "AC"), ("nobody", "")):
        if value is not None:
            monkeypatch.setenv("QUIRE_PLUGINS", value)
        assert "".join(Registry().get_supported_archs()) == expected
    with caplog.at_level(logging.WARNING, "quire"):
        plugins.check_groups()
    assert "QUIRE_PLUGINS lists 'nobody'" in caplog.text


@pytest.mark.parametrize(
    ("declared", "words"),
    [("1", None), ("2", "upgrade quire"), ("0", "install a plugin for this quire"), ("'1'", "version '1'")],
)
def test_the_version_of_the_contract(package: Make, declared: str, words: str | None) -> None:
    assert plugins.API_VERSION == 1
    top = f"quire_api_version = {declared}\n"
    package("one", {"quire.models": {"A": "plug_top.model:Good"}}, **{"plug_top/__init__": top, "plug_top/model": GOOD})
    if words is None:
        assert Registry().resolve("A").__name__ == "Good"
        return
    with pytest.raises(ClientError, match=words) as e:
        Registry().resolve("A")
    assert "'A' of one 1.0" in str(e.value) and "\n" not in str(e.value)
    assert "plug_top.model" not in sys.modules, "checked before the plugin's modules are imported"


def test_groups_that_cannot_be_served_are_told(package: Make, caplog: pytest.LogCaptureFixture) -> None:
    package("one", {"quire.drafters": {"mine": "plug_x:Y"}, "quire.modalities": {"smell": "plug_x:Z"}})
    with caplog.at_level(logging.WARNING, "quire"):
        Registry().get_supported_archs()
    assert "'mine' of one 1.0" in caplog.text and "speculative decoding" in caplog.text
    assert "'smell' of one 1.0" in caplog.text
    design = {"models", "ops", "logits_processors", "tool_parsers", "reasoning_parsers", "quantization", "executors"}
    assert {f"quire.{name}" for name in design | {"modalities", "drafters"}} == {*plugins.GROUPS, *plugins.NOT_YET}


def test_ops_of_a_plugin_that_fails(package: Make, caplog: pytest.LogCaptureFixture) -> None:
    source = "def register(registry):\n    registry['norm_of_nothing']\n"
    package("one", {"quire.ops": {"mine": "plug_ops:register"}}, plug_ops=source)
    code = """
import torch
from quire.ops.norm import RMS_NORM
from quire.ops.dispatch import Binder
from quire.types.errors import ClientError
try:
    Binder(torch.device("cpu"), torch.float32, {RMS_NORM.name: "mine"}).bind(RMS_NORM, size=8)
except ClientError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert "'mine' of one 1.0" in done.stdout and "norm_of_nothing" in done.stdout, done.stderr
    assert "left out" in done.stderr


def test_parsers_and_processors_of_plugins(package: Make, caplog: pytest.LogCaptureFixture) -> None:
    points = {
        "quire.tool_parsers": {"good": "plug_p:Good", "bad": "plug_q:Bad"},
        "quire.logits_processors": {"good": "plug_p:Good", "bad": "plug_q:Bad"},
    }
    package("one", points, plug_p="class Good: pass\n", plug_q="1 / 0\n")
    parsers = Parsers("quire.tool_parsers", "tool_call_parser", {})
    assert parsers.names() == ["bad", "good"] and parsers.find("good").__name__ == "Good"
    with pytest.raises(ClientError, match=r"'bad' comes from a plugin that fails.*ZeroDivisionError"):
        parsers.find("bad")
    with caplog.at_level(logging.WARNING, "quire"):
        assert [name for name, _ in processor_classes([])] == ["good"]
    assert "'bad' of one 1.0" in caplog.text and "ZeroDivisionError" in caplog.text
    with pytest.raises(ClientError, match="ZeroDivisionError"):
        processor_classes(["plug_q:Bad"])


def test_a_config_in_other_words(tmp_path: Path) -> None:
    names = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "words": "vocab_size",
    }

    def read(raw: dict[str, Any]) -> dict[str, Any]:
        return {names.get(k, k): v for k, v in raw.items()} | {"intermediate_size": 4 * raw["width"]}

    raw = {"width": 8, "depth": 2, "heads": 2, "words": 11, "max_position_embeddings": 32, "architectures": ["Odd"]}
    registry = Registry()
    registry.register_model("Odd", LlamaForCausalLM, config=read)
    assert registry.read_config(raw) == read(raw)
    assert registry.read_config({**raw, "architectures": ["Other"]})["width"] == 8
    registry.register_model("Odd", LlamaForCausalLM, config="no_such:function")
    with pytest.raises(ClientError, match="no_such"):
        registry.read_config(raw)
    registry.register_model("Odd", LlamaForCausalLM, config=lambda raw: raw["height"])
    with pytest.raises(ClientError, match=r"cannot read this config\.json: KeyError: 'height'"):
        registry.read_config(raw)


def test_what_cannot_be_registered() -> None:
    registry = Registry()
    for arch, model, config, words in (
        ("", LlamaForCausalLM, None, "named by a string"),
        ("A", "quire.models.llama", None, "module:Class"),
        ("A", 3, None, "must be a class"),
        ("A", LlamaForCausalLM, "read", "module:function"),
    ):
        with pytest.raises(ClientError, match=words):
            registry.register_model(arch, model, config)  # type: ignore[arg-type]
    registry.register_model("A", "quire.models.llama:kv_groups_of_nothing")
    with pytest.raises(ClientError, match="cannot be imported"):
        registry.resolve("A")
    registry.register_model("A", "math:pi")
    assert registry.carried("A") == {"A": "math:pi"}


# --- to other processes ----------------------------------------------------------------------------------------------


def config_of(folder: Path, **args: Any) -> Any:
    small: dict[str, Any] = {"max_model_len": 64, "load_format": "dummy", "skip_tokenizer_init": True, "threads": 1}
    return resolve(EngineArgs(model=str(folder), kv_cache_memory_bytes="1M", log_level="critical", **small, **args))


def test_local_classes_cannot_travel_and_say_so(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local(LlamaForCausalLM): ...

    registry = Registry()
    monkeypatch.setattr("quire.models.registry.ModelRegistry", registry)
    config = config_of(make_checkpoint())
    mine = dataclasses.replace(config.model.arch, architecture="Mine")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, arch=mine))
    registry.register_model("Mine", Local)
    with pytest.raises(ClientError, match=r"class of Mine .* inside a function.*module.*entry point") as e:
        ProcessClient(config)
    assert "\n" not in str(e.value)
    hidden = type("Hidden", (LlamaForCausalLM,), {"__module__": "plug_loaded_by_path", "__qualname__": "Hidden"})
    registry.register_model("Mine", hidden)
    with pytest.raises(ClientError, match=r"'plug_loaded_by_path' is not found on sys.path"):
        travelling(config)
    registry.register_model("Mine", type("Nobody", (LlamaForCausalLM,), {"__module__": "quire.models.llama"}))
    with pytest.raises(ClientError, match=r"has no .*Nobody"):
        travelling(config)
    registry.register_model("Mine", "__main__:Thing")
    with pytest.raises(ClientError, match="__main__"):
        travelling(config)
    registry.register_model("Mine", LlamaForCausalLM)
    registry.register_model("NotAskedFor", Local)
    assert travelling(config).model.registered == {"Mine": "quire.models.llama:LlamaForCausalLM"}
    # what came to this process goes on to the next
    came = dataclasses.replace(config, model=dataclasses.replace(config.model, registered={"Other": "a:B"}))
    assert travelling(came).model.registered["Other"] == "a:B"

    class Processor: ...

    with pytest.raises(ClientError, match=r"logits processor .* inside a function.*quire\.logits_processors"):
        travelling(config_of(make_checkpoint(), logits_processors=[Processor]))


SCRIPT = """
import logging, sys
from pathlib import Path
from quire import EngineArgs, ModelRegistry, SamplingParams, TokensPrompt
from quire.config.resolve import resolve
from quire.engine.llm_engine import LLMEngine
from quire.engine.process import ProcessClient
from quire.models.llama import LlamaForCausalLM
from quire.types.errors import ClientError

how, place = sys.argv[2:]
if how == "main":
    class Model(LlamaForCausalLM): pass
    ModelRegistry.register_model("Registered", Model)
elif how == "class":
    import plug_script
    ModelRegistry.register_model("Registered", plug_script.Model)
else:
    ModelRegistry.register_model("Registered", "plug_script:Model")
args = dict(model=sys.argv[1], max_model_len=64, load_format="dummy", skip_tokenizer_init=True, threads=1,
            kv_cache_memory_bytes="1M", log_level="critical")
if place == "workers":
    args |= dict(tensor_parallel_size=2, distributed_executor_backend="mp")
try:
    engine = LLMEngine(resolve(EngineArgs(**args)), ProcessClient if place == "process" else None)
except ClientError as e:
    print("refused:", e)
else:
    engine.add_request("0", TokensPrompt(prompt_token_ids=[1, 2, 3]), SamplingParams(max_tokens=4))
    while engine.has_unfinished_requests():
        outputs = engine.step()
    print(len(outputs[0].outputs[0].token_ids), "plug_script" in sys.modules)
    engine.shutdown()
"""


@pytest.mark.parametrize(
    ("how", "place", "expected"),
    [
        ("name", "process", "4 False"),
        ("class", "process", "4 True"),
        ("name", "workers", "4 False"),
        ("main", "here", "4 False"),
        ("main", "process", "refused: the class of Registered cannot reach"),
    ],
)
def test_a_registration_in_a_script_reaches_every_process(
    make_checkpoint: Callable[..., Path], tmp_path: Path, how: str, place: str, expected: str
) -> None:
    folder = make_checkpoint(architectures=["Registered"], eos_token_id=None)
    (tmp_path / "plug_script.py").write_text(GOOD.replace("Good", "Model"))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(folder), how, place],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected), done.stdout + done.stderr


def test_the_public_registry_has_quires_own_models() -> None:
    assert ModelRegistry.origin("LlamaForCausalLM") == "quire"
    assert json.loads(json.dumps(ModelRegistry.get_supported_archs())) == sorted(ModelRegistry.get_supported_archs())
