"""Encode ahead of training: ``python tools/encode.py`` with the models, data and run_dir of ``tools/pipeline.py``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("encode")
def main(config: DictConfig) -> None:
    """Build the encoded datasets that are missing."""
    from ctpd_nemo.pipeline.encode import encode

    encode(config)


if __name__ == "__main__":
    main()
