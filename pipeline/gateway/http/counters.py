"""What is counted of HTTP itself: requests by status, connections."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class HttpMetrics:
    """The door's Prometheus metrics, in a registry of the caller's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "veilpipe_http_requests",
            "Requests; status 499: the client left before its answer, 0: the server did.",
            ("route", "status"),
            registry=registry,
        )
        self.active = Gauge(
            "veilpipe_http_active_requests", "Requests being answered.", registry=registry
        )
        self.connections = Gauge(
            "veilpipe_http_connections", "Open connections.", registry=registry
        )
        self.refused = Counter(
            "veilpipe_http_refused_connections",
            "Connections refused because too many were open.",
            registry=registry,
        )
