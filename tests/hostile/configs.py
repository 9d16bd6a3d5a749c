"""Values of a config that cannot be used: unknown keys, other types, and what does not go together."""

from collections.abc import Callable
from typing import Any

from tests.hostile.case import Case, Scene, Values

UNKNOWN, KEYS = "a key that is not known", "keys and their values"


def _nested(key: str, value: Any) -> Values:
    """``a.b.c`` and a value as nested keys."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# Keys that are not known, and the one that is meant.
TYPOS = {
    "data.max_lenght": "'max_length'?",
    "data.trian": "'train'?",
    "data.on_bda": "'on_bad'?",
    "data.global_batchsize": "'global_batch_size'?",
    "optim.learning_rate": "one of lr, min_lr",
    "optim.warmup_fractoin": "'warmup_fraction'?",
    "parallel.tensr": "'tensor'?",
    "parallel.tensor_parallel": "one of tensor, pipeline",
    "parallel.pipline": "'pipeline'?",
    "precision.dytpe": "'dtype'?",
    "trainer.max_step": "'max_steps'?",
    "trainer.epoch": "'epochs'?",
    "model.student.pth": "'path'?",
    "model.studnet": "'student'?",
    "model.teacher.chat_tempalte": "'chat_template'?",
    "dat": "'data'?",
    "run_dri": "'run_dir'?",
    "sede": "'seed'?",
    "data.__class__": "one of train, validation",
    "data.a\x1b[2Jb": "one of train, validation",
}
# Values of another type: key, value, the type that is expected.
TYPES: list[tuple[str, Any, str]] = [
    ("data.train", "", "list[str]"),
    ("data.train", None, "list[str]"),
    ("data.train", [["a"]], "list[str]"),
    ("data.max_length", "long", "int"),
    ("data.max_length", 64.5, "int"),
    ("data.max_length", None, "int"),
    ("data.max_length", [64], "int"),
    ("data.include_eos", "perhaps", "bool"),
    ("data.num_workers", "all", "int"),
    ("optim.lr", "fast", "float"),
    ("optim.lr", [1e-3], "float"),
    ("optim.betas", 0.9, "tuple[float, float]"),
    ("optim.betas", ["a", "b"], "tuple[float, float]"),
    ("parallel.tensor", "two", "int"),
    ("parallel.sequence", "perhaps", "bool"),
    ("precision.dtype", {"a": 1}, "str"),
    ("trainer.max_steps", "all", "int | None"),
    ("trainer.epochs", None, "int"),
    ("seed", "random", "int"),
    ("run_dir", ["runs"], "str"),
    ("model.student.path", ["a"], "str | None"),
]
# Values that make no run: key, value, the place that is named, what is found, what is expected.
VALUES: list[tuple[str, Any, str, str, str]] = [
    ("model.student", 7, "model.student", "7", KEYS),
    ("optim", [1], "optim", "[1]", KEYS),
    ("data", "pairs.jsonl", "data", "'pairs.jsonl'", KEYS),
    ("run_dir", "${home}/run", "run_dir", "home", "a value"),
    ("run_dir", "${oc.env:NO_SUCH_VARIABLE}", "run_dir", "NO_SUCH_VARIABLE", "a value"),
    ("run_dir", "${evil:1}", "run_dir", "evil", "a value"),
    ("run_dir", "", "run_dir", "''", "a folder"),
    ("run_dir", "a\0b", "run_dir", r"'a\x00b'", "a folder"),
    ("policy", "judge", "policy", "'judge'", "student or teacher"),
    ("seed", -1, "seed", "-1", "0 to 4294967295"),
    ("seed", 2**40, "seed", str(2**40), "0 to 4294967295"),
    ("data.on_bad", "ignore", "data.on_bad", "'ignore'", "stop or skip"),
    ("data.packing", "dense", "data.packing", "'dense'", "packed or padded"),
    ("data.max_length", 0, "data.max_length", "0", "1 or more"),
    ("data.max_length", 4096, "data.microbatch_tokens", "256", "at least twice data.max_length"),
    ("data.max_length", 10**12, "data.microbatch_tokens", "256", "at least twice"),
    ("data.max_prompt_length", 0, "data.max_prompt_length", "0", "a positive number of tokens"),
    ("data.global_batch_size", -8, "data.global_batch_size", "-8", "1 or more"),
    ("data.microbatch_tokens", 0, "data.microbatch_tokens", "0", "1 or more"),
    ("data.num_workers", -1, "data.num_workers", "-1", "0 or more"),
    ("data.num_workers", 1_000_000, "data.num_workers", "1000000", "at most"),
    ("data.encoded", "", "data.encoded", "''", "auto"),
    ("optim.lr", -1.0, "optim.lr", "-1.0", "inf > lr"),
    ("optim.lr", float("inf"), "optim.lr", "inf", "inf > lr"),
    ("optim.lr", float("nan"), "optim.lr", "nan", "inf > lr"),
    ("optim.min_lr", 1.0, "optim.lr", "with optim.min_lr 1.0", "lr >= min_lr"),
    ("optim.eps", -1.0, "optim.eps", "-1.0", "a finite number"),
    ("optim.weight_decay", float("nan"), "optim.weight_decay", "nan", "a finite number"),
    ("optim.clip_grad", float("inf"), "optim.clip_grad", "inf", "a finite number"),
    ("optim.schedule", "cosin", "optim.schedule", "'cosin'", "cosine, linear or constant"),
    ("optim.warmup_fraction", 1.0, "optim.warmup_fraction", "1.0", "a share from 0"),
    ("optim.betas", [0.9], "optim.betas", "[0.9]", "two rates"),
    ("optim.betas", [0.9, 1.5], "optim.betas", "[0.9, 1.5]", "two rates"),
    ("precision.dtype", "fp8", "precision.dtype", "'fp8'", "fp32 or bf16"),
    ("precision.fp8", "evil", "precision.fp8", "'evil'", "null or one of"),
    ("precision.bf16_first_layers", 1, "precision.bf16_first_layers", "1", "a recipe in precision.fp8"),
    ("trainer.epochs", 0, "trainer.epochs", "0", "1 or more"),
    ("trainer.max_steps", -1, "trainer.max_steps", "-1", "1 or more"),
    ("trainer.checkpoint_every", -1, "trainer.checkpoint_every", "-1", "0 or more"),
    ("trainer.keep_last", 0, "trainer.keep_last", "0", "1 or more"),
    ("trainer.max_bad_steps", 0, "trainer.max_bad_steps", "0", "1 or more"),
    ("trainer.log_every", 0, "trainer.log_every", "0", "1 or more"),
    ("model.student.path", None, "model.student.path", "nothing", "a Hugging Face folder"),
    ("model.student.path", "nowhere", "nowhere", "no such folder", "a folder with"),
    ("model.student.path", "https://example.com/model", "https://example.com/model", "no such folder", "a folder"),
    ("model.student.path", "org/model-of-a-hub", "org/model-of-a-hub", "no such folder", "a folder with"),
    # Layouts
    ("parallel.tensor", 0, "parallel.tensor", "0", "1 or more"),
    ("parallel.tensor", -2, "parallel.tensor", "-2", "1 or more"),
    ("parallel.tensor", 2, "parallel", "tensor 2 x pipeline 1 x context 1 = 2 in a world of 1", "a product that"),
    ("parallel.pipeline", 3, "parallel", "pipeline 3", "a product that divides"),
    ("parallel.context", 10**9, "parallel", "context 1000000000", "a product that divides"),
    ("parallel.virtual_pipeline", 2, "parallel.virtual_pipeline", "2 with pipeline 1", "2 or more chunks"),
    ("parallel.sequence", True, "parallel.sequence", "true with tensor 1", "tensor parallelism of 2"),
    ("parallel.overlap_tensor", True, "parallel.overlap_tensor", "without parallel.sequence", "sequence par"),
    ("parallel.overlap_param_gather", True, "parallel.overlap_param_gather", "true", "distributed_optimizer"),
    ("parallel.recompute", "some", "parallel.recompute", "'some'", "none, selective or full"),
    ("parallel.context_communication", "mail", "parallel.context_communication", "'mail'", "p2p or a2a"),
    ("parallel.timeout_minutes", 0, "parallel.timeout_minutes", "0", "a positive number of minutes"),
    # Methods
    ("method", None, "method.name", "None", "one of sft, dpo"),
    ("method", "sft", "method.name", "None", "one of sft, dpo"),
    ("method", {"name": "ppo"}, "method.name", "'ppo'", "one of sft, dpo"),
    ("method", {"name": ["sft"]}, "method.name", "['sft']", "one of sft, dpo"),
    ("method", {"name": "dpo", "revers": True}, "method.revers", UNKNOWN, "'reverse'?"),
    ("method", {"name": "dpo", "beta": -0.1}, "method.beta", "-0.1", "a positive number"),
    ("method", {"name": "dpo", "beta": float("nan")}, "method.beta", "nan", "a positive number"),
    ("method", {"name": "dpo", "reference": "cache"}, "method.scores", "nothing", "the folder of a score cache"),
    ("method", {"name": "dpo", "reference": "evil"}, "method.reference", "'evil'", "online or cache"),
    ("method", {"name": "ctpd"}, "method.scores", "nothing", "the folder of a score cache"),
    ("method", {"name": "ctpd", "scores": "x", "weights": "evil"}, "method.weights", "'evil'", "contrastive_teacher"),
    ("method", {"name": "ctpd", "scores": "x", "weight_lower": 2.0}, "method.weight_lower", "2.0", "lower <= upper"),
    ("method", {"name": "ctpd", "scores": "nowhere"}, "nowhere", "no manifest.json", "a span score cache"),
    ("method", {"name": "ctpd", "reference": "online"}, "method.positive", "nothing", "a model folder"),
    ("method", {"name": "score", "cache": "x", "reference": "y"}, "method.name", "'score'", "one of sft, dpo"),
]
# The same of scoring.
SCORING: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "method.cache", "nothing", "a folder for the scores"),
    ({"cache": "x"}, "method", "no model", "a folder for one or more"),
    ({"cache": "x", "reference": "nowhere"}, "nowhere", "no such folder", "a Hugging Face model folder"),
    ({"cache": "x", "reference": "y", "pairs_per_shard": 0}, "method.pairs_per_shard", "0", "1 or more"),
    ({"cache": "x", "reference": "y", "microbatch_tokens": 3}, "method.microbatch_tokens", "3", "128"),
    ({"cache": "x", "reference": "y", "shards": 3}, "method.shards", UNKNOWN, "one of"),
]


def _always(values: Values) -> Callable[[Scene], Values]:
    return lambda scene: values


def config_cases() -> list[Case]:
    def case(name: str, values: Values, *rest: str, tool: str = "train") -> Case:
        return Case(name, "config", _always(values), *rest, tool=tool)

    shown = {key: key.encode("unicode_escape").decode() for key in TYPOS}
    return [
        *(case(f"{key!r}", _nested(key, 1), shown[key], UNKNOWN, nearest) for key, nearest in TYPOS.items()),
        *(
            case(f"{key}={value!r}", _nested(key, value), key, repr(value), f"a value of type {kind}")
            for key, value, kind in TYPES
        ),
        *(case(f"{key}={value!r}, of no use", _nested(key, value), *rest) for key, value, *rest in VALUES),
        *(
            case(f"scoring with {values!r}", {"method": {"name": "score", **values}}, *rest, tool="score")
            for values, *rest in SCORING
        ),
    ]
