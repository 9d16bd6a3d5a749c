"""A checkpoint to a Hugging Face folder: ``python tools/export_hf.py checkpoint=... reference=... folder=...``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("export")
def main(config: DictConfig) -> None:
    """Export the checkpoint."""
    from ctpd_nemo.pipeline.config import typed
    from ctpd_nemo.pipeline.export import ExportConfig, export

    export(typed(ExportConfig, config))


if __name__ == "__main__":
    main()
