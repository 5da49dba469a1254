"""Grafana dashboards as code: `python -m tools.dashboards` writes deploy/grafana; a test holds them fresh."""
