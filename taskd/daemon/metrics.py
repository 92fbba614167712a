"""A node's figures for Prometheus, read from the live counts when somebody asks: the hot path pays nothing for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from taskd.core.scheduler import Scheduler
from taskd.core.stats import Histogram
from taskd.daemon.shell import Shell, monotonic
from taskd.version import VERSION


class PeerFigures(Protocol):
    """What the mesh tells of a peer."""

    @property
    def node_name(self) -> str: ...
    @property
    def clock_offset_s(self) -> float | None: ...


class _NodeCollector(Collector):
    """Turns the state of one daemon into metric families."""

    def __init__(self, shell: Shell, reconnects: Callable[[], int], peers: Callable[[], Iterable[PeerFigures]]) -> None:
        self._shell = shell
        self._reconnects = reconnects
        self._peers = peers

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        shell = self._shell
        info = shell.node.info
        build = InfoMetricFamily("taskd_build", "The running program.")
        build.add_metric([], {"version": VERSION, "roles": ",".join(info.roles), "node": str(info.node_id)})
        yield build
        is_leader = shell.leader == info.node_id and shell.node.scheduler is not None
        yield GaugeMetricFamily("taskd_is_leader", "Whether this node leads.", value=is_leader)
        epoch = shell.term.epoch if shell.term is not None else 0
        yield GaugeMetricFamily("taskd_leader_epoch", "Epoch of the leader that this node follows.", value=epoch)
        yield CounterMetricFamily("taskd_peer_reconnects", "Connections made anew.", value=self._reconnects())
        yield _histogram("taskd_event_loop_lag_seconds", "How late the event loop wakes.", shell.loop_lag)
        offsets = GaugeMetricFamily("taskd_clock_offset_seconds", "Clocks of peers against ours.", labels=["node"])
        for peer in self._peers():
            if peer.clock_offset_s is not None:
                offsets.add_metric([peer.node_name], peer.clock_offset_s)
        yield offsets
        if shell.node.worker is not None:
            worker = shell.node.worker
            held = GaugeMetricFamily("taskd_worker_attempts", "Attempts at this worker.", labels=["state"])
            held.add_metric(["running"], worker.running_count)
            held.add_metric(["waiting"], worker.waiting_count)
            held.add_metric(["unacknowledged"], worker.unacknowledged_count)
            yield held
        if shell.node.scheduler is not None:
            yield from self._scheduler(shell.node.scheduler, is_leader)

    def _scheduler(self, scheduler: Scheduler, is_leader: bool) -> Iterator[Metric]:
        stats, shell = scheduler.stats, self._shell
        submitted = CounterMetricFamily("taskd_tasks_submitted", "Tasks accepted.", labels=["type", "queue"])
        for (kind, queue), count in stats.submitted.items():
            submitted.add_metric([kind, queue], count)
        yield submitted
        finished = CounterMetricFamily("taskd_tasks_finished", "Tasks ended.", labels=["type", "queue", "outcome"])
        for (kind, queue, outcome), count in stats.finished.items():
            finished.add_metric([kind, queue, outcome.word], count)
        yield finished
        lost = CounterMetricFamily("taskd_attempts_lost", "Attempts lost with their worker.", labels=["cause"])
        for cause, count in stats.lost.items():
            lost.add_metric([cause], count)
        yield lost
        yield CounterMetricFamily("taskd_retries", "Attempts made again.", value=stats.retries)
        yield CounterMetricFamily(
            "taskd_stale_results_rejected", "Results of attempts that were over.", value=stats.late_results
        )
        yield CounterMetricFamily("taskd_leader_changes", "Times this node took over.", value=stats.leader_changes)
        yield _histogram("taskd_task_wait_seconds", "From submission to the first dispatch.", stats.wait)
        yield _histogram("taskd_task_duration_seconds", "How long attempts ran.", stats.duration)
        yield _histogram("taskd_commit_seconds", "How long commits took.", shell.commit_seconds)
        if shell.store is not None:
            yield GaugeMetricFamily("taskd_store_bytes", "Size of the database.", value=shell.store.size_bytes())
        text = "Whether this scheduler holds everything that the leader does."
        yield GaugeMetricFamily("taskd_in_sync", text, value=scheduler.is_in_sync)
        if is_leader:
            yield from self._live(scheduler)
            yield from self._copies(scheduler)

    def _copies(self, scheduler: Scheduler) -> Iterator[Metric]:
        is_replicated = scheduler.durability == "replicated"
        yield GaugeMetricFamily("taskd_durability", "Whether what is accepted is on two disks.", value=is_replicated)
        standbys = scheduler.standbys(monotonic())
        count = sum(1 for standby in standbys if standby.stage == "in_sync")
        yield GaugeMetricFamily("taskd_standbys_in_sync", "Standbys that hold everything.", value=count)
        commits = GaugeMetricFamily("taskd_replication_lag_commits", "How far a standby is behind.", labels=["node"])
        seconds = GaugeMetricFamily("taskd_replication_lag_seconds", "For how long it is behind.", labels=["node"])
        for standby in standbys:
            row = scheduler.nodes.get(standby.node_id)
            name = row.name if row is not None else str(standby.node_id)
            commits.add_metric([name], standby.lag_commits)
            seconds.add_metric([name], standby.lag_s)
        yield from (commits, seconds)

    def _live(self, scheduler: Scheduler) -> Iterator[Metric]:
        tasks = GaugeMetricFamily("taskd_tasks", "Unfinished tasks.", labels=["state", "queue"])
        for (state, queue), count in scheduler.ledger.counts.as_dict().items():
            tasks.add_metric([state.word, queue], count)
        yield tasks
        age = GaugeMetricFamily("taskd_queue_oldest_age_seconds", "Age of the oldest ready task.", labels=["queue"])
        now_s = self._shell.utc()
        for queue, submitted_s in scheduler.ledger.queue.oldest_s().items():
            age.add_metric([queue], max(0.0, now_s - submitted_s))
        yield age
        nodes = GaugeMetricFamily("taskd_nodes", "Known workers.", labels=["role", "state"])
        capacity = GaugeMetricFamily(
            "taskd_node_resource_capacity", "What a worker offers; memory in bytes.", labels=["node", "resource"]
        )
        used = GaugeMetricFamily(
            "taskd_node_resource_used", "What its attempts take; memory in bytes.", labels=["node", "resource"]
        )
        nodes_by_state: Counter[str] = Counter()
        for worker in scheduler.roster:
            nodes_by_state["lost" if not worker.is_here else "up" if worker.drain_reason is None else "drained"] += 1
            for name, amount in worker.offer.capacity.items():
                capacity.add_metric([worker.name, name], amount / 1000)
                used.add_metric([worker.name, name], worker.used.get(name, 0) / 1000)
        for word, count in nodes_by_state.items():
            nodes.add_metric(["worker", word], count)
        yield from (nodes, capacity, used)


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)


def text_source(
    shell: Shell, reconnects: Callable[[], int], peers: Callable[[], Iterable[PeerFigures]]
) -> Callable[[], bytes]:
    """A function that gives the figures as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_NodeCollector(shell, reconnects, peers))

    def text() -> bytes:
        return generate_latest(registry)

    return text
