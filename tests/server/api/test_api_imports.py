"""The server starts without the engine's libraries."""

import subprocess
import sys


def test_importing_the_app_loads_neither_torch_nor_transformers():
    code = (
        "import sys, server.api.app, server.api.__main__; "
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_refused_settings_end_with_code_2_and_a_sentence():
    ran = subprocess.run(
        [sys.executable, "-m", "server.api", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert ran.returncode == 2
    assert "PROBE_API_KEYS" in ran.stderr
    assert "Traceback" not in ran.stderr
