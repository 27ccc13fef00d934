"""Command lines: a function's signature is the command's flags (python-fire).

Adds to fire what people expect of a command: an unknown flag is an error that names the nearest
one, text stays text (`--data_path 7` is "7"), and bad input ends in one line and exit code 2.
"""

import difflib
import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import UnionType
from typing import get_args

import fire

from lm.records import InputError


def run(command: Callable) -> None:
    """Run `command` with the flags of this process's command line."""
    os.environ.setdefault("PAGER", "cat")  # --help prints and returns
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    sys.stdout.reconfigure(errors="replace")  # any terminal can show any text
    # Remarks of libraries on each other, which nobody who reads a command's output can act on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    calls: list[Callable] = []  # fire looks for leftover arguments after its call, we before ours
    try:
        _reject_unknown_flags(command, sys.argv[1:])
        fire.Fire(_checked(command, calls), command=_quoted(command, sys.argv[1:]),
                  name=os.path.basename(sys.argv[0]))
        for call in calls:
            call()
    except InputError as error:
        _stop(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _stop(where + (error.strerror or str(error).strip()))
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to continue", code=130)
    except Exception as error:  # safetensors has a kind of its own for a full disk
        if "No space left on device" not in str(error):
            raise
        _stop(str(error))


def _stop(message: str, code: int = 2) -> None:
    """One line on the first process of the node; every process exits non-zero."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _reject_unknown_flags(command: Callable, arguments: list[str]) -> None:
    known = list(inspect.signature(command).parameters)
    for argument in arguments:
        if argument == "--":
            return
        name = argument[2:].split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in (*known, "help"):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"unknown flag --{name}; did you mean --{nearest[0]}? "
                             "(--help lists every flag)")


def _checked(command: Callable, calls: list[Callable]) -> Callable:
    """What fire calls: checks the flags' types and notes the call in `calls`."""
    kinds = {name: get_args(p.annotation) if isinstance(p.annotation, UnionType)
             else (p.annotation,)
             for name, p in inspect.signature(command).parameters.items()}

    @functools.wraps(command)
    def call(*args, **kwargs):
        given = inspect.signature(command).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if not _fits(value, kinds[name]):
                raise InputError(f"--{name} is {value!r}; expected "
                                 + " or ".join(getattr(k, "__name__", str(k))
                                               for k in kinds[name]))
        calls.append(functools.partial(command, *args, **kwargs))

    return call


def _quoted(command: Callable, arguments: list[str]) -> list[str]:
    """The arguments with the values of text flags in quotes, which fire takes off again."""
    text = {name for name, parameter in inspect.signature(command).parameters.items()
            if parameter.annotation is str}
    quoted, is_value = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if is_value and not argument.startswith("--"):
            quoted.append(repr(argument))
        elif flag[2:].replace("-", "_") in text and equals:
            quoted.append(f"{flag}={value!r}")
        else:
            quoted.append(argument)
        is_value = argument.startswith("--") and flag[2:].replace("-", "_") in text and not equals
    return quoted


def _fits(value: object, kinds: tuple) -> bool:
    if inspect.Parameter.empty in kinds:
        return True
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    plain = tuple(kind for kind in kinds if isinstance(kind, type))
    return isinstance(value, plain) if len(plain) == len(kinds) else True
