"""The dependency rule as a test: probe imports nothing of ours, the others what is listed.

Longest matching prefix wins; a module may import only names under the listed prefixes.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_PARTY = ("probe", "server", "clients")

TORCH_FREE = (
    "probe.__version__",
    "probe.assets",
    "probe.chart",
    "probe.chart_continual",
    "probe.chart_continual_panels",
    "probe.chart_mix",
    "probe.chart_style",
    "probe.chart_train",
    "probe.continual_lines",
    "probe.continual_summary",
    "probe.continual_text",
    "probe.errors",
    "probe.failures",
    "probe.image_sizes",
    "probe.json_log",
    "probe.kinds",
    "probe.launch",
    "probe.line_search",
    "probe.mix_summary",
    "probe.mix_text",
    "probe.model_size",
    "probe.placement",
    "probe.plan",
    "probe.plan_mix",
    "probe.plan_parts",
    "probe.plan_train",
    "probe.reports",
    "probe.result",
    "probe.result_curves",
    "probe.result_mix",
    "probe.result_train",
    "probe.schedule",
    "probe.series",
    "probe.shares",
    "probe.spec",
    "probe.spec_base",
    "probe.spec_load",
    "probe.spec_mix",
    "probe.plan_continual",
    "probe.result_continual",
    "probe.spec_continual",
    "probe.spec_train",
    "probe.sweet_spot",
    "probe.tables",
    "probe.tables_continual",
    "probe.tables_mix",
    "probe.tables_train",
    "probe.train_summary",
    "probe.train_text",
    "probe.unit_results",
    "probe.worker_link",
)
MAY_IMPORT = {
    "probe": ("probe",),
    "server": ("server", *TORCH_FREE),
    "server.wire": (
        "probe.continual_summary",
        "probe.mix_summary",
        "probe.result",
        "probe.result_continual",
        "probe.result_curves",
        "probe.result_mix",
        "probe.result_train",
        "probe.spec",
        "probe.train_summary",
        "probe.unit_results",
    ),
    "server.api": ("server", *TORCH_FREE),
    "clients": ("clients", "server.wire", *TORCH_FREE),
}


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def first_party_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in FIRST_PARTY}


@pytest.mark.parametrize(
    "path",
    sorted(p for top in FIRST_PARTY for p in (ROOT / top).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_follow_the_dependency_rule(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    rule = max((p for p in MAY_IMPORT if under(module, p)), key=len)
    bad = {
        name
        for name in first_party_imports(path)
        if not any(under(name, allowed) for allowed in MAY_IMPORT[rule])
    }
    assert not bad, f"{module} may import {MAY_IMPORT[rule]}, not {sorted(bad)}"


@pytest.mark.parametrize(
    "module",
    ["probe", *TORCH_FREE[1:], "server.api.app", "server.store", "server.worker", "clients"],
)
def test_imports_without_torch(module: str) -> None:
    code = (
        f"import {module}, sys; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
