"""DPO by TRL's trainer, with precomputed log-probs of the reference, on the very tokens that the other sides train."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from turns import Turn

from side_by_side.setting import BETA, Setting


class GivenTokens(DPOTrainer):
    """TRL's trainer where the data set holds token ids already; it remembers the loss of each batch, unrounded."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's own."""
        self.last_loss = super().compute_loss(*args, **kwargs)
        return self.last_loss


class TakeTurns(TrainerCallback):
    """Ends a turn with every step."""

    trainer: GivenTokens

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything is set up."""
        self.turn()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step is done."""
        metrics = self.trainer._metrics["train"]
        self.turn(
            loss=float(self.trainer.last_loss.detach()),
            logprob_chosen=metrics["logps/chosen"][-1],
            logprob_rejected=metrics["logps/rejected"][-1],
        )


def trl_dpo(turn: Turn, setting: Setting) -> None:
    """Train the student; the optimizer, its rate and the clipping are those of the other sides."""
    config = DPOConfig(
        output_dir=str(setting.folder / "run_trl"),
        beta=BETA,
        max_length=setting.max_length,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=setting.batch,
        train_sampling_strategy="sequential",
        max_steps=setting.steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        # Its default trades time for memory that these small models do not need.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    callback = TakeTurns(turn)
    callback.trainer = GivenTokens(
        model=AutoModelForCausalLM.from_pretrained(setting.student, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([_row(pair) for pair in setting.read_pairs()]),
        processing_class=AutoTokenizer.from_pretrained(setting.student),
        callbacks=[callback],
    )
    # It would print between the tables.
    callback.trainer.remove_callback(PrinterCallback)
    callback.trainer.train()


def _row(pair: dict[str, Any]) -> dict[str, list[int]]:
    chosen, rejected = pair["chosen"]["student"], pair["rejected"]["student"]
    return {"prompt_ids": chosen["prompt"], "chosen_ids": chosen["response"], "rejected_ids": rejected["response"]}
