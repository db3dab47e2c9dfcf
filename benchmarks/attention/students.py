"""Small models of several kinds and state sizes, each at the learning rate that is best for it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.attention.learning import Learned, Lesson, accuracies, learn, task_config
from benchmarks.attention.memory import state_bytes
from benchmarks.training import count_parameters
from simplernn_jax.config import ModelConfig
from simplernn_jax.data.tasks import Task

WIDTH, LAYERS = 64, 2
LONGER = 4
"""The longest rows and distances of tests are so many times those of the training."""


class Student(NamedTuple):
    """A model that learns tasks."""

    name: str
    fields: Mapping[str, Any]
    """Of its `ModelConfig`, besides those that all have."""
    optimizers: tuple[str, ...] = ("muon",)


def recurrent(state: int) -> Student:
    """The residual block with one head of `state` times `state` numbers a layer."""
    return Student(f"SimpleRNN {state} x {state}", {"key_dim": state, "value_dim": state})


ATTENTION = Student("attention", {"mixer": "attention", "mlp_dim": 2 * WIDTH + 32})
"""The MLP is wider by as many parameters as there are forget gates on the other side."""
PLAIN = Student("seed stack (plain)", {"block": "plain"}, ("muon", "adamw"))
"""The PyTorch project's layers: no convolution, norm, residual or MLP."""


def model_of(student: Student, context: int) -> ModelConfig:
    """The student's sizes; attention sees `context` tokens."""
    sizes = {"num_layers": LAYERS, "num_heads": 1, "mlp_dim": 2 * WIDTH}
    sizes |= dict.fromkeys(("hidden_dim", "key_dim", "value_dim"), WIDTH)
    return ModelConfig(attention_context=context, **(sizes | dict(student.fields)))


def examine(
    student: Student,
    lessons: Sequence[Lesson],
    rates: Mapping[str, tuple[float, ...]],
    exams: Mapping[str, Mapping[int, Task]],
    rows: int,
) -> dict[str, Any]:
    """Trains a student at every learning rate and tests the one that learned the lessons best.

    Args:
      student: who.
      lessons: one after another.
      rates: learning rates by optimizer.
      exams: tasks by the number they are drawn against, by the name of their curve.
      rows: of each test.

    Returns:
      Its name and sizes, the loss of every trial, which was best, and accuracy by curve and
      number.
    """
    context = max(task.length for tasks in exams.values() for task in tasks.values())
    trials: dict[str, Learned] = {}
    for optimizer in student.optimizers:
        for rate in rates[optimizer]:
            config = task_config(model_of(student, context), lessons, optimizer, rate)
            trials[f"{optimizer} {rate:g}"] = learn(config, lessons)
    # A loss that is not a number is no best.
    best = min(trials, key=lambda name: (trials[name].loss != trials[name].loss, trials[name].loss))
    learned = trials[best]
    print(f"  {student.name}: {best} of {', '.join(trials)}", flush=True)
    return {
        "name": student.name,
        "parameters": count_parameters(learned.config),
        "state_bytes": state_bytes(model_of(student, lessons[-1].task.length)),
        "losses": {name: trial.loss for name, trial in trials.items()},
        "seconds": {name: trial.seconds for name, trial in trials.items()},
        "best": best,
        "accuracy": {
            curve: {str(n): share for n, share in accuracies(learned, tasks, rows).items()}
            for curve, tasks in exams.items()
        },
    }
