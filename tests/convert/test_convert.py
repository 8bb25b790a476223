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


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The working directory, with every example and the register of datasets in it."""
    monkeypatch.chdir(tmp_path)
    for name, (text, _) in examples.EVERY.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(examples.REGISTER, encoding="utf-8")


@pytest.fixture
def parsed(monkeypatch):
    """What ``fit`` takes a configuration for, once it has passed every check that comes before the model."""
    values = {}

    def stop(self):
        values["all"] = self.config[self.subcommand]
        raise UserError("parsed")

    monkeypatch.setattr(QwenCLI, "instantiate_classes", stop)
    monkeypatch.setattr(accepted, "find_spec", lambda name: True)

    def parse(text):
        values.clear()
        Path("ours.yaml").write_text(text, encoding="utf-8")
        assert main(["fit", "--config", "ours.yaml"]) == 2
        return values.get("all")

    return parse


def of(text, suffix=".yaml", name="given"):
    """Our configuration and what is told, of a text."""
    path = Path(name + suffix)
    path.write_text(text, encoding="utf-8")
    made, told = converted(path)
    return yaml.safe_load(made), told


def changed(text, **keys):
    """The same example with other values; None takes a key out."""
    given = yaml.safe_load(text) | keys
    return of(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))


def refusal(text, **keys):
    with pytest.raises(UserError) as error:
        changed(text, **keys)
    return str(error.value)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WANTED = {
    "llama_factory.yaml": {
        "output_dir": "saves/qwen/lora/sft", "trainer.max_epochs": 3, "trainer.precision": "bf16-mixed",
        "trainer.accumulate_grad_batches": 8, "trainer.gradient_clip_val": 1.0, "trainer.log_every_n_steps": 10,
        "trainer.val_check_interval": 400, "trainer.check_val_every_n_epoch": None,
        "model.quantization_config.load_in_4bit": True, "model.quantization_config.bnb_4bit_use_double_quant": True,
        "model.lora_config.r": 16, "model.lora_config.lora_alpha": 32, "model.lora_config.target_modules": LINEARS,
        "model.learning_rate": 1e-4, "model.optimizer": "adamw", "model.warmup_ratio": 0.1, "data.val_size": 0.1,
        "data.batch_size": 2, "data.max_length": 4096, "checkpoint.every_n_train_steps": 500, "data.num_proc": 16,
    },
    "axolotl.yml": {
        "output_dir": "./outputs/out", "trainer.max_epochs": 4, "trainer.val_check_interval": 0.25,
        "trainer.accumulate_grad_batches": 4, "trainer.gradient_clip_val": 1.0,
        "model.quantization_config.load_in_4bit": True, "model.lora_config.r": 32,
        "model.lora_config.target_modules": LINEARS, "model.lora_config.modules_to_save": ["embed_tokens"],
        "model.optimizer": "paged_adamw_8bit", "model.weight_decay": 0.01, "model.learning_rate": 2e-4,
        "data.dataset_path": ["data/alpaca.jsonl", "data/chat.jsonl"], "data.packing": True, "data.val_size": 0.05,
        "data.batch_size": 2, "data.max_length": 2048, "data.overlong": "drop", "checkpoint.keep": 4,
    },
    "swift.sh": {
        "trainer.devices": 2, "trainer.strategy": "ddp", "trainer.accumulate_grad_batches": 16,
        "trainer.val_check_interval": 800, "model.model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "model.quantization_config.load_in_4bit": True, "model.lora_config.lora_dropout": 0.05,
        "model.learning_rate": 2e-4, "model.warmup_ratio": 0.05, "model.weight_decay": 0.1, "model.adam_beta2": 0.95,
        "data.dataset_path": [{"path": "one.jsonl", "max_rows": 500}, "two.jsonl"], "data.val_size": 0.01,
        "data.overlong": "drop", "data.num_workers": 4, "checkpoint.keep": 2, "checkpoint.every_n_train_steps": 50,
    },
    "args.json": {
        "seed_everything": 7, "trainer.check_val_every_n_epoch": 1, "model.quantization_config": None,
        "model.lora_config.target_modules": ["q_proj", "v_proj"], "model.lora_plus_ratio": 16.0,
        "model.lora_config.init_lora_weights": True, "data.dataset_path": "rows.jsonl", "data.train_on": "last",
        "data.val_dataset_path": "held.jsonl", "data.packing": True, "data.batch_size": 1,
    },
    "trl.yaml": {
        "trainer.max_steps": 1000, "trainer.max_epochs": None, "trainer.log_every_n_steps": 10,
        "model.lora_config.r": 32, "model.lora_config.lora_alpha": 16, "model.lr_scheduler": "linear",
        "model.quantization_config.bnb_4bit_use_double_quant": True, "model.warmup_ratio": 0.05,
        "data.dataset_path": "rows.jsonl", "checkpoint.every_n_train_steps": 100,
    },
    "trl.sh": {
        "trainer.devices": 4, "trainer.max_epochs": 1, "trainer.limit_train_batches": 0.5, "model.learning_rate": 1e-4,
        "model.lora_config.r": 8, "model.lora_config.target_modules": ["q_proj", "k_proj"], "data.batch_size": 8,
        "model.quantization_config": None,
    },
    "sections.yaml": {
        "output_dir": "output/qwen_qlora_model", "trainer.max_epochs": 3, "model.learning_rate": 2e-4,
        "model.optimizer": "paged_adamw_8bit", "model.lora_config.lora_dropout": 0.1, "data.max_length": 2048,
        "data.dataset_path": "dataset/novel_finetuning_dataset.jsonl", "checkpoint.every_n_train_steps": 100,
    },
    "flat.yaml": {
        "trainer.precision": "16-mixed", "model.learning_rate": 5e-5, "model.warmup_ratio": 0.0,
        "model.quantization_config": None, "model.lora_config.target_modules": LINEARS, "data.batch_size": 4,
        "trainer.gradient_clip_val": 1.0, "model.lr_scheduler": "linear",
    },
}  # fmt: skip


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
    ["lora_r: 3", "learning_rate: 1e-4", "dataset_path: a", "output_dir: a", "a: [", "- a", "1", "", "data: {a: b}",
     "output_dir: a\nckpt_path: last", "model: {learning_rate: 1}\ncutoff_len: 3\nstage: sft", "学: 习"],
)  # fmt: skip
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
        "model": {"model_name": "Qwen/Qwen3-4B"}, "data": {"train_file": "a.jsonl", "validation_file": "b.jsonl"},
        "lora": {"rank": 4, "alpha": 8, "target_modules": "q_proj,v_proj"}, "bnb_config": {"load_in_8bit": True},
        "training": {"learning_rate": 1e-4, "num_train_epochs": 1, "eval_strategy": "epoch"},
    }  # fmt: skip
    made = of(yaml.safe_dump(given))[0]
    assert made["model"]["model_name_or_path"] == "Qwen/Qwen3-4B"
    assert made["model"]["lora_config"] == {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    assert made["model"]["quantization_config"] == {"load_in_8bit": True}
    assert (made["data"]["dataset_path"], made["data"]["val_dataset_path"]) == ("a.jsonl", "b.jsonl")


def test_several_refusals_are_told_at_once():
    told = refusal(examples.LLAMA_FACTORY, stage="kto", train_on_prompt=True)
    assert told.count("\n") == 1 and "stage: kto" in told and "train_on_prompt" in told


def test_the_register_of_datasets_gives_files_and_columns():
    made, told = changed(examples.LLAMA_FACTORY, dataset="identity, qa", max_samples=None)
    columns = {"instruction": "question", "output": "answer"}
    assert made["data"]["dataset_path"] == ["data/identity.json", {"path": "data/qa.json", "columns": columns}]
    made, told = changed(examples.LLAMA_FACTORY, dataset="chat", eval_dataset="hub", val_size=None, max_samples=None)
    assert made["data"]["dataset_path"] == [
        {"path": "data/chat.jsonl", "columns": {"conversations": "turns", "from": "speaker", "value": "text"}}
    ]
    assert made["data"]["val_dataset_path"] == [{"path": "llamafactory/alpaca_en", "name": "small", "max_rows": 7}]
    assert any("user_tag 'me' is no role that is known" in line for line in told)
    made, told = changed(examples.LLAMA_FACTORY, dataset="qa", max_samples=None)
    assert made["data"]["dataset_path"] == "data/qa.json"
    assert made["data"]["fields"] == {"instruction": "question", "output": "answer"}
    made, told = changed(examples.LLAMA_FACTORY, dataset=["mine"], dataset_dir="elsewhere", max_samples=None)
    assert made["data"]["dataset_path"] == "elsewhere/mine.json"
    assert any("mine: no dataset_info.json tells its file" in line for line in told)


def test_the_register_is_found_beside_the_file_and_above_it(monkeypatch, tmp_path):
    Path("examples/train").mkdir(parents=True)
    path = Path("examples/train/qa.yaml")
    path.write_text(examples.LLAMA_FACTORY)
    monkeypatch.chdir(path.parent)
    paths = [one["path"] for one in yaml.safe_load(converted(Path(path.name))[0])["data"]["dataset_path"]]
    assert [Path(one).resolve() for one in paths] == [
        tmp_path / "data/identity.json", tmp_path / "data/alpaca_zh_demo.json"
    ]  # fmt: skip
    Path("dataset_info.json").write_text('{"identity": {"file_name": "i.json"}, "alpaca_zh_demo": {"file_name": "a"}}')
    paths = [one["path"] for one in yaml.safe_load(converted(Path(path.name))[0])["data"]["dataset_path"]]
    assert paths == ["i.json", "a"]


def test_the_smaller_of_two_limits_of_rows_and_the_rows_of_a_step_of_several_gpus_are_kept():
    register = {"rows": {"file_name": "rows.json", "num_samples": 10000, "columns": None}}
    Path("dataset_info.json").write_text(json.dumps(register))
    ours, _ = changed(examples.LLAMA_FACTORY, dataset="rows", dataset_dir=".", max_samples=50)
    assert ours["data"]["dataset_path"][0]["max_rows"] == 50
    ours, _ = of("NPROC_PER_NODE=4 swift sft --model a/b --dataset d.jsonl --per_device_train_batch_size 1\n", ".sh")
    assert ours["trainer"]["accumulate_grad_batches"] * ours["trainer"]["devices"] == 16


def test_a_share_in_percent_is_held_out_and_no_interval_is_the_end_of_an_epoch():
    ours, _ = of("training_args: {learning_rate: 1e-4, eval_strategy: epoch}\nmodel_name_or_path: a/b\n"
                 "data_args: {dataset_path: d.jsonl, validation_split_percentage: 5}\n"
                 "lora_config: {r: 8}\n")  # fmt: skip
    assert ours["data"]["val_size"] == 0.05


@pytest.mark.parametrize("text", ["trainer.max_epochs: 2\nmodel.learning_rate: 1.0e-4\noutput_dir: o\n"])
def test_keys_of_ours_with_dots_are_ours(text):
    Path("dots.yaml").write_text(text)
    assert kind_of("dots.yaml") is None


def test_datasets_of_axolotl_keep_their_columns_subset_and_split():
    datasets = [
        {"path": "tatsu-lab/alpaca", "type": "alpaca", "split": "train[:10%]", "name": "a"},
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "ds_type": "json", "type": "chat_template",
         "field_messages": "turns", "message_property_mappings": {"role": "who", "content": "value"}},
        {"path": "c.jsonl", "type": {"field_instruction": "ask", "field_output": "tell", "format": "[{instruction}]"}},
        {"path": "d.jsonl", "type": "completion", "field": "body"},
    ]  # fmt: skip
    made, told = changed(examples.AXOLOTL, datasets=datasets)
    turns = {"messages": "turns", "role": "who"}
    assert made["data"]["dataset_path"] == [
        {"path": "tatsu-lab/alpaca", "name": "a", "split": "train[:10%]"},
        {"path": "a.jsonl", "columns": turns}, {"path": "b.jsonl", "columns": turns},
        {"path": "c.jsonl", "columns": {"instruction": "ask", "output": "tell"}},
        {"path": "d.jsonl", "columns": {"text": "body"}},
    ]  # fmt: skip
    assert any("c.jsonl: its format is left out" in line for line in told)


def test_datasets_of_swift_and_trl_keep_their_counts_and_shares():
    made, told = changed(examples.SWIFT_ARGS, dataset=["HF::a/b:en/zh#9", "c.jsonl"], columns='{"q": "query"}')
    assert made["data"]["dataset_path"] == [
        {"path": "a/b", "name": "en", "max_rows": 9}, {"path": "a/b", "name": "zh", "max_rows": 9}, "c.jsonl"
    ]  # fmt: skip
    assert made["data"]["val_dataset_path"] == "held.jsonl" and made["data"]["fields"] == {"instruction": "q"}
    mixture = [{"path": "a/b", "split": "test", "fraction": 0.5}, {"path": "json", "data_files": "c.jsonl"}]
    made, told = changed(examples.TRL, datasets=mixture, dataset_name=None, test_split_size=0.1)
    assert made["data"]["dataset_path"] == [{"path": "a/b", "split": "test", "weight": 0.5}, "c.jsonl"]
    assert made["data"]["val_size"] == 0.1
    made, told = changed(examples.TRL, dataset_name="a/b", eval_strategy="epoch", dataset_test_split="val")
    assert made["data"]["val_dataset_path"] == [{"path": "a/b", "split": "val"}]


def test_a_model_of_modelscope_is_fetched_there():
    assert changed(examples.SWIFT_ARGS, use_hf=None)[0]["model"]["hub"] == "modelscope"
    assert "hub" not in changed(examples.SWIFT_ARGS)[0]["model"]
    Path("Qwen/mine").mkdir(parents=True)
    assert "hub" not in changed(examples.SWIFT_ARGS, use_hf=None, model="Qwen/mine")[0]["model"]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"eval_strategy": "epoch"}, {"check_val_every_n_epoch": 1}),
        ({"eval_strategy": None, "eval_steps": 0.1}, {"val_check_interval": 0.3}),
        ({"eval_strategy": None, "eval_steps": 0.5}, {"check_val_every_n_epoch": 2}),
        ({"eval_steps": 0.1, "max_steps": 200}, {"val_check_interval": 160, "check_val_every_n_epoch": None}),
        ({"eval_strategy": "no", "load_best_model_at_end": None, "early_stopping_steps": None},
         {"limit_val_batches": 0}),
        ({"eval_strategy": False, "early_stopping_steps": None}, {}),
    ],
)  # fmt: skip
def test_how_often_is_validated(keys, wanted):
    trainer = changed(examples.LLAMA_FACTORY, **keys)[0]["trainer"]
    names = ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches")
    assert {key: trainer[key] for key in names if key in trainer} == wanted


def test_what_waits_for_validation_is_left_out_where_no_rows_are_held_out():
    made, told = changed(examples.LLAMA_FACTORY, val_size=0)
    assert "callbacks" not in made["trainer"] and "val_check_interval" not in made["trainer"]
    assert "checkpoint" not in made.get("export", {})
    assert len([line for line in told if "no rows are held out" in line]) == 3


@pytest.mark.parametrize(
    ("keys", "ratio", "told"),
    [
        ({"warmup_steps": 100}, 0.03, True), ({"warmup_steps": 0.2}, 0.2, False),
        ({"warmup_steps": 0, "warmup_ratio": None}, 0.0, False), ({"warmup_steps": 0}, 0.1, False),
        ({"warmup_steps": 30, "max_steps": 300}, 0.1, False), ({"warmup_ratio": None}, 0.0, False),
        ({"lr_scheduler_type": "constant"}, 0.0, False), ({"lr_scheduler_type": "constant_with_warmup"}, 0.1, False),
    ],
)  # fmt: skip
def test_how_long_the_learning_rate_rises(keys, ratio, told):
    made, lines = changed(examples.LLAMA_FACTORY, **keys)
    assert made["model"]["warmup_ratio"] == ratio
    assert any("divided by it" in line for line in lines) == told


@pytest.mark.parametrize(
    ("keys", "where", "wanted"),
    [
        ({"bf16": None, "fp16": True}, ("trainer", "precision"), "16-mixed"),
        ({"pure_bf16": True}, ("trainer", "precision"), "bf16-true"),
        ({"max_grad_norm": 0}, ("trainer", "gradient_clip_val"), None),
        ({"optim": "paged_adamw_32bit"}, ("model", "optimizer"), "paged_adamw_32bit"),
        ({"optim": "adamw_8bit"}, ("model", "optimizer"), "paged_adamw_8bit"),
        ({"lr_scheduler_type": "polynomial"}, ("model", "lr_scheduler"), "linear"),
        ({"quantization_bit": None}, ("model", "quantization_config"), None),
        ({"quantization_bit": 8}, ("model", "quantization_config"), {"load_in_8bit": True}),
        ({"neat_packing": True}, ("data", "packing"), True),
        ({"mask_history": True}, ("data", "train_on"), "last"),
        ({"disable_gradient_checkpointing": True}, ("model", "gradient_checkpointing"), False),
        ({"adapter_name_or_path": "saves/a"}, ("model", "init_adapter"), "saves/a"),
        ({"save_total_limit": 1}, ("checkpoint", "keep"), 2),
        ({"loraplus_lr_ratio": "16"}, ("model", "lora_plus_ratio"), 16),
        ({"max_steps": "50"}, ("trainer", "max_steps"), 50),
        ({"num_train_epochs": 2.4}, ("trainer", "max_epochs"), 2),
        ({"learning_rate": "3e-05"}, ("model", "learning_rate"), 3e-5),
        ({"use_cpu": True}, ("trainer", "accelerator"), "cpu"),
    ],
)
def test_a_value_by_its_meaning(keys, where, wanted):
    made = changed(examples.LLAMA_FACTORY, **keys)[0]
    assert made[where[0]].get(where[1]) == wanted and where[1] in made[where[0]]


def test_going_on_from_a_run_of_another_trainer_is_told():
    assert changed(examples.LLAMA_FACTORY, resume_from_checkpoint=True)[0]["ckpt_path"] == "last"
    made, told = changed(examples.LLAMA_FACTORY, resume_from_checkpoint="saves/checkpoint-500")
    assert "ckpt_path" not in made and any("model.init_adapter" in line for line in told)


def test_keys_without_a_counterpart_are_told_once_in_their_order():
    made, told = changed(examples.TRL, zebra=1, apple={"a": 1}, model_revision="v2", truncation_mode="keep_end")
    lines = [line for line in told if line.startswith("no counterpart: ")]
    assert [line.split(": ")[1] for line in lines] == ["apple", "model_revision", "push_to_hub", "zebra"]
    assert lines[2].endswith("`qwen-lit export --push_to_hub NAME/MODEL` uploads")
    told = changed(examples.TRL, zebra=1, max_steps=None, save_steps=None)[1]
    assert told[0].startswith("different: warmup_steps: 50")
    order = [line.partition(":")[0] for line in told]
    assert order == sorted(order, key=["different", "no counterpart", "not needed"].index)


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", False), ("Qwen/Qwen3-8B", False), ("Qwen/QwQ-32B", False),
        ("models/mine/qwen", False), ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", False),
        ("Qwen/Qwen2.5-Coder-1.5B", False), ("Qwen/Qwen1.5-7B", False),
        ("Qwen/Qwen3.5-9B", True), ("meta-llama/Llama-3.1-8B", True), ("Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("Qwen/Qwen3-30B-A3B", True), ("Qwen/Qwen-7B", True), ("Qwen/Qwen2.5-7B-Instruct-AWQ", True),
    ],
)  # fmt: skip
def test_a_model_that_is_not_trained_here_is_warned_of(name, warned):
    told = changed(examples.FLAT, model_name_or_path=name)[1]
    assert any(line.startswith(f"different: {name}: ") for line in told) == warned


def test_what_was_a_default_is_written_with_whose_it_is():
    text = converted(Path("llama_factory.yaml"))[0]
    assert re.search(r"target_modules: \[q_proj.*\]    # lora_target: all\n", text)
    assert re.search(r"lora_alpha: 32    # LLaMA-Factory's default, twice lora_rank\n", text)
    assert re.search(r"optimizer: adamw    # LLaMA-Factory's default\n", text)
    assert re.search(r"batch_size: 2    # per_device_train_batch_size\n", text)


def test_texts_that_yaml_takes_for_something_else_stay_texts():
    odd = ("1e3", "yes", "a: b", "#1", "[x]", "C:\\x", "中文 路径", "~/x", "0x1F", "12", "-a", "2020-01-01", "1_0",
           ".5", ".inf", "../x", "./-", "on")  # fmt: skip
    for value in odd:
        made = changed(examples.FLAT, output_dir=value, run_name=value, report_to="wandb")[0]
        assert made["output_dir"] == value and made["trainer"]["logger"]["init_args"]["name"] == value


def test_a_script_takes_the_file_that_it_names_and_its_own_variables():
    Path("base.yaml").write_text(examples.TRL)
    line = "WANDB_PROJECT=p trl sft --config base.yaml --learning_rate ${LR} --report_to wandb --bf16\n"
    made, told = of("export LR='3e-4'\n" + line, ".sh")
    assert made["model"]["learning_rate"] == 3e-4 and made["model"]["lora_config"]["r"] == 32
    made, told = of("llamafactory-cli train llama_factory.yaml learning_rate=2e-5 \\\n  cutoff_len=99", ".sh")
    assert made["model"]["learning_rate"] == 2e-5 and made["data"]["max_length"] == 99


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
