"""Command-line flags made from the option models, a config file beside them, and errors that name the nearest flag."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kubeinfer.errors import OptionError, yaml_problem
from kubeinfer.options import read_options, target_device

T = TypeVar("T", bound=BaseModel)

# Flags of earlier vLLM versions that say the same as one of ours: (our option, its value).
_OLD_FLAGS: dict[str, tuple[str, Any]] = {
    "--disable-log-requests": ("enable_log_requests", False),
    "--disable-frontend-multiprocessing": ("", None),
    "--use-v2-block-manager": ("", None),
}
# Flags people know from vLLM whose feature this version does not have: refused with the reason.
_NOT_YET = {
    "--enable-auto-tool-choice": "tool calls are",
    "--tool-call-parser": "tool calls are",
    "--reasoning-parser": "reasoning parsers are",
    "--enable-reasoning": "reasoning parsers are",
    "--enable-lora": "LoRA adapters are",
    "--lora-modules": "LoRA adapters are",
    "--speculative-config": "speculative decoding is",
    "--speculative-model": "speculative decoding is",
    "--guided-decoding-backend": "structured output is",
    "--task": "tasks other than generation are",
    "--data-parallel-size": "data parallelism inside one server is",
    "--limit-mm-per-prompt": "images, audio and video are",
}


class Parser(argparse.ArgumentParser):
    """Long flags whole only, with dashes or underscores; errors are one line, with what to do."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "takes no value, got")
        self.exit(2, f"error: {message}\nSee '{self.prog} --help'.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashes(arg) for arg in args], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            self._chosen(known).unknown(rest[0])
        return known

    def _chosen(self, known: argparse.Namespace) -> Parser:
        """The sub-command's parser, as it knows the flags that were meant."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(known, action.dest, None) or "")
                if isinstance(chosen, Parser):
                    return chosen._chosen(known)
        return self

    def unknown(self, argument: str) -> NoReturn:
        """Exit with an error about an argument that no parser took."""
        flag = argument.split("=", 1)[0]
        if not flag.startswith("-"):
            self.error(f"unexpected argument {argument!r}.")
        if flag in _NOT_YET:
            self.error(f"{flag}: {_NOT_YET[flag]} not supported yet.")
        self.error(f"unknown flag {flag}{self._nearest(flag)}")

    def _nearest(self, flag: str) -> str:
        flags = [text for text in self._all_flags() if text.startswith("--")]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""

    def _all_flags(self) -> list[str]:
        flags: list[str] = []
        for action in self._actions:
            flags += action.option_strings
        return flags


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def _dashes(argument: str) -> str:
    """``--max_model_len=5`` as ``--max-model-len=5``."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain_type(annotation: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        inner = [arg for arg in get_args(annotation) if arg is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return annotation


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object ({exc})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _json_list(value: Any) -> Any:
    """``--allowed-origins '["a", "b"]'``, as vLLM has it, besides ``--allowed-origins a b``."""
    if not isinstance(value, list) or len(value) != 1 or not str(value[0]).startswith("["):
        return value
    try:
        items = json.loads(value[0])
    except ValueError:
        return value
    return items if isinstance(items, list) else value


def _arguments(field: FieldInfo) -> dict[str, Any]:
    """``add_argument``'s keywords for one option."""
    kind = _plain_type(field.annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    origin = get_origin(kind)
    if origin is Literal:
        choices = list(get_args(kind))
        return {
            "choices": choices,
            "type": type(choices[0]),
            "metavar": "{" + ",".join(map(str, choices)) + "}",
        }
    if origin is list:
        inner = get_args(kind)[0]
        return {"nargs": "+", "type": inner, "metavar": inner.__name__.upper()}
    if origin is dict:
        return {"type": _json_object, "metavar": "JSON"}
    unit = _extra(field).get("unit")
    names = {int: "N", float: "X", str: "TEXT"}
    return {"type": kind, "metavar": str(unit).upper() if unit else names.get(kind, "VALUE")}


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _help(field: FieldInfo) -> str:
    """The description and the default; the unit stands in the flag's metavar."""
    text = field.description or ""
    if field.default not in (None, "", False) and not isinstance(field.default, bool):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        text += f" Default: {shown}."
    elif field.default is True:
        text += " On by default."
    return text.replace("%", "%%")


def add_option_flags(parser: argparse.ArgumentParser, cls: type[BaseModel], skip: Sequence[str] = ()) -> None:
    """Flags for every option of ``cls``, grouped as its base classes group them. Only what is given is stored."""
    done: set[str] = set(skip)
    for owner in _groups(cls):
        names = [name for name in owner.__annotations__ if name in cls.model_fields and name not in done]
        if not names:
            continue
        done.update(names)
        doc = (owner.__doc__ or owner.__name__).strip().splitlines()[0]
        group = parser.add_argument_group(owner.__name__.removesuffix("Options").lower() + " options", doc)
        for name in names:
            field = cls.model_fields[name]
            short = _extra(field).get("short")
            flags = ([f"-{short}"] if short else []) + [flag_of(name)]
            group.add_argument(
                *flags, dest=name, default=argparse.SUPPRESS, help=_help(field), **_arguments(field)
            )
    for flag in _OLD_FLAGS:
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _groups(cls: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes that declare ``cls``'s options, in the order a reader wants: most basic first."""
    owners = [
        owner for owner in cls.__mro__ if issubclass(owner, BaseModel) and "__annotations__" in vars(owner)
    ]
    leaves = [owner for owner in owners if not any(o in owner.__bases__ for o in owners)]
    return leaves + [owner for owner in owners if owner not in leaves]


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """The model as an argument, besides ``--model``."""
    parser.add_argument(
        "model_positional",
        nargs="?",
        metavar="MODEL",
        default=None,
        help="A folder, a GGUF file, ORG/NAME, modelscope://ORG/NAME@REV or hf://ORG/NAME@REV.",
    )


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        default=None,
        help="A file of options (name: value); flags win over it.",
    )


def read_config(path: str, cls: type[BaseModel]) -> dict[str, Any]:
    """Options of a YAML file. Raises :class:`OptionError` for an unknown name, with the nearest one."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as exc:
        raise OptionError(f"config: cannot read {path!r}: {exc.strerror}.", "config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise OptionError(f"config: {path!r} is not YAML: {yaml_problem(exc)}.", "config") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"config: {path!r} must hold 'name: value' lines.", "config")
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in cls.model_fields:
            near = difflib.get_close_matches(name, list(cls.model_fields), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise OptionError(f"config: {path!r} has an unknown option {str(key)!r}{hint}.", "config")
        kind = _plain_type(cls.model_fields[name].annotation)
        if get_origin(kind) is list and value is not None and not isinstance(value, list):
            value = [value]
        options[name] = value
    return options


def environment(cls: type[BaseModel]) -> dict[str, Any]:
    """Options that environment variables give."""
    values: dict[str, Any] = {}
    key = os.environ.get("KUBEINFER_API_KEY")
    if key and "api_key" in cls.model_fields:
        values["api_key"] = [key]
    device = target_device()
    if device and "device" in cls.model_fields:
        values["device"] = device
    return values


def options_from(arguments: argparse.Namespace, cls: type[T]) -> T:
    """The options of parsed ``arguments`` over those of ``--config`` over the environment's.

    Raises :class:`OptionError` naming the option that cannot work.
    """
    given = {name: value for name, value in vars(arguments).items() if name in cls.model_fields}
    for name, value in given.items():
        given[name] = _json_list(value)
    for flag, (name, value) in _OLD_FLAGS.items():
        if getattr(arguments, flag[2:].replace("-", "_"), False):
            what = f"say {flag_of(name)} or nothing" if name else "it has no meaning here"
            print(f"warning: {flag} is a flag of earlier vLLM versions; {what}.", file=sys.stderr)
            if name:
                given.setdefault(name, value)
    values = environment(cls)
    config = getattr(arguments, "config", None)
    if config is not None:
        values |= read_config(config, cls)
    positional = getattr(arguments, "model_positional", None)
    if positional is not None:
        if given.get("model", positional) != positional:
            raise OptionError(
                f"model: both {positional!r} and --model {given['model']!r} are given; give one.", "model"
            )
        given["model"] = positional
    values |= given
    result = read_options(cls, values)  # type: ignore[arg-type]
    assert isinstance(result, cls)
    return result
