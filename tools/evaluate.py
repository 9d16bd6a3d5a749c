"""Benchmarks and held-out pairs: ``python tools/evaluate.py folder=... pairs.file=... tasks.data=...``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate the folder, and print its table."""
    from ctpd_nemo.evaluation.card import evaluation_table
    from ctpd_nemo.evaluation.evaluate import EvaluateConfig, evaluate
    from ctpd_nemo.pipeline.config import typed

    print("\n".join(evaluation_table(evaluate(typed(EvaluateConfig, config)))))


if __name__ == "__main__":
    main()
