"""The audit of a dataset and all of its rows as JSON, for other programs."""

import json
from pathlib import Path

from qwen_lit.data.audit import Audit, pieces, text_report
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.rows import Rows


def write_audit(path: Path, result: Audit, data: QwenDataModule) -> None:
    """The audit as the first line, then a line for each prepared row.

    Args:
        path: of the file.
        result: the audit.
        data: that was audited.

    Raises:
        OSError: it cannot be written.
    """
    assert data.train_rows is not None and data.val_rows is not None
    report = result.report
    about = {
        "verdict": result.verdict,
        "problems": result.problems,
        "notes": result.notes,
        "train": result.train,
        "val": result.val,
        "tokens": result.tokens,
        "supervised": result.supervised,
        "steps": result.steps,
        "percentiles": result.percentiles,
        "histogram": result.histogram,
        "masked": result.masked,
        "duplicates": result.duplicates,
        "faults": [{"place": one.source, "message": one.message} for one in report.first],
        "text": list(text_report(result)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(about, ensure_ascii=False) + "\n")
        for part, folder in parts(data).items():
            rows = Rows(folder)
            lengths, trained = rows.column("length").tolist(), rows.column("supervised").tolist()
            for number in range(len(rows)):
                place, note = rows.place(number)
                line = {
                    "place": place,
                    "note": note,
                    "part": part,
                    "tokens": lengths[number],
                    "trained": trained[number],
                    "pieces": pieces(rows, number, data.tokenizer),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for part, folder in parts(data).items():
            for place, message in left_out(folder):
                file.write(json.dumps({"place": place, "message": message, "part": part}, ensure_ascii=False) + "\n")


def parts(data: QwenDataModule) -> dict[str, Path]:
    """The folders of prepared rows: of the training files, and of the validation files where they have some."""
    assert data.train_rows is not None and data.val_rows is not None
    found = {"train": data.train_rows.folder}
    return {**found, "val": data.val_rows.folder} if data.val_sources else found


def left_out(folder: Path) -> list[tuple[str, str]]:
    """Place and reason of each row of ``rows.log``: left out, or changed."""
    path = folder / "rows.log"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    split = [line.partition(": ") for line in lines]
    return [(place, message) for place, _, message in split]
