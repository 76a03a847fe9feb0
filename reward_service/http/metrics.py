"""What the HTTP face counts, for Prometheus: one registry a face, so that two in a process don't add up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Scope

CONTENT_TYPE = CONTENT_TYPE_LATEST


class HttpMetrics:
    """Counters of requests by route and status, their seconds, and the rewards given and not given."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.in_flight = Gauge("antiphon_requests_in_flight", "Requests under way.", registry=self._registry)
        self._requests = Counter(
            "antiphon_requests", "Requests answered.", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "antiphon_request_seconds", "From a request's head to its answer.", ["route"], registry=self._registry
        )
        self._items = Counter(
            "antiphon_items", "Responses scored, and those that could not be.", ["outcome"], registry=self._registry
        )

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """A request was answered; status 0 where it ended without an answer."""
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def scored(self, num_rewards: int, num_errors: int) -> None:
        """One call's items."""
        self._items.labels("reward").inc(num_rewards)
        self._items.labels("error").inc(num_errors)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
