"""The curves of a run, read from the TensorBoard files that it writes."""

from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]


class Curves:
    """Keeps what was read of each run, and reads on from there."""

    def __init__(self) -> None:
        """Begins with nothing read."""
        self.read: dict[Path, Any] = {}

    def of(self, logs: Path) -> dict[str, Curve]:
        """(optimizer step, value) of each curve by its name; a step that was trained again counts as it was last.

        Args:
            logs: the folder of the TensorBoard files.
        """
        # It takes a second, which only those wait for who look at a run.
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not any(logs.glob("events.out.tfevents.*")):
            self.read.pop(logs, None)
            return {}
        if logs not in self.read:
            self.read[logs] = EventAccumulator(str(logs), size_guidance={"scalars": 0})
        events = self.read[logs]
        events.Reload()
        found: dict[str, Curve] = {}
        for name in events.Tags()["scalars"]:
            values = {one.step: one.value for one in events.Scalars(name)}
            found[name] = sorted(values.items())
        return found
