"""The direction of imports, read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import hydraspec

PACKAGE = Path(hydraspec.__file__).parent
# Each row may import from the rows above it, and modules of one package from each other.
TIERS = [
    ["errors"],
    ["files", "hub", "shipped"],
    ["config"],
    ["types"],
    ["tree"],
    ["accept", "base", "text"],
    ["heads"],
    ["decode"],
    ["llm"],
    ["train"],
    ["evaluate"],
    ["cli"],
]
TIER = {name: tier for tier, names in enumerate(TIERS) for name in names}
APART = {"decode": {"text"}}  # sees token ids only


def _imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hydraspec."):
            yield node.module.split(".")[1]


def test_imports_point_one_way():
    for file in PACKAGE.rglob("*.py"):
        if file.parent == PACKAGE and file.stem == "__init__":
            continue
        home = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in _imports(file):
            if target == home:
                continue
            assert TIER[target] < TIER[home], f"{file.relative_to(PACKAGE)} imports {target}"
            assert target not in APART.get(home, ()), f"{home} must not see {target}"


def test_the_command_line_does_not_import_torch():
    code = "import sys, hydraspec.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
