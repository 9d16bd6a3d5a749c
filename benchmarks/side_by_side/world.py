"""The world that all sides train in: random weights, real tokenizers and pairs, scores of student and teachers."""

import json
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from ctpd_nemo.data.config import DataConfig
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.models.config import ModelsConfig, RunConfig, SideConfig, TrainerConfig
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.scorer import ScoreConfig
from ctpd_nemo.parallel.optimizer import OptimConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.fingerprints import score_fingerprints
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.score_cache import ScoreReader
from ctpd_nemo.pipeline.tiny_world.models import write_model
from side_by_side.setting import BETA, TEACHERS, Setting

_PRECISION = "fp32"


def build_world(setting: Setting) -> None:
    """Write models and pairs, and score the pairs under the student (for DPO) and its teachers (for CTPD)."""
    quiet.after_imports()
    setting.folder.mkdir(parents=True, exist_ok=True)
    tokenizers = [
        AutoTokenizer.from_pretrained(path) for path in (setting.student_tokenizer, setting.teacher_tokenizer)
    ]
    student, teacher = tokenizers
    write_model(setting.student, LlamaConfig(**sizes(setting, student, setting.student_vocab)), student, seed=0)
    for seed, role in enumerate(TEACHERS, start=1):
        config = Qwen2Config(**sizes(setting, teacher, setting.teacher_vocab))
        write_model(setting.teacher(role), config, teacher, seed)
    kept = choose_pairs(setting, Side(student, None), Side(teacher, None))
    student_folder, teacher_folders = str(setting.student), {role: str(setting.teacher(role)) for role in TEACHERS}
    score(run_config(setting, ScoreConfig(cache=dpo_scores(setting), reference=student_folder), "student"))
    score(run_config(setting, ScoreConfig(cache=ctpd_scores(setting), **teacher_folders)))
    _write_encoded(setting, kept)


def dpo_scores(setting: Setting) -> str:
    """Cache of the student's log-probs of its own tokens."""
    return str(setting.folder / "dpo_scores")


def ctpd_scores(setting: Setting) -> str:
    """Cache of the teachers' log-probs of the shared spans."""
    return str(setting.folder / "ctpd_scores")


def run_config(setting: Setting, method: Any, teacher: str = "reference") -> RunConfig:
    """A training or scoring job; ``teacher`` "student" scores the student's own tokens."""
    scores_itself = isinstance(method, ScoreConfig) and teacher == "student"
    return RunConfig(
        method=method,
        policy="teacher" if scores_itself else "student",
        run_dir=str(setting.folder / f"run_{method.name}_{getattr(method, 'reference', '')}"),
        model=ModelsConfig(SideConfig(str(setting.student)), SideConfig(str(setting.folder / teacher))),
        data=DataConfig(
            train=[str(setting.train)],
            max_length=setting.max_length,
            global_batch_size=setting.batch,
            microbatch_tokens=2 * setting.max_length * setting.batch,
            shuffle=False,
            # A worker of one side would work while it is another's turn.
            num_workers=0,
        ),
        optim=OptimConfig(
            lr=setting.learning_rate, min_lr=setting.learning_rate, schedule="constant", warmup_fraction=0.0
        ),
        precision=PrecisionConfig(_PRECISION),
        trainer=TrainerConfig(epochs=-(-setting.steps // setting.steps_per_epoch), max_steps=setting.steps),
    )


def sizes(setting: Setting, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> dict[str, Any]:
    """Four heads over two query groups; the gated feed-forward is 8/3 as wide as the model."""
    return {
        "vocab_size": vocab_size or max(tokenizer.get_vocab().values()) + 1,
        "hidden_size": setting.hidden,
        "intermediate_size": -(-setting.hidden * 8 // 3 // 32) * 32,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max(2048, setting.max_length),
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def choose_pairs(setting: Setting, student: Side, teacher: Side) -> list[EncodedPair]:
    """Write the first pairs of which DPO and CTPD train the very same tokens, and give them as CTPD reads them.

    CTPD cuts a response that is too long where a span ends, so that a few tokens less may be left of it than of DPO's.
    """
    dataset = open_preferences([str(setting.preferences)])
    one_sided = PairEncoder(student, None, include_eos=True, max_length=setting.max_length)
    two_sided = PairEncoder(student, teacher, include_eos=True, max_length=setting.max_length)
    kept: list[EncodedPair] = []
    lines = setting.preferences.read_text(encoding="utf-8").splitlines()
    with setting.train.open("w", encoding="utf-8") as file:
        for row in range(len(dataset)):
            if len(kept) == setting.pairs:
                return kept
            (dpo,), (ctpd,) = (encoder.encode([row], [dataset[row]]) for encoder in (one_sided, two_sided))
            if isinstance(dpo, EncodedPair) and isinstance(ctpd, EncodedPair) and _lengths(dpo) == _lengths(ctpd):
                kept.append(ctpd)
                file.write(lines[row] + "\n")
    raise ValueError(f"{setting.preferences} has {len(kept)} pairs that fit, not {setting.pairs}")


def _lengths(pair: EncodedPair) -> tuple[int, int]:
    return len(pair.chosen.policy), len(pair.rejected.policy)


def _write_encoded(setting: Setting, pairs: list[EncodedPair]) -> None:
    """Token ids, spans and importance weights of the pairs, as ``Setting.read_pairs`` gives them."""
    method = CTPDConfig(beta=BETA, scores=ctpd_scores(setting))
    data = RunData(run_config(setting, method), ("chosen", "rejected"), two_sided=True)
    scores = ScoreReader(ctpd_scores(setting), score_fingerprints(data, _PRECISION), {}, method)
    rows = []
    for pair in pairs:
        _, _, chosen_weights, rejected_weights = scores.lookup(pair)
        weights = chosen_weights.tolist(), rejected_weights.tolist()
        chosen, rejected = (
            _plain(response, w) for response, w in zip((pair.chosen, pair.rejected), weights, strict=True)
        )
        rows.append({"chosen": chosen, "rejected": rejected})
    setting.encoded.write_text(json.dumps(rows), encoding="utf-8")


def _plain(response: EncodedResponse, weights: list[float]) -> dict[str, Any]:
    def side(tokens: SideTokens) -> dict[str, list[int]]:
        ids = {"prompt": tokens.prompt_ids, "response": tokens.response_ids, "span": tokens.response_span}
        return {name: values.tolist() for name, values in ids.items()}

    return {"student": side(response.policy), "teacher": side(response.reference), "weights": weights}
