"""What the documentation shows works: commands run or parse, rows are rows, and both languages say the same."""

import importlib.util
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from qwen_lit.cli import main
from qwen_lit.data.records import parse_row

DOCS = Path("docs")
READMES = [Path("README.md"), Path("README.zh-CN.md")]
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.name.endswith(".zh.md"))
ENGLISH_ALONE = {"design.md", "summary.md", "changelog.md"}
PAIRS = [tuple(READMES), *((page, page.with_suffix(".zh.md")) for page in PAGES if page.name not in ENGLISH_ALONE)]
ELSEWHERE = (
    "make",
    ".",
    "uv",
    "python3",
    "pip",
    "modelscope",
    "export",
    "docker",
    "sudo",
    "nvidia-smi",
    "wandb",
    "WANDB_MODE=offline",
    "sbatch",
    "torchrun",
    "srun",
    "bash",
    "hf",
    "cat",
    "cd",
    "vllm",
    "curl",
)
"""Programs beside this one, which a test cannot call or calls by itself."""


BESIDE = ("chat", "configs", "convert", "data", "studio")
"""Commands with a parser of their own."""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(path: Path) -> list[str]:
    whole = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    lines = [re.sub(r" +# .*", "", line).strip() for line in whole.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "--8<--"))]


def commands() -> list[str]:
    """Of all pages, each once."""
    found = dict.fromkeys(line for page in (READMES[0], *PAGES) for line in commands_of(page))
    return [line for line in found if "..." not in line]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_documentation_is_one_that_works(command, capsys, tmp_path):
    words = shlex.split(command)
    if words[0] == "qwen-lit":
        words = ["python", "-m", "qwen_lit", *words[1:]]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.MULTILINE)
    elif words[0] == "tensorboard":
        from tensorboard.program import TensorBoard

        board = TensorBoard()
        board.configure([None, *words[1:]])
        assert board.flags.logdir in ("output/qwen_qlora_model/logs", "output/sweep")
    elif words[:3] != ["python", "-m", "qwen_lit"]:
        assert words[0] in ELSEWHERE or words[0] == "python", words[0]
    elif words[3] in BESIDE:
        assert main([*words[3 : 4 + (words[3] == "data")], "--help"]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words if word.startswith("--"))
    else:
        for own in {"mine.yaml", "my.yaml"} & set(words):
            (tmp_path / own).write_text("model: {model_name_or_path: x}\ndata: {dataset_path: my.jsonl}\n")
            words[words.index(own)] = str(tmp_path / own)
        if any("output/" in word and word.endswith("config.yaml") for word in words):
            words = [word if "output/" not in word else "configs/qwen7b.yaml" for word in words]
            words += ["--data.dataset_path", "my.jsonl"]
        try:
            assert main([*words[3:], "--print_config"] if "--help" not in words else words[3:]) == 0
        except SystemExit as stop:
            assert stop.code == 0
        assert "model_name_or_path" in capsys.readouterr().out


def test_the_commands_of_both_readmes_train_a_model_one_after_the_other(model_folder, tmp_path, capsys):
    rows = tmp_path / "my.jsonl"
    (written,) = {"".join(blocks(path, "json")) for path in READMES}
    rows.write_text(written, encoding="utf-8")
    out = tmp_path / "out"
    toy = [
        "--model.model_name_or_path",
        str(model_folder),
        "--output_dir",
        str(out),
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--model.lora_config.r",
        "2",
        "--trainer.max_epochs",
        "1",
        "--export.smoke_rows",
        "0",
        "--data.cache_dir",
        str(tmp_path / "cache"),
    ]
    ours, other = (
        [shlex.split(line) for line in commands_of(path) if line.startswith("python -m qwen_lit")] for path in READMES
    )
    assert ours == other and [words[3] for words in ours] == ["inspect", "plan", "fit", "chat"]
    for words in ours[:3]:
        assert main([str(rows) if word == "my.jsonl" else word for word in words[3:]] + toy) == 0
    assert "⟦Hello!<|im_end|>⟧" in capsys.readouterr().out
    for text in (path.read_text(encoding="utf-8") for path in READMES):
        for left in (*out.iterdir(),):
            if not left.name.startswith(".") and left.name != "hparams.yaml":
                assert f"`{left.name}" in text or f"`{left.name}/" in text, left.name


@pytest.mark.parametrize("path", [DOCS / "chat.md", DOCS / "chat.zh.md"], ids=lambda path: path.name)
def test_what_is_told_of_chat_is_what_it_knows(path):
    text = path.read_text(encoding="utf-8")
    known = [re.search(r'^HELP = """(.*?)"""', one.read_text(), re.M | re.S) for one in Path("qwen_lit").rglob("*.py")]
    (listed,) = [found[1] for found in known if found]
    for name in re.findall(r"/[a-z]+", listed):
        assert f"`{name}" in text, name


YAMLS = [(page, block) for page in PAGES for block in blocks(page, "yaml") if not block.startswith(("--8<--", "api"))]


@pytest.mark.parametrize(("page", "block"), YAMLS, ids=[page.stem for page, _ in YAMLS])
def test_every_yaml_of_the_documentation_lies_over_a_configuration(page, block, tmp_path, capsys):
    over = tmp_path / "over.yaml"
    over.write_text(block, encoding="utf-8")
    missing = [name for name in re.findall(r"class_path: (\w+)\.", block) if find_spec(name) is None]
    code = main(["fit", "--config", "configs/qwen7b.yaml", "--config", str(over), "--print_config"])
    said = capsys.readouterr()
    if missing:
        assert code == 2 and missing[0] in said.err
    else:
        assert code == 0 and holds(yaml.safe_load(said.out), yaml.safe_load(block))


def holds(printed, given) -> bool:
    """Whether a printed configuration has all that was given; classes are printed with their module."""
    if isinstance(given, dict):
        return all(holds(printed[key], value) for key, value in given.items())
    if isinstance(given, list):
        return len(printed) == len(given) and all(map(holds, printed, given))
    return printed == given or (isinstance(given, str) and str(printed).endswith("." + given))


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_reference_explains_every_key_of_ours(language, hooks, capsys):
    assert main(["fit", "--config", "configs/qwen7b.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    keys = [f"{section}.{key}" for section in hooks.OURS[1:] for key in printed[section]]
    lines = hooks.tables(language).splitlines()
    for key in (*keys, "seed_everything", "output_dir"):
        if key == "model.lora_config":
            continue
        (line,) = [one for one in lines if one.startswith(f"| `{key}` |")]
        told = line.split(" | ")[1]
        assert len(told) > 2 and ("".join(re.findall("[\u4e00-\u9fff]", told)) != "") == (language == "zh"), line


def test_a_default_of_the_reference_is_the_one_that_runs(hooks, tmp_path, capsys):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: {model_name_or_path: x}\ndata: {dataset_path: y}\n")
    assert main(["fit", "--config", str(plain), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    compared = 0
    for one in hooks.reference()["keys"]:
        section, _, name = one["key"].partition(".")
        if section in hooks.OURS[1:] and name in printed[section] and not one.get("required"):
            assert printed[section][name] == one["default"], one["key"]
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair[0]))
def test_both_languages_give_the_same_commands_rows_and_tables(pair):
    english, chinese = pair
    for language in ("json", "yaml", "python"):
        assert blocks(english, language) == blocks(chinese, language)
    own = [line for line in commands_of(chinese) if english != READMES[0] or line.split()[0] not in FETCHING]
    # Parts may follow each other in another order.
    assert sorted(commands_of(english)) == sorted(own)
    assert sorted(map(marks, tables(english))) == sorted(map(marks, tables(chinese)))


FETCHING = ("export", "pip", "modelscope")
"""The Chinese README begins with getting a model; the English one has a link."""


def tables(path: Path) -> list[list[str]]:
    """Each table's rows."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [part.strip().splitlines() for part in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def marks(table: list[str]) -> list[list[str]]:
    return [marked(row) for row in table]


def marked(row: str) -> list[str]:
    """The numbers of a row and what stands in it as code, in any order; links are as in the other language."""
    row = re.sub(r"\]\([^)]*\)", "]", row)
    code = [one for one in re.findall(r"`([^`]+)`", row) if one.isascii() and one != "path:line: ..."]
    return sorted([*code, *re.findall(r"\d(?:[\d,.]*\d)?", re.sub("`[^`]+`", "", row))])


def test_every_guide_has_a_chinese_edition():
    for _, chinese in PAIRS:
        assert chinese.is_file(), chinese


CHINESE = [pair[1] for pair in PAIRS]


@pytest.mark.parametrize("path", CHINESE, ids=lambda path: path.name)
def test_a_chinese_paragraph_is_one_line(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = text.splitlines()
    for line, following in zip(lines, lines[1:], strict=False):
        if line.strip() and following.strip():
            assert following.startswith(("|", "- ", "#", "1", "2", "3", "4", "5", "6", "7")), following


LINKED = [*READMES, Path("CONTRIBUTING.md"), *DOCS.rglob("*.md"), *Path("examples").rglob("*.md")]


@pytest.mark.parametrize("path", LINKED, ids=str)
def test_every_link_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


ROWS = [(page, line) for page in (READMES[0], *PAGES) for block in blocks(page, "json") for line in block.splitlines()]


def test_the_rows_of_the_documentation_are_rows():
    shown = [(page, json.loads(line)) for page, line in ROWS if "--8<--" not in line]
    assert len(shown) > 5
    for page, row in shown:
        if "text" not in row:
            assert parse_row(row, f"{page}:1").messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_exit_code_and_output_is_named(path):
    text = path.read_text(encoding="utf-8")
    outputs = ("lora_adapter/", "final_model/", "checkpoints/", "logs/", "config.yaml", "summary.json", "report.html")
    for word in ("130", "143", "tensorboard", "samples.jsonl", *outputs):
        assert word in text


def test_a_readme_says_in_the_users_words_what_it_is_for():
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    assert "Fine-tune" in english.splitlines()[2] and "QLoRA" in english and len(english.splitlines()) <= 130
    assert "微调" in chinese.splitlines()[2] and "QLoRA" in chinese and len(chinese.splitlines()) <= 130
    assert chinese.index("HF_ENDPOINT") < chinese.index("make demo")


def test_the_image_copies_what_there_is_and_runs_a_command_that_there_is():
    text = Path("Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {"pyproject.toml", "README.md", "qwen_lit", "configs"} <= set(copied)
    for name in copied:
        assert Path(name).exists(), name
    command = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    assert f"{command[0]} = " in Path("pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)


def test_the_citation_names_the_version_that_is_installed():
    cited = yaml.safe_load(Path("CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{cited["version"]}"' in Path("pyproject.toml").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()


def test_contributing_names_files_that_there_are():
    text = Path("CONTRIBUTING.md").read_text(encoding="utf-8") + (DOCS / "design.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:qwen_lit|tests|docs|configs|benchmarks|examples)/[\w./-]*)`", text):
        assert Path(name).exists(), name
