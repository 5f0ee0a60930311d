"""Settings from dataclasses: command-line flags, presets, JSON, all made from the fields themselves.

A configuration is a frozen dataclass of frozen dataclasses, its sections. A field is named `section.field`; a preset
and the JSON form are mappings from such names, or from sections, to values. On the command line a field is
`--section.field`, and those of a script's own sections also plain `--field`. The help text of a flag is the comment
above its field. Precedence: flags, then preset, then the defaults in the source.
"""

import argparse
import ast
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, asdict, fields
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.flag_names import Several, what_was_meant
from utils.scripts import is_first, let_the_first_speak, printable

Settings = Mapping[str, Any]
C = TypeVar("C")


class ConfigError(ValueError):
    """A setting is unknown or has a value that it cannot have; the message names it."""


def require(condition: bool, name: str, message: str) -> None:
    """Raise ConfigError for the setting `name` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}: {message}")


def at_least(least: float, section: Any, name: str, *field_names: str) -> None:
    """Raise ConfigError unless the fields of `section`, which is called `name`, are `least` or more."""
    for field in field_names:
        value = getattr(section, field)
        require(value >= least, f"{name}.{field}", f"must be {least} or more, got {value}")


def between(least: float, most: float, section: Any, name: str, *field_names: str) -> None:
    """Raise ConfigError unless the fields of `section`, which is called `name`, are from `least` to `most`."""
    for field in field_names:
        value = getattr(section, field)
        require(least <= value <= most, f"{name}.{field}", f"must be from {least} to {most}, got {value}")


def positive(section: Any, name: str, *field_names: str) -> None:
    """Raise ConfigError unless the fields of `section`, which is called `name`, are above 0."""
    for field in field_names:
        value = getattr(section, field)
        require(value > 0, f"{name}.{field}", f"must be positive, got {value}")


def unless(used: bool, why: str, *names: str) -> dict[str, str]:
    """For a section's `unused`: the fields `names`, each with `why` it has no effect, unless they are `used`."""
    return {} if used else dict.fromkeys(names, why)


def field_comments(section: type) -> dict[str, str]:
    """The comment lines right above each field of a dataclass, joined, from the source of its module, in whose top
    level it is."""
    lines, classes = _source_of(section.__module__)
    comments = {}
    for node in classes[section.__name__].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while first > 0 and lines[first - 1].lstrip().startswith("#"):
                first -= 1
            comments[node.target.id] = " ".join(line.strip(" #") for line in lines[first : node.lineno - 1])
    return comments


@cache
def _source_of(module: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    """The lines of a module and its classes. inspect.getsource of each class would parse the module for each."""
    source = inspect.getsource(sys.modules[module])
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return source.splitlines(), classes


def parse_settings(
    config_class: type[C],
    presets: Mapping[str, Settings],
    own_sections: Sequence[str],
    description: str,
    argv: Sequence[str] | None = None,
    saved: Callable[[Settings], Settings] | None = None,
    reads: Collection[str] | None = None,
) -> C:
    """The configuration that `argv` (default: the command line) asks for.

    `own_sections` are those whose fields need no prefix. `saved`, given all settings so far, may return some
    that take the place of the defaults (those of a run that is resumed). `reads`: the sections and single fields that
    the script looks at; None: all. Help shows those alone; of what was given, and has no effect, a warning tells.
    Prints help, or an error that names the field, and exits as argparse does.
    """
    parser = _parser(config_class, presets, own_sections, description, reads)
    arguments = _with_dashes(argv)
    found, unknown = parser.parse_known_intermixed_args(arguments)
    flags = vars(found)
    named_twice = flags.pop(_NAMED_TWICE, None)
    if unknown:
        parser.error(what_was_meant(unknown[0], arguments, parser._actions, presets, lambda name: is_read(name, reads)))
    if named_twice:
        parser.error(named_twice)
    preset = flags.pop("preset")
    of_preset = _at_home(presets[preset]) if preset else {}
    chosen = of_preset | _at_home(flags)
    try:
        start = _at_home(flatten(config_class()))
        begun_with = _at_home(saved(start | chosen)) if saved else {}
        start |= begun_with
        config = build(config_class, {**start, **chosen})
    except ConfigError as error:
        parser.error(str(error))
    if is_first():
        for line in _changed_by_preset(preset, of_preset, begun_with, flags):
            warnings.warn(line, stacklevel=2)
        changed = {name for name, value in chosen.items() if start[name] != value}
        for line in (*_unread(changed & flags.keys(), reads, parser.prog), *_without_effect(config, changed, reads)):
            warnings.warn(line, stacklevel=2)
    return config


def _changed_by_preset(
    preset: str | None, of_preset: Settings, saved: Settings, flags: Collection[str]
) -> Iterator[str]:
    """A line about the `saved` settings that a preset changes: whoever repeats it may not mean those."""
    changed = [
        f"{name} {_as_text(value)} (it was {_as_text(saved[name])})"
        for name, value in of_preset.items()
        if name not in flags and saved.get(name, value) != value
    ]
    if changed:
        yield f"--preset {preset} changes what the run was begun with: {', '.join(changed)}"


def is_read(name: str, reads: Collection[str] | None) -> bool:
    """Whether the setting `name`, or its whole section, is among those that a script reads."""
    return reads is None or name in reads or name.partition(".")[0] in reads


def _unread(flags: Collection[str], reads: Collection[str] | None, script: str) -> Iterator[str]:
    """A line about those of the `flags`, settings by name, that are of other scripts."""
    if names := sorted(name for name in flags if not is_read(name, reads)):
        yield f"{', '.join(names)} not used: {script} does not read {'it' if len(names) == 1 else 'them'}"


def _without_effect(config: Any, names: Collection[str], reads: Collection[str] | None) -> Iterator[str]:
    """Lines about those of the settings `names` that have no effect beside the others, one for each reason, which
    the sections give: {field: why} by a method `unused`."""
    by_reason: dict[str, list[str]] = {}
    for section in fields(config):
        values = getattr(config, section.name)
        for field, why in values.unused().items() if hasattr(values, "unused") else ():
            name = f"{section.name}.{field}"
            if name in names and is_read(name, reads):
                by_reason.setdefault(why, []).append(name)
    for why, unused in by_reason.items():
        yield f"{', '.join(unused)} not used: {why}"


def build(config_class: type[C], settings: Settings) -> C:
    """A configuration with `settings` ({`section.field`: value}) over its defaults, validated once they are all in. A
    `~` that begins a path is the user's home.

    Raises ConfigError for a name that is no setting and for values that the sections refuse.
    """
    sections = get_type_hints(config_class)
    # Defaults, too, may begin with a `~`.
    values = {name: {field.name: field.default for field in fields(section)} for name, section in sections.items()}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        if field not in values.get(section, ()):
            raise ConfigError(f"{name}: there is no such setting")
        values[section][field] = value
    return config_class(**{name: section(**_at_home(values[name])) for name, section in sections.items()})


def _at_home(settings: Settings) -> dict[str, Any]:
    """`settings` with the home folder for each `~` that begins a text, or follows the `@` that begins it, and with
    tuples for the lists of JSON."""
    return {name: _expanded(value) for name, value in settings.items()}


def _expanded(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_expanded, value))
    if isinstance(value, str) and value.startswith(("~", "@~")):
        at = "@" if value[0] == "@" else ""
        with suppress(RuntimeError):  # ~NAME of nobody: a name as any other
            return at + str(Path(value.removeprefix(at)).expanduser())
    return value


def flatten(config: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """{`section.field`: value} of a configuration: what `build` takes; `without` those of these names."""
    return {name: value for name, value in by_name(asdict(config)).items() if name not in without}


def by_name(sections: Mapping[str, Settings]) -> dict[str, Any]:
    """{`section.field`: value} of a configuration's fields by section, as its JSON has them."""
    return {f"{section}.{field}": value for section, group in sections.items() for field, value in group.items()}


def as_flags(settings: Settings) -> list[str]:
    """Command-line flags that set `settings`; every script understands them."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return flags


def to_json(config: Any) -> str:
    """A configuration as JSON, one object a section."""
    return json.dumps(asdict(config), indent=2)


def from_json(text: str) -> dict[str, Any]:
    """What `to_json` wrote, as settings for `build`. Raises ConfigError for anything else."""
    try:
        return by_name(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"these are no saved settings: {error}") from None


def describe(config: Any, names: Collection[str]) -> str:
    """The settings called `names`, or all of a section with one of them, a line each, for the screen."""
    chosen = {name: value for name, value in flatten(config).items() if is_read(name, names)}
    width = max(map(len, chosen))
    return "\n".join(f"  {name:<{width}}  {printable(_as_text(value))}" for name, value in chosen.items())


def check_types(section: Any, name: str) -> None:
    """Raise ConfigError unless every field of the dataclass instance `section` has the type that it declares."""
    for field, hint in get_type_hints(type(section)).items():
        check_type(getattr(section, field), hint, f"{name}.{field}")


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raise ConfigError unless the value of the setting `name` has the type that a field declares as `hint`."""
    words, hint = _words(hint)
    if value in words:
        return
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        require(value in choices, name, f"must be one of {', '.join(choices)}, got {value!r}")
    elif get_origin(hint) is tuple:
        item = get_args(hint)[0]
        good = isinstance(value, tuple) and all(isinstance(v, item) and not isinstance(v, bool) for v in value)
        require(good, name, f"must be a tuple of {_kind(item, many=True)}, got {value!r}")
    else:
        good = isinstance(value, int | float if hint is float else hint)
        good &= hint is bool or not isinstance(value, bool)
        good = good and (hint is not float or abs(value) <= sys.float_info.max)
        require(good, name, f"must be {' or '.join((_kind(hint), *words))}, got {value!r}")


def _words(hint: Any) -> tuple[tuple[str, ...], Any]:
    """The words that a field takes instead of its proper type, and that type: `float | Literal["auto"]`."""
    if get_origin(hint) not in (Union, UnionType):
        return (), hint
    proper, literal = get_args(hint)
    return get_args(literal), proper


def _kind(hint: type, many: bool = False) -> str:
    if many:
        return {int: "whole numbers", str: "texts"}[hint]
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


#: Where a namespace has the message of `_Plain`.
_NAMED_TWICE = " named twice"


class _Plain(argparse.Action):
    """Arguments without a flag, each one or several separated by commas. They may not stand beside their own flag,
    which would win or lose without a word: `--merge A B`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        plain = tuple(item for value in values for item in value)
        if switch := {"true", "false"} & set(map(str.lower, plain)):
            parser.error(
                f"there is no setting {switch.pop()}: a flag that is on or off takes no value, as --x and --no-x"
            )
        if hasattr(namespace, self.dest):
            # Said later: `plain` may be the value of a flag that there is not.
            message = f"{self.dest} is named by a flag and by {' '.join(plain)}"
            setattr(namespace, _NAMED_TWICE, f"{message}: name all in one way (with the flag, separated by commas)")
            return
        setattr(namespace, self.dest, plain)


class _Parser(argparse.ArgumentParser):
    """Of several processes on a machine the first one says what is wrong with the command line."""

    def error(self, message: str) -> NoReturn:
        let_the_first_speak()
        super().error(message)


def _parser(
    config_class: type,
    presets: Mapping[str, Settings],
    own_sections: Sequence[str],
    description: str,
    reads: Collection[str] | None,
) -> argparse.ArgumentParser:
    sections = get_type_hints(config_class)
    own = [field for name in own_sections for field in fields(sections[name])]
    plain = "".join(f" [{field.name.upper()} ...]" for field in own if field.metadata.get("positional"))
    parser = _Parser(
        description=description,
        # argparse's own usage would list every field before each error.
        usage=f"%(prog)s{plain} [--preset NAME] [--FIELD VALUE ...]   (--help lists the fields)",
        epilog=None if reads is None else "Fields of the other programs are taken as well, and change nothing here.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=sorted(presets), metavar="NAME", help=f"one of: {', '.join(presets)}")
    for name in [*own_sections, *(name for name in sections if name not in own_sections)]:
        section = sections[name]
        group = parser.add_argument_group(f"{name} ({(section.__doc__ or '').splitlines()[0]})")
        comments, hints = field_comments(section), get_type_hints(section)
        for field in fields(section):
            text = f"{comments[field.name]} [{_as_text(field.default)}]".replace("%", "%%")
            text = text if is_read(f"{name}.{field.name}", reads) else argparse.SUPPRESS
            _add_flag(group, name, field, hints[field.name], text, name in own_sections)
    return parser


def _add_flag(group: argparse._ArgumentGroup, section: str, field: Field, hint: Any, text: str, own: bool) -> None:
    dest = f"{section}.{field.name}"
    flag = field.name.replace("_", "-")
    names = [f"--{section.replace('_', '-')}.{flag}"]
    add = partial(group.add_argument, help=text, default=argparse.SUPPRESS)
    if own:
        names += field.metadata.get("aliases", ())
        if field.metadata.get("positional"):
            add(dest, nargs="*", action=_Plain, type=_converter(hint), metavar=flag.upper())
        else:
            names.insert(0, f"--{flag}")
    if hint is bool:
        add(*names, dest=dest, action=argparse.BooleanOptionalAction)
    else:
        choices = get_args(hint) if get_origin(hint) is Literal else None
        metavar = "{" + ",".join(choices) + "}" if choices else field.name.upper()
        action = Several if get_origin(hint) is tuple else "store"
        add(*names, dest=dest, action=action, type=_converter(hint), metavar=metavar)


def _converter(hint: Any) -> Callable[[str], Any]:
    words, hint = _words(hint)
    if get_origin(hint) is tuple:
        item_type = get_args(hint)[0]
        convert_item = _converter(item_type)

        def convert_all(text: str) -> tuple:
            if item_type is str and "," in text and _is_path(text):  # one whose name has a comma
                return (text,)
            return tuple(convert_item(item) for item in text.split(",") if item)

        return convert_all
    if get_origin(hint) is Literal:
        return str  # the section says which values there are

    def convert(text: str) -> Any:
        if text in words:
            return text
        try:
            return hint(text)
        except ValueError:
            wanted = " or ".join((_kind(hint), *words))
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None

    return convert


def _is_path(text: str) -> bool:
    try:
        return Path(_expanded(text)).exists()
    except (OSError, ValueError):  # too long, say, for a name
        return False


def _with_dashes(argv: Sequence[str] | None) -> list[str]:
    """`--batch_size` means `--batch-size`: both spellings are in use."""
    dashed = []
    for argument in sys.argv[1:] if argv is None else argv:
        name, equals, value = argument.partition("=")
        dashed.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return dashed


def _as_text(value: Any) -> str:
    """A value as it is given on the command line; `none` is a value of some settings, and not the empty one."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text or "''"
