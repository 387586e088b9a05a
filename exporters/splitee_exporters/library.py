"""A segment as a C library: a folder that compiles with no other file of ours.

Under ``src`` stand the generated ``segment.c`` and those of the firmware's files that it needs, as
they are; one include path, ``src``, serves all of them. That is the layout that PlatformIO and the
Arduino tools expect of a library, and any other build compiles ``src/**/*.c``.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from splitee.errors import BuildError, ExportError, MissingTool
from splitee.ops import Array
from splitee_exporters.manifest import made_by

NAME = "splitee-segment"
SOURCES = ("core/trainer.c", "core/step.c", "core/fused.c")  # and all kernels: where to look
_NO_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
_DEFINED = re.compile(r"^(?![^\n(]*\bstatic\b|typedef\b)[A-Za-z_][^\n;=]*?(\w+)\(", re.MULTILINE)
_PROTOTYPE = re.compile(r"^[A-Za-z_][^{};#]*\);", re.MULTILINE)
_INCLUDED = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def files(
    firmware: Path, generated: Mapping[str, str], read_me: str, about: str, includes: str
) -> dict[str, bytes]:
    """All files of a library, by their path in its folder.

    firmware: the folder of the firmware's sources. generated: C texts by path. about: a sentence.
    includes: the header that a program includes.
    """
    texts = {
        **generated,
        "README.md": read_me,
        "library.json": json.dumps(_platformio(about), indent=2) + "\n",
        "library.properties": "".join(f"{k}={v}\n" for k, v in _arduino(about, includes).items()),
        "LICENSE": _licence(),
    }
    needed = _needed(firmware, list(generated.values()))
    # what is generated includes its own, too
    own = {path.removeprefix("src/") for path in generated}
    texts |= {f"src/{path}": text for path, text in needed.items() if path not in own}
    return {path: text.encode() for path, text in texts.items()}


def _needed(firmware: Path, texts: list[str]) -> dict[str, str]:
    """The firmware's files that C texts call, and all that these call or include in turn."""
    sources = [*SOURCES, *(str(p.relative_to(firmware)) for p in firmware.glob("kernels/**/*.c"))]
    contents = {path: (firmware / path).read_text() for path in sorted(sources)}
    definers: dict[str, list[str]] = {}
    for path, text in contents.items():
        for name in _DEFINED.findall(_NO_CODE.sub("", text)):
            definers.setdefault(name, []).append(path)
    found: dict[str, str] = {}
    waiting = list(texts)
    while waiting:
        text = waiting.pop()
        words = re.findall(r"\w+", _PROTOTYPE.sub("", _NO_CODE.sub("", text)))
        named = {path for word in words for path in definers.get(word, [])}
        for path in sorted(named | set(_INCLUDED.findall(text))):
            if path not in found and (firmware / path).exists():
                found[path] = contents.get(path) or (firmware / path).read_text()
                waiting.append(found[path])
    return dict(sorted(found.items()))


def literals(values: Array) -> str:
    """Values as decimal C literals, eighteen to a line."""
    texts = [str(int(v)) for v in values.ravel()]
    return ",\n     ".join(", ".join(texts[i : i + 18]) for i in range(0, len(texts), 18))


def _platformio(about: str) -> dict[str, object]:
    _, version = made_by()
    return {
        "name": NAME,
        "version": version,
        "description": about,
        "license": "Apache-2.0",
        "frameworks": "*",
        "platforms": "*",
    }


def _arduino(about: str, includes: str) -> dict[str, str]:
    name, version = made_by()
    return {
        "name": NAME,
        "version": version,
        "author": name,
        "maintainer": name,
        "sentence": about,
        "paragraph": "Its arithmetic and its memory are on the microcontroller alone.",
        "category": "Data Processing",
        "url": "https://arxiv.org/abs/2512.09313",
        "architectures": "*",
        "includes": includes,
    }


def _licence() -> str:
    text = importlib.metadata.distribution(made_by()[0]).read_text("licenses/LICENSE")
    assert text, "the distribution has its licence with it"
    return text


def run(files: Mapping[str, bytes], check: str, given: bytes, defined: Mapping[str, str]) -> bytes:
    """What a program answers to the bytes given, compiled with a library for this machine.

    check: its text. defined: its macros. Raises MissingTool without a compiler, BuildError where it
    does not compile, ExportError where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="splitee-library-") as name:
        folder = Path(name)
        write(files, folder)
        (folder / "check.c").write_text(check)
        command = [compiler(), "-std=c11", "-O2", "-Isrc", "check.c", *_compiled(folder)]
        command += [f"-D{key}={value}" for key, value in defined.items()]
        made = subprocess.run(
            [*command, "-lm", "-o", "check"], cwd=folder, capture_output=True, text=True
        )
        if made.returncode:
            raise BuildError(f"the library does not compile:\n{made.stderr[:2000]}")
        ran = subprocess.run([folder / "check"], input=given, capture_output=True)
        if ran.returncode:
            raise ExportError(f"src/segment.c: its check ended with status {ran.returncode}")
        return ran.stdout


def compiler() -> str:
    compiler = next((c for c in ("gcc", "cc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise MissingTool("no C compiler to check the library with: install gcc")
    return compiler


def _compiled(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.glob("src/**/*.c")))


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes a library's files into a folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
