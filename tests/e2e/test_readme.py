"""The README cannot drift: its commands and snippets run here, in order, in one shell."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_ELSEWHERE = ("make demo", "make test")
"""`make demo` runs in its own test, `make test` is what runs this one."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, code) of every fenced block that has one of our languages."""
    return [(match[1], match[2]) for match in BLOCK.finditer(text)]


def script_of(text: str) -> str:
    """Join all blocks into one bash script, Python snippets run by the project's interpreter."""
    parts = ["set -euo pipefail"]
    for language, code in blocks(text):
        if language == "python":
            parts.append(f"'{sys.executable}' - <<'SNIPPET'\n{code}SNIPPET")
        elif not code.startswith(RUN_ELSEWHERE):
            parts.append(f"echo '@@'; {code.rstrip()}")
    return "\n".join(parts) + "\n"


def test_a_readme_with_a_wrong_command_fails() -> None:
    """The check can fail: a command that does not exist ends the script with an error."""
    script = script_of("```sh\nthis-command-does-not-exist\n```\n")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0


@pytest.mark.slow
def test_every_command_and_snippet_of_the_readme_runs() -> None:
    """Follow the README literally; the balance shows one GPU-hour, the hold is open."""
    if (ROOT / ".hisab" / "stack.json").exists():
        pytest.skip("a stack of `make up` is running in this checkout; `make down` first")
    script = script_of((ROOT / "README.md").read_text(encoding="utf-8"))
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=3600,
            check=False,
        )
    finally:
        subprocess.run(["make", "down"], cwd=ROOT, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    balance = next(answer for answer in answers if "charged_micro" in answer)
    hold = next(answer for answer in answers if "hold_id" in answer)
    reconciliation = next(answer for answer in answers if "difference_gpu_ns" in answer)
    assert balance["charged_micro"] == "840000000"
    assert hold["state"] == "open"
    assert reconciliation["duplicate_gpu_ns"] == reconciliation["billed_gpu_ns"] != "0"
    assert reconciliation["difference_gpu_ns"] == "0"
