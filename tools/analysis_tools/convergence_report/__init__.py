"""Parts of tools/analysis_tools/convergence.py."""

# Its filters of warnings come before the imports that warn.
import common  # noqa: F401
