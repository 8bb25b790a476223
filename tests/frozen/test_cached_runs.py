"""Runs on a base from its file of blocks are those on the base that transformers loads."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from qwen_lit.cli import main
from qwen_lit.errors import UserError
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.frozen.store import store_of
from qwen_lit.model.load import add_adapter, load_base, read_adapted
from qwen_lit.planner import settle as settling
from qwen_lit.planner.settle import settle
from tests.frozen.stores import CPU
from tests.runs import same

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def test_a_run_goes_on_exactly_from_a_file_that_it_did_not_begin_with(stopped, whole, command, tmp_path, caplog):
    cache = ("--model.base_cache", str(tmp_path / "cache"))
    assert main(command(stopped, *cache, "--ckpt_path", "last")) == 0
    assert same(stopped, whole)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert "base_cache was" not in caplog.text


def test_dora_begins_on_a_base_from_its_file(command, tmp_path):
    options = ("--model.lora_config.use_dora", "true", "--trainer.max_steps", "1", "--data.val_size", "0")
    runs = [tmp_path / "plain", tmp_path / "cached"]
    assert main(command(runs[0], *options)) == 0
    assert main(command(runs[1], *options, "--model.base_cache", str(tmp_path / "cache"))) == 0
    assert same(*runs)


@pytest.fixture(scope="module")
def dora(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    add_adapter(load_base(model_folder, NF4, CPU), lora, False).save_pretrained(folder)
    return folder


def test_an_adapter_that_reads_the_base_has_all_layers_there(model_folder, dora, tmp_path, monkeypatch):
    monkeypatch.setattr(settling, "free_bytes", lambda device: 0)
    base = load_frozen(model_folder, NF4, CPU, str(tmp_path))
    settle(base, 100)
    assert store_of(base).streamed == (0, 1)
    settle(base, 100, dora)
    assert store_of(base).streamed == ()
    ids = torch.arange(7)[None]
    plain = read_adapted(load_base(model_folder, NF4, CPU), dora)
    assert torch.equal(read_adapted(base, dora)(ids).logits, plain(ids).logits)


def test_an_adapter_that_reads_a_base_without_room_says_so(model_folder, dora, tmp_path, monkeypatch):
    base = load_frozen(model_folder, NF4, CPU, str(tmp_path))

    def full(streamed):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(store_of(base), "place", full)
    with pytest.raises(UserError, match="use_dora: true, which reads the base's weights, so all layers have to be on"):
        settle(base, 100, dora)
