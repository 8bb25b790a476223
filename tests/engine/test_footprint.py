"""The table of memory equals what autograd saves, operation by operation."""

from functools import partial

import numpy as np
import pytest
from torch.autograd.graph import saved_tensors_hooks

from qwen_lit.data.batches import collate
from qwen_lit.engine import engine as engine_module
from qwen_lit.engine import mlp as mlp_module
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.footprint import loss_ops
from qwen_lit.engine.policy import Policies
from qwen_lit.engine.products import Products
from qwen_lit.planner.memory import ModelMemory
from tests.engine.test_engine import AGAIN, ALL, KEEP, QKVO, adapted, base, four_bit
from tests.engine.test_products import adapted as narrow

LENGTHS = (8, 8, 8)
"""Documents of one length, so that attention on the CPU is one fused kernel too."""

WRAPPED = {
    engine_module: ("add_norm", "qkv_rope", "attention", "group_linear", "mlp_in_pieces", "head_loss"),
    mlp_module: ("gate_up", "group_linear"),
}


class Recorder:
    """What each operation of a batch saves for backward: bytes of memory that no operation before it has saved."""

    def __init__(self, monkeypatch, model):
        self.shared = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.alive, self.seen, self.found, self.within = [], set(), [], False
        for module, names in WRAPPED.items():
            for name in names:
                monkeypatch.setattr(module, name, partial(self.run, name, getattr(module, name)))

    def run(self, name, function, *given, **more):
        if self.within:
            # A piece of the MLP, of which nothing is saved.
            return function(*given, **more)
        if name == "qkv_rope":
            # cos and sin, which all layers share.
            self.shared |= {one.untyped_storage().data_ptr() for one in given[3:5]}
        self.found.append((name, 0))
        self.within = True
        with saved_tensors_hooks(self.pack, lambda tensor: tensor):
            out = function(*given, **more)
        self.within = False
        return out

    def pack(self, tensor):
        memory = tensor.untyped_storage()
        self.alive.append(tensor)
        if memory.data_ptr() not in self.seen | self.shared:
            self.seen.add(memory.data_ptr())
            name, before = self.found[-1]
            self.found[-1] = name, before + memory.nbytes()
        return tensor


def batch_of(lengths):
    draw = np.random.default_rng(0)
    return collate([(draw.integers(0, 301, n), np.array([[0, n]])) for n in lengths], 0)


def told(memory, tokens, rows, piece=0):
    """Bytes of each operation by the table; what the last layer does after attention, it does with the rows alone."""
    found = []
    for number in range(len(memory.layers)):
        ops, count = memory.layer(number, piece).ops, tokens
        for op, before in zip(ops, (None, *ops), strict=False):
            if op.name == "rows that predict":
                # The operation after it is the first to save what it has made.
                count = rows
                continue
            chosen = before.saved_bytes if before is not None and before.name == "rows that predict" else 0
            found.append((op.name, (op.saved_bytes + chosen) * count))
    norm, loss = loss_ops(memory.layers[0].hidden, memory.vocabulary, 1, 0, memory.size)
    return [*found, ("norm", norm.saved_bytes * rows), ("head_loss", loss.saved_bytes * rows)]


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    base("qwen3").save_pretrained(folder)
    return folder


LORA = {
    "q,k,v,o": {"target_modules": QKVO},
    "all linears": {"target_modules": ALL},
    "some linears": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "the MLP alone": {"target_modules": ["up_proj"]},
    "ranks that leave columns free": {"target_modules": ALL, "rank_pattern": {"q_proj": 6, "o_proj": 1, "up_proj": 3}},
    "the middle layer alone": {"target_modules": ALL, "layers_to_transform": [1]},
    "a higher rank in the last layer": {"target_modules": ALL, "rank_pattern": {r"layers\.2\..*": 16}},
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_every_operation_saves_what_the_table_says(family, lora, dropout, monkeypatch):
    model, one = adapted(family, lora_dropout=dropout, **LORA[lora]), batch_of(LENGTHS)
    memory, recorder = ModelMemory.of(model, 0), Recorder(monkeypatch, model)
    FastEngine(model).loss_sum(one)
    wanted = told(memory, sum(LENGTHS), len(one["targets"]))
    assert [size for _, size in recorder.found] == [size for _, size in wanted], list(
        zip(recorder.found, wanted, strict=True)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [QKVO, ALL, ["o_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("norm", [False, True], ids=["qwen2", "qwen3"])
def test_over_a_4_bit_base_too(targets, dropout, norm, model_folder, qwen3_folder, monkeypatch):
    model = four_bit(qwen3_folder if norm else model_folder, target_modules=targets, lora_dropout=dropout)
    one = batch_of(LENGTHS)
    memory, recorder = ModelMemory.of(model, 0), Recorder(monkeypatch, model)
    assert all(linear.quantized for layer in memory.layers for group in layer.groups for linear in group)
    FastEngine(model).loss_sum(one)
    wanted = told(memory, sum(LENGTHS), len(one["targets"]))
    assert [size for _, size in recorder.found] == [size for _, size in wanted], list(
        zip(recorder.found, wanted, strict=True)
    )


@pytest.mark.parametrize("lora", ["q,k,v,o", "all linears", "the middle layer alone"])
def test_gate_and_up_are_saved_in_8_bits_where_that_is_asked(lora, monkeypatch):
    model, one = adapted("qwen2", **LORA[lora]), batch_of(LENGTHS)
    memory, recorder = ModelMemory.of(model, 0, kept="int8"), Recorder(monkeypatch, model)
    FastEngine(model, Policies.of_counts(3, kept="int8")).loss_sum(one)
    wanted = told(memory, sum(LENGTHS), len(one["targets"]))
    assert [size for _, size in recorder.found] == [size for _, size in wanted]
    assert wanted != told(ModelMemory.of(model, 0), sum(LENGTHS), len(one["targets"]))


@pytest.mark.parametrize(("products", "targets"), [("fp8", QKVO), ("fp8_backward", ALL)])
def test_they_are_so_beside_products_in_8_bits(products, targets, folders, monkeypatch):
    model, one, chosen = narrow(folders["qwen2"], targets, 0.0), batch_of(LENGTHS), Products(products)
    memory, recorder = ModelMemory.of(model, 0, products=chosen, kept="int8"), Recorder(monkeypatch, model)
    FastEngine(model, Policies.of_counts(3, kept="int8"), chosen).loss_sum(one)
    wanted = told(memory, sum(LENGTHS), len(one["targets"]))
    assert [size for _, size in recorder.found] == [size for _, size in wanted]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [QKVO, ALL, ["v_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("products", ["fp8_backward", "fp8", "int8", "mixed8"])
def test_products_in_8_bits_too(products, targets, dropout, folders, monkeypatch):
    model, one, chosen = narrow(folders["qwen3"], targets, dropout), batch_of(LENGTHS), Products(products)
    if products == "mixed8":
        # Each group is in bf16 beside others that are not.
        chosen = Products(products, frozenset({(0, 0), (0, 3), (1, 2), (2, 1), (2, 3)}))
    memory, recorder = ModelMemory.of(model, 0, products=chosen), Recorder(monkeypatch, model)
    found = [[group[0].passes for group in layer.groups] for layer in memory.layers]
    assert found == [[chosen.of(number, group) for group in range(4)] for number in range(3)]
    FastEngine(model, None, chosen).loss_sum(one)
    wanted = told(memory, sum(LENGTHS), len(one["targets"]))
    assert [size for _, size in recorder.found] == [size for _, size in wanted], list(
        zip(recorder.found, wanted, strict=True)
    )


def test_an_mlp_in_pieces_saves_its_input(monkeypatch):
    model, one = adapted("qwen2", target_modules=ALL), batch_of(LENGTHS)
    memory, recorder = ModelMemory.of(model, 0), Recorder(monkeypatch, model)
    FastEngine(model, Policies.of_counts(3, mlp_piece=5)).loss_sum(one)
    wanted = told(memory, sum(LENGTHS), len(one["targets"]), piece=5)
    assert [size for _, size in recorder.found] == [size for _, size in wanted]


@pytest.mark.parametrize("kept", ["bf16", "int8"])
@pytest.mark.parametrize("targets", [QKVO, ALL], ids=len)
@pytest.mark.parametrize("policies", [(AGAIN, AGAIN, AGAIN), (KEEP, AGAIN, KEEP), (AGAIN, KEEP, AGAIN)])
def test_a_batch_saves_what_its_layers_policies_say(policies, targets, kept):
    model, one = adapted("qwen2", target_modules=targets), batch_of(LENGTHS)
    memory, seen, alive = ModelMemory.of(model, 0, kept=kept), {}, []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        FastEngine(model, Policies(policies, kept=kept)).loss_sum(one)
    tokens, rows = sum(LENGTHS), len(one["targets"])
    norm, loss = loss_ops(memory.layers[0].hidden, memory.vocabulary, 1, 0, memory.size)
    kept = memory.moments(tokens, Policies(policies))[0].kept * tokens
    # Of the last layer the table counts all tokens; the indices of its rows are saved too.
    ops = memory.layer(2).ops
    after = sum(op.saved_bytes for op in ops[3:]) if policies[2] is KEEP else 0
    indices = 8 * rows * (policies[2] is KEEP)
    wanted = kept - after * (tokens - rows) + (norm.saved_bytes + loss.saved_bytes) * rows + indices
    # Half of cos and sin: the engine takes the other half of each, which repeats it.
    cos_and_sin = 2 * memory.head_size // 2 * memory.size * tokens
    assert cos_and_sin == memory.head_size * memory.size * tokens
    assert sum(seen.values()) - wanted in (0, 8 * rows), (sum(seen.values()), wanted)
