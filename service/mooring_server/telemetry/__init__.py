"""Logs and metrics. A leaf: every layer but the kernels may import it."""
