"""The benchmark's table sets ours beside each peer of the same case, its rows are what it says they are, and what it
makes in memory is a model that trains."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qwen_lit.data.batches import collate
from qwen_lit.engine.policy import Policy
from qwen_lit.frozen.loading import load_frozen
from tests.tiny import MLP, ROPE, SIZES


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    sizes = {**SIZES, **MLP, "num_hidden_layers": 3, "vocab_size": 301, "rope_parameters": ROPE}
    path.write_text(json.dumps({"model_type": "qwen2", **sizes}))
    return str(path)


def test_a_peer_is_compared_with_ours_of_its_own_case_and_a_failure_is_told(load):
    ours = {"runner": "qwen_lit", "peak_gib": 7.3, "estimate_gib": 7.4, "first_step_s": 3.0}
    theirs = {"runner": "unsloth", "peak_gib": 6.0, "first_step_s": 37.3, "tokens_per_second": 8000}
    lines = load("train").table(
        [
            {"case": "8 GiB", "tokens_per_second": 14_000, "host_gib": 4.2, "streamed": 28, **ours},
            {"case": "8 GiB", **theirs},
            {"case": "24 GiB", "runner": "qwen_lit", "error": "one\ntwo: out of memory\n"},
            {"case": "24 GiB", **theirs},
        ]
    )
    assert lines[2] == "| 8 GiB | qwen_lit | 14,000 | 7.30 | 7.4 | 4.2 | 28 | 3.0 |  |"
    assert lines[3] == "| 8 GiB | unsloth | 8,000 | 6.00 |  |  |  | 37.3 | 1.75 x |"
    assert lines[4].startswith("| 24 GiB | qwen_lit | failed: two: out of memory |")
    assert lines[5].endswith("| 37.3 |  |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_length_mix_has_a_median_of_300_tokens_of_which_60_percent_are_supervised(load):
    documents = load("cases").documents
    lengths, supervised = zip(
        *((len(ids), int(spans[0, 1] - spans[0, 0])) for ids, spans in documents({"mix": True}, 4000, 2048)),
        strict=True,
    )
    assert 290 < np.median(lengths) < 310 and max(lengths) == 2048 and min(lengths) >= 30
    assert abs(sum(supervised) / sum(lengths) - 0.6) < 0.01
    assert {len(ids) for ids, _ in documents({}, 5, 2048)} == {2048}


@pytest.mark.parametrize("case", [{}, {"mix": True}])
def test_all_rows_of_a_step_are_trained_and_the_heaviest_ones_are_planned_for(load, case):
    rows = load("ours").Rows.of({**case, "tokens": 512, "longest": 64, "steps": 3})
    batches = [rows.batches(step, 3) for step in range(3)]
    assert [len(step) for step in batches] == [3, 3, 3] and rows.per_step == 8
    assert sum(one["tokens"] for step in batches for one in step) == sum(map(rows.tokens, range(24)))
    work = rows.work()
    heaviest = work.heaviest(3)["tokens"]
    assert all(one["tokens"] <= heaviest <= work.sizes[3] for step in batches for one in step)


def test_a_base_that_is_made_in_memory_trains_alike_streamed_and_resident(load, shape):
    equal, made = load("equal"), load("made")
    base = made.made_base(shape, load("random_base").NF4, torch.device("cpu"))
    blocks = base.frozen.blocks
    assert len(blocks.sizes) == 3 and not torch.equal(blocks.read(0), blocks.read(1))
    torch.manual_seed(0)
    model = equal.add_adapter(base, equal.LoraConfig(r=4, lora_dropout=0.1, target_modules=equal.QKVO), False)
    batches = [collate([(torch.randint(0, 300, (24,)).numpy(), np.array([[0, 24]]))], 0) for _ in range(3)]
    trainer = equal.Trainer(model, batches)
    expected = trainer.run(Policy.RECOMPUTE, (), 2)
    assert expected[0][0] == pytest.approx(np.log(301), rel=0.05) and len(set(expected[0])) == 3
    assert equal.told(trainer.run(Policy.RECOMPUTE, (0, 1, 2), 2), expected) == "equal"
    # The middle layer stays in its slot, where passes turn.
    blocks.read(2).copy_(blocks.read(0))
    assert "losses part at step 1" in equal.told(trainer.run(Policy.RECOMPUTE, (0, 1, 2), 2), expected)


def test_a_random_base_has_the_weights_of_its_config_in_files_that_safetensors_reads(
    load, shape, tmp_path, monkeypatch
):
    made = load("random_base")
    monkeypatch.setattr(made, "SHARD", 2**14)
    config = made.config_of(shape, 2)
    made.write_weights(tmp_path, config, set(), torch.device("cpu"))
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    wanted, found = made.shapes_on_disk(config), {}
    for file in set(listed["weight_map"].values()):
        with safe_open(tmp_path / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert {name: list(one.shape) for name, one in found.items()} == wanted and len(
        set(listed["weight_map"].values())
    ) > 2
    assert sum(one.nbytes for one in found.values()) == listed["metadata"]["total_size"]
    assert (found["model.layers.1.input_layernorm.weight"] == 1).all()
    assert found["model.layers.1.mlp.up_proj.weight"].float().std() == pytest.approx(0.02, rel=0.05)


def test_a_random_base_leaves_holes_in_its_files_for_the_layers_that_its_cache_has(load, shape, tmp_path, monkeypatch):
    made = load("random_base")
    monkeypatch.setattr(made, "tokenizer", lambda: SimpleNamespace(save_pretrained=lambda folder: None))
    arguments = [str(shape), str(tmp_path / "base"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr("sys.argv", ["random_base.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made.main()
    base = load_frozen(tmp_path / "base", made.NF4, torch.device("cpu"), str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    base.frozen.place(())
    assert file.stat().st_size > sum(base.frozen.sizes) and base(torch.arange(5)[None]).logits.std() > 0


def test_a_choice_is_experimental_where_it_is_further_from_bf16_than_bf16s_seeds_are_from_each_other(load):
    def run(products, seed, held):
        return {"products": products, "seed": seed, "seconds": 1.0, "losses": [2.0], "held": [held], "tokens": [1]}

    wide = [run("bf16", 0, 1.0), run("bf16", 1, 1.01)]
    near = [run("fp8_backward", 0, 1.004), run("fp8_backward", 1, 1.006)]
    # Apart from bf16 in both directions: the mean of the differences alone would hide it.
    far = [run("fp8+16", 0, 1.03), run("fp8+16", 1, 0.98)]
    failed = {"products": "unsloth", "seed": 0, "error": "not installed"}
    lines = load("curves").table([*wide, *near, *far, run("peft", 0, 1.5), failed])
    assert lines[0].endswith("0.0100")
    assert lines[5].endswith("| 1.0050 | +0.0000 ± 0.0040 | 0.0040 | passes |")
    assert lines[6].endswith("| 0.0300 | experimental |") and lines[7].endswith("| 0.5000 |  |")
    assert lines[8].startswith("| unsloth | failed: not installed |")


def test_a_packed_model_computes_the_same_with_whole_widths_and_keeps_its_rows(load, shape, tmp_path):
    packed, made = load("packed"), load("random_base")
    config = made.config_of(shape, 2)
    config.update({"tie_word_embeddings": True, "dtype": torch.float32})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)
    docs = [(np.arange(start, start + 9), np.array([[3, 6], [7, 9]])) for start in (20, 40, 250)]
    rows = packed.Rows(docs[1:], docs[:1], 8)
    whole = packed._in_whole_units(model, rows.used()).float()
    assert whole.config.hidden_size == 128 and whole.model.layers[1].self_attn.v_proj.weight.shape == (128, 128)
    number_of = np.zeros(301, dtype=np.int64)
    number_of[rows.used()] = np.arange(27)
    rows.write(tmp_path / packed.ROWS, number_of)
    read = packed.Rows.read(tmp_path, [], 8)
    assert [ids.tolist() for ids, _ in read.train] == [list(range(9, 17)), list(range(18, 26))]
    assert read.held[0][1].tolist() == [[3, 6], [7, 8]]
    expected = model(torch.as_tensor(docs[2][0])[None]).logits[..., rows.used()]
    found = whole(torch.arange(18, 27)[None]).logits
    assert (found - expected).norm() < 0.02 * expected.norm()
