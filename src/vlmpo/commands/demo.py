"""``vlmpo demo``: a tiny model learns a skill and a bad habit, and MPO mends the habit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from vlmpo.commands.report import SHARE_OF_TIME, ReportRefresh, never_failing, report_at_end
from vlmpo.data.records import PreferencePair
from vlmpo.demo.answers import answer_records, generate, make_pairs, marks
from vlmpo.demo.files import DATA_FOLDER, write_data
from vlmpo.demo.model import demo_model, demo_processor
from vlmpo.demo.task import Lesson, Lessons, Question, SceneSource
from vlmpo.errors import RecipeError
from vlmpo.fileio import replace_json, replace_json_lines
from vlmpo.log import logger, print_line, print_table
from vlmpo.report.files import ANSWERS, ANSWERS_BEFORE
from vlmpo.train.config import MPOConfig
from vlmpo.train.trainer import MPOTrainer

RESULTS_FILE = "results.json"
MARK_FILE = "demo.json"  # in a folder that a demo has begun to fill
# What is trained from the warm-up, in the order of the table.
ARMS: dict[str, dict[str, float]] = {
    "sft_on_chosen": {"nll": 1.0},
    "dpo": {"sigmoid": 1.0},
    "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0},
}
_ANSWERS = {"warm_up": ANSWERS_BEFORE, "mpo": ANSWERS}  # files of answers for the report
# One thread computes, beside one process that encodes: the fastest on two cores, since matrices this small gain nothing
# from more threads; and sums are rounded the same on every machine.
THREADS = 1
WORKERS = 1


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and rates: how much is drawn, trained and asked.

    Chosen on validation questions, partly of seeds 0, 1 and 2, never on test ones.

    Attributes:
        caption_steps, worked_steps, habit_steps: warm-up: describing images, then worked answers, then worked and
            direct answers mixed, which makes the habit.
        direct_sums, direct_differences: shares of direct answers in that mixture.
        questions, samples, pairs_per_question: what the training pairs are made from.
        held_out_questions: validation questions; reward accuracy is measured on their pairs.
        steps, rate: of each arm, from the warm-up on the same pairs.
        test_questions: accuracy is measured on them.
    """

    batch: int = 32
    caption_steps: int = 200
    worked_steps: int = 380
    habit_steps: int = 80
    warm_up_rate: float = 3e-3
    habit_rate: float = 1e-3
    direct_sums: float = 0.7
    direct_differences: float = 0.25
    questions: int = 600
    held_out_questions: int = 200
    samples: int = 8
    temperature: float = 1.0
    pairs_per_question: int = 2
    steps: int = 150
    rate: float = 1e-3
    beta: float = 0.1
    test_questions: int = 500


def demo(output: Path, seed: int = 0, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run the demo and return what is written to ``output/results.json``.

    ``output/warm_up`` and ``output/model`` hold the models before and after MPO with their processors, ``output/logs``
    the metrics of each training stage, ``output/data`` the pairs and the test's questions. Runs on the CPU, for
    the same results on every machine.

    Raises:
        RecipeError: ``output`` is a file, or holds a folder of others where the demo would write.
    """
    if output.exists() and not output.is_dir():
        raise RecipeError(f"--output {output} is a file; name a folder, or one that does not exist yet")
    output.mkdir(parents=True, exist_ok=True)
    _refuse_to_overwrite(output)
    replace_json(output / MARK_FILE, {"seed": seed})
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    (output / RESULTS_FILE).unlink(missing_ok=True)  # of an earlier demo
    with report_at_end(output):
        try:
            results = DemoRun(output, seed, settings or DemoSettings()).run()
        finally:
            torch.set_num_threads(threads)
        replace_json(output / RESULTS_FILE, results)
    show(results)
    print_line(f"Models, data, logs and {RESULTS_FILE} are in {output}")
    return results


def _refuse_to_overwrite(output: Path) -> None:
    written = ("warm_up", "model", "logs", DATA_FOLDER, RESULTS_FILE, *ARMS)
    taken = sorted(name for name in written if (output / name).exists())
    if taken and not (output / MARK_FILE).exists() and not {"warm_up", "logs", RESULTS_FILE} <= set(taken):
        raise RecipeError(f"--output {output} holds {', '.join(taken)}, which no demo wrote; name a new folder")


class DemoRun:
    """Runs the stages, in order, on one model."""

    def __init__(self, output: Path, seed: int, settings: DemoSettings) -> None:
        self.output, self.seed, self.settings = output, seed, settings
        self.seconds: dict[str, float] = {}
        # Test scenes are drawn first, validation scenes next: no later draw repeats one of them.
        self.source = SceneSource(seed)
        self.test = self.source.questions(settings.test_questions)
        self.validation = self.source.questions(settings.held_out_questions)
        self.processor = demo_processor()
        self.model = demo_model(self.processor, seed)

    def run(self) -> dict[str, Any]:
        """Warm up, sample, pair, train each arm from the warm-up, and return the results."""
        self.warm_up()
        self._save("warm_up")
        warm = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        arms = {"warm_up": self._examine("warm_up")}
        train, held_out = self.sample_pairs()
        write_data(self.output / DATA_FOLDER, train, held_out, self.test)
        for name, weights in ARMS.items():
            self.model.load_state_dict(warm)
            trainer = self._trainer(name, train, self.settings.steps, self.settings.rate, weights, held_out)
            if name == "mpo":  # policy and reference are still the warm-up
                arms["warm_up"] |= _pair_figures(trainer)
            trainer.keep_margins()
            trainer.add_callback(ReportRefresh(self.output))
            with self._stage(name, f"{self.settings.steps} steps on {len(train)} pairs"):
                trainer.train()
            with never_failing("the part of the report on single pairs"):
                trainer.score_kept_pairs(SHARE_OF_TIME)
            arms[name] = {**self._examine(name), **_pair_figures(trainer)}
            self._save("model" if name == "mpo" else name)
        return {
            "seed": self.seed,
            "arms": arms,
            "pairs": {"train": len(train), "held_out": len(held_out)},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "settings": asdict(self.settings),
        }

    def warm_up(self) -> None:
        """Teach the skill first, then the habit."""
        s, source = self.settings, self.source
        with self._stage("captions", f"{s.caption_steps} steps of describing drawings"):
            self.teach("captions", source.captions(s.caption_steps * s.batch), s.caption_steps, s.warm_up_rate)
        with self._stage("worked answers", f"{s.worked_steps} steps of counting aloud"):
            self.teach("worked", source.answers(s.worked_steps * s.batch), s.worked_steps, s.warm_up_rate)
        with self._stage("habit", f"{s.habit_steps} steps with direct answers among the worked ones"):
            answers = source.answers(s.habit_steps * s.batch, s.direct_sums, s.direct_differences)
            self.teach("habit", answers, s.habit_steps, s.habit_rate)

    def teach(self, name: str, lessons: list[Lesson], steps: int, rate: float) -> None:
        """Fine-tune on ``lessons``: MPO with the nll term alone, without reference and rejected responses."""
        self._trainer(name, Lessons(lessons), steps, rate, {"nll": 1.0}).train()

    def sample_pairs(self) -> tuple[list[PreferencePair], list[PreferencePair]]:
        """Pair the model's own right and wrong responses: to fresh questions, and to validation questions."""
        fresh = self.source.questions(self.settings.questions)
        count = len(fresh) + len(self.validation)
        with self._stage("sampling", f"{self.settings.samples} responses each to {count} fresh questions"):
            return self.pairs(fresh, self.seed), self.pairs(self.validation, self.seed + 1)

    def pairs(self, questions: list[Question], seed: int) -> list[PreferencePair]:
        """Sample responses to ``questions`` and pair them; the draws depend on ``seed`` alone."""
        s = self.settings
        set_seed(seed)  # not on how often training drew
        responses = generate(self.model, self.processor, questions, samples=s.samples, temperature=s.temperature)
        return make_pairs(questions, responses, most=s.pairs_per_question, seed=seed)

    def _trainer(
        self, name: str, data: Any, steps: int, rate: float, loss_weights: dict[str, float], held_out: Any = None
    ) -> MPOTrainer:
        """Return the trainer of one stage.

        The nll term is averaged over tokens. By its default, a mean over each response, the first word of a direct
        answer (6 tokens) weighs five times that of a worked one (31), and the nll term preserves the habit.
        """
        args = MPOConfig(
            output_dir=str(self.output / "logs" / name),
            per_device_train_batch_size=self.settings.batch,
            per_device_eval_batch_size=self.settings.batch,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, steps // 5),
            adam_beta2=0.99,
            weight_decay=0.01,
            beta=self.settings.beta,
            nll_reduction="token",
            logging_steps=50 if held_out is None else 10,  # the report draws the arms
            save_strategy="no",
            seed=self.seed,
            use_cpu=True,
            precision="float32",  # the same on every CPU; bf16 learns as much, and is no faster at this size
            dataloader_num_workers=WORKERS,
            loss_weights=loss_weights,
        )
        trainer = MPOTrainer(
            self.model, args=args, train_dataset=data, eval_dataset=held_out, processing_class=self.processor
        )
        trainer.console.with_opening = False  # of six short runs on one model
        return trainer

    def _examine(self, name: str) -> dict[str, Any]:
        with self._stage(f"test {name}", f"{len(self.test)} held-out questions"):
            responses = [response for (response,) in generate(self.model, self.processor, self.test)]
        if name in _ANSWERS:
            replace_json_lines(self.output / _ANSWERS[name], answer_records(self.test, responses))
        return marks(self.test, responses)

    def _save(self, name: str) -> None:
        self.model.save_pretrained(self.output / name)
        self.processor.save_pretrained(self.output / name)

    @contextmanager
    def _stage(self, name: str, text: str) -> Iterator[None]:
        """Announce a stage and note the seconds it takes."""
        logger.info(f"{name}: {text}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def _pair_figures(trainer: MPOTrainer) -> dict[str, Any]:
    """Evaluate on the held-out pairs: the chosen responses' log-prob and, if the model has rewards, their accuracy."""
    metrics = trainer.evaluate()
    names = {
        "logps/chosen": "chosen_logp",
        "rewards/accuracies": "reward_accuracy",
        "rewards/accuracies_low": "reward_low",
        "rewards/accuracies_high": "reward_high",
    }
    return {name: metrics.get(f"eval_{key}") for key, name in names.items()}


_TITLES = {"warm_up": "warm-up only", "sft_on_chosen": "SFT on the chosen", "dpo": "DPO only", "mpo": "MPO"}


def show(results: dict[str, Any]) -> None:
    """Print the table and what it shows."""
    settings, arms = results["settings"], results["arms"]
    rows = [("arm", "accuracy [95 %]", "unparsed", "worked", "logp", "reward")]
    for name, arm in arms.items():
        # The warm-up is its own reference: its rewards are 0, and so is their accuracy.
        reward = f"{arm['reward_accuracy']:.3f}" if arm["reward_accuracy"] else "-"
        accuracy = f"{arm['accuracy']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}]"
        unparsed, worked = f"{arm['unparsed']:.1%}", f"{arm['worked']:.0%}"
        rows.append((_TITLES[name], accuracy, unparsed, worked, f"{arm['chosen_logp']:.2f}", reward))
    print_table(f"{settings['test_questions']} held-out questions, seed {results['seed']}", rows)
    gain = 100 * (arms["mpo"]["accuracy"] - arms["warm_up"]["accuracy"])
    for line in (
        "worked: share of answers that count aloud first; logp: of the chosen responses of held-out pairs; reward: "
        "reward accuracy on them.",
        f"All arms start from the warm-up and take {settings['steps']} steps on the same {results['pairs']['train']} "
        "pairs of its own right and wrong responses.",
        "The warm-up teaches a skill (to count aloud) and then a wrong habit (to answer at once). MPO's accuracy less "
        f"the warm-up's: {gain:+.1f} points.",
        "Rate and nll reduction (token, not the default) were chosen for MPO and not tuned for the other arms: this is "
        "no comparison of losses.",
    ):
        print_line(line)
