"""Cross-tokenizer preference distillation on NeMo and Megatron-Core."""

__version__ = "0.1.0"
