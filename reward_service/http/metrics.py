"""Prometheus metrics of the HTTP server, in one registry per server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Scope

CONTENT_TYPE = CONTENT_TYPE_LATEST


class HttpMetrics:
    """Counts requests by route and status, their duration, and the items that got a reward or an error."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.in_flight = Gauge("antiphon_requests_in_flight", "Requests in progress.", registry=self._registry)
        self._requests = Counter(
            "antiphon_requests", "Requests answered.", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "antiphon_request_seconds", "Seconds from request to response.", ["route"], registry=self._registry
        )
        self._items = Counter(
            "antiphon_items", "Items by outcome: reward or error.", ["outcome"], registry=self._registry
        )

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request; status 0 means that it ended without a response."""
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def scored(self, num_rewards: int, num_errors: int) -> None:
        """Count the items of one call."""
        self._items.labels("reward").inc(num_rewards)
        self._items.labels("error").inc(num_errors)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
