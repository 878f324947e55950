"""The same as `engine.Workers`, on the nodes of a Ray cluster: Ray decides what runs where, and again after a loss.

A task runs only where versions, code and folders are those of this machine (`nodes`). That is asked of every node
before the first task, and of each worker process that is started later. Little comes back: what is large is written by
the tasks, into a folder that all nodes see.
"""

import logging
import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dedup import nodes
from dedup.engine import ONE_THREAD, WorkerError, Workers, one_thread_each
from dedup.nodes import ClusterError

if TYPE_CHECKING:
    from ray import ObjectRef

HERE = "local"  # the address of a cluster that is this machine alone, and ends with the run
REACH = 10.0  # seconds that an address may say nothing
# What `ray health-check` asks, by a process of its own: Ray's client takes 40 seconds to give up, which nothing
# shortens, and complains on stderr. It prints a line when Ray is imported, and one when it was answered.
QUESTION = """
import sys
from ray._raylet import GcsClient
print(flush=True)
GcsClient(address=sys.argv[1])
print(flush=True)
"""
START = 300.0  # seconds that a node may take for its first task, which imports all it needs
LOOK = 10.0  # seconds between two looks whether there are nodes at all
AHEAD = 2  # tasks a processor that Ray knows of: none should wait for the next
RETRIES = 3  # of a task whose worker or node has died
MEMORY = 100 << 20  # bytes of the object store of HERE: results are small
SETTINGS = {  # of Ray, unless the user has others
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nodes have their environment: `uv run` would make it anew for each worker
    "RAY_task_oom_retries": str(RETRIES),  # else without end
}


def start(
    jobs: int, address: str | None, folder: Path, inputs: Sequence[Path] = (), weights: Sequence[Path] = ()
) -> Workers:
    """Workers on this machine if there is no address, else on that Ray cluster: HOST:PORT, "auto" or HERE.

    jobs: tasks at a time, 0 = one per processor. folder: where the tasks write. inputs: files and folders that they
    read there. weights: files and folders that each node may have a copy of. All three are looked for on every node.
    """
    return Workers(jobs) if address is None else Cluster(jobs, address, folder, inputs, weights)


class Cluster(Workers):
    """Connected while the `with` block lasts; one inside of another shares its connection.

    Raises ClusterError when it cannot be reached, or a node differs.
    """

    def __init__(
        self, jobs: int, address: str, folder: Path, inputs: Sequence[Path] = (), weights: Sequence[Path] = ()
    ) -> None:
        super().__init__(jobs)  # the threads of what is done here
        self.most = jobs
        self.address = address
        self.place = nodes.describe(folder, inputs, weights)
        self._connected = False

    def __enter__(self) -> Self:
        token = self.place.token
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        try:
            self._connect()
            self._check_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._connected:
            import ray

            ray.shutdown()
        self.place.token.unlink(missing_ok=True)

    def _connect(self) -> None:
        for name, value in SETTINGS.items():  # Ray reads them when it is imported
            os.environ.setdefault(name, value)
        import ray

        if ray.is_initialized():
            return
        for token in set(self.place.token.parent.glob(f"{nodes.TOKEN}*")) - {self.place.token}:
            token.unlink()  # of a run that was killed
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.FATAL}
        if self.address == HERE:
            options |= {"num_cpus": self.jobs, "include_dashboard": False, "object_store_memory": MEMORY}
            self.most = 0  # it has no more processors than that, so tasks may wait for them
        else:
            _reach(self.address)
            options["runtime_env"] = {"env_vars": ONE_THREAD}
        self._connected = True
        try:
            with one_thread_each():  # where Ray is started here its processes inherit that, and workers wait ready
                ray.init(self.address, **options)
        except Exception as error:  # they have no common class
            raise ClusterError(f"the Ray cluster {self.address} cannot be used ({_squeeze(error)})") from error

    def _check_nodes(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = []
        for node in _list_nodes():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = ray.remote(nodes.call).options(num_cpus=0, max_retries=RETRIES, scheduling_strategy=there)
            name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
            asked.append((name, ask.remote(self.place, os.getpid)))
        if not asked:
            raise ClusterError(f"no node of the Ray cluster {self.address} has a processor for tasks")
        for name, answer in asked:
            try:
                ray.get(answer, timeout=START)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ClusterError):
                    raise error.cause from error
                raise ClusterError(
                    f"node {name} cannot run our tasks ({_squeeze(error.cause)}): install the same version there"
                ) from error
            except ray.exceptions.TaskUnschedulableError:
                continue  # it has left
            except ray.exceptions.RayError as error:
                raise ClusterError(f"node {name} does not answer ({_squeeze(error)}): take it out") from error

    def run[T](self, function: Callable[..., T], tasks: Iterable[tuple], *, gpu: bool = False) -> Iterator[T]:
        """`function(*task)` for every task, results in order; tasks are taken from the iterable as there is room."""
        import ray

        has = ray.cluster_resources()
        gpus = int(gpu and has.get("GPU", 0) > 0)
        room = self.most or AHEAD * max(1, int(has.get("CPU", 1)))
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, max_calls=0)(nodes.call)
        queue = iter(tasks)
        ordered: deque[ObjectRef] = deque()
        flying: list[ObjectRef] = []
        try:
            while True:
                for task in islice(queue, room - len(flying)):
                    ordered.append(remote.remote(self.place, function, *task))
                    flying.append(ordered[-1])
                while ordered and ordered[0] not in flying:
                    yield _get(ordered.popleft())
                if not ordered:
                    return
                flying = _wait(flying, gpus)
        finally:
            for lost in flying:  # of a caller who takes no more
                ray.cancel(lost)


def _wait(flying: "list[ObjectRef]", gpus: int) -> "list[ObjectRef]":
    """Those that are left when one has ended. Raises ClusterError when nobody is there who could end them."""
    import ray

    while True:
        ended, left = ray.wait(flying, timeout=LOOK)
        if ended:
            return left
        if not any(node["Resources"].get("GPU", 0) >= gpus for node in _list_nodes()):
            raise ClusterError(
                "no node is left that could go on: start one, and the same command goes on where it stopped"
            )


def _get(answer: "ObjectRef") -> Any:
    """The result of a task, or what it raised."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise WorkerError(
            f"a task was given up after {RETRIES + 1} workers had died of it: out of memory? Try fewer --jobs"
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"the Ray cluster has failed ({_squeeze(error)}): the same command goes on where it stopped"
        ) from error


def _list_nodes() -> list[dict[str, Any]]:
    """Those that tasks may run on."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _reach(address: str) -> None:
    """Ray itself would try for minutes, where a cluster has left no more than its address, or something else listens.

    Raises ClusterError.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        found = canonicalize_bootstrap_address_or_die(address) if address == "auto" else address
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
        _ask(found)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): give --address HOST:PORT as `ray start --head` says it"
        ) from error


def _ask(address: str) -> None:
    """Raise OSError unless the head of a Ray cluster answers at HOST:PORT within REACH seconds."""
    command = [sys.executable, "-P", "-c", QUESTION, address]  # -P: no module of the working directory
    none = subprocess.DEVNULL
    with subprocess.Popen(command, bufsize=0, stdin=none, stdout=subprocess.PIPE, stderr=none) as asking:
        assert asking.stdout is not None
        try:
            asking.stdout.readline()  # importing Ray may take long, and is no silence of the address
            said = select.select([asking.stdout], [], [], REACH)[0]
            answered = said and asking.stdout.readline()  # b"" when the process has failed
        finally:
            asking.kill()
    if not answered:
        raise OSError(f"something listens there, and gave no answer of Ray's within {REACH:g} s")


def _squeeze(error: BaseException) -> str:
    """In one line, without what Ray appends for those who debug it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
