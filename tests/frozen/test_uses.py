"""What is done with a model beside training it, where its layers are streamed or away."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from qwen_lit.callbacks import as_trained
from qwen_lit.cli import main
from qwen_lit.commands import chat_model
from qwen_lit.commands.conversation import Chat
from qwen_lit.engine.engine import FastEngine
from qwen_lit.errors import UserError
from qwen_lit.export import pipeline
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.frozen.store import disband, store_of
from qwen_lit.generate import generate
from qwen_lit.hardware import product_dtype
from qwen_lit.model import adapted as adapted_file
from qwen_lit.model.load import load_base, put_adapter
from qwen_lit.planner import settle as settling
from qwen_lit.planner.settle import hold_all, settle, streamed_in
from tests.engine.test_engine import batch
from tests.frozen.stores import CPU, LateCopies, snapshot

FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=product_dtype(CPU),
)


def hooked(base):
    store = snapshot(base)
    store.hook(base.model.layers)
    return store


def based(folder, **lora):
    """A base with an adapter, and its store with all layers away."""
    base = load_base(str(folder), FOUR_BITS, CPU)
    store = hooked(base)
    torch.manual_seed(1)
    return put_adapter(
        base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", **lora)
    ), store


def told(model, tokenizer):
    return [one.ids for one in generate(model.eval(), tokenizer, [[5, 6, 7], [8, 9]], 5, use_cache=True)]


def test_streamed_layers_answer_as_resident_ones_before_and_after_they_are_released(model_folder, monkeypatch):
    monkeypatch.setattr("qwen_lit.frozen.store.copies_of", lambda blocks, numbers, device: LateCopies(blocks))
    model, store = based(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(RuntimeError, match="never placed"):
        told(model, tokenizer)
    store.place(())
    wanted = told(model, tokenizer)
    engine, one = FastEngine(model.train()), batch(True)
    with torch.inference_mode():
        loss = engine.loss_sum(one)
    for streamed in ((0, 1), (1,)):
        store.place(streamed)
        assert told(model, tokenizer) == wanted
        store.release()
        assert store.away == sum(store.sizes) and not store.resident
        # Whoever comes next, and in whatever mode, finds the layers where they were.
        with torch.inference_mode():
            assert torch.equal(engine.loss_sum(one), loss)
        assert store.streamed == streamed
        store.release()
        assert told(model, tokenizer) == wanted and store.streamed == streamed
        engine.loss_sum(one).backward()


def test_an_adapter_is_saved_without_a_base_that_is_away(model_folder, tmp_path):
    model, store = based(model_folder)
    with store.left_out():
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert model.base_model.model.model.layers[0].mlp.up_proj.weight.quant_state is not None


def test_a_beginning_that_changes_the_base_leaves_it_to_the_modules(model_folder):
    base = load_base(str(model_folder), FOUR_BITS, CPU)
    hooked(base)
    hold_all(base, "olora reads the base's weights")
    disband(base)
    assert store_of(base) is None
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora")
    plain = put_adapter(load_base(str(model_folder), FOUR_BITS, CPU), lora)
    losses = [FastEngine(model).loss_sum(batch(True)) for model in (plain, put_adapter(base, lora))]
    assert torch.equal(*losses)


def test_layers_that_must_all_be_there_and_do_not_fit_are_a_user_s_error(model_folder, monkeypatch):
    model, store = based(model_folder)

    def full(streamed):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(store, "place", full)
    with pytest.raises(UserError, match="the engine is reference, so all layers have to be on the device: 0.0 GiB"):
        hold_all(model.base_model.model, "the engine is reference")


@pytest.mark.parametrize(
    ("room", "count"),
    [(400, 0), (399, 3), (300, 3), (299, 4), (0, 4)],
)
def test_as_many_layers_are_resident_as_fit_beside_the_slots(room, count):
    found = streamed_in([100, 100, 100, 100], room)
    assert len(found) == count and found <= {0, 1, 2, 3}


def test_what_is_streamed_is_said_with_the_seconds_of_a_token(model_folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    model, store = based(model_folder)
    base = model.base_model.model
    settle(base, 100)
    assert len(store.resident) == 2 and "streamed" not in caplog.text
    monkeypatch.setattr(settling, "free_bytes", lambda device: 0)
    settle(base, 100)
    assert store.streamed == (0, 1) and "2 of 2 layers are streamed; about" in caplog.text
    settle(load_base(str(model_folder), None, CPU), 100)


@pytest.fixture(scope="module")
def run(model_folder, dataset, tmp_path_factory):
    """A run whose layers are streamed, and whose merged model does not fit."""
    out, stores = tmp_path_factory.mktemp("streamed") / "out", []
    cache = str(out.parent / "cache")

    def streamed(*given):
        base = load_frozen(*given)
        stores.append(store_of(base))
        stores[-1].place((0, 1))
        return base

    options = {
        "output_dir": out,
        "model.model_name_or_path": model_folder,
        "data.dataset_path": dataset,
        "data.val_size": 3,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 1,
        "trainer.enable_progress_bar": "false",
        "model.engine": "fast",
        "model.base_cache": cache,
        "model.lora_config.r": 4,
        "samples.max_new_tokens": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted_file, "load_frozen", streamed)
        patch.setattr(pipeline, "fits", lambda size, device: False)
        patch.setattr("qwen_lit.callbacks.export.can_be_asked", lambda module, device: True)
        patch.setattr(as_trained, "settle", lambda base, tokens: stores[0].place((0, 1)))
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        assert main(["fit", "--config", "configs/qwen7b.yaml", *given]) == 0
    return out, stores[0], cache


def test_a_streamed_run_validates_answers_exports_and_gives_its_memory_back(run):
    out, store, _ = run
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 1, 2} and all(line["wanted"] for line in lines)
    card = (out / "final_model" / "README.md").read_text("utf-8")
    assert "answered by the adapter on its base, as it was trained: this model did not fit the device" in card
    assert json.loads((out / "summary.json").read_text())["verdict"]
    assert not store.resident and store.ring is None


def test_chat_streams_what_does_not_fit_and_answers_as_if_it_did(run, monkeypatch):
    choice = chat_model.Choice(run[0] / "lora_adapter", chat_model.base_of(run[0] / "lora_adapter"), FOUR_BITS)

    def answer():
        model, tokenizer = chat_model.load(choice, CPU)
        return store_of(model.get_base_model()), "".join(Chat(model, tokenizer, 4, False).ask("Hi"))

    with monkeypatch.context() as patch:
        patch.setattr(chat_model, "load_frozen", lambda folder, held, device, cache: load_base(folder, held, device))
        store, wanted = answer()
    assert store is None
    monkeypatch.setattr(settling, "free_bytes", lambda device: 0)
    # No pass is timed, so that every layer is away when the adapter is put on the base.
    monkeypatch.setattr(settling, "pass_seconds", lambda store: 1.0)
    store, found = answer()
    assert store.streamed == (0, 1) and found == wanted


def test_the_last_choice_is_streamed_where_nothing_fits_as_a_whole(run, monkeypatch):
    cuda = SimpleNamespace(type="cuda", index=0)
    monkeypatch.setattr(chat_model, "planned_weights", lambda *given: {})
    monkeypatch.setattr(chat_model, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(chat_model, "least_bytes", lambda config, blocks, tokens: 2 * max(blocks))
    offered = list(chat_model.offered(run[0], None, cuda))
    assert [one.streams for one in offered] == [False, False, True]
    assert offered[-1].folder.name == "lora_adapter" and offered[-1].held == "4 bits (nf4), layers on the host"
    sizes = [one.bytes_needed(cuda) for one in offered]
    # Both of its layers are in the two slots.
    assert sizes[2] == sizes[1]
    assert [one.streams for one in chat_model.offered(run[0], None, CPU)] == [False, False]
    assert not any(one.streams for one in chat_model.offered(run[0], False, cuda))
