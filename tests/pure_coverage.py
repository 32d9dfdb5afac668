"""Branch coverage of what decides (`[tool.hisab] pure`), by the tests that need no stack.

python tests/pure_coverage.py            prints what is not covered; exit 1 below 100 %
"""

from __future__ import annotations

import sys

import pytest

from architecture.source import ROOT, package_modules

FOLDERS = ("unit", "property", "scenarios", "contract")


def main() -> int:
    """Run those tests under coverage and report the pure modules."""
    pure = [module for module in package_modules() if module.pure and module.text.strip()]
    folders = [str(ROOT / "tests" / name) for name in FOLDERS if (ROOT / "tests" / name).exists()]
    include = ",".join(str(ROOT / module.path) for module in pure)
    configuration = ROOT / ".hisab/pure_coverage.toml"
    configuration.parent.mkdir(exist_ok=True)
    configuration.write_text(
        "[tool.coverage.run]\nbranch = true\n"
        f'data_file = "{(ROOT / ".hisab/coverage").as_posix()}"\n'
        f"include = {include.split(',')!r}\n"
        "[tool.coverage.report]\nshow_missing = true\nskip_covered = true\n"
        'exclude_also = ["assert_never\\\\(", "if TYPE_CHECKING:"]\n'
    )
    command = ["-q", f"--cov-config={configuration}", "--cov", "--cov-branch"]
    return int(
        pytest.main([*command, "--cov-report=term-missing", "--cov-fail-under=100", *folders])
    )


if __name__ == "__main__":
    sys.exit(main())
