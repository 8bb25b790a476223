"""What all views of the page share: the folders, the jobs, and the draft as it was kept last."""

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_lit import help
from qwen_lit.run import Run
from qwen_lit.studio.curves import Curves
from qwen_lit.studio.draft import Draft
from qwen_lit.studio.folders import Folders
from qwen_lit.studio.jobs import Job, Jobs


@dataclass
class Studio:
    """The page without its views: what a reload, and another server, finds again."""

    folders: Folders
    jobs: Jobs
    curves: Curves

    @property
    def draft_file(self) -> Path:
        """Where the fields of the page are kept."""
        return self.folders.home / "draft.json"

    def draft(self) -> Draft:
        """The fields as they were kept last."""
        return Draft.read(self.draft_file)

    def audit_file(self, config: Path) -> Path:
        """Where the audit of a configuration is written."""
        path = self.folders.home / "audits" / f"{config.stem}.jsonl"
        path.parent.mkdir(exist_ok=True)
        return path

    def inspect(self, draft: Draft) -> list[str]:
        """Arguments of the audit."""
        config = draft.write(self.folders)
        return ["inspect", "--config", str(config), "--rows", "0", "--json", str(self.audit_file(config))]

    def plan(self, draft: Draft, measured: bool) -> list[str]:
        """Arguments of a plan.

        Args:
            draft: what is planned.
            measured: on the card; else by arithmetic, for a card of ``draft.memory_budget``.
        """
        found = ["plan", "--config", str(draft.write(self.folders)), "--json", "true", "--explain", "true"]
        found += [] if measured else ["--trainer.accelerator", "cpu"]
        return found + (["--memory_budget", draft.memory_budget] if draft.memory_budget else [])

    def fit(self, draft: Draft) -> list[str]:
        """Arguments of a run."""
        return ["fit", "--config", str(draft.write(self.folders))]

    def go_on(self, run: Run) -> list[str]:
        """Arguments with which a run goes on from its newest checkpoint."""
        return [*_of(run, "fit"), "--ckpt_path", "last"]

    def export(self, run: Run, checkpoint: str, merge: bool, gguf: str, repository: str = "") -> list[str]:
        """Arguments of an export.

        Args:
            run: whose checkpoint it is.
            checkpoint: ``last``, ``best`` or the path of one.
            merge: write the merged model too.
            gguf: a kind of GGUF; empty writes none.
            repository: of the hub to upload to; empty uploads nothing.
        """
        found = [*_of(run, "export"), "--ckpt_path", checkpoint, "--export.merge", str(merge).lower()]
        found += ["--export.gguf", gguf] if gguf else []
        return found + (["--push_to_hub", repository] if repository else [])

    def predict(self, run: Run, source: Path, target: Path) -> list[str]:
        """Arguments that answer a file."""
        return [*_of(run, "predict"), "--source", str(source), "--target", str(target)]

    def running(self, run: Run) -> Job | None:
        """The job that writes the folder of a run at this moment; None where none was started here."""
        return next((one for one in self.jobs.of_run(run.output_dir) if one.alive), None)


def _of(run: Run, command: str) -> list[str]:
    return [command, "--config", str(run.config_file), "--output_dir", str(run.output_dir)]


def gguf_kinds() -> list[str]:
    """The kinds of GGUF that ``export.gguf`` takes, as the reference names them."""
    keys = help.load()["keys"]
    kind = next(one["type"] for one in keys if one["key"] == "export.gguf")
    return re.findall(r"[a-z]+\d\w*", kind)
