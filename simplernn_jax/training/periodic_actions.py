"""What a run does every few steps: evaluate, sample and save."""

from flax import nnx

from simplernn_jax.inference import generate_text
from simplernn_jax.sharding.agreement import barrier, is_coordinator
from simplernn_jax.sharding.global_arrays import local_copy
from simplernn_jax.sharding.layer_layout import in_layout_of
from simplernn_jax.training.evaluate import Evaluation, Evaluator
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.reporter import Reporter
from simplernn_jax.training.run import Run

SAMPLE_TEMPERATURE = 0.8


class PeriodicAction:
    """An action on the state after every N-th step but the last; 0 is never."""

    def __init__(self, run: Run, reporter: Reporter, every: int) -> None:
        self._run = run
        self._reporter = reporter
        self._every = every

    def is_due(self) -> bool:
        """Whether to act after the step that was just taken."""
        step = self._run.step
        return self._every > 0 and step % self._every == 0 and step < self._run.setup.total_steps

    def __call__(self) -> None:
        """Act."""
        raise NotImplementedError


class Evaluate(PeriodicAction):
    """Evaluation on the validation split, which may stop the run early."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        setup = run.setup
        super().__init__(run, reporter, setup.config.train.eval_every)
        self._evaluator = Evaluator(setup.config, setup.corpus.tokenizer.pad_id, setup.mesh)

    def __call__(self) -> None:
        """Evaluate `eval_tokens` tokens and decide on early stopping."""
        result = self.report(self._run.setup.config.train.eval_tokens)
        if result is not None:
            self._run.history.add(self._run.step, result)
            self._run.check_early_stopping()

    def measure(self, limit_tokens: int) -> Evaluation | None:
        """Evaluate the current state, unless that was done on the same tokens."""
        run = self._run
        split = run.setup.corpus.validation
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

    def report(self, limit_tokens: int) -> Evaluation | None:
        """Measure, and report what was not reported before."""
        run, result = self._run, self.measure(limit_tokens)
        reported = run.history.last_step, run.history.predictions
        if result is not None and reported != (run.step, result.predictions):
            self._reporter.validation(result)
        return result


class Sample(PeriodicAction):
    """A sample from the current model, written by the coordinator."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        super().__init__(run, reporter, run.setup.config.train.sample_every)

    def __call__(self) -> None:
        """Continue the prompt of the configuration."""
        setup, params = self._run.setup, local_copy(self._run.state.params)
        if is_coordinator():
            train = setup.config.train
            graph, abstract = abstract_model(setup.config)
            (text,) = generate_text(
                nnx.merge(graph, in_layout_of(abstract, params)),
                setup.corpus.tokenizer,
                train.sample_prompt,
                max_new_tokens=train.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                seed=train.seed,
            )
            self._reporter.sample(train.sample_prompt + text)
        barrier("a sample is written")


class Save(PeriodicAction):
    """A checkpoint, saved in the background."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        super().__init__(run, reporter, run.setup.config.train.save_every)

    def __call__(self) -> None:
        """Save."""
        self._run.save()
