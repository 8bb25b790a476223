"""A base from its file of blocks is, bit for bit, the base that transformers loads and quantises."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from qwen_lit.errors import UserError
from qwen_lit.frozen import cache, loading
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.frozen.store import store_of
from qwen_lit.model.load import load_base, load_config
from qwen_lit.quantization import usable
from tests.frozen.stores import CPU
from tests.runs import ended
from tests.tiny import make_model, tensors_of


def held(**options):
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    return BitsAndBytesConfig(**given)


def numbers(model):
    """Everything that a model computes with, by name."""
    found = {name: buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        found[name] = parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found |= {
                f"{name}.{key}": value for key, value in state.as_dict().items() if isinstance(value, torch.Tensor)
            }
    return found


WAYS = [
    ("qwen2", {}, {}),
    ("qwen2", {"bnb_4bit_use_double_quant": False}, {}),
    ("qwen3", {"bnb_4bit_quant_type": "fp4"}, {"tie_word_embeddings": True}),
    ("qwen3", {"llm_int8_skip_modules": ["lm_head", "v_proj"]}, {}),
    ("qwen3_5", {}, {}),
    ("qwen3_vl", {}, {}),
]


@pytest.mark.parametrize(("kind", "quantized", "options"), WAYS, ids=[f"{kind} {a} {b}" for kind, a, b in WAYS])
def test_a_base_from_its_file_is_the_one_that_transformers_loads(kind, quantized, options, tmp_path, tokenizer):
    folder = make_model(kind, tmp_path / "base", tokenizer, **options)
    config = usable(held(**quantized), load_config(folder))
    expected = load_base(folder, config, CPU)
    for _ in range(2):
        # The second time the file is there.
        found = load_frozen(folder, config, CPU, str(tmp_path / "cache"))
        store_of(found).place(())
    there, here = numbers(expected), numbers(found)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) and here[name].dtype == there[name].dtype for name in there)
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in expected.parameters()]
    ids = torch.randint(len(tokenizer), (2, 7))
    assert torch.equal(found(ids).logits, expected(ids).logits)
    said = ("is_loaded_in_4bit", "is_quantized", "quantization_method", "training", "dtype", "device")
    assert [getattr(found, one) for one in said] == [getattr(expected, one) for one in said]
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.config.to_dict() == expected.config.to_dict()
    answers = [model.generate(ids[:1], max_new_tokens=4, do_sample=False) for model in (found, expected)]
    assert torch.equal(*answers)


def test_what_is_no_linear_in_4_bits_is_loaded_as_before(tmp_path, tokenizer):
    folder, where = make_model("qwen3_moe", tmp_path / "base", tokenizer), str(tmp_path / "cache")
    assert store_of(load_frozen(folder, held(), CPU, where)) is None
    folder = make_model("qwen2", tmp_path / "dense", tokenizer)
    assert store_of(load_frozen(folder, None, CPU, where)) is None
    assert store_of(load_frozen(folder, BitsAndBytesConfig(load_in_8bit=True), CPU, where)) is None
    assert store_of(load_frozen(folder, held(), CPU, "auto")) is None
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    return make_model("qwen2", tmp_path_factory.mktemp("dense") / "base", tokenizer)


def file_of(folder):
    (found,) = folder.glob("*.safetensors")
    return found


@pytest.mark.parametrize("left", [0, 7, 4096, -4096, -1])
def test_a_torn_file_is_set_aside_and_made_again(dense, tmp_path, left, caplog):
    load_frozen(dense, held(), CPU, str(tmp_path))
    file = file_of(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    found = load_frozen(dense, held(), CPU, str(tmp_path))
    assert file.read_bytes() == whole and "set aside" in caplog.text
    assert (tmp_path / f"{file.stem}.broken").read_bytes() == whole[:left]
    store_of(found).place(())
    assert torch.equal(
        found(torch.arange(5)[None]).logits, load_base(dense, held(), CPU)(torch.arange(5)[None]).logits
    )


def test_a_whole_file_is_read_where_nothing_may_be_written(dense, tmp_path, monkeypatch):
    load_frozen(dense, held(), CPU, str(tmp_path))

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.FileLock, "acquire", refused)
    assert store_of(load_frozen(dense, held(), CPU, str(tmp_path))).blocks.path == file_of(tmp_path)


def test_what_a_killed_process_has_left_takes_no_room(dense, tmp_path, monkeypatch):
    store = store_of(load_frozen(dense, held(), CPU, str(tmp_path)))
    file = file_of(tmp_path)
    left = file.rename(file.with_suffix(f".{socket.gethostname()}.tmp"))
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 0 if left.exists() else 2**30)
    again = store_of(load_frozen(dense, held(), CPU, str(tmp_path)))
    assert not left.exists() and torch.equal(again.blocks.memory, store.blocks.memory)


def test_a_file_is_kept_for_each_checkpoint_and_quantisation(dense, tmp_path, tokenizer):
    other = make_model("qwen2", tmp_path / "other", tokenizer, initializer_range=0.05)
    for folder, config in (
        (dense, held()),
        (dense, held(bnb_4bit_use_double_quant=False)),
        (dense, held(bnb_4bit_quant_type="fp4")),
        (dense, usable(held(llm_int8_skip_modules=["lm_head", "k_proj"]), load_config(dense))),
        (other, held()),
        (dense, held()),
    ):
        load_frozen(folder, config, CPU, str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 5
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_plain_safetensors_reads_the_file(dense, tmp_path):
    from safetensors import safe_open

    store = store_of(load_frozen(dense, held(), CPU, str(tmp_path)))
    with safe_open(file_of(tmp_path), framework="pt") as opened:
        assert list(opened.keys()) == ["layers.000", "layers.001"]
        assert torch.equal(opened.get_tensor("layers.001"), store.blocks.read(1))
    assert store.blocks.memory.data_ptr() % 4096 == 0 and all(start % 4096 == 0 for start in store.blocks.starts)


@pytest.mark.parametrize("fault", ["full", "read only", "breaks off"])
def test_where_no_file_can_be_kept_the_base_is_loaded_all_the_same(dense, tmp_path, monkeypatch, fault, caplog):
    write = cache.write_blocks

    def breaks_off(file, *arguments):
        write(file, *arguments)
        if str(tmp_path) in str(file.name):
            raise OSError(28, "No space left on device")

    if fault == "full":
        monkeypatch.setattr(cache, "free_bytes", lambda folder: 1000)
    elif fault == "breaks off":
        monkeypatch.setattr(cache, "write_blocks", breaks_off)
    where = tmp_path / "file" if fault == "read only" else tmp_path
    (tmp_path / "file").write_text("")
    found = load_frozen(dense, held(), CPU, str(where))
    assert "is not kept" in caplog.text and "model.base_cache" in caplog.text
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.tmp"))
    # No device has 0 bytes of room, so it goes through host memory.
    assert store_of(found).blocks.path is None
    store_of(found).place(())
    assert torch.equal(
        found(torch.arange(5)[None]).logits, load_base(dense, held(), CPU)(torch.arange(5)[None]).logits
    )


@pytest.mark.parametrize("full", [False, True])
def test_one_rank_of_a_machine_tells_why_no_file_is_kept(dense, tmp_path, monkeypatch, full, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(loading, "_room", lambda device, room: 2**40)
    where = str(tmp_path if full else tmp_path / "file")
    for rank in range(2):
        load_frozen(dense, held(), CPU, where, ranks=cache.Ranks(rank=rank))
    assert caplog.text.count("is not kept") == 1


def test_without_a_cache_a_base_with_room_is_loaded_as_transformers_does(dense, monkeypatch):
    monkeypatch.setattr(loading, "_room", lambda device, room: 2**40)
    assert loading._blocks(loading._skeleton(dense, held(), CPU), dense, CPU, None, None) is None


def test_two_processes_make_one_file(dense, tmp_path, monkeypatch):
    made = loading.quantized_layers

    def slowly(*given):
        (tmp_path / f"made by {os.getpid()}").touch()
        time.sleep(0.3)
        yield from made(*given)

    monkeypatch.setattr(loading, "quantized_layers", slowly)
    where, ids = str(tmp_path / "cache"), torch.arange(5)[None]
    expected = load_base(dense, held(), CPU)(ids).logits

    def alike():
        found = load_frozen(dense, held(), CPU, where)
        store_of(found).place(())
        return torch.equal(found(ids).logits, expected)

    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            os._exit(0 if alike() else 1)
        children.append(pid)
    assert [ended(pid) for pid in children] == [0, 0]
    assert len(list(tmp_path.glob("made by *"))) == 1
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_files_in_other_dtypes_are_quantised_as_transformers_does(dense, tmp_path, dtype):
    folder = shutil.copytree(dense, tmp_path / "base")
    tensors = {name: (1.01 * one.float()).to(dtype) for name, one in tensors_of(dense).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_frozen(folder, held(), CPU, str(tmp_path / "cache"))
    store_of(found).place(())
    there, here = numbers(load_base(folder, held(), CPU)), numbers(found)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) and here[name].dtype == there[name].dtype for name in there)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_files_that_lack_a_weight_are_refused(dense, tmp_path, name):
    folder = shutil.copytree(dense, tmp_path / "base")
    tensors = tensors_of(dense)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_frozen(folder, held(), CPU, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize(
    ("folder", "said"),
    [("hub/models--Qwen--Qwen3-8B/snapshots/0a1b", "Qwen/Qwen3-8B"), ("/data/Qwen3-8B", "Qwen3-8B")],
)
def test_a_model_is_told_by_the_name_that_people_know(folder, said):
    assert loading._name(Path(folder)) == said


@pytest.mark.parametrize(("given", "found"), [("here", "here"), ("gone", "auto"), ("auto", "auto"), (None, None)])
def test_the_base_of_an_adapter_is_kept_where_its_training_kept_it(given, found, tmp_path):
    (tmp_path / "here").mkdir()
    named = {name: str(tmp_path / name) for name in ("here", "gone")}
    (tmp_path / "training_config.json").write_text(json.dumps({"model": {"base_cache": named.get(given, given)}}))
    assert cache.cache_of_training(tmp_path) == named.get(found, found)
