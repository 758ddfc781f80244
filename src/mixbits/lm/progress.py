"""Progress of a training run: a live bar on a terminal, one line per validation in a log file.

Both go to stderr, so that a command's stdout holds only its result.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Literal

from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Speed and time left, training and validation loss. ``stop`` must be called, also when training ends by an error."""

    def __init__(self, title: str, tokens_per_step: int, *, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.mode: Literal["bar", "lines", "none"] = "none" if not show else "bar" if console.is_terminal else "lines"
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), console=console, disable=self.mode != "bar",
        )  # fmt: skip
        self.title, self.tokens_per_step, self.losses = (
            title,
            tokens_per_step,
            dict[str, float | None](loss=None, valid=None),
        )
        self.task: Any = None
        self.start_seconds, self.start_step = 0.0, 0

    def stop(self) -> None:
        """Take the bar down; harmless when there is none."""
        self.bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, speed="", losses=""
        )
        self.start_seconds, self.start_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = self.bar.tasks[0].speed
        text = f"{speed * self.tokens_per_step:,.0f} tokens/s" if speed else ""
        self.bar.update(self.task, completed=state.global_step, speed=text)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.task is None:
            return
        logs = logs or {}
        self.losses["loss"] = logs.get("loss", self.losses["loss"])
        self.losses["valid"] = logs.get("eval_loss", self.losses["valid"])
        text = " ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items() if loss is not None)
        self.bar.update(self.task, losses=text)
        if self.mode == "lines" and "eval_loss" in logs:
            seconds = max(time.monotonic() - self.start_seconds, 1e-9)
            speed = (state.global_step - self.start_step) * self.tokens_per_step / seconds
            print(
                f"{self.title}: step {state.global_step:,} of {state.max_steps:,}, {text}, {speed:,.0f} tokens/s",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()
