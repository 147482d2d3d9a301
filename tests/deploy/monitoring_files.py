"""The rules and the dashboards as they lie in deploy/, and every query in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
# What Grafana puts in place of its variables when everything is selected.
VARIABLES = {"$__rate_interval": "1m", "$namespace": ".*", "$job": ".*", "$instance": ".*"}


class Query(NamedTuple):
    """``where`` names the rule, or the dashboard with the panel; ``labels`` are those that its legend shows."""

    where: str
    expr: str
    labels: frozenset[str] = frozenset()


@cache
def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts, in the order in which Prometheus takes them."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def recording_rules() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "record" in rule]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


@cache
def dashboards() -> dict[str, dict[str, Any]]:
    """By the name of the file."""
    return {file.stem: json.loads(file.read_text()) for file in DASHBOARDS}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each panel and where it is: the dashboard and the panel's title."""
    for name, board in dashboards().items():
        for panel in board["panels"]:
            yield f"{name}: {panel['title']}", panel


def dashboard_queries() -> list[Query]:
    return [
        Query(where, filled_in(target["expr"]), frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"])))
        for where, panel in panels()
        for target in panel["targets"]
    ]


def filled_in(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = re.sub(re.escape(name) + r"\b", value, expr)
    return expr
