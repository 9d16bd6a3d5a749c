"""What scores depend on, by name: equal fingerprints, equal scores."""

from collections.abc import Mapping

from ctpd_nemo.convert.fingerprint import weights_fingerprint
from ctpd_nemo.models.data import RunData
from ctpd_nemo.pipeline.rank_zero import on_rank_0_however_long


def weights_fingerprints(folders: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of the weights in each folder, by role; rank 0 reads the files, every rank calls it together.

    Raises:
        InputError: A folder without weights.
    """

    def read() -> dict[str, str]:
        # A folder in two roles is read once.
        prints = {folder: weights_fingerprint(folder) for folder in dict.fromkeys(folders.values())}
        return {role: prints[folder] for role, folder in folders.items()}

    return on_rank_0_however_long(read)


def score_fingerprints(data: RunData, precision: str) -> dict[str, str]:
    """Fingerprints of everything but the weights, by the names of the score cache.

    Args:
        data: The data of the job. The policy stands for the student; without a reference it is both.
        precision: In which the scores were, or are to be, computed.
    """
    student, teacher = data.encoder.policy, data.encoder.reference
    return {
        "data": data.train.fingerprint,
        "teacher_tokenizer": teacher.tokenizer_fingerprint,
        "student_tokenizer": student.tokenizer_fingerprint,
        "teacher_template": teacher.template_fingerprint,
        "student_template": student.template_fingerprint,
        "truncation": data.encoder.lengths,
        "precision": precision,
    }
