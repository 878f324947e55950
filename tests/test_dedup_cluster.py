"""dedup.cluster on a real Ray cluster: two raylets on this machine, one of which can be told to differ."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster as Raylets
from test_dedup_pipeline import encode, picture
from typer.testing import CliRunner

from dedup import cluster, manifest, nodes
from dedup.cli import app
from dedup.cluster import Cluster
from dedup.engine import WorkerError
from dedup.export import Options as ExportOptions
from dedup.export import export
from dedup.images import ImageError
from dedup.nodes import ClusterError
from dedup.options import Options, OutputError, lock
from dedup.pipeline import deduplicate

HEAD = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": cluster.MEMORY}
NODE = {"num_cpus": 1, "object_store_memory": cluster.MEMORY}
# Read by every Python of a node before all else: what a node does not see.
BLIND = """
import os
stat, hidden = os.stat, [line for line in open(HIDDEN).read().splitlines() if line]
def look(path, *args, **kwargs):
    if any(os.fsdecode(path).startswith(name) for name in hidden if not isinstance(path, int)):
        raise FileNotFoundError(2, "No such file or directory", path)
    return stat(path, *args, **kwargs)
os.stat = look
"""


class Doctor:
    """What the second node does not see, and the versions that it believes to have, from its next worker on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hidden = folder / "hidden"
        self.hidden.touch()
        (folder / "sitecustomize.py").write_text(BLIND.replace("HIDDEN", repr(str(self.hidden))))

    def hide(self, path: Path) -> None:
        self.hidden.write_text(f"{path}\n")

    def pretend(self, name: str, version: str) -> Path:
        info = self.folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return info

    def heal(self) -> None:
        self.hidden.write_text("")
        for info in self.folder.glob("*.dist-info"):
            (info / "METADATA").unlink()
            info.rmdir()


@pytest.fixture(scope="module")
def doctor(tmp_path_factory: pytest.TempPathFactory) -> Doctor:
    return Doctor(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def raylets(doctor: Doctor) -> Iterator[Raylets]:
    found = Raylets(initialize_head=True, head_node_args=HEAD)
    found.add_node(**NODE, env_vars={"PYTHONPATH": str(doctor.folder)})
    yield found
    found.shutdown()


@pytest.fixture
def address(raylets: Raylets, doctor: Doctor) -> Iterator[str]:
    yield raylets.address
    doctor.heal()


def make_shards(folder: Path, shards: int, each: int, large: bytes = b"") -> Path:
    """Tars of pictures; every fifth stands a second time, at lower quality. large: one that each tar has first."""
    folder.mkdir()
    numbers = iter(range(shards * each))
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in [next(numbers) for _ in range(each)]:
                seed, quality = (number // 5, 60) if number % 5 == 0 else (1_000 + number, 90)
                data = large if large and number % each == 0 else encode(picture(seed), "JPEG", quality=quality)
                for suffix, content in (("jpg", data), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("src") / "shards", 6, 10)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_bytes(bytes(range(32)))
    return path


def read_tree(folder: Path) -> dict[str, bytes]:
    """All files but the times, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "timings.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def connect(address: str, folder: Path, **more: Any) -> Cluster:
    return Cluster(0, address, folder, **more)


# --- the engine ----------------------------------------------------------------------------------------------------


def test_results_come_in_order_errors_as_they_were_and_a_dead_worker_is_made_up_for(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RETRIES", 1)

    def work(number: int) -> tuple[int, dict[str, str | None]]:
        time.sleep(0.1 if number == 0 else 0.02)
        return number, {name: os.environ.get(name) for name in cluster.ONE_THREAD}

    def fail(number: int) -> None:
        raise ImageError("unreadable", f"picture {number}")

    def die(mark: Path, always: bool) -> int:
        if always or not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1

    taken = []

    def ask() -> Iterator[tuple[int]]:
        for number in range(40):
            taken.append(number)
            yield (number,)

    with connect(address, tmp_path) as workers:
        results = workers.run(work, ask())
        first = next(results)
        assert len(taken) < 40  # tasks are made as there is room
        told = [first, *results]
        assert [number for number, _ in told] == list(range(40))
        assert all(threads == cluster.ONE_THREAD for _, threads in told)
        with pytest.raises(ImageError, match=r"^picture 0$"):
            list(workers.run(fail, [(0,), (1,)]))
        assert list(workers.run(die, [(tmp_path / "mark", False)])) == [1]
        with pytest.raises(WorkerError, match="given up after 2 workers"):
            list(workers.run(die, [(tmp_path / "mark", True)]))
        for folder in (tmp_path / "inner", tmp_path):
            with connect(address, folder) as inner:
                assert [number for number, _ in inner.run(work, [(7,)])] == [7]
            assert workers.place.token.exists()
        assert [number for number, _ in workers.run(work, [(8,)])] == [8]  # the inner one has not hung up
    assert not ray.is_initialized()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mark"]


def test_the_same_bytes_as_without_a_cluster_and_either_goes_on_where_the_other_stopped(
    address: str, src: Path, key: Path, tmp_path: Path
) -> None:
    options = Options()
    for name, where in (("local", None), ("there", address)):
        deduplicate(src, tmp_path / name, options, jobs=1, address=where, subject_key=key)
    expected = read_tree(tmp_path / "local")
    assert expected.keys() >= {"run.json", "pairs.parquet", ".work/signatures/00005.parquet"}
    assert read_tree(tmp_path / "there") == expected
    for name, where in (("local", address), ("there", None)):  # half of it is lost, the other engine goes on
        out = tmp_path / name
        for lost in (out / ".work" / "signatures" / "00003.parquet", out / "run.json", out / "pairs.parquet"):
            lost.unlink()
        kept = (out / ".work" / "signatures" / "00001.parquet").stat().st_mtime_ns
        deduplicate(src, out, options, jobs=1, address=where, subject_key=key)
        assert read_tree(out) == expected
        assert (out / ".work" / "signatures" / "00001.parquet").stat().st_mtime_ns == kept


def test_a_node_with_other_versions_is_named_before_any_work(
    address: str, src: Path, doctor: Doctor, tmp_path: Path
) -> None:
    doctor.pretend("pillow", "1.2.3")
    with pytest.raises(ClusterError, match=r"^node .* has pillow 1\.2\.3, this machine .*: install") as error:
        deduplicate(src, tmp_path / "out", Options(), address=address)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# --- what is asked of every node -----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> nodes.Place:
    for name in ("shard.tar", "weights.onnx"):
        (tmp_path / name).write_bytes(b"some bytes")
    workers = Cluster(1, "local", tmp_path, [tmp_path / "shard.tar", tmp_path], [tmp_path / "weights.onnx"])
    workers.place.token.touch()
    return workers.place


def test_a_node_that_differs_says_in_what(place: nodes.Place, tmp_path: Path) -> None:
    examine = nodes.examine.__wrapped__
    examine(place)
    wanted: list[tuple[dict[str, Any], str]] = [
        ({"versions": (*place.versions, ("ape", "1"))}, r"has ape \(none\), this machine 1"),
        ({"code": "other"}, "has other code of unmemorize"),
        ({"token": tmp_path / "none"}, f"^{tmp_path} is not shared with node"),
        ({"inputs": ((tmp_path / "shard.tar", "9:9"),)}, "shard.tar is not shared with node"),
        ({"inputs": ((tmp_path / "no", "folder"),)}, "no is not shared with node"),
        ({"weights": ((tmp_path / "no.onnx", "0"),)}, "lacks the weights"),
        ({"weights": ((tmp_path / "weights.onnx", "0"),)}, "has other weights"),
    ]
    for differing, message in wanted:
        with pytest.raises(ClusterError, match=message):
            examine(replace(place, **differing))


def test_weights_of_a_folder_are_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = nodes._digest(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert nodes._digest(tmp_path) != before


def test_a_cluster_that_is_not_there_is_one_line_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = time.monotonic()
    with socket.socket() as nobody:  # bound, so that nobody else gets it, and not listening
        nobody.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{nobody.getsockname()[1]}", "127.0.0.1", "no.such.host.invalid:6379"):
            with pytest.raises(ClusterError, match=f"^no Ray cluster answers at {address} ") as error:
                connect(address, tmp_path).__enter__()
            assert "\n" not in str(error.value)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(ClusterError, match=r"^no Ray cluster answers at auto "):
            connect("auto", tmp_path).__enter__()
    assert time.monotonic() - begin < 15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [None, b"HTTP/1.0 400 Bad Request\r\n\r\n"])
def test_what_listens_and_is_no_ray_is_one_line_within_seconds(
    answer: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A socket that accepts and says nothing, and a web server."""
    monkeypatch.setattr(cluster, "REACH", 3.0)
    taken: list[socket.socket] = []
    times: list[float] = []

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the end of the test
            while True:
                taken.append(listening.accept()[0])
                times.append(time.monotonic())
                if answer is not None:
                    with taken[-1] as connection, contextlib.suppress(OSError):  # the first one says nothing
                        connection.recv(100)
                        connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^no Ray cluster answers at {address} .*within 3 s") as error:
            connect(address, tmp_path).__enter__()
        end = time.monotonic()
        listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
    assert len(times) > 1  # it was asked, not only connected to
    assert end - times[1] < 15  # Ray's own client takes 40, once it is imported
    assert "\n" not in str(error.value)
    for connection in taken:
        connection.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_two_runs_into_one_folder(address: str, src: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out"), pytest.raises(OutputError, match="in use by another run"):
        deduplicate(src, tmp_path / "out", Options(), address=address)


# --- slow: real nodes that differ, and what is lost on the way -------------------------------------------------------


@pytest.mark.slow
def test_nodes_that_do_not_see_the_same(address: str, src: Path, key: Path, doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    options = Options(weights=str(tmp_path / "weights"))
    for hidden, message in (
        (tmp_path / "out", f"^{tmp_path / 'out'} is not shared with node"),
        (src, f"^{src / '00000.tar'} is not shared with node"),
        (tmp_path / "weights", "^node .* lacks the weights"),
    ):
        doctor.hide(hidden)
        with pytest.raises(ClusterError, match=message):
            deduplicate(src, tmp_path / "out", options, address=address, subject_key=key)


def kill_workers(raylet: Any) -> int:
    """SIGKILL for the processes of a raylet that have a task; returns how many."""
    pid = raylet.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    busy = [int(child) for child in children if b"ray::call" in Path(f"/proc/{child}/cmdline").read_bytes()]
    for child in busy:
        os.kill(child, signal.SIGKILL)
    return len(busy)


def kill_some(raylets: list[Any]) -> int:
    """The same once any has a task: between two of them none may have one."""
    for _ in range(2_000):
        if found := sum(map(kill_workers, raylets)):
            return found
        time.sleep(0.002)
    return 0


@contextlib.contextmanager
def meanwhile(path: Path, act: Callable[[], object]) -> Iterator[list]:
    """Do that once `path` is there."""
    done: list = []
    over = threading.Event()

    def wait() -> None:
        while not over.is_set():
            if path.exists():
                done.append(act())
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that take long enough to be met at work."""
    large = encode(Image.linear_gradient("L").resize((5_000, 5_000)), "PNG", compress_level=1)
    return make_shards(tmp_path_factory.mktemp("many") / "shards", 12, 20, large)


@pytest.fixture(scope="module")
def expected(many: Path, key: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    deduplicate(many, out, Options(), subject_key=key)
    return read_tree(out)


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing(
    raylets: Raylets, address: str, many: Path, key: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    first = tmp_path / "out" / ".work" / "signatures" / "00002.parquet"
    both = [raylets.head_node, *raylets.worker_nodes]
    with meanwhile(first, lambda: kill_some(both)) as killed:
        deduplicate(many, tmp_path / "out", Options(), address=address, subject_key=key)
    assert killed[0] >= 1
    assert read_tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_node_that_is_lost_changes_nothing_and_without_any_the_run_can_go_on_later(
    many: Path, key: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    found = Raylets(initialize_head=True, head_node_args=HEAD | {"num_cpus": 0})
    try:
        added = [found.add_node(**NODE) for _ in range(2)]
        out = tmp_path / "out"
        with meanwhile(
            out / ".work" / "signatures" / "00002.parquet",
            lambda: found.remove_node(added[0], allow_graceful=False),
        ) as lost:
            deduplicate(many, out, Options(), address=found.address, subject_key=key)
        assert lost
        assert read_tree(out) == expected
        out = tmp_path / "other"
        with (
            meanwhile(
                out / ".work" / "signatures" / "00002.parquet",
                lambda: found.remove_node(added[1], allow_graceful=False),
            ),
            pytest.raises(ClusterError, match=r"^no node is left that could go on"),
        ):
            deduplicate(many, out, Options(), address=found.address, subject_key=key)
        assert not (out / "run.json").exists()
        deduplicate(many, out, Options(), subject_key=key)
        assert read_tree(out) == expected
    finally:
        found.shutdown()


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_what_another_one_goes_on_with(
    address: str, many: Path, key: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    words = ["dedup", many, "-o", tmp_path / "out", "--engine", "ray", "--address", address, "--level", "hash"]
    words += ["--subject-key", key, "--no-report"]
    command = [sys.executable, "-c", "from eval.cli import main; main()", *map(str, words)]
    driver = subprocess.Popen(command, cwd=tmp_path)
    signatures = tmp_path / "out" / ".work" / "signatures"
    while not (signatures / "00002.parquet").exists():
        assert driver.poll() is None
        time.sleep(0.005)
    driver.kill()
    driver.wait()
    deduplicate(many, tmp_path / "out", Options(), address=address, subject_key=key)
    assert read_tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_edited_copies_a_test_set_and_an_export_are_the_same_too(
    address: str, src: Path, key: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(5):
        cropped = picture(number).crop((12, 12, 150, 150))
        (other / f"{number}.png").write_bytes(encode(cropped, "PNG"))
    options = Options(level="copy", against=(str(other),))
    trees = []
    for where in (None, address):
        out = tmp_path / "out"  # of the same name, which run.json and the exports have in them
        deduplicate(src, out, options, address=where, subject_key=key)
        assert manifest.read_run(out)["counts"]["external"]["rows"] > 0
        exports = {"same": "webdataset", "parquet": "parquet"}
        for name, kind in exports.items():
            export(out, tmp_path / name, ExportOptions(format=kind), address=where)
        trees.append({name: read_tree(tmp_path / name) for name in ("out", *exports)})
        for name in ("out", *exports):
            (tmp_path / name).rename(tmp_path / f"{name}-{len(trees)}")
    assert trees[0] == trees[1]


@pytest.mark.slow
def test_the_program_under_uv_run_starts_a_cluster_of_its_own_and_says_no_more_than_without(
    src: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parent.parent
    uv = [os.environ.get("UV", "uv"), "run", "--no-sync", "unmemorize"]
    words = ["dedup", src, "-o", tmp_path / "out", "--engine", "ray", "--jobs", "1", "--level", "hash", "--no-report"]
    done = subprocess.run([*uv, *map(str, words)], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("60 images: ")
    again = [*uv, *map(str, words), "--address", "127.0.0.1:9"]
    lost = subprocess.run(again, cwd=root, capture_output=True, text=True, check=False)
    assert (lost.returncode, lost.stderr.count("\n")) == (3, 1)
    assert lost.stderr.startswith("unmemorize: no Ray cluster answers at 127.0.0.1:9 ")


@pytest.mark.slow
def test_a_cluster_of_its_own_has_so_many_workers_of_one_thread(tmp_path: Path) -> None:
    def work(number: int) -> tuple[int, int, dict[str, str | None]]:
        time.sleep(0.1)
        return number, os.getpid(), {name: os.environ.get(name) for name in cluster.ONE_THREAD}

    before = dict(os.environ)
    with Cluster(2, cluster.HERE, tmp_path) as workers:
        numbers, processes, threads = zip(*workers.run(work, [(n,) for n in range(20)]), strict=True)
        assert ray.cluster_resources()["CPU"] == 2
    assert list(numbers) == list(range(20))
    assert len(set(processes)) > 1
    assert all(each == cluster.ONE_THREAD for each in threads)
    assert {name: os.environ.get(name) for name in cluster.ONE_THREAD} == {
        name: before.get(name) for name in cluster.ONE_THREAD
    }


def test_an_address_needs_the_engine(src: Path) -> None:
    wrong = CliRunner().invoke(app, ["dedup", str(src), "--address", "auto"])
    assert wrong.exit_code == 2
    assert "--address is of --engine ray" in wrong.output
