"""What the pages show works: their commands and Python are run, or at least exist.

A block that cannot be run here has a comment on the line before it: ``<!-- needs: GPU -->``.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from sd35_trt.cli import main
from sd35_trt.policies import load_policy
from sd35_trt.runtime import Pipeline, PipelinePool

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "mini" / "README.md",
    ROOT / "comfyui" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
#: Why a block is not run.
REASONS = {
    "needs: GPU",
    "needs: checkpoint",
    "needs: network",
    "needs: opencv",
    "needs: opentelemetry",
    "needs: port",
    "takes: minutes",
}
#: Of them, what is here.
MET: set[str] = set()
if importlib.util.find_spec("cv2") is not None:
    MET.add("needs: opencv")
RUN = {"sh", "console", "python", "toml"}
PROGRAMS = ("sd35-trt", "python", "pip", "make")

_FENCE = re.compile(r"^( *)```(.*)$")
_MARK = re.compile(r"^ *<!-- ((?:needs|takes): .*) -->$")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMAND = re.compile(rf"^(?:\$ )?(?:{'|'.join(PROGRAMS)}) ")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``marks`` says why it is not run, ``line`` is that of its fence."""

    page: Path
    line: int
    language: str
    text: str
    marks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line, and what a ``console`` block shows below it."""

    words: list[str]
    output: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines = page.read_text("utf-8").splitlines()
    number = 0
    while number < len(lines):
        start, fence = number, _FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        body = list(itertools.takewhile(lambda line: line.strip() != "```", lines[number:]))
        number += len(body) + 1
        assert number <= len(lines), f"{page}:{start + 1}: the block does not end"
        mark = _MARK.match(lines[start - 1]) if start else None
        kind, _, values = mark[1].partition(": ") if mark else ("", "", "")
        yield Block(
            page,
            start + 1,
            fence[2].strip(),
            "\n".join(line.removeprefix(fence[1]) for line in body) + "\n",
            tuple(f"{kind}: {value.strip()}" for value in values.split(",")) if mark else (),
        )


def commands(block: Block) -> list[Command]:
    """The command lines of a block of the shell."""
    if block.language == "sh":
        lines = block.text.replace("\\\n", " ").splitlines()
        return [Command(words) for line in lines if (words := shlex.split(line, comments=True))]
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    assert parts[0] == "", f"{block}: a console block begins with '$ '"
    return [
        Command(shlex.split(line), output)
        for line, output in zip(parts[1::2], parts[2::2], strict=True)
    ]


def inline_commands(page: Path) -> Iterator[Command]:
    """The command lines between backticks in the text of a page."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for code in _INLINE.findall(text):
        line = " ".join(code.split())
        if _COMMAND.match(line):
            yield Command(shlex.split(line))


def check(words: list[str]) -> None:
    """Fails where a command, an option, a file, an extra or a target does not exist."""
    program, *arguments = words
    if program == "sd35-trt":
        check_ours(main, arguments)
    elif program == "python":
        check_script(arguments)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for name in re.findall(r"\.\[(.*?)\]", " ".join(arguments)):
            assert set(name.split(",")) <= set(extras), f"extras {name}"
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        rules = re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE)
        targets = set(" ".join(rules).split())
        given = {word for word in arguments if "=" in word}
        assert set(arguments) - given <= targets, f"targets of the Makefile: {targets}"
        for word in given:
            assert f"$({word.partition('=')[0]})" in makefile, f"the Makefile has no {word}"
    else:
        pytest.fail(f"{program!r} is none of {PROGRAMS}")


def check_ours(command: click.Command, arguments: list[str]) -> None:
    """Parses the arguments of ``sd35-trt`` without asking whether their files exist."""
    context = click.Context(command, info_name="sd35-trt")
    if isinstance(command, click.Group) and not arguments[0].startswith("-"):
        child = command.get_command(context, arguments[0])
        assert child is not None, f"no command {arguments[0]!r}"
        # Whoever names a command in passing leaves its arguments out.
        if arguments[1:]:
            check_ours(child, arguments[1:])
        return
    values, rest, order = command.make_parser(context).parse_args(list(arguments))
    assert not rest, f"unexpected {rest}"
    for parameter in order:
        value = values[parameter.name]
        if isinstance(parameter.type, (click.Choice, click.types.IntParamType, click.IntRange)):
            parameter.type_cast_value(context, value)


def check_script(arguments: list[str]) -> None:
    """Looks for a script or module, and for its options in its source."""
    if arguments[0] == "-m":
        spec = importlib.util.find_spec(arguments[1])
        assert spec is not None, f"no module {arguments[1]}"
        assert spec.origin is not None, arguments[1]
        if arguments[1].partition(".")[0] not in ("mini", "sd35_trt"):
            return
        path, options = Path(spec.origin), arguments[2:]
    else:
        path, options = ROOT / arguments[0], arguments[1:]
    source = path.read_text("utf-8")
    for word in options:
        if word.startswith("--"):
            assert re.search(rf"[\"'/]{re.escape(word)}[\"'/]", source), f"{path}: no {word}"
        elif word.endswith((".toml", ".py")):
            assert (ROOT / word).is_file(), word


def run(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command and compares its output with what the page shows."""
    assert command.words[0] == "sd35-trt", "only sd35-trt is run: mark the block"
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(command.words[1:])
    out, err = capsys.readouterr()
    refused = command.output is not None and command.output.startswith("error: ")
    assert bool(end.value.code) == refused, err
    if command.output is not None:
        shown = err if refused else out
        assert [line.rstrip() for line in shown.splitlines()] == command.output.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_and_python_compiles(page: Path) -> None:
    for block in blocks(page):
        assert set(block.marks) <= REASONS, f"{block}: {block.marks}"
        assert block.language in {*RUN, "text"}, f"{block}: name a language, of {RUN} or text"
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language in ("sh", "console"):
            assert commands(block), f"{block}: no command"
            for command in commands(block):
                check(command.words)
        elif block.language == "text":
            assert not block.marks, f"{block}: output is never run"
            hidden = [line for line in block.text.splitlines() if _COMMAND.match(line)]
            assert not hidden, f"{block}: commands belong into a block of sh: {hidden}"
    for command in inline_commands(page):
        check(command.words)


@pytest.mark.parametrize(
    "page",
    [
        # They build mini for themselves.
        pytest.param(p, marks=pytest.mark.nightly if p.name in ("control.md", "serving.md") else ())
        for p in PAGES
        if any(b.language in RUN and not b.marks for b in blocks(p))
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_page_works_from_top_to_bottom(
    page: Path,
    mini_bundle: Path,
    stage_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD35_TRT_CACHE", str(stage_cache))
    monkeypatch.setenv("COLUMNS", "120")
    shutil.copytree(mini_bundle, "bundles/mini-cpu", copy_function=os.link)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if set(block.marks) - MET:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
        elif block.language == "toml":
            Path("policy.toml").write_text(block.text, "utf-8")
            load_policy("policy.toml")
        elif block.language != "text":
            for command in commands(block):
                run(command, capsys)
    for value in names.values():
        if isinstance(value, Pipeline | PipelinePool):
            value.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_lists_every_extra_and_stays_short() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.partition("| extra | adds |")[2].partition("\n\n")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert sorted(re.findall(r"^\| `(.*?)` ", table, re.MULTILINE)) == sorted(extras)
    assert len(readme.splitlines()) <= 150


@pytest.mark.parametrize(
    "line",
    [
        "sd35-trt build --no-such-option",
        "sd35-trt draw",
        "sd35-trt generate bundle prompt another",
        "sd35-trt plan --batch many --gpu ada",
        "python benchmarks/none.py",
        "python benchmarks/soak.py --no-such-option",
        "python -m mini.none",
        "pip install '.[none]'",
        "make none",
        "curl example.org",
    ],
)
def test_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException, OSError, pytest.fail.Exception)):
        check(shlex.split(line))
