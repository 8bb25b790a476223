"""Keys whose value shows in what a command leaves or says, each with another value than its default."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from qwen_lit.cli import main
from qwen_lit.commands import plan as dry_run
from qwen_lit.data import encoding
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.planner.flops import token_flops
from qwen_lit.planner.plan import Plan
from tests.runs import adapter, doing, lengths, trace

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 50_000,
    "layer_types": ["full_attention"] * 8,
}


def test_samples_verdict_smoke_test_and_checkpoints_are_as_many_as_asked(arguments, tmp_path, caplog):
    options = [
        "--trainer.max_steps",
        "4",
        "--data.val_size",
        "6",
        "--samples.prompts",
        '["Who are you?", "好?"]',
        "--samples.max_new_tokens",
        "3",
        "--export.verdict_rows",
        "2",
        "--export.smoke_rows",
        "1",
        "--checkpoint.every_n_train_steps",
        "1",
        "--checkpoint.keep",
        "3",
    ]
    assert main([*arguments, *options]) == 0
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"].count("Who are you?") for line in lines[:2]] == [1, 0] and "好?" in lines[1]["prompt"]
    assert len(lines) % 2 == 0 and all(len(line["answer"]) <= 3 * 8 for line in lines)
    assert json.loads((out / "summary.json").read_text())["verdict"]["rows"] == 2
    assert " of 1 trained prompts" in caplog.text
    kept = sorted(path.name for path in (out / "checkpoints").glob("step=*.ckpt"))
    assert kept == [f"step={step:08d}.ckpt" for step in (2, 3, 4)]


@pytest.fixture
def plan(model_folder, dataset, tmp_path, capsys):
    """``plan --json`` for a model of half a gigabyte, of which only the shapes are read."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SHAPE))

    def run(*options):
        capsys.readouterr()
        code = main(
            [
                "plan",
                "--config",
                "configs/qwen7b.yaml",
                "--model.model_name_or_path",
                str(folder),
                "--json",
                "true",
                "--data.dataset_path",
                str(dataset),
                "--trainer.accelerator",
                "cpu",
                "--model.optimizer",
                "adamw",
                "--model.lora_config.r",
                "64",
                "--data.val_size",
                "0",
                *options,
            ]
        )
        return code, json.loads(capsys.readouterr().out)

    run.folder = folder
    return run


def test_a_plan_tells_disk_memory_and_advice_by_the_shapes(plan, rows):
    code, told = plan("--checkpoint.keep", "4", "--memory_budget", "8GiB", "--export.gguf", "q4_k_m")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plan.folder))
    count, largest = (of(p.numel() for p in model.parameters()) for of in (sum, max))
    # r x (inputs + outputs) of q, k, v and o; AdamW keeps two more numbers of 4 bytes for each.
    trained = 64 * 8 * (2 * (1024 + 1024) + 2 * (1024 + 512))
    assert code == 0 and told["checkpoint_mb"] == round(12 * trained / 1e6, 1)
    assert told["export_gb"] == round(2 * count / 1e9, 2)
    # 4.9 bits a weight, and the bf16 file that they are made from.
    gguf = count * (4.9 + 16) / 8
    assert told["gguf_gb"] == round(gguf / 1e9, 2)
    assert told["disk_gb"] == round((5 * 12 * trained + 4 * trained + 2 * count + gguf) / 1e9, 2)
    # The tensor in the making, two float32 copies of a block of at most 2**25 numbers, the adapter, and libraries.
    ram = 2 * largest + 8 * min(largest, 2**25) + 4 * trained
    assert told["export_ram_gib"] == round(ram / 2**30 + 0.6, 2)
    assert [one["budget_gib"] for one in told["plans"]] == [8.0]
    tokens, supervised = lengths(rows, plan.folder)
    share = sum(supervised) / sum(tokens)
    assert told["rows"] == 25 and told["tokens_per_epoch"] == sum(tokens)
    assert told["supervised_share"] == round(share, 4) and told["heaviest_micro_batch_tokens"] == max(tokens)
    assert (told["steps"], told["steps_per_epoch"], told["epochs"]) == (12, 4, 3)
    assert told["tokens_per_step"] == round(sum(tokens) / 4)
    adapted = get_peft_model(model, LoraConfig(r=64, target_modules=QKVO, task_type="CAUSAL_LM"))
    mean = sum(count**2 for count in tokens) / sum(tokens)
    assert told["flops_per_token"] == pytest.approx(token_flops(adapted, mean, share)[0], rel=1e-6)
    # Half of the weights, their gradients and AdamW's two numbers.
    advice = "\n".join(told["advice"])
    assert f"lora_config.r 32 takes {8 * trained / 2**30:.2f} GiB less" in advice and "data.packing: true" in advice
    _, packed = plan("--data.packing", "true", "--memory_budget", "8GiB")
    assert "data.packing" not in "\n".join(packed["advice"])


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_processes_tokenise_as_asked(count, model_folder, dataset, tmp_path, monkeypatch):
    asked, plain = [], encoding.in_order
    monkeypatch.setattr(encoding, "in_order", lambda *given: asked.append(given[2]) or plain(*given))
    inspect = [
        "inspect",
        "--config",
        "configs/qwen7b.yaml",
        "--model.model_name_or_path",
        str(model_folder),
        "--data.dataset_path",
        str(dataset),
        "--trainer.accelerator",
        "cpu",
        "--data.num_proc",
        str(count),
        "--data.cache_dir",
        str(tmp_path / "cache"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(inspect) == 0
    assert asked == [count] * (count > 1) and list((tmp_path / "cache").glob("*/rows.arrow"))


LONG = {"instruction": "a long question " * 40, "output": "short"}
LONG_ANSWER = {"instruction": "short", "output": "a long answer " * 40}
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "second"},
    ]
}
TWO_QUESTIONS = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
}
CONTROL = {"instruction": "what is <|im_start|>?", "output": "a mark"}


@pytest.fixture
def inspect(model_folder, tmp_path, capsys):
    """What ``inspect`` says of one row, with its exit code."""

    def run(row, *options):
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps(row) + "\n")
        command = [
            "inspect",
            "--config",
            "configs/qwen7b.yaml",
            "--model.model_name_or_path",
            str(model_folder),
            "--data.dataset_path",
            str(path),
            "--trainer.accelerator",
            "cpu",
            "--data.max_length",
            "96",
            "--output_dir",
            str(tmp_path / "out"),
            *options,
        ]
        capsys.readouterr()
        return main(command), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("row", "key", "value", "code", "words"),
    [
        (LONG, "overlong", "shorten", 1, "1 row cut: longest user text shortened"),
        (LONG_ANSWER, "overlong", "shorten", 1, "1 of 1 row (100%) dropped: question and answer do not fit"),
        (LONG_ANSWER, "overlong", "truncate", 1, "1 row cut: end of the answer cut off"),
        (LONG, "overlong", "drop", 1, "dropped         overlong 1"),
        (LONG, "overlong", "error", 1, "has 607 tokens, more than data.max_length 96"),
        (LONG, "max_length", "2048", 0, "nothing is lost"),
        (TWO_TURNS, "train_on", "all", 0, "⟦first<|im_end|>⟧"),
        (TWO_TURNS, "train_on", "last", 0, "assistant\nfirst<|im_end|>\n<|im_start|>user\nb<|im_end|>"),
        (CONTROL, "control_tokens", "error", 1, "\nfaulty          control"),
        (CONTROL, "control_tokens", "escape", 0, "⟦a mark<|im_end|>⟧"),
        (TWO_QUESTIONS, "odd_turns", "error", 1, "message 1 (user) follows user: 'b'; data.odd_turns: merge"),
        (TWO_QUESTIONS, "odd_turns", "merge", 0, "user\na\n\nb<|im_end|>"),
        ({"q": "x", "output": "y"}, "fields", "{}", 1, "misses 'instruction'"),
        ({"q": "x", "output": "y"}, "fields", "{instruction: q}", 0, "user\nx<|im_end|>"),
    ],
)
def test_each_way_to_take_a_row_shows_in_what_is_trained(inspect, row, key, value, code, words):
    found, out = inspect(row, f"--data.{key}", value)
    assert found == code and words in out


def test_faulty_rows_stop_a_run_unless_they_may_be_skipped_and_are_few(arguments, dataset, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(dataset.read_text("utf-8") + "nonsense\n")
    plan = ["plan", *arguments[1:], "--data.dataset_path", str(path)]
    codes = {}
    for options in ([], ["--data.on_bad_row", "skip"], ["--data.on_bad_row", "skip", "--data.max_bad_share", "0.03"]):
        codes[" ".join(options)] = main([*plan, *options])
        assert ("rows.jsonl:26: is not JSON" in capsys.readouterr().err) == (codes[" ".join(options)] == 2)
    assert list(codes.values()) == [2, 0, 2]


def test_the_seed_chooses_the_order_and_the_adapter_s_beginning(command, tmp_path):
    found = {}
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        out = tmp_path / name
        few = ["--seed_everything", seed, "--trainer.max_steps", "1"]
        assert main(command(out, *few)) == 0
        found[name] = trace(out)[0]["rows"], next(v for k, v in sorted(adapter(out).items()) if "lora_A" in k)
    assert found["one"][0] == found["again"][0] != found["other"][0]
    assert torch.equal(found["one"][1], found["again"][1]) and not torch.equal(found["one"][1], found["other"][1])


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_processes_build_batches_as_asked(count, command, tmp_path):
    told, out = tmp_path / "workers", tmp_path / "out"
    options = ["--data.num_workers", str(count), "--trainer.max_steps", "2", "--data.val_size", "0"]
    assert main(command(out, *options, *doing(2, "count_workers", str(told)))) == 0
    assert told.read_text() == str(count)


@pytest.mark.parametrize(("name", "told"), [("fast", "fast (PyTorch fallback, no CUDA)"), ("reference", "reference")])
def test_the_engine_that_is_asked_for_is_the_one_that_runs(name, told, arguments, tmp_path):
    options = ["--model.engine", name, "--trainer.max_steps", "1", "--export.merge", "false"]
    assert main([*arguments, *options]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["engine"].startswith(told)


@pytest.mark.parametrize("engine", [FastEngine, Qwen2Attention])
@pytest.mark.parametrize("recomputed", [True, False])
def test_gradient_checkpointing_computes_each_layer_twice(engine, recomputed, arguments, monkeypatch):
    name, many = "_layer" if engine is FastEngine else "forward", []
    plain = getattr(engine, name)

    def counted(self, *given, **more):
        many.extend([1] * torch.is_grad_enabled())
        return plain(self, *given, **more)

    monkeypatch.setattr(engine, name, counted)
    options = ["--model.engine", "fast" if engine is FastEngine else "reference", "--trainer.max_steps", "1"]
    options += ["--model.gradient_checkpointing", str(recomputed).lower(), "--export.merge", "false"]
    assert main([*arguments, *options]) == 0
    # Three micro-batches through two layers.
    assert len(many) == 3 * 2 * (1 + recomputed)


def test_without_merging_the_adapter_alone_is_written(arguments, tmp_path):
    out = tmp_path / "out"
    assert main([*arguments, "--trainer.max_steps", "1", "--export.merge", "false"]) == 0
    assert (out / "lora_adapter").is_dir() and not (out / "final_model").exists()
    assert main(["export", *arguments[1:]]) == 0
    assert (out / "final_model" / "model.safetensors").is_file()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_validation_rows_are_answered_as_asked(count, command, tmp_path):
    out = tmp_path / "out"
    assert main(command(out, "--trainer.max_steps", "1", "--samples.rows", str(count))) == 0
    file = out / "samples.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    assert len({json.loads(line)["prompt"] for line in lines}) == len(lines) == count


def test_predictions_are_made_so_many_at_a_time_and_no_longer_than_asked(arguments, tmp_path, monkeypatch):
    from transformers import GenerationMixin

    assert main([*arguments, "--trainer.max_steps", "1", "--export.merge", "false"]) == 0
    source, target, asked = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl", []
    source.write_text("".join(json.dumps({"instruction": f"Say {n}"}) + "\n" for n in range(7)))
    plain = GenerationMixin.generate

    def generate(self, **options):
        answers = plain(self, **options)
        asked.append((len(options["input_ids"]), answers.shape[1] - options["input_ids"].shape[1]))
        return answers

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    options = ["--source", str(source), "--target", str(target), "--batch_size", "3", "--max_new_tokens", "5"]
    assert main(["predict", *arguments[1:], *options]) == 0
    assert [rows for rows, _ in asked] == [3, 3, 1] and {tokens for _, tokens in asked} == {5}


def test_a_plan_is_told_as_the_planner_chose_it(plan, monkeypatch):
    policies = Policies.of_counts(8, 5, 3, True, 2, 1024, True, 512, kept="int8")
    chosen = Plan(4, policies, 3 * 2**30, 6 * 2**30)
    monkeypatch.setattr(dry_run, "choose", lambda *given, **more: chosen)
    _, told = plan("--memory_budget", "6GiB")
    (found,) = told["plans"]
    assert found.pop("relative_time") > 0
    assert found == {
        "budget_gib": 6.0,
        "estimated_peak_gib": 3.0,
        "micro_batches_at_once": 4,
        "recomputed_layers": 5,
        "embedding_on_cpu": True,
        "inputs_offloaded": True,
        "layers_offloaded": 3,
        "mlp_piece_tokens": 512,
        "layers_packed": 3,
        "layers_held_in_bf16": 2,
        "layers_streamed": 0,
        "head_on_host": False,
        "graph_tokens": 0,
        "host_memory_gib": 0.0,
        "fits": True,
    }


def test_the_budget_of_the_configuration_is_the_one_that_is_planned_for(plan):
    _, told = plan("--model.memory_budget", "6GiB")
    assert [one["budget_gib"] for one in told["plans"]] == [6.0]
    _, told = plan()
    assert [one["budget_gib"] for one in told["plans"]] == [4, 8, 12, 16, 24, 40, 80]


def test_predictions_come_from_the_checkpoint_that_is_asked_for(arguments, tmp_path):
    learning = ["--model.learning_rate", "0.05", "--model.lr_scheduler", "constant", "--model.warmup_ratio", "0"]
    kept = ["--trainer.max_steps", "3", "--checkpoint.every_n_train_steps", "1", "--checkpoint.keep", "3"]
    assert main([*arguments, *learning, *kept, "--export.merge", "false"]) == 0
    source, answers = tmp_path / "questions.jsonl", {}
    source.write_text(json.dumps({"instruction": "What is 1 plus 2?"}) + "\n")
    for name in ("step=00000001.ckpt", "step=00000003.ckpt", ""):
        target = tmp_path / f"answers{name}.jsonl"
        asked = ["--ckpt_path", str(tmp_path / "out" / "checkpoints" / name)] if name else []
        options = ["--source", str(source), "--target", str(target), "--max_new_tokens", "12", *asked]
        assert main(["predict", *arguments[1:], *options]) == 0
        answers[name] = target.read_text("utf-8")
    assert answers["step=00000001.ckpt"] != answers["step=00000003.ckpt"] == answers[""]
