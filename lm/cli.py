"""Command lines: a function's signature is the command's flags (python-fire).

Adds to fire what people expect of a command: an unknown flag is an error that names the nearest
one, text stays text (`--data_path 7` is "7"), and bad input ends in one line and exit code 2.
"""

import contextlib
import difflib
import functools
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from types import UnionType
from typing import get_args

import fire

from lm.records import InputError, first_line, fits

INTERRUPTED = 130
PATIENCE = 5  # seconds; a launcher ends its other processes a tenth after one has ended


def run(command: Callable) -> None:
    """Run `command` with the flags of this process's command line."""
    os.environ.setdefault("PAGER", "cat")  # --help prints and returns
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    sys.stdout.reconfigure(errors="replace")  # any terminal can show any text
    # Remarks of libraries on each other, which nobody who reads a command's output can act on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="Could not find a config file in", module="peft")
    calls: list[Callable] = []  # fire looks for leftover arguments after its call, we before ours
    try:
        _reject_unknown_flags(command, sys.argv[1:])
        arguments, shown = _quoted(command, sys.argv[1:]), contextlib.nullcontext()
        if {"--help", "-h"} & {*arguments}:  # fire writes it to stderr, which no pager gets
            arguments, shown = ["--", "--help"], contextlib.redirect_stderr(sys.stdout)
        with shown:
            fire.Fire(_checked(command, calls), command=arguments,
                      name=os.path.basename(sys.argv[0]))
        for call in calls:
            call()
    except InputError as error:
        _stop(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _stop(where + (error.strerror or str(error).strip()))
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to continue", code=INTERRUPTED)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported
            _stop(f"the GPU's memory is full ({first_line(error)}); lower the flag for tokens or "
                  "rows at a time (--batch_tokens, --micro_batch_size); the same command goes on")
        # safetensors has a kind of its own for a full disk
        if "No space left on device" not in str(error):
            raise
        _stop(str(error))


def _stop(message: str, code: int = 2) -> None:
    """One line, and exit. Beside the first process of a node, only what that one does not say.

    If all processes stop, the first one's end makes the launcher end the others while they wait.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        if code == INTERRUPTED:  # all of them were
            sys.exit(code)
        time.sleep(PATIENCE)
        message = f"process {rank}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _reject_unknown_flags(command: Callable, arguments: list[str]) -> None:
    known = [name for name in inspect.signature(command).parameters
             if name != _overrides(command)]
    for argument in arguments:
        if argument == "--":
            return
        name = argument[2:].split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in (*known, "help"):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"unknown flag --{name}; did you mean --{nearest[0]}? "
                             "(--help lists every flag)")


def _overrides(command: Callable) -> str | None:
    """`overrides`, if the command takes `section.key=value` arguments as `*overrides`."""
    return "overrides" if "overrides" in inspect.signature(command).parameters else None


def _checked(command: Callable, calls: list[Callable]) -> Callable:
    """What fire calls: checks the flags' types and notes the call in `calls`."""
    kinds = _kinds(command)

    @functools.wraps(command)
    def call(*args, **kwargs):
        given = inspect.signature(command).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name != _overrides(command):
                _refuse_other_kinds(name, value, kinds[name])
        calls.append(functools.partial(command, *args, **kwargs))

    return call


def typed(command: Callable, texts: Mapping[str, str]) -> dict[str, object]:
    """The values that `command` gets where these texts are typed after its flags."""
    kinds = _kinds(command)
    values = {name: text if kinds[name] == (str,) else fire.parser.DefaultParseValue(text)
              for name, text in texts.items()}
    for name, value in values.items():
        _refuse_other_kinds(name, value, kinds[name])
    return values


def _kinds(command: Callable) -> dict[str, tuple]:
    """The types that each parameter may have."""
    return {name: get_args(parameter.annotation) if isinstance(parameter.annotation, UnionType)
            else (parameter.annotation,)
            for name, parameter in inspect.signature(command).parameters.items()}


def _refuse_other_kinds(name: str, value: object, kinds: tuple) -> None:
    if not _fits(value, kinds):
        raise InputError(f"--{name} is {value!r}; expected "
                         + " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds))


def _quoted(command: Callable, arguments: list[str]) -> list[str]:
    """The arguments with texts in quotes, which fire takes off again.

    Texts are the values of text flags, and `section.key=value` where the command takes those.
    """
    annotations = {name: parameter.annotation
                   for name, parameter in inspect.signature(command).parameters.items()}
    quoted, flag = [], ""  # the flag that the argument before this one left without a value
    for argument in arguments:
        kind = annotations.get(flag)
        is_value = flag and not argument.startswith("--") and (
            kind is not bool or argument in ("True", "False"))
        argument = argument if is_value else _in_full(argument, command)
        name, equals, value = argument.partition("=")
        if is_value:
            quoted.append(repr(argument) if kind is str else argument)
        elif _overrides(command) and not argument.startswith("-"):
            if not equals or not name:
                raise InputError(f"{argument!r}: not a flag; settings are overridden as "
                                 "section.key=value")
            if kind is bool:
                quoted[-1] += "=True"  # or fire would take this for the flag's value
            quoted.append(repr(argument))
        elif annotations.get(_parameter(name)) is str and equals:
            quoted.append(f"{name}={value!r}")
        else:
            quoted.append(argument)
        flag = _parameter(name) if argument.startswith("--") and not equals else ""
    return quoted


def _in_full(argument: str, command: Callable) -> str:
    """A flag's letter as its name, if no other flag begins with it: so --help lists them."""
    flag, equals, value = argument.partition("=")
    meant = [name for name in inspect.signature(command).parameters
             if f"-{name[0]}" == flag and name != _overrides(command)]
    return f"--{meant[0]}{equals}{value}" if len(meant) == 1 else argument


def _parameter(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _fits(value: object, kinds: tuple) -> bool:
    if inspect.Parameter.empty in kinds:
        return True
    plain = all(isinstance(kind, type) for kind in kinds)
    return fits(value, kinds) if plain or isinstance(value, bool) else True
