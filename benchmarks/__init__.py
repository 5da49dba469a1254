"""Benchmarks: one command each, `python -m benchmarks.NAME [--quick] [--json]`, peers in the same run."""
