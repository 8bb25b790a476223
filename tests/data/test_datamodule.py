"""The split is by content, the order a pure function, and no row is lost or shown twice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen_lit.data.batches import EpochOrder, group, join
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.settings import DataSettings
from qwen_lit.errors import UserError


def rows_of(count, start=0):
    return [{"instruction": f"Question {n}?", "output": f"Answer {n}."} for n in range(start, start + count)]


@pytest.fixture
def module(tokenizer, tmp_path):
    def make(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache = str(tmp_path / "cache")
        given = options.pop("dataset_path", str(path))
        data = QwenDataModule(DataSettings(given, cache_dir=cache, **options), tokenizer)
        data.prepare_data()
        data.setup()
        return data

    return make


def texts(tokenizer, rows):
    return [tokenizer.decode(rows[n][0]) for n in range(len(rows))]


def test_no_row_changes_side_when_the_file_grows(module, tokenizer):
    small = module(rows_of(200), val_size=0.2)
    train, val = set(texts(tokenizer, small.train_rows)), set(texts(tokenizer, small.val_rows))
    large = module(rows_of(300), val_size=0.2)
    assert 20 < len(val) < 60
    assert train <= set(texts(tokenizer, large.train_rows)) and val <= set(texts(tokenizer, large.val_rows))


def test_what_a_count_has_held_out_stays_held_out_when_the_file_grows(tokenizer, tmp_path):
    from qwen_lit.data.datamodule import QwenDataModule
    from qwen_lit.data.settings import DataSettings

    path, sides = tmp_path / "rows.jsonl", []
    for count in (200, 300, 100):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)))
        cache = str(tmp_path / "cache")
        data = QwenDataModule(DataSettings(str(path), val_size=20, max_length=256, cache_dir=cache), tokenizer)
        data.setup()
        sides.append((set(texts(tokenizer, data.train_rows)), set(texts(tokenizer, data.val_rows))))
    assert len(sides[0][1]) == 20
    assert sides[0][0] < sides[1][0] and sides[0][1] < sides[1][1]
    # Another file of the same name, with fewer rows below the limit, is split anew.
    assert len(sides[2][1]) == 20


def test_duplicates_are_never_on_both_sides(module, tokenizer):
    data = module(rows_of(50) * 3, val_size=20)
    train, val = texts(tokenizer, data.train_rows), texts(tokenizer, data.val_rows)
    assert not set(train) & set(val)
    assert len(train) == 90 and len(set(val)) == 20


def test_a_validation_file_takes_its_rows_out_of_training(module, tokenizer, tmp_path):
    other = tmp_path / "val.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows_of(10, 45)))
    data = module(rows_of(50), val_dataset_path=str(other))
    assert len(data.val_rows) == 10 and len(data.train_rows) == 45


def test_sources_have_weights_and_caps(module, tmp_path):
    for name, start in (("a", 0), ("b", 1000), ("c", 2000)):
        rows = "".join(json.dumps(row) + "\n" for row in rows_of(200, start))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    data = module(
        [],
        dataset_path=[
            str(tmp_path / "a.jsonl"),
            {"path": str(tmp_path / "b.jsonl"), "weight": 2.5},
            {"path": str(tmp_path / "c.jsonl"), "max_rows": 30},
        ],
    )
    counts = np.bincount(data.train_rows.column("source"))
    assert counts[0] == 200 and 440 < counts[1] < 560 and counts[2] == 30


def test_the_order_is_a_function_of_seed_epoch_and_position():
    batches = [[n] for n in range(101)]
    order = EpochOrder(batches, seed=7)
    first, again = list(order), list(EpochOrder(batches, seed=7))
    assert first == again and sorted(first) == [[batch] for batch in batches]
    order.epoch = 1
    second = list(order)
    assert second != first and sorted(second) == sorted(first)
    order.start = 40
    assert list(order) == second[40:]
    assert list(EpochOrder(batches, seed=8)) != first


def test_the_order_does_not_depend_on_the_device_new_tensors_go_to():
    lengths = np.array([5, 3, 9, 3])
    wanted = group(lengths, 2, 16, True, 7), group(lengths, 2, 16, False, 7), list(EpochOrder([[0], [1], [2]], 7))
    with torch.device("meta"):
        found = group(lengths, 2, 16, True, 7), group(lengths, 2, 16, False, 7), list(EpochOrder([[0], [1], [2]], 7))
    assert found == wanted


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_row_is_seen_once_over_all_ranks_and_each_rank_has_equally_many_batches(ranks):
    batches = [[n] for n in range(101)]
    orders = [list(EpochOrder(batches, 7, rank, ranks)) for rank in range(ranks)]
    assert len({len(order) for order in orders}) == 1
    assert sorted(batch for order in orders for (batch,) in order if batch) == batches


def trainer(per_step):
    """Of one process at the beginning of a run."""
    return SimpleNamespace(
        micro_batches_per_step=per_step, global_rank=0, world_size=1, overfit_batches=0.0, current_epoch=0
    )


def ids(step):
    return [batch["input_ids"].tolist() for batch in step]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_a_loader_goes_on_at_the_very_next_batch(module, workers, packing):
    data = module(rows_of(60), batch_size=4, max_length=64, packing=packing, num_workers=workers)
    data.trainer = trainer(2)
    whole = [ids(step) for step in data.train_dataloader()]
    loader = data.train_dataloader()
    steps = iter(loader)
    begun = [ids(next(steps)) for _ in range(3)]
    state = loader.state_dict()
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert begun + [ids(step) for step in resumed] == whole and state == {"epoch": 0, "position": 3}
    assert len(whole) == len(loader) and {len(step) for step in whole[:-1]} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"max_length": 4}, "data.max_length is 4"),
        ({"val_size": -1}, "data.val_size is -1"),
        ({"val_size": 1.5}, "data.val_size is 1.5"),
        ({"val_size": 500}, "there are 20 distinct rows"),
        ({"dataset_path": "nowhere.jsonl"}, "data.dataset_path: no such dataset: nowhere.jsonl"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(module, options, message):
    with pytest.raises(UserError, match=message):
        module(rows_of(20), **options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_has_consecutive_micro_batches_of_a_rank_and_the_last_one_what_is_left(ranks):
    batches = [[n, n + 1000] for n in range(23)]
    plain = [batch for (batch,) in EpochOrder(batches, 7, 0, ranks)]
    order = EpochOrder(batches, 7, 0, ranks, per_step=4)
    steps = list(order)
    assert steps == [plain[at : at + 4] for at in range(0, len(plain), 4)]
    assert len(order) == len(steps) and 0 < len(steps[-1]) < 4 or ranks == 2
    order.start = 2
    assert list(order) == steps[2:]


@pytest.mark.parametrize("packing", [False, True])
def test_the_heaviest_micro_batches_are_as_heavy_as_any_that_are_trained_together(module, packing):
    rows = [{"instruction": "Say.", "output": "word " * (1 + 7 * n % 40)} for n in range(60)]
    data = module(rows, batch_size=2, max_length=80, packing=packing)
    for count in (1, 3):
        one = data.heaviest(count)
        data.trainer = trainer(count)
        trained = max(join(step)["tokens"] for step in data.train_dataloader())
        assert one["tokens"] >= trained and one["input_ids"].numel() == one["tokens"]
        assert one["tokens"] == data.most_tokens([1, 3])[count] <= count * data.most_tokens([1])[1]
    assert data.mean_tokens() == data.train_rows.column("length").sum() / data.micro_batches(1)
    assert data.heaviest(10_000)["tokens"] == int(data.train_rows.column("length").sum())
