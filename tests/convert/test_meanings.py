"""What each value of another trainer becomes: datasets, validation, schedules, single keys."""

import json
import re
from pathlib import Path

import pytest
import yaml

from qwen_lit.convert import converted, kind_of
from tests.convert import examples
from tests.convert.examples import changed, of

pytestmark = pytest.mark.usefixtures("folder")


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
        tmp_path / "data/identity.json",
        tmp_path / "data/alpaca_zh_demo.json",
    ]
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
    ours, _ = of(
        "training_args: {learning_rate: 1e-4, eval_strategy: epoch}\nmodel_name_or_path: a/b\n"
        "data_args: {dataset_path: d.jsonl, validation_split_percentage: 5}\n"
        "lora_config: {r: 8}\n"
    )
    assert ours["data"]["val_size"] == 0.05


@pytest.mark.parametrize("text", ["trainer.max_epochs: 2\nmodel.learning_rate: 1.0e-4\noutput_dir: o\n"])
def test_keys_of_ours_with_dots_are_ours(text):
    Path("dots.yaml").write_text(text)
    assert kind_of("dots.yaml") is None


def test_datasets_of_axolotl_keep_their_columns_subset_and_split():
    datasets = [
        {"path": "tatsu-lab/alpaca", "type": "alpaca", "split": "train[:10%]", "name": "a"},
        {
            "path": "json",
            "data_files": ["a.jsonl", "b.jsonl"],
            "ds_type": "json",
            "type": "chat_template",
            "field_messages": "turns",
            "message_property_mappings": {"role": "who", "content": "value"},
        },
        {"path": "c.jsonl", "type": {"field_instruction": "ask", "field_output": "tell", "format": "[{instruction}]"}},
        {"path": "d.jsonl", "type": "completion", "field": "body"},
    ]
    made, told = changed(examples.AXOLOTL, datasets=datasets)
    turns = {"messages": "turns", "role": "who"}
    assert made["data"]["dataset_path"] == [
        {"path": "tatsu-lab/alpaca", "name": "a", "split": "train[:10%]"},
        {"path": "a.jsonl", "columns": turns},
        {"path": "b.jsonl", "columns": turns},
        {"path": "c.jsonl", "columns": {"instruction": "ask", "output": "tell"}},
        {"path": "d.jsonl", "columns": {"text": "body"}},
    ]
    assert any("c.jsonl: its format is left out" in line for line in told)


def test_datasets_of_swift_and_trl_keep_their_counts_and_shares():
    made, told = changed(examples.SWIFT_ARGS, dataset=["HF::a/b:en/zh#9", "c.jsonl"], columns='{"q": "query"}')
    assert made["data"]["dataset_path"] == [
        {"path": "a/b", "name": "en", "max_rows": 9},
        {"path": "a/b", "name": "zh", "max_rows": 9},
        "c.jsonl",
    ]
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
        ({"eval_steps": 0.1, "max_steps": 200}, {"val_check_interval": 20, "check_val_every_n_epoch": None}),
        (
            {"eval_strategy": "no", "load_best_model_at_end": None, "early_stopping_steps": None},
            {"limit_val_batches": 0},
        ),
        ({"eval_strategy": False, "early_stopping_steps": None}, {}),
    ],
)
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
        ({"warmup_steps": 100}, 0.03, True),
        ({"warmup_steps": 0.2}, 0.2, False),
        ({"warmup_steps": 0, "warmup_ratio": None}, 0.0, False),
        ({"warmup_steps": 0}, 0.1, False),
        ({"warmup_steps": 30, "max_steps": 300}, 0.1, False),
        ({"warmup_ratio": None}, 0.0, False),
        ({"lr_scheduler_type": "constant"}, 0.0, False),
        ({"lr_scheduler_type": "constant_with_warmup"}, 0.1, False),
    ],
)
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
        ({"optim": "adamw_8bit"}, ("model", "optimizer"), "adamw_8bit"),
        ({"lr_scheduler_type": "polynomial"}, ("model", "lr_scheduler"), "polynomial"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ("model", "lr_scheduler"), "cosine"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            ("model", "lr_scheduler_kwargs"),
            {"min_lr_rate": 0.1},
        ),
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
        ("Qwen/Qwen2.5-7B-Instruct", False),
        ("Qwen/Qwen3-8B", False),
        ("Qwen/QwQ-32B", False),
        ("models/mine/qwen", False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", False),
        ("Qwen/Qwen2.5-Coder-1.5B", False),
        ("Qwen/Qwen1.5-7B", False),
        ("Qwen/Qwen3.5-9B", False),
        ("Qwen/Qwen3.8-27B", False),
        ("Qwen/Qwen2.5-VL-7B-Instruct", False),
        ("Qwen/Qwen3-30B-A3B", False),
        ("unsloth/Qwen3-8B-bnb-4bit", False),
        ("meta-llama/Llama-3.1-8B", True),
        ("Qwen/Qwen2-VL-7B-Instruct", True),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", True),
        ("Qwen/Qwen3.8-Flash-Next", True),
        ("Qwen/Qwen1.5-MoE-A2.7B", True),
        ("Qwen/Qwen-7B", True),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", True),
    ],
)
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
    odd = (
        "1e3",
        "yes",
        "a: b",
        "#1",
        "[x]",
        "C:\\x",
        "中文 路径",
        "~/x",
        "0x1F",
        "12",
        "-a",
        "2020-01-01",
        "1_0",
        ".5",
        ".inf",
        "../x",
        "./-",
        "on",
    )
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
