"""What a card says of the models that a model was made of: their names and their licences, and no place of any."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ctpd_nemo.evaluation.front_matter import read_card, split_card
from ctpd_nemo.json_files import read_object

RECORD = "ctpd_nemo.json"
_LONGEST = 200
# Of ``huggingface_hub``: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+/?\Z")
_SEPARATORS = re.compile(r"[\\/]+")
# What a run calls its own folders.
_OWN_FOLDERS = ("run_dir", "from_run")


@dataclass(frozen=True)
class BaseModel:
    """A model that another one was made of.

    Attributes:
        name: On the Hub where that is known, else its folder's.
        license: As its card states it; empty where it states none.
        license_name: Where that is ``other``.
        license_link: Likewise.
        stated: What its folder says of its licence, in a few words; empty where it says nothing.
    """

    name: str
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    stated: str = ""


def base_of(folder: str | Path) -> BaseModel:
    """The model that a folder is, or that a chain of exports began with."""
    folder = base_folder(folder)
    record = read_json(folder / RECORD)
    policy = record.get("policy")
    known = of_record(record)
    if isinstance(policy, str) and policy in known:
        return known[policy]
    metadata, _ = split_card(read_card(folder / "README.md") or "") or ({}, "")
    terms = {key: _text(metadata.get(key)) for key in ("license", "license_name", "license_link")}
    return BaseModel(_name(folder, metadata), **terms, stated=stated_licence(folder) or "")


def base_folder(folder: str | Path) -> Path:
    """The folder that a chain of exports began with, as far as they say where that is.

    What a stage trains is often the export of an earlier one.
    """
    folder = Path(folder)
    seen = {folder.resolve()}
    while policy := (record := read_json(folder / RECORD)).get("policy"):
        base = record.get(policy) if isinstance(policy, str) and not of_record(record) else None
        if not isinstance(base, str) or not base or Path(base).resolve() in seen:
            break
        folder = Path(base)
        seen.add(folder.resolve())
    return folder


def of_record(record: Mapping[str, Any]) -> dict[str, BaseModel]:
    """The models that the record of an export names, by what they are to it."""
    found = {}
    bases = record.get("bases")
    for side, fields in bases.items() if isinstance(bases, Mapping) else ():
        if isinstance(fields, Mapping) and isinstance(fields.get("name"), str):
            names = ("license", "license_name", "license_link", "stated")
            found[str(side)] = BaseModel(_plain_name(fields["name"]), **{key: _text(fields.get(key)) for key in names})
    return found


def stated_licence(folder: str | Path) -> str | None:
    """What a model folder says of its licence: in its card's metadata, else the first line of a licence file."""
    folder = Path(folder)
    metadata, _ = split_card(read_card(folder / "README.md") or "") or ({}, "")
    for key in ("license_name", "license"):
        # What is no text is none of a licence's names, and may be larger than anyone prints.
        if metadata.get("license") and isinstance(stated := metadata.get(key), str) and stated:
            return stated[:_LONGEST]
    for path in sorted(folder.glob("LICENSE*")):
        lines = (read_card(path) or "").splitlines()
        if first := next((line.strip() for line in lines if line.strip()), None):
            return f"{path.name}: {first[:_LONGEST]}"
    return None


def terms_of(bases: Mapping[str, BaseModel]) -> dict[str, str]:
    """The licence in a card's metadata: that of all models it was made of where it is one, else a hint at theirs."""
    terms = {(base.license, base.license_name, base.license_link) for base in bases.values()}
    stated, name, link = terms.pop() if len(terms) == 1 else ("", "", "")
    if not stated or (stated == "other" and not name):
        return {"license": "other", "license_name": "see-license-of-the-base-models"}
    more = {"license_name": name, "license_link": link} if stated == "other" else {}
    return {"license": stated, **{key: value for key, value in more.items() if value}}


def repository(folder: str) -> str:
    """What a model is called on the Hub: ``owner/name`` where its folder is in a cache of the Hub, else its own name.

    It can stand in ``base_model``: letters, digits, ``_``, ``-`` and ``.``, neither of these two twice in a row,
    and one slash.
    """
    cached = _CACHED.search(folder)
    parts = cached.group(1).split("--", 1) if cached else [Path(folder).name]
    singles = (re.sub(r"--+|\.\.+", lambda marks: marks[0][0], plain(part)) for part in parts)
    return "/".join(single.removesuffix(".git").strip("-.") or "unnamed" for single in singles)


def plain(text: str) -> str:
    """A text as part of a name on the Hub."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:96] or "unnamed"


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config with the names of its files and folders, and not where they are."""
    return {key: _named(value, key) for key, value in config.items() if key not in _OWN_FOLDERS}


def _named(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _named(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_named(part, key) for part in value]
    # A template is one by its braces; else it is the path of one.
    if not isinstance(value, str) or not _SEPARATORS.search(value) or (key == "chat_template" and "{" in value):
        return value
    if _CACHED.search(value):
        return repository(value)
    return next((part for part in reversed(_SEPARATORS.split(value)) if part), "")


def _name(folder: Path, metadata: Mapping[str, Any]) -> str:
    """The Hub's name for a folder, from the Hub's cache, its config or its card; else the folder's own."""
    if _CACHED.search(str(folder)):
        return repository(str(folder))
    config = folder / "config.json"
    of_config = read_object(config).get("_name_or_path") if config.is_file() else None
    base = metadata.get("base_model")
    of_card = base[0] if isinstance(base, list) and base else base
    return next((str(one) for one in (of_config, of_card) if _is_on_the_hub(one)), repository(str(folder)))


def _is_on_the_hub(name: Any) -> bool:
    """Whether it has the form of a name there: an owner and a model, and nothing of a path."""
    if not isinstance(name, str) or name.count("/") != 1 or PurePosixPath(name).is_absolute() or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _plain_name(name: str) -> str:
    return name if _is_on_the_hub(name) else repository(name)


def _text(value: Any) -> str:
    return value[:_LONGEST] if isinstance(value, str) else ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or an empty one where there is no file.

    Raises:
        InputError: The file holds something else.
    """
    return read_object(path) if path.exists() else {}
