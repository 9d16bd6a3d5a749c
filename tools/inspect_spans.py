"""Spans to look at: ``python tools/inspect_spans.py tokenizers=[A,B] data.train=[pairs.jsonl] output=spans.html``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("inspect_spans")
def main(config: DictConfig) -> None:
    """Write the page, and print its table."""
    from ctpd_nemo.pipeline.config import typed
    from ctpd_nemo.report.spans_page import SpansPageConfig, table_text, write_spans_page

    print(table_text(write_spans_page(typed(SpansPageConfig, config))))


if __name__ == "__main__":
    main()
