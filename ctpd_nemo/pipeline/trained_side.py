"""How the model of a run reads: the tokenizer and the template it was trained with, found again for its export."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpd_nemo.convert.companions import ReaderFiles, copy_companions, stated_stop_ids
from ctpd_nemo.data.templates import Side, tokenizer_fingerprint
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import SideConfig

_FINGERPRINTS = {"policy_tokenizer": "tokenizer_fingerprint", "policy_template": "template_fingerprint"}


@dataclass(frozen=True)
class TrainedSide:
    """A side, and the folder that its tokenizer is from.

    Attributes:
        side: Tokenizer and template.
        folder: Of the tokenizer.
        given_template: The template's text where it is not the tokenizer's own.
    """

    side: Side
    folder: Path
    given_template: str | None

    @property
    def stop_id(self) -> int:
        """The token that training ended turns with."""
        return int(self.side.end_of_turn_ids[-1])

    def files(self, reference: Path) -> ReaderFiles:
        """What of it goes into an exported folder.

        Args:
            reference: The model that training started from. What else ends its generations still does, as long as it
                means the same: its ids are those of its own tokenizer.
        """
        tokenizer = self.side.tokenizer
        own = self.folder.resolve() == reference.resolve()
        if not own and (reference / "tokenizer.json").is_file():
            own = tokenizer_fingerprint(load_tokenizer(str(reference))) == self.side.tokenizer_fingerprint
        control = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        control |= {index for index in (tokenizer.eos_token_id,) if index is not None}
        others = (
            [index for index in stated_stop_ids(reference) if index in control] if own else [tokenizer.eos_token_id]
        )
        stops = [self.stop_id, *(index for index in others if index is not None)]
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return ReaderFiles(
            tokenizer=self.folder,
            tokenizer_class=type(tokenizer).__name__,
            chat_template=self.given_template,
            stop_ids=list(dict.fromkeys(stops)),
            token_ids={} if own else {name: index for name, index in ids.items() if index is not None},
        )


def check_beside(config: SideConfig, side: Side, key: str) -> None:
    """Stop where a tokenizer of another folder would be another one beside the weights: known before it is trained.

    By the kind of model that lies beside it, transformers puts rules of its own into a tokenizer.

    Args:
        config: Of the model that is trained.
        side: How it reads.
        key: Of its config, for errors.

    Raises:
        InputError: It would.
    """
    if (
        config.tokenizer is None
        or config.path is None
        or Path(config.tokenizer).resolve() == Path(config.path).resolve()
    ):
        return
    with tempfile.TemporaryDirectory() as folder:
        files = TrainedSide(side, Path(config.tokenizer), None).files(Path(config.path))
        copy_companions(Path(config.path), Path(folder), None, files)
        beside = tokenizer_fingerprint(load_tokenizer(folder))
    if beside != side.tokenizer_fingerprint:
        found = f"{config.tokenizer}, which transformers reads otherwise beside the config.json of {config.path}"
        raise InputError(f"{key}.tokenizer", found, "a tokenizer that an export reads as it was trained")


def find_side(
    config: SideConfig, reference: Path, fingerprints: Mapping[str, str], started_in: str | None
) -> TrainedSide:
    """The side that a run was trained with, from where its config says, or else from the folder it started from.

    Args:
        config: Of the side.
        reference: The folder that training started from.
        fingerprints: Of the run; what is found has the same.
        started_in: The folder that relative paths of the config are of; ``None`` for the one of today.

    Raises:
        InputError: It is not there any more, or another one now.
    """
    template, given = config.chat_template, None
    if template is not None and "{" not in template:
        template = str(_there(template, started_in))
    errors: list[InputError] = []
    for folder in _folders(config, reference, started_in):
        try:
            side = Side(load_tokenizer(str(folder)), template, config.chat_template_kwargs)
        except InputError as error:
            errors.append(error)
            continue
        wrong = [
            name for name, own in _FINGERPRINTS.items() if fingerprints.get(name) not in (None, getattr(side, own))
        ]
        if not wrong:
            given = side.chat_template if template is not None else None
            return TrainedSide(side, folder, given)
        what = "chat template" if wrong == ["policy_template"] else "tokenizer"
        found, expected = f"another {what} than the run was trained with", f"that one: {what.replace(' ', '_')}=..."
        errors.append(InputError(f"{folder}, {what}", found, f"{expected} says where it is"))
    raise errors[0]


def _folders(config: SideConfig, reference: Path, started_in: str | None) -> Iterator[Path]:
    """Where its tokenizer may be: of its own name, or beside the weights that the run began with."""
    named = config.tokenizer or config.path
    if named is not None and _there(named, started_in).is_dir():
        yield _there(named, started_in)
    if config.tokenizer is None or not _there(config.tokenizer, started_in).is_dir():
        yield reference


def _there(path: str, started_in: str | None) -> Path:
    """A path of a run's config, which may have been started in another folder."""
    if Path(path).exists() or started_in is None or not (Path(started_in) / path).exists():
        return Path(path)
    return Path(started_in) / path


def side_config(config: Mapping[str, Any], place: str) -> SideConfig:
    """The side of the model that a run trained, as its ``config.json`` has it.

    Raises:
        InputError: There is something else.
    """
    policy = config.get("policy") or "student"
    model = config.get("model") or {}
    side: Any = model.get(policy) or {} if isinstance(model, Mapping) and isinstance(policy, str) else None
    if not isinstance(side, Mapping):
        found, expected = repr({"policy": policy, "model": model}), "policy and model, as a job writes them"
        raise InputError(place, found, expected)
    values = {key: side.get(key) for key in ("path", "tokenizer", "chat_template", "chat_template_kwargs")}
    for key, value in values.items():
        kind = dict if key == "chat_template_kwargs" else str
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{place}, model.{policy}.{key}", repr(value), "a value of it, as a job writes it")
    return SideConfig(**values)
