"""Packing loses nothing, leaves little room, and does not change the loss."""

import random

import numpy as np
import pytest
import torch

from qwen_lit.data.batches import collate, group, join, padded, prefix
from qwen_lit.data.packing import best_fit, fill
from qwen_lit.model.loss import summed_loss


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_in_exactly_one_pack_that_holds_it(seed):
    draw = random.Random(seed)
    budget = draw.randint(10, 4096)
    lengths = [draw.randint(1, budget) for _ in range(draw.randint(0, 3000))]
    packs = best_fit(lengths, budget)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in pack) <= budget for pack in packs)


@pytest.mark.parametrize("median", [60, 150, 300, 600])
def test_packs_of_real_length_mixes_are_98_percent_full(median):
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.8, 5000).astype(int).clip(8, 2048).tolist()
    assert fill(best_fit(lengths, 2048), lengths, 2048) >= 0.98


def test_the_tightest_pack_is_chosen():
    assert best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def documents(count: int, vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        length = int(draw.integers(3, 40))
        begin = int(draw.integers(0, length - 1))
        end = int(draw.integers(begin + 1, length + 1))
        made.append((draw.integers(3, vocabulary, length).astype(np.int32), np.array([[begin, end]], dtype=np.int32)))
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_document_has_the_same_loss_packed_padded_and_alone(model_folder, attention):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention)
    made = documents(7, model.config.vocab_size)

    def losses(batch):
        hidden = model.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state.flatten(0, 1)
        owner = torch.bucketize(batch["target_index"], batch["cu_seqlens"][1:], right=True)
        rows = hidden[batch["target_index"]]
        return [
            float(summed_loss(model.lm_head, rows[owner == i], batch["targets"][owner == i])) for i in range(len(made))
        ]

    with torch.no_grad():
        packed, filled = losses(collate(made, 0)), losses(padded(collate(made, 0), 0))
        alone = [
            float(
                summed_loss(
                    model.lm_head,
                    model.model(input_ids=torch.tensor(ids[None]).long()).last_hidden_state[
                        0, max(span[0, 0], 1) - 1 : span[0, 1] - 1
                    ],
                    torch.tensor(ids[max(span[0, 0], 1) : span[0, 1]]).long(),
                )
            )
            for ids, span in made
        ]
    assert np.allclose(packed, alone, rtol=1e-5) and np.allclose(filled, alone, rtol=1e-5)


def test_positions_restart_and_no_target_crosses_a_document():
    ids = [(np.array([5, 6, 7]), np.array([[0, 3]])), (np.array([8, 9]), np.array([[0, 2]]))]
    batch = collate(ids, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5] and batch["max_seqlen"] == 3 and batch["tokens"] == 5
    assert batch["target_index"].tolist() == [0, 1, 3] and batch["targets"].tolist() == [6, 7, 9]


def test_padding_is_on_the_right_and_never_a_target():
    ids = [(np.array([5, 6, 7]), np.array([[1, 3]])), (np.array([8, 9]), np.array([[1, 2]]))]
    batch = padded(collate(ids, 0), 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]] and batch["cu_seqlens"].tolist() == [0, 3, 6]
    assert batch["target_index"].tolist() == [0, 1, 3] and batch["targets"].tolist() == [6, 7, 9]
    assert batch["tokens"] == 5


def test_an_empty_batch_trains_nothing():
    batch = collate([], 0)
    for one in (batch, padded(batch, 0), join([batch, batch])):
        assert one["targets"].numel() == 0 and one["input_ids"].shape == (1, 1) and one["tokens"] == 0


def test_micro_batches_are_joined_as_if_their_documents_had_been_one():
    made = documents(9, 301)
    parts = [collate(made[:4], 0), collate([], 0), collate(made[4:5], 0), collate(made[5:], 0)]
    joined, whole = join(parts), collate(made, 0)
    assert joined.keys() == whole.keys()
    for name, wanted in whole.items():
        found = joined[name]
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted
    assert join(parts[1:3]) is parts[2]


def test_padded_rows_of_like_length_share_a_batch():
    lengths = np.array([5, 90, 6, 88, 7, 91])
    batches = group(lengths, 3, 0, packing=False, seed=0)
    assert sorted(sorted(batch) for batch in batches) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 11, 12, 20])
def test_the_beginning_of_a_micro_batch_is_what_its_first_tokens_make(tokens):
    documents = [(np.arange(10, 15), np.array([[2, 5]])), (np.arange(20, 27), np.array([[0, 3], [5, 7]]))]
    whole = collate(documents, 0)
    found = prefix(whole, tokens)
    if tokens >= 12:
        assert found is whole
        return
    cut = [(ids[: max(0, tokens - at)], spans) for at, (ids, spans) in zip((0, 5), documents, strict=True)]
    # A target is the token after its place, which may be the first that is cut off.
    within = {int(place): int(target) for place, target in zip(whole["target_index"], whole["targets"], strict=True)}
    assert found["input_ids"][0].tolist() == [number for ids, _ in cut for number in ids.tolist()]
    assert found["lengths"] == [len(ids) for ids, _ in cut if len(ids)] == found["cu_seqlens"].diff().tolist()
    assert found["tokens"] == tokens and found["max_seqlen"] == max(found["lengths"])
    assert found["position_ids"].tolist() == whole["position_ids"][:, :tokens].tolist()
    pairs = zip(found["target_index"].tolist(), found["targets"].tolist(), strict=True)
    assert dict(pairs) == {place: target for place, target in within.items() if place < tokens}
