"""An embedding and a head that wait on the host compute what they do on the device."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qwen_lit.engine.ends import HeadAtHand, cast_ends, place_ends, waits
from qwen_lit.engine.engine import FastEngine
from tests.engine.test_engine import adapted, batch, engine, gradients

ENDS = ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]


def ends_of(model):
    return [name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name]


def answers(model):
    ids = batch(True)["input_ids"][:, :12].view(2, 6)
    model.eval()
    said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        return torch.cat([said.float().flatten(), model(input_ids=said).logits.flatten()])


@pytest.mark.parametrize("recompute", [0, 3])
def test_what_waits_on_the_host_computes_what_it_does_on_the_device(recompute):
    model, one = adapted("qwen2", lora_dropout=0.1), batch(True)
    base = model.base_model.model
    torch.manual_seed(2)
    loss = engine(model, recompute).loss_sum(one)
    wanted, said = gradients(model, loss), answers(model)
    place_ends(base, True, True)
    assert ends_of(model) == [] and waits(base.lm_head) and waits(base.model.embed_tokens)
    assert torch.equal(answers(model), said)
    model.train()
    torch.manual_seed(2)
    again = engine(model, recompute).loss_sum(one)
    found = gradients(model, again)
    assert torch.equal(again, loss) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    cast_ends(base, torch.float64)
    assert base.lm_head.weight.dtype == base.model.embed_tokens.weight.dtype == torch.float64
    cast_ends(base, torch.float32)
    place_ends(base, False, False)
    assert ends_of(model) == ENDS and torch.equal(answers(model), said)


def test_the_head_comes_when_the_last_layer_begins_and_is_gone_before_backward(monkeypatch):
    model, seen, copies = adapted("qwen2"), [], []
    layer, begin = FastEngine._layer, HeadAtHand.begin

    def begun(self):
        begin(self)
        seen.append("head")
        copies.append(StorageWeakRef(self.copy.untyped_storage()))

    monkeypatch.setattr(FastEngine, "_layer", lambda *given: seen.append("layer") or layer(*given))
    monkeypatch.setattr(HeadAtHand, "begin", begun)
    place_ends(model.base_model.model, False, True)
    loss = engine(model).loss_sum(batch(True))
    assert seen == ["layer", "layer", "head", "layer"]
    assert copies[0].expired()
    loss.backward()


def test_the_copy_of_the_head_is_what_the_loss_reads():
    head = adapted("qwen2").base_model.model.lm_head
    assert HeadAtHand(head, torch.device("cpu")).take(torch.float32) is head.weight
    place_ends(model := adapted("qwen2").base_model.model, False, True)
    at_hand = HeadAtHand(model.lm_head, torch.device("cpu"))
    at_hand.begin()
    taken = at_hand.take(torch.float32)
    assert torch.equal(taken, model.lm_head.weight) and taken.data_ptr() != model.lm_head.weight.data_ptr()
    assert at_hand.copy is None


def test_a_copy_of_the_head_is_given_up_where_a_pass_breaks_off():
    place_ends(model := adapted("qwen2").base_model.model, False, True)
    with pytest.raises(torch.OutOfMemoryError), HeadAtHand(model.lm_head, torch.device("cpu")) as head:
        head.begin()
        assert head.copy is not None
        raise torch.OutOfMemoryError
    assert head.copy is None


@pytest.mark.parametrize("back", [False, True])
def test_without_memory_an_end_stays_where_it_is(back, monkeypatch):
    base = adapted("qwen2").base_model.model
    place_ends(base, back, back)
    wanted, place = base.lm_head.weight.clone(), torch.Tensor.to

    def full(tensor, *arguments, **options):
        if tensor.shape == wanted.shape:
            raise torch.OutOfMemoryError
        return place(tensor, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "to", full)
        place_ends(base, not back, not back)
    assert waits(base.lm_head) == back and torch.equal(base.lm_head.weight, wanted)
    answers(base)
    place_ends(base, False, False)
    assert torch.equal(base.lm_head.weight, wanted)


def test_a_tied_head_is_never_moved_nor_its_embedding():
    model = adapted("qwen3")
    place_ends(model.base_model.model, True, True)
    assert ends_of(model) == ENDS[:1]
    assert not waits(model.base_model.model.lm_head)
