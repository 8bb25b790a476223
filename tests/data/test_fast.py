"""The faster encoder gives the tokenizer's own ids, wherever it is used at all."""

import copy
import json
import random

import pytest
import tiktoken
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from qwen_lit.data import fast
from qwen_lit.data.fast import PROVEN, FastEncoder, is_proven, model_digest, usual_text
from qwen_lit.data.faults import DataError
from qwen_lit.data.prepare import PROVED, Task, prepare, read_report
from qwen_lit.data.prove import prove
from qwen_lit.data.rows import Rows
from qwen_lit.data.sources import Source
from tests.conftest import QWEN_PATTERN

USUAL = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000 and usual_text().fullmatch(chr(code))]


@pytest.fixture(scope="module")
def encoder(qwen_tokenizer):
    made = FastEncoder.of(qwen_tokenizer)
    assert made is not None
    return made


def own(tokenizer, texts):
    return [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def random_text(draw):
    pieces = [
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</tool_call>",
        "<|im_",
        " ",
        "  ",
        "\n",
        "\r\n",
        "'s",
        "'LL",
        "don't",
        "1234567",
        "你好，",
        "Straße",
        "\u00a0",
        "\u3000",
        "e\u0301",
        "Å",
        "if (x){",
        "//",
        "\t\t",
        "的" * 9,
    ]
    return "".join(
        draw.choice(pieces) if draw.random() < 0.5 else draw.choice(USUAL) for _ in range(draw.randint(0, 60))
    )


def test_random_text_has_the_tokenizers_own_ids(encoder, qwen_tokenizer):
    draw = random.Random(0)
    texts = [random_text(draw) for _ in range(4000)]
    found = encoder.encode(texts)
    assert found == own(qwen_tokenizer, texts)
    assert all(encoder.reads_as(ids, text) for ids, text in zip(found, texts, strict=True))
    assert not encoder.reads_as(found[0] + found[1][:1], texts[0])


def test_both_engines_split_text_alike_around_every_usual_character(qwen_tokenizer):
    # Words that are tokens as a whole show where the text was split.
    assert len(USUAL) > 20_000
    before = qwen_tokenizer.backend_tokenizer.pre_tokenizer
    text = " ".join(f"a{c}a1{c}1{c}{c}!{c}\n'{c} {c}" for c in USUAL)
    text = normalizers.NFC().normalize_str(text)
    wanted = [text[a:b].encode() for _, (a, b) in before.pre_tokenize_str(text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in wanted:
        ranks.setdefault(word, len(ranks))
    split = tiktoken.Encoding("split", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert split.encode_ordinary(text) == [ranks[word] for word in wanted]


def test_unusual_and_very_long_text_goes_to_the_tokenizer(encoder, qwen_tokenizer, monkeypatch):
    texts = ["한국어", "usual", "👩‍👩‍👧 hi", "שלום", " " * 100_001, "\u017f"]
    seen = []

    class Spy:
        def encode_batch_fast(self, given, **options):
            seen.extend(given)
            return qwen_tokenizer.backend_tokenizer.encode_batch_fast(given, **options)

    monkeypatch.setattr(encoder, "backend", Spy())
    assert encoder.encode(texts) == own(qwen_tokenizer, texts)
    assert seen == [text for text in texts if text != "usual"]


def model_of(vocabulary, merges):
    return json.loads(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).to_str())["model"]


def canonical_merges(ranks):
    """The last merge of each token, as the tokenizer files of Qwen list them."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def test_the_vocabulary_of_qwen_is_proven_and_so_are_its_tokenizer_files(encoder, qwen_tokenizer):
    parts = json.loads(qwen_tokenizer.backend_tokenizer.to_str())
    assert is_proven(qwen_tokenizer.backend_tokenizer, parts["model"])
    character = {byte: chr(code) for code, byte in fast.bytes_of_characters().items()}
    ranks = {token: rank for token, rank in encoder.encoding._mergeable_ranks.items() if rank < 151_643}

    def written(token):
        return "".join(map(character.__getitem__, token))

    vocabulary = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in canonical_merges(ranks)]
    options = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    file = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False, **options))
    assert is_proven(file, json.loads(file.to_str())["model"])
    assert model_digest(file.to_str()) in PROVEN


def test_merges_in_another_order_or_a_token_that_is_never_made_are_not_proven():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    good = [("a", "b"), ("b", "c"), ("ab", "c")]
    for merges, proven in (
        (good, True),
        ([good[1], good[0], good[2]], False),
        ([good[0], good[1], ("a", "bc")], False),
    ):
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        assert is_proven(model, json.loads(model.to_str())["model"]) == proven


@pytest.mark.parametrize("change", ["normalizer", "split", "added token", "prefix of an added token"])
def test_a_tokenizer_that_does_more_has_no_faster_encoder(qwen_tokenizer, change):
    from tokenizers import AddedToken

    other = copy.deepcopy(qwen_tokenizer)
    backend = other.backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif change == "split":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif change == "added token":
        backend.add_tokens([AddedToken("new", lstrip=True)])
    else:
        backend.add_tokens([AddedToken("<think>!", normalized=False)])
    assert FastEncoder.of(other) is None


@pytest.fixture
def large(qwen_tokenizer, tmp_path, monkeypatch):
    from tests.data.test_chatml import template

    monkeypatch.setattr("qwen_lit.data.encoding.LARGE_BYTES", 0)
    qwen_tokenizer.chat_template = template("qwen3")
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": f"第{n}个问题?", "output": f"Answer {n}." if n % 3 else f"한국 {n}"} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task([Source(str(path))], {"max_length": 256}, {})


def contents(folder):
    return (folder / "rows.arrow").read_bytes(), read_report(folder)


@pytest.mark.parametrize("way", ["one process", "forked", "started anew"])
def test_a_large_dataset_is_what_the_tokenizer_alone_would_make(large, qwen_tokenizer, tmp_path, monkeypatch, way):
    used = []
    plain = FastEncoder.encode
    monkeypatch.setattr(FastEncoder, "encode", lambda self, texts: used.append(1) or plain(self, texts))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: way == "started anew")
    with_it = prepare(large, qwen_tokenizer, tmp_path / "fast", processes=1 if way == "one process" else 2)
    assert bool(used) == (way == "one process")
    monkeypatch.setattr("qwen_lit.data.encoding.LARGE_BYTES", 10**9)
    assert contents(prepare(large, qwen_tokenizer, tmp_path / "plain")) == contents(with_it)


def test_every_row_of_a_large_dataset_is_compared_with_the_template_when_asked(large, qwen_tokenizer, tmp_path):
    folder = prepare(large, qwen_tokenizer, tmp_path / "fast", processes=1)
    assert not (folder / PROVED).is_file()
    prove(large, qwen_tokenizer, folder)
    assert (folder / PROVED).is_file()


def test_a_row_that_differs_where_none_is_sampled_is_found_by_the_full_comparison(
    large, qwen_tokenizer, tmp_path, monkeypatch
):
    plain = FastEncoder.encode

    def spoiled(self, texts):
        found = plain(self, texts)
        if len(found) > 7:
            text = self.encoding.decode_bytes(found[7])
            at = next(n for n, one in enumerate(found[7]) if 1000 < one < 151_643)
            inside = self.encoding.decode_bytes([found[7][at]])
            found[7][at : at + 1] = [self.encoding.encode_single_token(bytes([byte])) for byte in inside]
            assert self.encoding.decode_bytes(found[7]) == text
        return found

    monkeypatch.setattr(FastEncoder, "encode", spoiled)
    folder = prepare(large, qwen_tokenizer, tmp_path / "fast", processes=1)
    with pytest.raises(DataError, match=r"a\.jsonl:8: the prepared token ids differ"):
        prove(large, qwen_tokenizer, folder)
    assert not (folder / PROVED).is_file()


def test_small_datasets_are_compared_while_they_are_prepared(large, qwen_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_lit.data.encoding.LARGE_BYTES", 10**9)
    assert (prepare(large, qwen_tokenizer, tmp_path / "plain") / PROVED).is_file()


@pytest.mark.parametrize("wrong", ["an id", "a split"])
def test_an_encoder_that_differs_in_one_row_is_not_used_for_any(
    large, qwen_tokenizer, tmp_path, monkeypatch, caplog, wrong
):
    plain = FastEncoder.encode

    def spoiled(self, texts):
        found = plain(self, texts)
        at = next(number for number, one in enumerate(found[0]) if one < 151_643 and one > 1000)
        # The row reads the same when a token is split into its bytes.
        bytes_of = [self.encoding.encode_single_token(bytes([b])) for b in self.encoding.decode_bytes([found[0][at]])]
        found[0] = found[0][:at] + (bytes_of if wrong == "a split" else []) + found[0][at + 1 :]
        return found

    monkeypatch.setattr(FastEncoder, "encode", spoiled)
    found = prepare(large, qwen_tokenizer, tmp_path / "fast", processes=1)
    assert "differs from the model's own" in caplog.text
    monkeypatch.setattr("qwen_lit.data.encoding.LARGE_BYTES", 10**9)
    assert contents(prepare(large, qwen_tokenizer, tmp_path / "plain")) == contents(found)
    assert len(Rows(found)) == 300
