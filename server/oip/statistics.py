"""The model's statistics, whichever route a request came by: what the metrics count, and batches by their size."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from prometheus_client.metrics import MetricWrapperBase

from server.metrics import Metrics
from server.oip.classifier import VERSION
from server.oip.schemas import BatchStatistics, Duration, InferenceStatistics, ModelStatistics
from server.types import Timed

ANSWERED = ("met", "missed")  # outcomes of requests
NOTHING = Duration(count=0, ns=0)


class BatchTally:
    """What no metric tells: answered images and their time, by the size of the batch that they were in."""

    def __init__(self) -> None:
        self._images: defaultdict[int, int] = defaultdict(int)
        self._decode_s: defaultdict[int, float] = defaultdict(float)
        self._inference_s: defaultdict[int, float] = defaultdict(float)
        self.last = 0.0  # when there was one, in seconds since 1970

    def add(self, answers: Sequence[Timed]) -> None:
        self.last = time.time()
        for timed in answers:
            size = timed.answer.batch_size
            self._images[size] += 1
            self._decode_s[size] += timed.decode_s
            self._inference_s[size] += timed.answer.inference_s

    def statistics(self) -> list[BatchStatistics]:
        """Each image stands for its share of its batch."""
        return [
            BatchStatistics(
                batch_size=size,
                compute_input=_duration(images / size, self._decode_s[size] / size),
                compute_infer=_duration(images / size, self._inference_s[size] / size),
                compute_output=NOTHING,
            )
            for size, images in sorted(self._images.items())
        ]


def model_statistics(name: str, metrics: Metrics, tally: BatchTally) -> ModelStatistics:
    """``success`` and ``fail`` count requests, ``queue`` and ``compute_*`` images. What is not measured is 0."""

    def stage(name: str) -> Duration:
        return _observed(metrics.stage_duration, lambda labels: labels["stage"] == name)

    return ModelStatistics(
        name=name,
        version=VERSION,
        last_inference=int(1000 * tally.last),
        inference_count=int(_sum(metrics.width_selected, "_total")),
        execution_count=int(_sum(metrics.batches, "_total")),
        inference_stats=InferenceStatistics(
            success=_observed(metrics.request_duration, lambda labels: labels["outcome"] in ANSWERED),
            fail=_observed(metrics.request_duration, lambda labels: labels["outcome"] not in ANSWERED),
            queue=stage("queue"),
            compute_input=stage("decode"),
            compute_infer=stage("inference"),
            compute_output=NOTHING,
            cache_hit=NOTHING,
            cache_miss=NOTHING,
        ),
        batch_stats=tally.statistics(),
    )


def _observed(metric: MetricWrapperBase, keep: Callable[[Mapping[str, str]], bool]) -> Duration:
    return _duration(_sum(metric, "_count", keep), _sum(metric, "_sum", keep))


def _sum(
    metric: MetricWrapperBase, suffix: str, keep: Callable[[Mapping[str, str]], bool] = lambda labels: True
) -> float:
    samples = (sample for family in metric.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name.endswith(suffix) and keep(sample.labels))


def _duration(count: float, seconds: float) -> Duration:
    return Duration(count=round(count), ns=round(1e9 * seconds))
