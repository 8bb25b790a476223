"""The words of a run's lines."""

from qwen_lit.lines import chat_turns, duration, end_lines, panel_lines, plural, question

CHAT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
    "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\n茶?<|im_end|>\n<|im_start|>assistant\n"
)


def test_one_is_one_and_others_are_more():
    assert [plural(n, "row") for n in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert [plural(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
    names = (
        "tokens_per_second",
        "supervised_tokens_per_second",
        "fill",
        "model_tflops",
        "recompute_tflops",
        "share_waiting_for_data",
        "share_saving",
        "share_validating",
    )
    panel = dict.fromkeys(names, 0.5) | {"tokens_per_second": 400, "flop_use": 0.5}
    lines = panel_lines(panel, skipped=1)
    assert lines[-1] == "skipped      1 step" and "400 tokens/s, " in lines[0] and "50% of the card's peak" in lines[1]
    lines = panel_lines(panel | {"tokens_per_second_per_card": 100}, skipped=1)
    assert "400 tokens/s (100 a card), " in lines[0] and "50% of the cards' peak" in lines[1]


def test_a_prompt_is_read_as_turns_and_its_question_is_the_last_of_the_user():
    assert chat_turns(CHAT) == [("system", "Be brief."), ("user", "a\nb"), ("assistant", "c"), ("user", "茶?")]
    assert question(CHAT) == "茶?"
    assert chat_turns("Once upon") == [("", "Once upon")] and question("Once upon") == "Once upon"


def test_several_attempts_are_told_with_their_time_together():
    summary = {
        "output_dir": "o",
        "duration_seconds": 61.2,
        "trained_seconds": 7300,
        "attempts": 3,
        "exported": {},
        "files": {"report": "o/report.html"},
    }
    assert end_lines(summary) == [
        "done in      0:01:01, 2:01:40 of training over 3 attempts",
        "report       o/report.html",
    ]
    assert duration(90_000) == "1 day, 1:00:00"
