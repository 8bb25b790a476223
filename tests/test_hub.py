"""A base from a hub: what is fetched and said, what is not reached, and that the run is the folder's."""

import json
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from qwen_lit import hub, hub_libraries
from qwen_lit.cli import main
from qwen_lit.errors import UserError
from qwen_lit.hub import fetch, find
from qwen_lit.model.base import fingerprint
from tests.hub_server import FakeHub, serving

NAME = "Qwen/Tiny"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
WEIGHTS = "model.safetensors"


@pytest.fixture
def server(model_folder, tmp_path, monkeypatch, caplog):
    """Hugging Face's hub, which has the tiny model with files that nobody needs, and an empty cache."""
    folder = shutil.copytree(model_folder, tmp_path / "on_the_hub")
    for name in ("pytorch_model.bin", "model-q8_0.gguf", "README.md", "original.pth", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not needed")
    with serving(folder, NAME) as server:
        point_at(server.address, tmp_path / "cache", monkeypatch)
        caplog.set_level("INFO", "qwen_lit")
        yield server


def point_at(address: str, cache: Path, monkeypatch) -> None:
    """What huggingface_hub makes of HF_ENDPOINT and HF_HOME when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    hub_libraries.library.cache_clear()


@pytest.fixture
def modelscope(model_folder, tmp_path, monkeypatch):
    """The package modelscope with as much of it as is used; its hub is a folder."""
    source = shutil.copytree(model_folder, tmp_path / "on_modelscope")
    (source / "pytorch_model.bin").write_bytes(b"not needed")
    cache = tmp_path / "modelscope"
    package, api, config = (types.ModuleType(f"modelscope{name}") for name in ("", ".hub.api", "_hub.config"))
    calls = []

    def snapshot_download(name, local_files_only=False, allow_file_pattern=None):
        folder = cache / "models" / name.replace("/", "--") / "snapshots" / "master"
        if local_files_only:
            if not folder.is_dir():
                raise ValueError("not in the cache")
            return str(folder)
        calls.append(allow_file_pattern)
        folder.mkdir(parents=True, exist_ok=True)
        for one in allow_file_pattern:
            shutil.copy(source / one, folder / one)
        return str(folder)

    def get_model_files(self, name, recursive):
        if name != NAME:
            raise ConnectionError("connection refused")
        return [{"Path": path.name, "Size": path.stat().st_size, "Type": "blob"} for path in source.iterdir()]

    package.snapshot_download = snapshot_download
    package.calls, package.source = calls, source
    api.HubApi = type("HubApi", (), {"get_model_files": get_model_files})
    config.get_default_config = lambda: types.SimpleNamespace(endpoint="https://ms.example", cache_dir=cache)
    for name, module in (
        ("", package),
        (".hub", types.ModuleType("modelscope.hub")),
        (".hub.api", api),
        ("_hub", types.ModuleType("modelscope_hub")),
        ("_hub.config", config),
    ):
        monkeypatch.setitem(sys.modules, f"modelscope{name}", module)
    hub_libraries.library.cache_clear()
    yield package
    hub_libraries.library.cache_clear()


def by_name(arguments: list[str], *options: str) -> list[str]:
    """The command with the model's hub name for its folder."""
    at = arguments.index("--model.model_name_or_path")
    return [*arguments[: at + 1], NAME, *arguments[at + 2 :], *options]


def test_only_what_is_needed_is_fetched_and_the_second_time_nothing_is_asked(server: FakeHub, caplog):
    folder = fetch(NAME)
    assert set(server.fetched()) == NEEDED and {one.name for one in folder.iterdir()} == NEEDED
    told = caplog.messages[-1]
    size = sum(len(server.files[name]) for name in NEEDED)
    assert f"fetching {NAME} from {server.address}: config and tokenizer, {size / 1e6:.2f} MB, into" in told
    assert str(constants.HF_HUB_CACHE) in told and "GB free" in told
    whole = fetch(NAME, weights=True)
    assert set(server.fetched()) == NEEDED | {WEIGHTS} and (whole / WEIGHTS).is_file()
    assert f"weights, {len(server.files[WEIGHTS]) / 1e6:.2f} MB" in caplog.messages[-1]
    asked, said = len(server.asked), len(caplog.messages)
    assert fetch(NAME) == fetch(NAME, weights=True) == whole
    assert len(server.asked) == asked and len(caplog.messages) == said


def test_weights_in_shards_are_those_that_the_index_names(server: FakeHub):
    tensors = load_file(Path(fetch(NAME, weights=True)) / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    index = {"metadata": {"total_size": 7}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    server.files.pop(WEIGHTS)
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, Path(constants.HF_HUB_CACHE) / "one", {"format": "pt"})
        server.files[file] = (Path(constants.HF_HUB_CACHE) / "one").read_bytes()
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    shutil.rmtree(constants.HF_HUB_CACHE)
    small = fetch(NAME)
    assert not hub.has_weights(small) and hub.missing_bytes(small, 99) == 7 and fingerprint(NAME) is None
    folder = fetch(NAME, weights=True)
    assert {one.name for one in folder.glob("*.safetensors")} == set(shards)
    assert hub.has_weights(folder) and hub.missing_bytes(folder, 99) == 0 and fingerprint(NAME)


def test_a_model_without_safetensors_is_refused_before_its_weights_are_fetched(server: FakeHub):
    server.files.pop(WEIGHTS)
    with pytest.raises(UserError, match=r"has no model.safetensors, and weights are read from safetensors alone"):
        fetch(NAME, weights=True)


def test_what_does_not_fit_the_disk_is_refused_before_it_is_fetched(server: FakeHub, monkeypatch):
    fetch(NAME)
    monkeypatch.setattr(hub, "free_bytes", lambda folder: 100_000)
    with pytest.raises(UserError, match=r"weights of Qwen/Tiny are 0.\d\d MB, and .* has 0.10 MB free; .* HF_HOME"):
        fetch(NAME, weights=True)
    assert WEIGHTS not in server.fetched()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"blobs": 500}, ["cannot be fetched from http", "(HTTP 500)", "HF_ENDPOINT=https://hf-mirror.com"]),
        ({"resolve": 503}, ["(HTTP 503)"]),
        ({"blobs": 404}, [f"there is no {NAME} on http", "check the name, or log in with hf auth login"]),
        ({"blobs": 401}, ["does not accept the login"]),
        ({"resolve": "gated"}, ["is gated on http", "accept its terms at", "hf auth login"]),
        ({"blobs": "silence"}, ["no answer in 1 s"]),
        ({"resolve": "silence"}, ["no answer in 1 s"]),
    ],
    ids=str,
)
def test_a_hub_that_refuses_or_is_silent_is_one_line_with_what_to_do(server: FakeHub, arguments, fault, words, capsys):
    server.faults = fault
    assert main(by_name(arguments)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    for word in [NAME, server.address, *words]:
        assert word in told


@pytest.mark.parametrize(
    ("address", "words"),
    [("http://127.0.0.1:9", "Connection refused"), ("http://no-such-host.invalid", "not"), ("mirror", "protocol")],
)
def test_a_hub_that_is_not_there_is_one_line_with_the_remedies_in_order(address, words, tmp_path, monkeypatch):
    point_at(address, tmp_path, monkeypatch)
    with pytest.raises(UserError) as raised:
        fetch(NAME)
    told = str(raised.value)
    assert f"{NAME} cannot be fetched from {address} (" in told and words in told and "\n" not in told
    remedies = [
        "HF_ENDPOINT=https://hf-mirror.com",
        "--model.hub modelscope",
        "hf download",
        "modelscope download",
        "HF_HUB_OFFLINE",
    ]
    places = [told.index(one) for one in remedies]
    assert places == sorted(places)


def test_a_proxy_that_is_in_the_way_is_named_without_its_password(tmp_path, monkeypatch):
    point_at("https://hub.example", tmp_path, monkeypatch)
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"through the proxy 127.0.0.1\)") as raised:
        fetch(NAME)
    assert "secret" not in str(raised.value)


def test_a_break_in_a_file_is_gone_on_from(server: FakeHub):
    fetch(NAME)
    server.faults = {WEIGHTS: "break once"}
    folder = fetch(NAME, weights=True)
    assert (folder / WEIGHTS).read_bytes() == server.files[WEIGHTS]
    assert server.fetched().count(WEIGHTS) == 2


def test_a_download_that_breaks_off_is_one_line_and_what_is_whole_stays(server: FakeHub, monkeypatch):
    def broken(*arguments, **options):
        raise OSError("the line is cut")

    fetch(NAME)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(UserError, match=r"was interrupted \(the line is cut\); files that are whole stay: run the"):
        fetch(NAME, weights=True)
    assert find(NAME) is not None


def test_offline_a_whole_model_is_used_and_a_missing_one_is_one_line(server: FakeHub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not all in .* and HF_HUB_OFFLINE is set"):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    small = fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (small / "tokenizer_config.json").unlink()
    assert fetch(NAME) == small
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fetch(NAME, weights=True)


def test_one_of_several_processes_fetches_and_the_others_wait(server: FakeHub, caplog):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(fetch(NAME, weights=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1
    assert server.fetched().count(WEIGHTS) == 1 and server.fetched().count("config.json") == 1
    assert sum("fetching" in one for one in caplog.messages) == 2


def test_another_rank_does_not_try_what_the_first_has_failed_at(server: FakeHub, monkeypatch):
    server.faults = {"blobs": "silence"}
    first = threading.Thread(target=lambda: pytest.raises(UserError, fetch, NAME))
    first.start()
    while not server.asked:
        pass
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="was not fetched by the first process"):
        fetch(NAME)
    first.join()
    assert sum("blobs" in one for one in server.asked) == 1


def test_a_log_file_has_a_line_of_progress(server: FakeHub, monkeypatch, caplog):
    monkeypatch.setattr("qwen_lit.progress.PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    fetch(NAME)
    server.faults = {WEIGHTS: "slow"}
    monkeypatch.setattr("qwen_lit.progress.EVERY", 0.0)
    fetch(NAME, weights=True)
    assert any(one.startswith(f"fetching {NAME}: ") and " of 0.2 MB" in one for one in caplog.messages)


def test_the_environment_names_the_hub_and_the_cache(server: FakeHub, tmp_path):
    home = str(tmp_path / "home")
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
    code = f"from qwen_lit.hub import fetch; print(fetch({NAME!r}, weights=True))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(home)


def test_a_model_by_its_name_is_trained_resumed_and_used_as_its_folder(
    server: FakeHub, arguments, tmp_path, capsys, caplog, model_folder
):
    out, short = tmp_path / "out", ["--trainer.max_steps", "2", "--export.verdict_rows", "2"]
    assert main(by_name(arguments, *short)) == 0
    config = json.loads((out / "lora_adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAME
    card = (out / "final_model/README.md").read_text()
    assert f"base_model: {NAME}" in card and f"vllm serve {NAME} " in card and "MODELSCOPE" not in card
    assert "_name_or_path" not in json.loads((out / "final_model/config.json").read_text())
    # The same base in a folder is the same run.
    assert main([*arguments, "--trainer.max_steps", "3", "--export.merge", "false", "--ckpt_path", "last"]) == 0
    caplog.clear()
    asked = len(server.asked)
    assert main(["chat", str(out / "lora_adapter"), "--prompt", "Hi", "--greedy", "--max_new_tokens", "2"]) == 0
    assert len(server.asked) == asked and "fetching" not in caplog.text


def test_plan_and_inspect_fetch_no_weights_and_plan_counts_them(server: FakeHub, arguments, capsys):
    for command in ("inspect", "plan"):
        assert main([command, *by_name(arguments)[1:]]) in (0, 1)
    assert WEIGHTS not in server.fetched()
    capsys.readouterr()
    main(["plan", *by_name(arguments, "--json", "true")[1:]])
    before = json.loads(capsys.readouterr().out)
    fetch(NAME, weights=True)
    main(["plan", *by_name(arguments, "--json", "true")[1:]])
    after = json.loads(capsys.readouterr().out)
    assert before["download_gb"] == before["export_gb"] and after["download_gb"] == 0


def test_modelscope_is_a_hub_like_the_other(modelscope, arguments, tmp_path, caplog, model_folder):
    out = tmp_path / "out"
    short = ["--trainer.max_steps", "2", "--export.verdict_rows", "0", "--export.smoke_rows", "0"]
    command = by_name(arguments, "--model.hub", "modelscope", *short)
    assert main(command) == 0
    small, everything = modelscope.calls
    assert set(small) == NEEDED and set(everything) == NEEDED | {WEIGHTS}
    assert f"fetching {NAME} from https://ms.example: weights, 0.23 MB, into {tmp_path / 'modelscope'}" in caplog.text
    assert json.loads((out / "lora_adapter/adapter_config.json").read_text())["base_model_name_or_path"] == NAME
    assert f"VLLM_USE_MODELSCOPE=True vllm serve {NAME}" in (out / "lora_adapter/README.md").read_text()
    assert (
        f"SGLANG_USE_MODELSCOPE=true python -m sglang.launch_server --model-path {NAME}"
        in (out / "final_model/README.md").read_text()
    )
    # Whoever uses the adapter finds its base again without saying where it is from.
    assert main(["chat", str(out / "lora_adapter"), "--prompt", "Hi", "--greedy", "--max_new_tokens", "2"]) == 0
    assert main(["export", *by_name(arguments, *short)[1:]]) == 0
    assert main([*arguments, "--trainer.max_steps", "3", "--export.merge", "false", "--ckpt_path", "last"]) == 0
    assert len(modelscope.calls) == 2


def test_modelscope_that_is_not_reached_is_one_line(modelscope):
    with pytest.raises(UserError, match=r"Qwen/Other cannot be fetched from https://ms.example \(connection ref"):
        fetch("Qwen/Other", "modelscope")


def test_a_missing_package_is_named_with_its_command(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    hub_libraries.library.cache_clear()
    assert main(by_name(arguments, "--model.hub", "modelscope")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pip install 'qwen_lit[modelscope]'" in told
    assert find(NAME, "modelscope") is None
