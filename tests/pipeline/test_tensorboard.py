"""TensorBoard's files lie in the run folder, whatever its name is."""

from pathlib import Path

from ctpd_nemo.pipeline.tensorboard import LastingTensorBoard


def test_a_dollar_in_a_folders_name_begins_no_variable(tmp_path: Path) -> None:
    logs = tmp_path / "$HOME ${HOME}" / "logs"
    logger = LastingTensorBoard(save_dir=str(logs), name="", version="", default_hp_metric=False)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    logger.finalize("success")
    assert list(logs.glob("events*"))
    assert [path.name for path in tmp_path.iterdir()] == ["$HOME ${HOME}"]
