"""The rooms: who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
ROOMS = ("jobs", "curate", "storage", "schemas")
#: Outside the standard library, what each room may import; jobs may import everything.
ALLOWED = {
    "schemas": {"schemas", "pyarrow", "pydantic", "pydantic_core"},
    "storage": {"storage", "schemas", "pyarrow", "pydantic", "duckdb", "datasets", "fsspec", "numpy"},
    "curate": {"curate", "schemas", "numpy", "faiss", "duckdb", "sklearn", "scipy"},
}
FILES = sorted(path for room in ROOMS for path in (HOME / room).rglob("*.py"))
TESTS = sorted((HOME / "tests").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all imports, those inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_imports_go_one_way() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    said = subprocess.run([tool, "--no-cache"], cwd=HOME, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stdout
    assert "2 kept, 0 broken" in said.stdout


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_the_design_allows(room: str) -> None:
    for path in (HOME / room).rglob("*.py"):
        assert imported(path) <= ALLOWED[room], path


def test_files_stay_readable() -> None:
    assert len(FILES) > 50
    long = {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_there_is_no_drawer_for_everything() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_every_file_says_what_it_is() -> None:
    for path in FILES:
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_schemas_and_curate_do_no_input_or_output() -> None:
    for room in ("schemas", "curate"):
        for path in (HOME / room).rglob("*.py"):
            calls = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
            assert not calls & {"open", "print", "input"}, path


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, jobs.cli; assert not {'torch', 'diffusers', 'transformers', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HOME, check=True, timeout=60)


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    for path in FILES:
        text = path.read_text()
        assert "trust_remote_code" not in text and "weights_only=False" not in text, path
        assert not imported(path) & {"pickle", "dill", "cloudpickle", "joblib"}, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" for k in node.keywords), path
