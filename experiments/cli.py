"""The command line of every experiment: the fields of one frozen dataclass as flags, with presets and files.

Each source overrides those before it: the defaults of the class, ``--preset NAME`` for the model, ``--config FILE``,
flags such as ``--train.steps 100``. Only the final values are validated, because sources may be valid only together: a
file's ``num_memories = 1`` needs ``--model.top-k 1`` where the preset has top_k = 2.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from mom_jax.config import PRESETS, require
from mom_jax.config_io import checked_values

PARSERS = {".json": json.loads, ".toml": tomllib.loads}


@dataclass(frozen=True)
class _Sources:
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON or TOML file (by its ending) of values that flags then override: a table for each group of options below."""


@dataclass(frozen=True)
class _SourcesWithModel(_Sources):
    preset: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None
    """Model that the file and the model options then change. The file may name it instead: preset = "tiny"."""


def run[Experiment](
    experiment_class: type[Experiment], main: Callable[[Experiment], Any], description: str | None = None
) -> None:
    """Call ``main`` with what the program's command line asks for; arguments as in ``parse``.

    What the user can mend (a setting, a file, a run that diverged) ends the program with the message on stderr and
    status 1, without a traceback; Ctrl-C with status 130; a reader of the output that has gone, as head does, silently with
    status 141. A warning, too, is one line. One of several processes ends at once where it fails: JAX would have it wait for
    the others, which wait for it.
    """
    experiment = parse(experiment_class, description)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    try:
        main(experiment)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        _end(128 + signal.SIGINT)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, NotImplementedError) as error:
        _refuse(error, experiment_class, status=1)
    except Exception:
        traceback.print_exc()
        _end(1)


def parse[Experiment](
    experiment_class: type[Experiment], description: str | None = None, argv: Sequence[str] | None = None
) -> Experiment:
    """The experiment that the command line ``argv`` (None: the program's own) asks for.

    ``experiment_class`` is a frozen dataclass of scalars and nested frozen dataclasses (see mom_jax/config_io.py for
    the types); the strings below its fields explain them in ``--help``, and a field without a default is a required
    flag. It takes ``--preset`` if it has a ``model`` that is one too. ``description`` heads the help: pass ``__doc__``.

    A value that is not allowed ends the program with status 2 and says on stderr which flag's and what is allowed.
    """
    argv = sys.argv[1:] if argv is None else argv
    sources_class = _SourcesWithModel if _has_model(experiment_class) else _Sources
    sources, _ = tyro.cli(sources_class, args=argv, add_help=False, return_unknown_args=True)
    try:
        defaults = _defaults(experiment_class, sources)
    except (OSError, ValueError) as error:
        _refuse(error, experiment_class)

    @dataclass(frozen=True)
    class Command:
        sources: Annotated[sources_class, tyro.conf.arg(name="")]
        experiment: Annotated[experiment_class, tyro.conf.arg(name="")]

    return tyro.cli(
        Command,
        description=description or experiment_class.__doc__,
        args=argv,
        default=Command(sources, defaults),
        registry=_one_line_errors(experiment_class),
    ).experiment


def _has_model(cls: type) -> bool:
    """Whether ``cls`` describes a model, which a preset may then do too."""
    return is_dataclass(get_type_hints(cls).get("model"))


def _refuse(error: Exception, experiment_class: type, status: int = 2) -> NoReturn:
    """End the program with the message of ``error``, in which a field that it begins with becomes the field's flag."""
    flags = _flags(experiment_class)
    message = re.sub(r"^[\w.]+(?= = )", lambda name: flags.get(name[0], name[0]), str(error))
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    _end(status)


def _end(status: int) -> NoReturn:
    jax = sys.modules.get("jax")  # what only reads text does not wait for it
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _flags(cls: type, prefix: str = "") -> dict[str, str]:
    """The flag of each field, by both names that messages give it: ``train.steps`` and ``TrainConfig.steps``."""
    flags = {}
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            flags |= _flags(hint, f"{prefix}{name}.")
        else:
            flags[f"{prefix}{name}"] = flags[f"{cls.__name__}.{name}"] = f"--{prefix}{name}".replace("_", "-")
    return flags


def _one_line_errors(experiment_class: type) -> ConstructorRegistry:
    """Rules for tyro that end the program with one line where the validation of a dataclass raises ``ValueError``."""
    registry = ConstructorRegistry()
    asking_tyro = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking_tyro
        if asking_tyro or not is_dataclass(info.type):
            return None
        asking_tyro = True  # tyro's own rule for dataclasses is found by declining, once, to have one
        spec = ConstructorRegistry.get_struct_spec(info)
        asking_tyro = False

        def make(**values: Any) -> Any:
            try:
                return info.type(**values)
            except ValueError as error:
                _refuse(error, experiment_class)

        return dataclasses.replace(spec, instantiate=make)

    return registry


def _defaults[Experiment](cls: type[Experiment], sources: _Sources) -> Experiment:
    """What the flags start from, not validated yet: the class, then the preset, then the file."""
    preset = getattr(sources, "preset", None)
    require(preset in (None, *PRESETS), "--preset", preset, f"choose one of {', '.join(PRESETS)}")
    file_values = {}
    if sources.config is not None:
        file_values, file_preset = _read(sources.config, cls)
        if preset and file_preset:
            raise ValueError(f"{sources.config} names preset = {file_preset!r} beside --preset {preset}: give only one")
        preset = preset or file_preset
    values = _class_defaults(cls)
    if preset:
        values = _merge(values, {"model": asdict(PRESETS[preset]())})
    return _unvalidated(cls, _merge(values, file_values))


def _read(path: str, cls: type) -> tuple[dict[str, Any], str | None]:
    """The values for ``cls`` in the file at ``path``, type-checked, and the preset that it names."""
    suffix = Path(path).suffix
    require(suffix in PARSERS, "--config", path, f"its name must end in {' or '.join(PARSERS)}")
    try:
        values = PARSERS[suffix](Path(path).read_text(encoding="utf-8"))
        preset = None
        if isinstance(values, dict) and _has_model(cls):
            preset = values.pop("preset", None)
            require(preset in (None, *PRESETS), "preset", preset, f"choose one of {', '.join(PRESETS)}")
        return checked_values(cls, values), preset
    except OSError as error:
        require(False, "--config", path, f"it must be a file of settings ({error.strerror})")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _class_defaults(cls: type) -> dict[str, Any]:
    """The defaults that ``cls`` declares, as nested dictionaries; ``tyro.MISSING`` where there is none."""
    hints = get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = _class_defaults(hints[field.name]) if is_dataclass(hints[field.name]) else tyro.MISSING
        values[field.name] = asdict(default) if is_dataclass(default) else default
    return values


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    return values | {
        name: _merge(values[name], value) if isinstance(value, dict) else value for name, value in overrides.items()
    }


def _unvalidated(cls: type, values: dict[str, Any]) -> Any:
    """An object of ``cls`` that holds ``values``, allowed or not: tyro only reads the defaults of the flags off it."""
    instance = object.__new__(cls)
    for name, hint in get_type_hints(cls).items():
        value = _unvalidated(hint, values[name]) if is_dataclass(hint) else values[name]
        object.__setattr__(instance, name, value)
    return instance
