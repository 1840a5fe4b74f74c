"""Measurements of the HTTP server in the text format of Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from fused_rec.http.served import ServedModel

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # seconds
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server; no label holds what a client wrote."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("fused_rec_requests", "Answered requests.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "fused_rec_request_seconds",
            "Seconds from the headers of a request to the end of its answer.",
            ("route",),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge("fused_rec_requests_in_flight", "Requests not yet answered.", registry=self.registry)
        self.pending = Gauge(
            "fused_rec_computations_pending", "Requests that compute or wait for it.", registry=self.registry
        )
        self.loads = Counter(
            "fused_rec_model_loads", "Models loaded, by outcome: done, failed.", ("outcome",), registry=self.registry
        )
        for outcome in ("done", "failed"):
            self.loads.labels(outcome)  # shown from the start, as 0
        self.loaded = Gauge("fused_rec_model_loaded_timestamp_seconds", "When it was loaded.", registry=self.registry)
        self.model = Gauge(
            "fused_rec_model_info", "The served model.", ("model", "tables", "history"), registry=self.registry
        )

    def served(self, model: ServedModel) -> None:
        """Records which model is served."""
        self.model.clear()
        self.model.labels(model.model, model.tables, model.history).set(1)
        self.loaded.set(model.loaded.timestamp())

    def text(self) -> bytes:
        """Returns all values in the text format."""
        return generate_latest(self.registry)
