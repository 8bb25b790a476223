"""Trackers: a logger of Lightning in the place of ``report_to``."""

from typing import Any

from qwen_lit.convert.draft import Draft
from qwen_lit.convert.values import is_off, listed

CLASSES = {
    "wandb": "WandbLogger",
    "mlflow": "MLFlowLogger",
    "comet_ml": "CometLogger",
    "comet": "CometLogger",
    "swanlab": "swanlab.integration.pytorch_lightning.SwanLabLogger",
}
ARGUMENTS = {
    "wandb": {"project": "project", "run_name": "name", "entity": "entity", "run_id": "id"},
    "mlflow": {"project": "experiment_name", "run_name": "run_name", "tracking_uri": "tracking_uri"},
    "comet_ml": {"project": "project", "workspace": "workspace"},
    "comet": {"project": "project", "workspace": "workspace"},
    "swanlab": {"project": "project", "run_name": "experiment_name", "workspace": "workspace", "mode": "mode"},
}
"""Tracker to the logger's arguments by common word."""
SAVES = ("wandb", "mlflow")
"""Those whose logger takes a folder."""
PLAIN = ("tensorboard", "none", "all", "false", "no")


def trackers(draft: Draft) -> None:
    """One logger for each tracker that Lightning has one for; TensorBoard alone is what is there by itself."""
    given = [str(name).lower() for name in listed("report_to", draft.use("report_to", []))]
    options = {
        word: draft.use(word)
        for word in ("project", "run_name", "entity", "workspace", "run_id", "mode", "tracking_uri", "log_model")
    }
    made = []
    for name in dict.fromkeys(given):
        if name in CLASSES:
            made.append(logger(draft, name, options))
        elif name not in PLAIN:
            draft.note(f"no counterpart: report_to: {name}; a logger of Lightning can be given as trainer.logger")
    if given and given[0] in ("none", "false", "no"):
        draft.note(
            "report_to: none: TensorBoard is written into output_dir/logs all the same; "
            "trainer.logger: false leaves it out"
        )
    if not made:
        return
    draft.write("trainer.logger", made[0] if len(made) == 1 else made, draft.origin("report_to"))
    if "tensorboard" in given:
        draft.note("report_to: a logger that is given takes TensorBoard's place; report.html still draws the curves")
    if "swanlab" in given:
        draft.note("report_to: swanlab needs its package: pip install swanlab")


def logger(draft: Draft, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The section of one logger."""
    arguments = {ours: options[word] for word, ours in ARGUMENTS[name].items() if options[word] is not None}
    if name == "wandb":
        arguments.setdefault("project", "huggingface")
        if str(options["mode"]).lower() in ("offline", "dryrun"):
            arguments["offline"] = True
        if options["log_model"] is not None:
            value = str(options["log_model"]).lower()
            arguments["log_model"] = False if is_off(value) else "all" if value == "checkpoint" else True
    if name in SAVES and "tracking_uri" not in arguments:
        folder = draft.ours.get("output_dir", "output")
        arguments["save_dir"] = folder if name == "wandb" else f"{folder}/mlruns"
    return {"class_path": CLASSES[name], "init_args": arguments}
