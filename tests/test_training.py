"""Every key of the optimizer does what it says: runs beside a plain loop of torch, transformers and PEFT."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qwen_lit import hardware
from qwen_lit.cli import main
from qwen_lit.hardware import product_dtype
from tests.runs import adapter, doing, ended, forked, recording, scalars, stopping

RATE, BETAS, DECAY, PLUS, CLIP, WARMUP, STEPS = 3e-3, (0.7, 0.9), 0.8, 5.0, 0.2, 3, 6
UNUSUAL = [
    "--model.quantization_config",
    "null",
    "--model.lora_config.lora_dropout",
    "0",
    "--model.lora_config.lora_alpha",
    "24",
    "--model.gradient_checkpointing",
    "false",
    "--model.learning_rate",
    str(RATE),
    "--model.adam_beta1",
    str(BETAS[0]),
    "--model.adam_beta2",
    str(BETAS[1]),
    "--model.weight_decay",
    str(DECAY),
    "--model.lora_plus_ratio",
    str(PLUS),
    "--model.warmup_ratio",
    "0.5",
    "--trainer.gradient_clip_val",
    str(CLIP),
]
MUON = [
    "--model.optimizer=torch.optim.Muon",
    "--model.optimizer.init_args.momentum=0.9",
    "--model.optimizer.init_args.nesterov=false",
    "--model.lr_scheduler=cosine_with_min_lr",
    '--model.lr_scheduler_kwargs={"min_lr_rate": 0.2}',
]


def plain_run(folder, record, optimizer, schedule):
    """Weights, losses, norms and rates of the same micro-batches by a loop that reads nothing of the package."""
    dtype = product_dtype(torch.device("cpu"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=24, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            p.copy_(record["first"]["model." + name])
    groups = [
        {"params": [p for name, p in trained.items() if "lora_A" in name], "lr": RATE},
        {"params": [p for name, p in trained.items() if "lora_B" in name], "lr": RATE * PLUS},
    ]
    if optimizer == "muon":
        optimizer = torch.optim.Muon(groups, momentum=0.9, nesterov=False, weight_decay=DECAY)
    else:
        optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY)
    said = {"train/loss": [], "train/grad_norm": [], "train/lr": []}
    for step in range(STEPS):
        done = (step - WARMUP) / (STEPS - WARMUP)
        later = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}.get(schedule)
        if schedule == "cosine_with_min_lr":
            later = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * done))
        factor = step / WARMUP if step < WARMUP and schedule != "constant" else later
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = RATE * factor, RATE * PLUS * factor
        window = record["batches"][3 * step : 3 * step + 3]
        tokens, total = sum(len(batch["targets"]) for batch in window), 0.0
        for batch in window:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["target_index"]]
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        said["train/loss"].append(total)
        said["train/grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)))
        said["train/lr"].append(RATE * factor)
        optimizer.step()
        optimizer.zero_grad()
    return {name.replace(".default", ""): p.detach() for name, p in trained.items()}, said


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("adamw", "linear"),
        ("paged_adamw_32bit", "cosine"),
        ("paged_adamw_8bit", "constant"),
        ("adamw_8bit", "linear"),
        ("muon", "cosine_with_min_lr"),
    ],
)
def test_unusual_values_of_every_key_give_the_weights_of_a_plain_loop(
    optimizer, schedule, arguments, tmp_path, model_folder, monkeypatch
):
    # In float32 on every CPU: bfloat16 rounds what is compared.
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
    chosen = MUON if optimizer == "muon" else ["--model.optimizer", optimizer, "--model.lr_scheduler", schedule]
    chosen = [*chosen, "--export.merge", "false"]
    assert main([*arguments, *UNUSUAL, *chosen, *recording(tmp_path / "record.pt")]) == 0
    record = torch.load(tmp_path / "record.pt")
    assert len(record["batches"]) == 3 * STEPS
    assert all(changed == 0 for changed, _, _ in record["noise"])
    wanted, said = plain_run(model_folder, record, optimizer, schedule)
    found, logged = adapter(tmp_path / "out"), scalars(tmp_path / "out")
    # AdamW does not see a clipping that is the same at every step.
    assert min(said["train/grad_norm"]) > CLIP
    assert optimizer == "muon" or max(said["train/grad_norm"]) > 4 * min(said["train/grad_norm"])
    for name, values in said.items():
        assert logged[name] == pytest.approx(values, rel=0.02), name
    for name, value in wanted.items():
        moved = (value - record["first"]["model." + name.replace(".weight", ".default.weight")]).norm()
        assert (found[name] - value).norm() < 0.03 * moved, name


def test_neftune_adds_noise_of_its_size_while_training_and_none_in_validation(arguments, tmp_path):
    options = ["--model.neftune_noise_alpha", "5", "--trainer.max_steps", "1", "--data.val_size", "5"]
    options += ["--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1", "--export.merge", "false"]
    assert main([*arguments, *options, "--samples.rows", "0", *recording(tmp_path / "record.pt")]) == 0
    noise = torch.load(tmp_path / "record.pt")["noise"]
    trained = [changed * size**0.5 for changed, size, training in noise if training]
    assert len(trained) >= 3 and all(4.5 < one < 5.1 for one in trained)
    still = [changed for changed, _, training in noise if not training]
    assert still and not any(still)


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(arguments, tmp_path):
    options = ["--trainer.val_check_interval", "1", "--data.val_size", "5", "--export.merge", "false"]
    options += ["--samples.rows", "0", *doing(4, "worsen_validation")]
    assert main([*arguments, *options]) == 0
    out = tmp_path / "out"
    losses = scalars(out)["val/loss"]
    best = losses.index(min(losses))
    # Seven micro-batches an epoch are three steps, and each of them is validated.
    assert len(losses) == 6 and best < 3
    assert json.loads((out / "checkpoints" / "best.json").read_text())["step"] == best + 1


def test_a_run_with_an_optimizer_by_its_class_goes_on_exactly_and_not_with_other_arguments(command, tmp_path, capsys):
    chosen = [*MUON, "--trainer.max_steps", "6"]
    assert main(command(tmp_path / "whole", *chosen)) == 0
    assert ended(forked(command(tmp_path / "parts", *chosen, *stopping(4)))) == 143
    assert main(command(tmp_path / "parts", *chosen, "--ckpt_path", "last")) == 0
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    capsys.readouterr()
    changed = ["--model.optimizer.init_args.momentum", "0.5", "--trainer.max_steps", "8", "--ckpt_path", "last"]
    assert main(command(tmp_path / "parts", *chosen, *changed)) == 2
    assert "model.optimizer.init_args.momentum" in capsys.readouterr().err
    assert main(command(tmp_path / "parts", "--model.optimizer", "adamw", "--ckpt_path", "last")) == 2
    assert "model.optimizer" in capsys.readouterr().err
