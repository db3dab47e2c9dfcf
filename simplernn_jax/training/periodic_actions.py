"""Actions of a run every N steps: evaluate, sample and save."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from simplernn_jax.distributed import barrier, is_coordinator
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text
from simplernn_jax.models.initialization import abstract_model
from simplernn_jax.sharding.global_arrays import local_copy
from simplernn_jax.sharding.layer_layout import in_layout_of
from simplernn_jax.training.evaluate import Evaluation, Evaluator
from simplernn_jax.training.reporter import Reporter
from simplernn_jax.training.run import Run

SAMPLE_TEMPERATURE = 0.8


class PeriodicAction(NamedTuple):
    """An action on the state after every N-th step but the last."""

    run: Callable[[], object]
    every: int
    """Interval in steps; 0 disables it."""

    def is_due(self, run: Run) -> bool:
        """Return whether the action is due after the step that `run` has just taken."""
        return self.every > 0 and run.step % self.every == 0 and run.step < run.total_steps


class Validation:
    """Evaluation on the validation split."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self._run = run
        self._reporter = reporter
        self._reported: tuple[int, int] | None = None
        """Step and predictions of the last report."""
        self._evaluator = Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh)

    def evaluate(self) -> None:
        """Evaluate ``eval_tokens`` tokens and decide on early stopping."""
        result = self.report(self._run.config.train.eval_tokens)
        if result is not None:
            self._run.history.add(self._run.step, result, is_scheduled=True)
            self._run.stopped_early = self._run.has_stopped_improving()

    def measure_last(self) -> None:
        """Evaluate ``eval_tokens`` tokens at the end of the run, without a report."""
        run, result = self._run, self.measure(self._run.config.train.eval_tokens)
        if result is not None and run.history.last_step != run.step:
            is_scheduled = run.step % run.config.train.eval_every == 0
            run.history.add(run.step, result, is_scheduled=is_scheduled)

    def report(self, limit_tokens: int) -> Evaluation | None:
        """Evaluate the current state, and report a result that was not reported before."""
        result = self.measure(limit_tokens)
        if result is not None and self._reported != (self._run.step, result.predictions):
            self._reported = self._run.step, result.predictions
            self._reporter.validation(result)
        return result

    def measure(self, limit_tokens: int) -> Evaluation | None:
        """Evaluate the current state, unless that was done on the same tokens."""
        run, split = self._run, self._run.corpus.validation
        if split is None:
            return None
        predictions = min(limit_tokens or split.num_predictions, split.num_predictions)
        if run.latest_evaluation is not None:
            step, result = run.latest_evaluation
            if (step, result.predictions) == (run.step, predictions):
                return result
        result = self._evaluator(run.state.params, split, limit_tokens)
        run.latest_evaluation = run.step, result
        return result


def sample(run: Run, reporter: Reporter) -> None:
    """Continue the configured prompt with the current model, on the coordinator."""
    params = local_copy(run.state.params)
    if is_coordinator():
        train = run.config.train
        graph, abstract = abstract_model(run.config.model)
        try:
            (text,) = generate_text(
                nnx.merge(graph, in_layout_of(abstract, params)),
                run.corpus.tokenizer,
                train.sample_prompt,
                max_new_tokens=train.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                seed=train.seed,
            )
        except UserError as error:  # such as a model that has diverged, which training reports
            text = f" ({error})"
        reporter.sample(train.sample_prompt + text)
    barrier("sample")
