"""Help and versions are told at once, in 80 columns, from a reference that equals the code."""

import json
import signal
import subprocess
import sys
import types
from importlib.metadata import version

import pytest

from qwen_lit import help, reference
from qwen_lit.front import BESIDE, main

HEAVY = {"torch", "lightning", "transformers", "peft", "jsonargparse", "bitsandbytes", "datasets"}
COMMANDS = list(help.load()["commands"])


@pytest.mark.skipif(
    any(version(name) != help.load()["versions"][name] for name in reference.PACKAGES),
    reason="another version of a library has other keys and words",
)
def test_the_reference_that_ships_is_what_the_code_gives():
    # By itself: what other tests have parsed stays in jsonargparse's caches.
    found = subprocess.run(
        [sys.executable, "-c", "from qwen_lit import reference; print(reference.text())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert help.load() == json.loads(found), "run python -m qwen_lit.reference"


def test_every_key_has_a_plain_type_and_a_help_without_markup():
    found = help.load()
    options = [one for command in found["commands"].values() for one in command["options"]]
    for one in (*found["keys"], *options):
        assert one["help"] and one["type"], one
        for markup in (":class:", ":paramref:", "``", "typing.", "<class", "NoneType", "  "):
            assert markup not in one["help"] + one["type"], one
    keys = {one["key"] for one in found["keys"]}
    assert {"model.lora_config.r", "model.quantization_config.load_in_4bit", "trainer.max_epochs"} <= keys


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "all")
def test_a_page_of_help_is_80_columns_wide_and_gives_an_example(words, capsys):
    assert main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Example: qwen-lit ") for line in lines)
    assert not any("__main__" in line or "Lightning Trainer command line tool" in line for line in lines)


def test_the_help_of_a_command_lists_our_sections_before_those_of_the_libraries(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    ours = ("model", "data", "checkpoint", "export", "samples", "trainer", "model.quantization_config")
    places = [text.index(f"\n{section}: ") for section in (*ours, "model.lora_config")]
    assert places == sorted(places)
    assert "--data.max_length  int, default 2048" in text and "--model.model_name_or_path  str, required" in text


def test_the_first_page_names_every_command(capsys):
    assert main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in (*COMMANDS, *BESIDE))
    assert main([]) == 2
    assert capsys.readouterr().err == text


def test_the_versions_are_one_line(capsys):
    assert main(["--version"]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and told.startswith("qwen_lit ") and "Python 3." in told
    assert all(f"{name} {version(name)}" in told for name in help.TOLD)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fti", "there is no command fti; did you mean fit?"),
        ("train", "did you mean fit?"),
        ("verify_resum", "did you mean verify-resume?"),
        ("xyzzy", "there is no command xyzzy; --help lists them"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(given, words, capsys):
    assert main([given, "--config", "configs/qwen7b.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and words in told


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["fit", "--help"],
        ["chat", "--help"],
        ["configs", "--help"],
        ["--version"],
        ["fti"],
        ["fit", "--config", "configs/qwen7b.yaml", "--model.lr", "1e-4"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_to_answer(words):
    script = f"import sys; from qwen_lit.front import main; main({words}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())


def test_what_no_command_uses_is_not_imported_and_torch_compile_is_left_as_it_is():
    asked = ["plan", "--model.model_name_or_path", "nowhere/at/all"]
    script = (
        f"import os, sys; from qwen_lit.front import main; main({asked});"
        "print(*sys.modules, os.environ.get('TORCHDYNAMO_DISABLE'), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *loaded, variable = done.stderr.split()
    assert "qwen_lit.cli" in loaded and "bitsandbytes" in loaded and variable == "None"
    assert not {"torch._inductor.compile_fx", "networkx", "tensorboard"} & set(loaded)


def test_ctrl_c_while_libraries_are_loaded_ends_the_process_without_a_traceback(monkeypatch):
    found = []

    class Loading(types.ModuleType):
        def __getattr__(self, name: str):
            if name != "run":
                raise AttributeError(name)
            found.append(signal.getsignal(signal.SIGINT))
            return lambda given: found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setitem(sys.modules, "qwen_lit.cli", Loading("qwen_lit.cli"))
    main(["fit", "--config", "configs/qwen7b.yaml"])
    assert found == [signal.SIG_DFL, before]
