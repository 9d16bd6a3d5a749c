"""Tokenizer folders that cannot be used, and chat templates that must not be."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Scene, Values

Spec = dict[str, Any]
Edit = Callable[[Path], object]
UNREADABLE, FAST = "a tokenizer that cannot be read", "a Hugging Face tokenizer"
READ = ("tokenizer", UNREADABLE, FAST)
ROWS = "an embedding with a row for every id"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def copied(scene: Scene) -> Path:
    """The student's tokenizer in a folder of its own."""
    folder = scene.folder / "tokenizer"
    folder.mkdir()
    for name in FILES:
        if (scene.world.student / name).exists():
            shutil.copy(scene.world.student / name, folder)
    return folder


def _spec(edit: Callable[[Spec], object], name: str = "tokenizer.json") -> Edit:
    def change(folder: Path) -> None:
        spec = json.loads((folder / name).read_text())
        edit(spec)
        (folder / name).write_text(json.dumps(spec))

    return change


def _model(**changed: Any) -> Edit:
    return _spec(lambda spec: spec["model"].update(changed))


def _config(**changed: Any) -> Edit:
    return _spec(lambda spec: spec.update(changed), "tokenizer_config.json")


def _text(content: str | bytes, name: str = "tokenizer.json") -> Edit:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _template(content: str | bytes) -> Edit:
    return _text(content, "chat_template.jinja")


def _one_more(spec: Spec) -> None:
    token = {"id": 0, "content": "<far>", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    spec["added_tokens"].append({**token, "normalized": False, "id": 5_000_000})


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _spec(lambda spec: spec.pop("chat_template", None), "tokenizer_config.json")(folder)


def _remote_code(folder: Path) -> None:
    """A tokenizer class that is code beside it, and nothing that stands for it without."""
    (folder / "evil.py").write_text("open('evil-was-here', 'w')\nclass Evil: pass\n")
    _config(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(folder)
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')


TOKENIZERS: dict[str, tuple[Edit, str, str, str]] = {
    "no folder": (shutil.rmtree, "tokenizer", "no such folder", "a folder with a Hugging Face fast tokenizer"),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", "no tokenizer.json", ""),
    "a folder by that name": (
        lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").mkdir()),
        "tokenizer",
        "no tokenizer.json",
        "a folder with a Hugging Face fast tokenizer",
    ),
    "an empty file": (_text(""), *READ),
    "no JSON": (_text("{"), *READ),
    "a list": (_text("[]"), *READ),
    "nothing in it": (_text("{}"), *READ),
    "lists without end": (_text("[" * 100_000), *READ),
    "random bytes": (_text(bytes(range(256))), *READ),
    "a pickle": (_text(pickle.dumps({"model": {}})), *READ),
    "half a file": (
        lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500]),
        *READ,
    ),
    "no model": (_spec(lambda spec: spec.pop("model")), *READ),
    "an unknown model": (_model(type="Evil"), *READ),
    "a vocabulary of numbers": (_model(vocab=[1, 2]), *READ),
    "a vocabulary that is null": (_model(vocab=None), *READ),
    "a negative id": (_model(vocab={"a": -1}, merges=[]), *READ),
    "an id that is text": (_model(vocab={"a": "0"}, merges=[]), *READ),
    "an id of 33 bits": (_model(vocab={"a": 2**33}, merges=[]), *READ),
    "merges of what is not there": (_model(type="BPE", vocab={"a": 0}, merges=[["a", "b"]]), *READ),
    "merges that are numbers": (_model(type="BPE", vocab={"a": 0}, merges=[1]), *READ),
    "a Unigram without scores": (
        _spec(lambda spec: spec.update(model={"type": "Unigram", "vocab": ["a"], "unk_id": 0})),
        *READ,
    ),
    "a Unigram's unknown id that is none": (
        _spec(lambda spec: spec.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7})),
        *READ,
    ),
    "an unknown normalizer": (_spec(lambda s: s.update(normalizer={"type": "Evil"})), *READ),
    "a pattern that is none": (
        _spec(lambda s: s.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"})),
        *READ,
    ),
    "an unknown decoder": (_spec(lambda s: s.update(decoder={"type": "Evil"})), *READ),
    "added tokens that are text": (_spec(lambda s: s.update(added_tokens=["<s>"])), *READ),
    "a token at five million": (
        _spec(_one_more),
        "student",
        "a tokenizer with ids up to",
        ROWS,
    ),
    "a config that is no JSON": (
        _text("{", "tokenizer_config.json"),
        "tokenizer_config.json",
        "no JSON",
        "a JSON object",
    ),
    "a config that is a list": (_text("[]", "tokenizer_config.json"), "tokenizer_config.json", "a JSON list", ""),
    "code in the folder": (_remote_code, *READ),
    "a special token that is a number": (_config(eos_token=3), *READ),
    "a special token that is a list": (_config(eos_token=["a"]), *READ),
    "ids that are words": (_config(added_tokens_decoder={"abc": {"content": "<x>"}}), "tokenizer", UNREADABLE, FAST),
    "a special token without a row": (
        lambda folder: (
            _config(eos_token="<|nowhere|>")(folder),
            _template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")(folder),
        ),
        "student",
        "a tokenizer with ids up to",
        ROWS,
    ),
    # Templates of the folder
    "no template": (_no_template, "tokenizer", "no chat template", "one in the tokenizer's folder"),
    "a template that is a number": (
        lambda folder: (_no_template(folder), _config(chat_template=7)(folder)),
        "chat template",
        "",
        "",
    ),
    "templates by name, and no default": (
        lambda folder: (
            _no_template(folder),
            _config(chat_template=[{"name": "tools", "template": "{{ messages }}"}])(folder),
        ),
        "chat template",
        "",
        "one template, or a default",
    ),
    "a template that is no UTF-8": (_template(b"\xff{{ messages }}"), *READ),
    "an empty template": (_template(""), "tokenizer", "", ""),
}

# What a template does: its text, and what is said of it.
FAILS, RENDERS = "a template that fails on the roles user, assistant", "a template that renders them"
BODY = "{% for m in messages %}{{ m.content }}{% endfor %}"
ESCAPES = {
    "the classes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the modules of a macro": "{{ cycler.__init__.__globals__.os.system('touch evil-was-here') }}",
    "the modules of lorem ipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "the modules of a filter": "{{ raise_exception.__globals__['jinja2'] }}",
    "the modules of a clock": "{{ (strftime_now|attr('__globals__'))['sys'] }}",
    "its own template": "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__['a'] }}",
    "a format that reads classes": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a frame of a generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "a namespace": "{{ namespace.__init__.__globals__['x'] }}",
    "the messages, to change them": "{{ messages.append(1) }}",
    "a message, to change it": "{{ messages[0].update({'content': 'other'}) }}",
    "a file of the system": "{% include '/etc/passwd' %}",
    "a module to import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "a template to extend": "{% extends '../base.jinja' %}",
}
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "no end of an expression": ("{{ oops(", FAILS, RENDERS),
    "no end of a loop": ("{% for m in messages %}{{ m.content }}", FAILS, RENDERS),
    "an unknown tag": ("{% evil %}", FAILS, RENDERS),
    "an unknown filter": ("{{ messages|evil }}", FAILS, RENDERS),
    "a name that is not there": ("{{ nothing.at.all }}", FAILS, RENDERS),
    "a call of text": ("{{ 'a'() }}", FAILS, RENDERS),
    "a refusal": ("{{ raise_exception('not these') }}", "(not these)", RENDERS),
    "a division by zero": ("{{ 1 // 0 }}", FAILS, RENDERS),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", FAILS, RENDERS),
    "a range of ten billion": ("{% for i in range(10 ** 10) %}{% endfor %}", FAILS, RENDERS),
    "no end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + BODY,
        "no end after",
        RENDERS,
    ),
    "text without end": (
        BODY + "{% for a in range(9999) %}{{ 'abcdefghij' * 100 }}{% endfor %}",
        "a value of more than 1,0",
        "a template that renders",
    ),
    "no assistant": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "drops an assistant's text",
        "one that",
    ),
    "nothing to begin with": (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
        "a prompt of no tokens",
        "opens a",
    ),
    "nothing at all": ("{# nothing #}", "drops an assistant's text", "one that renders it"),
    **{f"{name}": (escape, FAILS, RENDERS) for name, escape in ESCAPES.items()},
}


def tokenizer_cases() -> list[Case]:
    def build(edit: Edit) -> Callable[[Scene], Values]:
        def make(scene: Scene) -> Values:
            folder = copied(scene)
            edit(folder)
            return {"model": {"student": {"tokenizer": str(folder)}}}

        return make

    return [Case(name, "tokenizer", build(edit), *rest) for name, (edit, *rest) in TOKENIZERS.items()]


def _given(template: str) -> Callable[[Scene], Values]:
    return lambda scene: {"model": {"student": {"chat_template": template}}}


def template_cases() -> list[Case]:
    cases = [
        Case(name, "template", _given(template), "chat template", *rest)
        for name, (template, *rest) in TEMPLATES.items()
    ]

    def not_text(scene: Scene) -> Values:
        (scene.folder / "t.jinja").write_bytes(b"\xff{{ messages }}")
        return _given(str(scene.folder / "t.jinja"))(scene)

    wants = "a Jinja template or the path of one"
    files = [
        Case("no such file", "template", _given("none.jinja"), "chat_template", "no file 'none.jinja'", wants),
        Case("a folder", "template", lambda scene: _given(str(scene.folder))(scene), "chat_template", "no file", wants),
        Case("no UTF-8", "template", not_text, "chat_template", "a file that cannot be read", wants),
        Case("a name too long", "template", _given("a" * 5000), "chat_template", "cannot be read", wants),
    ]
    return cases + files
