"""The house's rules: rooms import in one direction, light modules stay light, a name means one thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import REPOSITORY, clean_environment

PACKAGE = REPOSITORY / "soundmind"
LONGEST_FILE = 450

# What a room may import of ours. Doors (soundmind/<command>.py) may import every room and each other;
# no room imports a door.
MAY_IMPORT: dict[str, set[str]] = {
    "task": set(),
    "system": set(),
    "model": {"system"},
    "data": {"task", "system", "model"},
    "planning": {"system", "model", "data"},
    "plugin": {"model"},
    "speech": {"system", "model", "data"},
    "training": {"task", "system", "model", "data", "planning", "plugin", "speech"},
    "evaluation": {"task", "system", "model", "data", "planning", "plugin", "speech"},
    "standin": {"task", "system", "model", "data", "planning", "speech"},
    "making": {"task", "system", "model", "data", "standin", "speech"},
    "run": {
        *("task", "system", "model", "data", "planning", "plugin", "speech", "training"),
        *("evaluation", "standin"),
    },
}
IMPORT_VERL = {"plugin", "training", "run"}  # the launcher starts verl's trainer

# Rooms, or modules of a room, that load without torch, verl, vLLM, transformers or Ray.
HEAVY = ("torch", "verl", "vllm", "transformers", "ray")
LOADS_HEAVY = {
    *("plugin.platform_cpu", "evaluation.speech"),
    *("speech.decoding", "speech.recogniser", "speech.states", "speech.talker", "speech.vocoder"),
    "speech.weights",
    *("training.agent_loop", "training.dataset", "training.engine", "training.feature_store"),
    *("training.micro_batch", "training.model_config", "training.policy", "training.trainer"),
    *("training.shared_prompts", "training.nodes", "standin.warmup"),
    *("training.sft", "training.sft_dataset", "training.algorithms", "training.failures"),
    *("training.speaking_step", "training.speech", "training.talker_states"),
    "run.tracked",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by its name below `soundmind`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        yield name.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def test_rooms_import_in_one_direction() -> None:
    breaches = []
    for name, path in modules():
        room = name.split(".")[0]
        if room not in MAY_IMPORT:
            continue  # a door
        for line, imported in imports(path):
            parts = imported.split(".")
            if parts[0] != "soundmind" or len(parts) < 2 or parts[1] in (room, "__version__"):
                continue
            if parts[1] not in MAY_IMPORT:
                rule = "a room imports no door"
            elif parts[1] not in MAY_IMPORT[room]:
                rule = (
                    f"{room} may import {', '.join(sorted(MAY_IMPORT[room])) or 'nothing of ours'}"
                )
            else:
                continue
            breaches.append(f"{path.relative_to(REPOSITORY)}:{line} imports {imported}: {rule}")
    assert breaches == []


def test_every_folder_of_the_package_is_a_room_and_says_what_it_is_for() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == MAY_IMPORT.keys()
    for room in folders:
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
        text = ast.get_docstring(tree) or ""
        assert len(tree.body) == 1, f"{room}/__init__.py holds more than a docstring"
        assert "Read first" in text, f"{room}/__init__.py does not say what to read first"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = dict(modules())
    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        for _, imported in imports(path):
            target = imported.removeprefix("soundmind.")
            if not imported.startswith("soundmind."):
                continue
            module = target if target in known else target.rpartition(".")[0]
            if module in known and module != name:
                graph[name].add(module)

    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in known:
        visit(name, ())


def test_a_public_name_is_defined_in_one_module_only() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            else:
                continue
            for defined in names:
                if not defined.startswith("_") and defined not in ("main", "logger"):
                    places[defined].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_a_name_that_another_file_uses_has_no_underscore() -> None:
    breaches = []
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("soundmind")
            for alias in node.names
        }
        breaches += [
            f"{name}:{line} {what}"
            for line, what in imports(path)
            if what.startswith("soundmind.")
            and what.rpartition(".")[2].startswith("_")
            and not what.endswith("__version__")
        ]
        breaches += [
            f"{name}:{node.lineno} {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
            and node.value.id.islower()
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
    assert breaches == []


def test_only_plugin_training_and_the_launcher_import_verl() -> None:
    offenders = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for name, path in modules()
        if name.split(".")[0] not in IMPORT_VERL
        for line, imported in imports(path)
        if imported.split(".")[0] == "verl"
    ]
    assert offenders == []


def test_light_modules_import_without_the_heavy_packages() -> None:
    """One interpreter imports every module but those listed, with the heavy packages out of reach."""
    light = [f"soundmind.{name}" for name, _ in modules() if name not in LOADS_HEAVY]
    code = f"""
import importlib, importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"a light module imports {{name}}")
sys.meta_path.insert(0, Block())
for name in {light!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.returncode) == ("", 0), result.stdout + result.stderr[-1500:]


@pytest.mark.parametrize("folder", ["soundmind", "benchmarks", "tests"])
def test_no_file_is_longer_than_a_person_can_hold(folder: str) -> None:
    lines = {
        path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_the_reading_path_is_an_hour() -> None:
    """The files that the README lists, from a row to an update, exist and are 3,700 lines at most."""
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = page.split("\n## Reading path")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `([^`]+)`:", section, re.MULTILINE)
    assert len(files) >= 15
    assert sum((REPOSITORY / file).read_text("utf-8").count("\n") for file in files) <= 3700
