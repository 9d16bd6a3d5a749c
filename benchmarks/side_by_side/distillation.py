"""The sides of ``distillation.py``, and the world they train in: jobs as ``tools/train.py`` runs them."""

import dataclasses
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config
from turns import Turn

from ctpd_nemo.data.templates import Side
from ctpd_nemo.models.dskd import DSKDConfig
from ctpd_nemo.models.multilevel_ot import MultiLevelOTConfig
from ctpd_nemo.models.scorer import ScoreConfig
from ctpd_nemo.models.sft import SFTConfig
from ctpd_nemo.models.uld import ULDConfig
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.tiny_world.models import write_model
from side_by_side.ours import train_in_turns
from side_by_side.setting import DistillationSetting
from side_by_side.world import choose_pairs, run_config, sizes


def build_world(setting: DistillationSetting) -> dict[str, float]:
    """Write models and pairs and fill the cache; sizes in bytes, on disk and of the teacher's weights."""
    quiet.after_imports()
    setting.folder.mkdir(parents=True, exist_ok=True)
    student = AutoTokenizer.from_pretrained(setting.student_tokenizer)
    teacher = AutoTokenizer.from_pretrained(setting.teacher_tokenizer)
    own = sizes(setting, student, setting.student_vocab)
    write_model(setting.student, LlamaConfig(**own), student, seed=0)
    wide = dataclasses.replace(setting, hidden=setting.teacher_hidden, layers=setting.teacher_layers)
    folder = setting.teacher("reference")
    write_model(folder, Qwen2Config(**sizes(wide, teacher, setting.teacher_vocab)), teacher, seed=1)
    choose_pairs(setting, Side(student, None), Side(teacher, None))
    score(run_config(setting, ScoreConfig(cache=setting.cache, reference=str(folder), top_k=setting.top_k)))
    shards = sorted((setting.folder / "cache").glob("top_k-*.parquet"))
    tokens = sum(len(tail) for shard in shards for tail in pq.read_table(shard)["tail"].to_pylist())
    return {
        "teacher_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "student_bytes": sum(file.stat().st_size for file in setting.student.glob("*.safetensors")),
        "cached_tokens": tokens,
        "cached_bytes": sum(shard.stat().st_size for shard in shards),
        "cached_bytes_per_token": sum(shard.stat().st_size for shard in shards) / tokens,
    }


def sft(turn: Turn, setting: DistillationSetting) -> None:
    """Fine-tuning on the same responses: no teacher."""
    _train(turn, setting, "sft", SFTConfig())


def uld_whole(turn: Turn, setting: DistillationSetting) -> None:
    """ULD on whole distributions."""
    _train(turn, setting, "uld_whole", ULDConfig())


def uld_online(turn: Turn, setting: DistillationSetting) -> None:
    """ULD on the largest probabilities, of the teacher beside the student."""
    _train(turn, setting, "uld_online", ULDConfig(top_k=setting.top_k))


def uld_cached(turn: Turn, setting: DistillationSetting) -> None:
    """The same from the cache."""
    _train(turn, setting, "uld_cached", ULDConfig(top_k=setting.top_k, reference="cache", scores=setting.cache))


def multilevel_ot_online(turn: Turn, setting: DistillationSetting) -> None:
    """Multi-level optimal transport, the teacher beside the student."""
    _train(turn, setting, "multilevel_ot_online", MultiLevelOTConfig(top_k=setting.top_k))


def multilevel_ot_cached(turn: Turn, setting: DistillationSetting) -> None:
    """The same from the cache."""
    method = MultiLevelOTConfig(top_k=setting.top_k, reference="cache", scores=setting.cache)
    _train(turn, setting, "multilevel_ot_cached", method)


def dskd(turn: Turn, setting: DistillationSetting) -> None:
    """DSKD, which needs the teacher itself."""
    _train(turn, setting, "dskd", DSKDConfig())


def _train(turn: Turn, setting: DistillationSetting, name: str, method: Any) -> None:
    run = dataclasses.replace(run_config(setting, method), run_dir=str(setting.folder / name))
    train_in_turns(turn, run)
