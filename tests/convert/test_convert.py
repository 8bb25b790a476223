"""Configurations of other trainers become ours, which the real parser takes; what is different is told."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwen_lit.callbacks import accepted
from qwen_lit.cli import QwenCLI, main
from qwen_lit.convert import command, converted, kind_of
from qwen_lit.convert.kinds import OWN, PEERS
from qwen_lit.convert.ours import PLAIN
from qwen_lit.errors import UserError
from tests.convert import examples
from tests.convert.examples import changed, of

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def parsed(monkeypatch):
    """What ``fit`` takes a configuration for, once it has passed every check that comes before the model."""
    values = {}

    def stop(self):
        values["all"] = self.config
        raise UserError("parsed")

    monkeypatch.setattr(QwenCLI, "instantiate_classes", stop)
    monkeypatch.setattr(accepted, "find_spec", lambda name: True)

    def parse(text):
        values.clear()
        Path("ours.yaml").write_text(text, encoding="utf-8")
        assert main(["fit", "--config", "ours.yaml"]) == 2
        return values.get("all")

    return parse


def refusal(text, **keys):
    with pytest.raises(UserError) as error:
        changed(text, **keys)
    return str(error.value)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WANTED = {
    "llama_factory.yaml": {
        "output_dir": "saves/qwen/lora/sft",
        "trainer.max_epochs": 3,
        "trainer.precision": "bf16-mixed",
        "trainer.accumulate_grad_batches": 8,
        "trainer.gradient_clip_val": 1.0,
        "trainer.log_every_n_steps": 10,
        "trainer.val_check_interval": 400,
        "trainer.check_val_every_n_epoch": None,
        "model.quantization_config.load_in_4bit": True,
        "model.quantization_config.bnb_4bit_use_double_quant": True,
        "model.lora_config.r": 16,
        "model.lora_config.lora_alpha": 32,
        "model.lora_config.target_modules": LINEARS,
        "model.learning_rate": 1e-4,
        "model.optimizer": "adamw",
        "model.warmup_ratio": 0.1,
        "data.val_size": 0.1,
        "data.batch_size": 2,
        "data.max_length": 4096,
        "checkpoint.every_n_train_steps": 500,
        "data.num_proc": 16,
    },
    "axolotl.yml": {
        "output_dir": "./outputs/out",
        "trainer.max_epochs": 4,
        "trainer.val_check_interval": 0.25,
        "trainer.accumulate_grad_batches": 4,
        "trainer.gradient_clip_val": 1.0,
        "model.quantization_config.load_in_4bit": True,
        "model.lora_config.r": 32,
        "model.lora_config.target_modules": LINEARS,
        "model.lora_config.modules_to_save": ["embed_tokens"],
        "model.optimizer": "adamw_8bit",
        "model.weight_decay": 0.01,
        "model.learning_rate": 2e-4,
        "data.dataset_path": ["data/alpaca.jsonl", "data/chat.jsonl"],
        "data.packing": True,
        "data.val_size": 0.05,
        "data.batch_size": 2,
        "data.max_length": 2048,
        "data.overlong": "drop",
        "checkpoint.keep": 4,
    },
    "swift.sh": {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "trainer.accumulate_grad_batches": 16,
        "trainer.val_check_interval": 800,
        "model.model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "model.quantization_config.load_in_4bit": True,
        "model.lora_config.lora_dropout": 0.05,
        "model.learning_rate": 2e-4,
        "model.warmup_ratio": 0.05,
        "model.weight_decay": 0.1,
        "model.adam_beta2": 0.95,
        "data.dataset_path": [{"path": "one.jsonl", "max_rows": 500}, "two.jsonl"],
        "data.val_size": 0.01,
        "data.overlong": "drop",
        "data.num_workers": 4,
        "checkpoint.keep": 2,
        "checkpoint.every_n_train_steps": 50,
    },
    "args.json": {
        "seed_everything": 7,
        "trainer.check_val_every_n_epoch": 1,
        "model.quantization_config": None,
        "model.lora_config.target_modules": ["q_proj", "v_proj"],
        "model.lora_plus_ratio": 16.0,
        "model.lora_config.init_lora_weights": True,
        "data.dataset_path": "rows.jsonl",
        "data.train_on": "last",
        "data.val_dataset_path": "held.jsonl",
        "data.packing": True,
        "data.batch_size": 1,
    },
    "trl.yaml": {
        "trainer.max_steps": 1000,
        "trainer.max_epochs": None,
        "trainer.log_every_n_steps": 10,
        "model.lora_config.r": 32,
        "model.lora_config.lora_alpha": 16,
        "model.lr_scheduler": "linear",
        "model.quantization_config.bnb_4bit_use_double_quant": True,
        "model.warmup_ratio": 0.05,
        "data.dataset_path": "rows.jsonl",
        "checkpoint.every_n_train_steps": 100,
    },
    "trl.sh": {
        "trainer.devices": 4,
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 0.5,
        "model.learning_rate": 1e-4,
        "model.lora_config.r": 8,
        "model.lora_config.target_modules": ["q_proj", "k_proj"],
        "data.batch_size": 8,
        "model.quantization_config": None,
    },
    "sections.yaml": {
        "output_dir": "output/qwen_qlora_model",
        "trainer.max_epochs": 3,
        "model.learning_rate": 2e-4,
        "model.optimizer": "paged_adamw_8bit",
        "model.lora_config.lora_dropout": 0.1,
        "data.max_length": 2048,
        "data.dataset_path": "dataset/novel_finetuning_dataset.jsonl",
        "checkpoint.every_n_train_steps": 100,
    },
    "flat.yaml": {
        "trainer.precision": "16-mixed",
        "model.learning_rate": 5e-5,
        "model.warmup_ratio": 0.0,
        "model.quantization_config": None,
        "model.lora_config.target_modules": LINEARS,
        "data.batch_size": 4,
        "trainer.gradient_clip_val": 1.0,
        "model.lr_scheduler": "linear",
    },
}


@pytest.mark.parametrize("name", examples.EVERY)
def test_every_example_is_taken_by_fit_with_the_values_that_it_had(parsed, name):
    config = parsed(converted(Path(name))[0])
    assert config is not None
    found = {key: config.get(key) for key in WANTED[name]}
    targets = found.get("model.lora_config.target_modules")
    if targets is not None:
        found["model.lora_config.target_modules"] = sorted(targets, key=[*LINEARS, *targets].index)
    assert found == WANTED[name]


def test_a_tracker_and_early_stopping_are_classes_of_lightning(parsed):
    config = parsed(converted(Path("axolotl.yml"))[0])
    assert config.trainer.logger.class_path.endswith(".WandbLogger")
    given = config.trainer.logger.init_args
    assert (given.project, given.name, given.offline, given.save_dir) == ("mine", "first", True, "./outputs/out")
    stop = config.trainer.callbacks[0]
    assert stop.class_path.endswith(".EarlyStopping") and stop.init_args.patience == 3
    for tracker, name in (("mlflow", "MLFlowLogger"), ("comet_ml", "CometLogger")):
        text = re.sub("report_to: .*", f"report_to: {tracker}", examples.LLAMA_FACTORY)
        Path("other.yaml").write_text(text)
        assert parsed(converted(Path("other.yaml"))[0]).trainer.logger.class_path.endswith(name)


@pytest.mark.parametrize("name", examples.EVERY)
def test_each_is_told_by_its_keys(name):
    assert kind_of(name) == kind_of(Path(name)) == examples.EVERY[name][1]


@pytest.mark.parametrize("path", sorted(Path("configs").absolute().glob("*.yaml")), ids=lambda path: path.name)
def test_our_own_configurations_are_of_nobody_else(path):
    assert kind_of(path) is None
    with pytest.raises(UserError, match="is a configuration of qwen_lit already"):
        converted(path)


@pytest.mark.parametrize(
    "text",
    [
        "lora_r: 3",
        "learning_rate: 1e-4",
        "dataset_path: a",
        "output_dir: a",
        "a: [",
        "- a",
        "1",
        "",
        "data: {a: b}",
        "output_dir: a\nckpt_path: last",
        "model: {learning_rate: 1}\ncutoff_len: 3\nstage: sft",
        "学: 习",
    ],
)
def test_a_slip_in_a_file_of_ours_is_no_other_trainer(text):
    Path("given.yaml").write_text(text, encoding="utf-8")
    assert kind_of("given.yaml") is None
    with pytest.raises(UserError):
        converted(Path("given.yaml"))


def test_what_is_read_of_a_dictionary_is_read_of_its_file():
    assert kind_of(yaml.safe_load(examples.AXOLOTL)) == "Axolotl"
    assert kind_of({"trainer": {}, "model": {}}) is None and kind_of("no.yaml") is None and kind_of("data") is None


@pytest.mark.parametrize("command_name", ["fit", "plan", "inspect"])
def test_fit_names_the_command_that_converts(capsys, command_name):
    Path("my file.yaml").write_text(examples.AXOLOTL)
    assert main([command_name, "--config", "my file.yaml"]) == 2
    told = capsys.readouterr().err
    assert told == (
        "error: my file.yaml is an Axolotl configuration; convert it: qwen-lit convert 'my file.yaml' "
        "--output my.yaml\n"
    )


def test_the_command_writes_a_file_and_says_what_is_next(capsys):
    assert main(["convert", "llama_factory.yaml", "--output", "new/my.yaml"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err.endswith("new/my.yaml written; next: qwen-lit inspect --config new/my.yaml\n")
    assert yaml.safe_load(Path("new/my.yaml").read_text())["model"]["lora_config"]["r"] == 16
    assert main(["convert", "llama_factory.yaml", "--output", "new/my.yaml"]) == 2
    assert capsys.readouterr().err == "error: new/my.yaml is there already; give another --output.\n"
    assert main(["convert", "llama_factory.yaml"]) == 0
    told = capsys.readouterr()
    assert told.out == Path("new/my.yaml").read_text() and "different: " not in told.out
    assert main(["convert", "llama_factory.yaml", "--output", "data/dataset_info.json/a"]) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.yaml", None, "none.yaml: no such file"),
        ("broken.yaml", "a: [", "broken.yaml: is neither YAML nor JSON"),
        ("rows.json", '[{"instruction": "a"}]', "rows.json is no configuration of LLaMA-Factory, Axolotl"),
        ("gbk.yaml", "好".encode("gbk"), "gbk.yaml: is not UTF-8"),
        ("dpo.sh", "swift rlhf --rlhf_type dpo --model a", "dpo.sh: swift rlhf is not done here"),
        ("quotes.sh", "swift sft --model 'a", "quotes.sh: swift sft: cannot be split"),
        ("code.yaml", "a: !!python/object/apply:os.system [ls]", "code.yaml: is neither YAML nor JSON"),
    ],
)
def test_a_file_that_is_none_is_one_line(capsys, name, text, words):
    if text is not None:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert command.main([name]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(f"error: {words}") and told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "keys", "words"),
    [
        (examples.LLAMA_FACTORY, {"stage": "dpo"}, "stage: dpo is not done here"),
        (examples.LLAMA_FACTORY, {"finetuning_type": "full"}, "write finetuning_type: lora, lora_rank: 32"),
        (examples.LLAMA_FACTORY, {"train_on_prompt": True}, "train_on_prompt: true is not done here"),
        (examples.LLAMA_FACTORY, {"use_dft_loss": "true"}, "use_dft_loss: true is another loss"),
        (examples.LLAMA_FACTORY, {"dataset": None}, "names no rows to train on"),
        (examples.LLAMA_FACTORY, {"dataset": "dpo"}, "dpo is preference data"),
        (examples.LLAMA_FACTORY, {"learning_rate": "fast"}, "learning_rate is 'fast'; give a number"),
        (examples.LLAMA_FACTORY, {"lora_rank": 2.5}, "lora_rank is 2.5; give a whole number"),
        (examples.LLAMA_FACTORY, {"model_name_or_path": None}, "names no model"),
        (examples.AXOLOTL, {"adapter": None}, "write adapter: qlora, lora_r: 32"),
        (examples.AXOLOTL, {"rl": "dpo"}, "rl: dpo is not done here"),
        (examples.AXOLOTL, {"train_on_inputs": True}, "train_on_inputs: true is not done here"),
        (examples.AXOLOTL, {"datasets": [{"path": "a", "type": "input_output"}]}, "type input_output"),
        (examples.AXOLOTL, {"datasets": [{"path": "a", "roles_to_train": ["user"]}]}, "roles_to_train: user"),
        (examples.SWIFT_ARGS, {"tuner_type": "full"}, "train_type: full is not done here"),
        (examples.SWIFT_ARGS, {"loss_scale": "all"}, "loss_scale: all is not done here"),
        (examples.SWIFT_ARGS, {"task_type": "embedding"}, "task_type: embedding"),
        (examples.TRL, {"use_peft": None}, "write use_peft: true, lora_r: 32"),
        (examples.TRL, {"completion_only_loss": False}, "completion_only_loss: false is not done here"),
        (examples.FLAT, {"lora_config": None}, "has no lora_config"),
    ],
)
def test_what_is_not_done_here_is_refused_with_what_to_write(text, keys, words):
    assert words in refusal(text, **keys)


def test_sections_of_a_script_of_ones_own_are_read_by_any_of_their_names():
    given = {
        "model": {"model_name": "Qwen/Qwen3-4B"},
        "data": {"train_file": "a.jsonl", "validation_file": "b.jsonl"},
        "lora": {"rank": 4, "alpha": 8, "target_modules": "q_proj,v_proj"},
        "bnb_config": {"load_in_8bit": True},
        "training": {"learning_rate": 1e-4, "num_train_epochs": 1, "eval_strategy": "epoch"},
    }
    made = of(yaml.safe_dump(given))[0]
    assert made["model"]["model_name_or_path"] == "Qwen/Qwen3-4B"
    assert made["model"]["lora_config"] == {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    assert made["model"]["quantization_config"] == {"load_in_8bit": True}
    assert (made["data"]["dataset_path"], made["data"]["val_dataset_path"]) == ("a.jsonl", "b.jsonl")


def test_several_refusals_are_told_at_once():
    told = refusal(examples.LLAMA_FACTORY, stage="kto", train_on_prompt=True)
    assert told.count("\n") == 1 and "stage: kto" in told and "train_on_prompt" in told


def test_every_key_of_the_tables_is_one_of_fit(capsys):
    assert main(["fit", "--config", str(Path(__file__).parents[2] / "configs/qwen7b.yaml"), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    words = {word for peer in (*PEERS, OWN) for word in peer.words.values()}
    keys = {key for key, _ in PLAIN.values()} | {f"model.{word}" for word in words if "_config." in word}
    assert len(keys) > 30
    for key in keys:
        place = printed
        for part in key.split("."):
            assert part in place, key
            place = place[part]


def test_no_key_stands_in_two_tables_of_a_peer():
    for peer in (*PEERS, OWN):
        tables = [peer.words, peer.unneeded, peer.without]
        names = [key for table in tables for key in table]
        assert len(names) == len(set(names)), sorted(key for key in names if names.count(key) > 1)


def test_it_needs_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "jsonargparse")
    code = f"import sys, qwen_lit.convert; print([one for one in {heavy} if one in sys.modules])"
    root = str(Path(__file__).parents[2])
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_json_and_yaml_of_the_same_are_the_same():
    given = yaml.safe_load(examples.AXOLOTL)
    assert of(json.dumps(given), ".json") == of(yaml.safe_dump(given, sort_keys=False), ".yaml")
