"""What `corral run` loads before its command runs: nothing that takes longer to load than a sandbox to start."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import corral.cli.run, corral.sandbox.core, corral.sandbox.supervision
sys.exit(sys.argv[1] in sys.modules)
"""


@pytest.mark.parametrize("module", ["asyncio", "concurrent.futures", "logging", "pydantic", "yaml"])
def test_it_does_without(module: str) -> None:
    assert subprocess.run([sys.executable, "-c", CODE, module], check=False).returncode == 0
