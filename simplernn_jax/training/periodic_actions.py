"""Actions of a run every N steps: evaluate, sample and save."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.parallel.distributed import barrier, is_coordinator
from simplernn_jax.parallel.layer_layout import in_layout_of
from simplernn_jax.parallel.shardings import local_copy
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
        self._evaluator = Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh)

    def evaluate(self) -> None:
        """Evaluate ``eval_tokens`` tokens, report them and decide on early stopping."""
        run, result = self._run, self._measure(self._run.config.train.eval_tokens)
        if result is not None:
            is_scheduled = run.step % run.config.train.eval_every == 0
            run.history.add(run.step, result, is_scheduled=is_scheduled)
            run.stopped_early = run.has_stopped_improving()
            self._reporter.validation(result)

    def evaluate_all(self) -> Evaluation | None:
        """Evaluate and report the whole validation split; None if nothing is held out."""
        result = self._measure(limit_tokens=0)
        if result is not None:
            self._reporter.held_out(result)
        return result

    def _measure(self, limit_tokens: int) -> Evaluation | None:
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
        train, prompt = run.config.train, run.config.train.sample_prompt
        graph, abstract = abstract_model(run.config.model)
        try:
            if template := run.config.data.template:
                prompt = ChatTemplate(template).render_next([{"role": "user", "content": prompt}])
            (text,) = generate_text(
                nnx.merge(graph, in_layout_of(abstract, params)),
                run.corpus.tokenizer,
                prompt,
                max_new_tokens=train.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                seed=train.seed,
            )
        except (UserError, TemplateError) as error:  # training goes on without a sample
            text = f" ({error})"
        reporter.sample(prompt + text)
    barrier("sample")
