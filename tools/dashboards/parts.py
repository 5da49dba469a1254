"""What the dashboards share: data sources and filters as variables, and three kinds of panels.

Every Prometheus expression keeps `HERE` in each selector, so that one import serves many installations. Rates
use Grafana's `$__rate_interval`, which is never shorter than four scrapes.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, dashboard, logs, loki, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)

HERE = 'job=~"$job", instance=~"$instance"'
RATE = "$__rate_interval"
METRICS = DataSourceRef(type_val="prometheus", uid="${datasource}")
LOGS = DataSourceRef(type_val="loki", uid="${logs}")

Queries = dict[str, str]
"""Legend → expression."""


def new_board(name: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty dashboard with the variables that `HERE` needs."""
    return (
        dashboard.Dashboard(title)
        .uid(f"mooring-{name}")
        .description(description)
        .tags(["mooring"])
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Metrics").type("prometheus"))
        .with_variable(_label("job", "label_values(mooring_build_info, job)"))
        .with_variable(_label("instance", 'label_values(mooring_build_info{job=~"$job"}, instance)'))
    )


def _label(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .query(query)
        .datasource(METRICS)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def graph(
    title: str, description: str, unit: str, queries: Queries, *, span: int = 12, stacked: bool = False
) -> timeseries.Panel:
    """Lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(METRICS)
        .span(span)
        .height(8)
        .min(0)
        .fill_opacity(15 if stacked else 0)
        .legend(
            common.VizLegendOptions()
            .display_mode(models.LegendDisplayMode.LIST)
            .placement(models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(models.StackingMode.NORMAL))
    for legend, expression in queries.items():
        panel = panel.with_target(_metric(expression).legend_format(legend))
    return panel


def number(
    title: str, description: str, unit: str, expression: str, *, span: int = 4, decimals: int | None = None
) -> stat.Panel:
    """The newest value, large."""
    panel = stat.Panel().title(title).description(description).unit(unit).datasource(METRICS)
    if decimals is not None:
        panel = panel.decimals(decimals)
    return panel.span(span).height(4).with_target(_metric(expression).instant())


def top(title: str, description: str, unit: str, expression: str, *, span: int = 12) -> table.Panel:
    """A LogQL instant query as a table: what is too many for a metric's labels."""
    query = loki.Dataquery().expr(expression).query_type("instant").datasource(LOGS)
    panel = table.Panel().title(title).description(description).unit(unit).datasource(LOGS)
    return panel.span(span).height(8).with_target(query)


def lines(title: str, description: str, expression: str) -> logs.Panel:
    """Log lines."""
    query = loki.Dataquery().expr(expression).query_type("range").max_lines(200).datasource(LOGS)
    panel = logs.Panel().title(title).description(description).datasource(LOGS)
    return panel.show_time(True).enable_log_details(True).span(24).height(10).with_target(query)


def row(title: str) -> dashboard.Row:
    """A heading."""
    return dashboard.Row(title)


def quantile(q: float, histogram: str, *by: str, more: str = "") -> str:
    """A quantile of a histogram over the rate interval."""
    labels = ", ".join([*by, "le"])
    return f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket{{{HERE}{more}}}[{RATE}])))"


def rate(counter: str, *by: str, more: str = "") -> str:
    """Events per second."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} (rate({counter}{{{HERE}{more}}}[{RATE}]))"


def _metric(expression: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).datasource(METRICS)
