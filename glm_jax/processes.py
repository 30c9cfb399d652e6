"""Several processes that work as one: how they find each other, what they tell each other, and how they end.

jax.distributed does the work between devices. What it lacks is an end: a process that does not come, or dies, makes it
abort the others with a stack dump, some of them after minutes. So the processes first meet here, on the coordinator's
port, and each keeps a line to process 0 open. The kernel closes the lines of a process that dies, whatever it died of;
the lines also carry what few things all must know. jax's own client is led through a relay in its process, which does
not tell it that the coordinator has closed, so that it has no time to abort before the line is heard.
All of it is absent, and costs nothing, for a single process."""

import atexit
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

import numpy

from glm_jax import errors
from glm_jax.errors import GLMError, UsageError

WAIT = 60.0  # seconds for all processes to meet
GRACE = 1.0  # seconds in which a process may end for the same reason as another, and so need not be told
LEAVE = 300.0  # seconds that those who are done wait for the rest
PORT = 55527  # of a JobSet's first pod, as jax has it
_LONGEST = 1 << 26  # bytes of one message


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of several processes this one is."""

    coordinator: str  # HOST:PORT
    processes: int
    process: int
    devices: list[int]  # which of this host's GPUs are its own; none: all that it sees
    found: str  # how it is known


class _Job:
    """The lines of this process, once it has met the others: from process 0 to each, from each to process 0."""

    def __init__(self, place: Place, lines: dict[int, socket.socket], hosts: list[str]):
        self.place, self.lines, self.hosts = place, lines, hosts
        self.heard = {i: queue.SimpleQueue() for i in lines}  # what each said
        self.writing = threading.Lock()
        self.devices = False  # are jax's to share
        self.done = False  # from here on a line may close
        self.ending = threading.Event()  # this process has a reason to end
        self.reason: tuple[int, str] | None = None  # which other process ended, and its words
        self.knows = threading.Event()  # there is a reason
        for i in lines:
            threading.Thread(target=self._listen, args=(i,), daemon=True, name=f"line to process {i}").start()

    def name(self, process: int) -> str:
        return f"process {process} ({self.hosts[process]})"

    def send(self, message: dict, but: int = -1) -> None:
        with self.writing:
            for i, line in self.lines.items():
                if i != but:
                    with contextlib.suppress(OSError):  # whoever has gone is noticed where its line is read
                        _send(line, message)

    def _listen(self, i: int) -> None:
        messages = _messages(self.lines[i])
        for message in messages:
            if "say" in message:
                self.heard[i].put(message["say"])
            elif "end" in message:
                self.heard_end(*message["end"])
        if not self.done:  # without a word: killed, crashed, or its host is gone
            self.heard_end(i, "has gone")

    def heard_end(self, process: int, words: str) -> None:
        """Another process has ended, so this one ends: by itself in a moment, or here."""
        if self.knows.is_set() or self.done:
            return
        self.reason = process, words
        self.knows.set()
        if self.place.process == 0:
            self.send({"end": [process, words]}, but=process)
        if words == "has gone" or not self.ending.wait(GRACE):
            if self.ending.is_set():  # the main thread is at it, and knows
                time.sleep(2 * GRACE)
            _leave(f"{self.name(process)} {words}", 1)


_job: _Job | None = None
stderr = 2  # where this process's last words go


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: float = WAIT,
    devices: bool = True,
) -> None:
    """Makes this process one of several, if it is; call it first, before anything that asks jax for a device.

    `coordinator` is "HOST:PORT" of process 0, `processes` how many there are, `process` which this is, from 0; so are
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. What is not given is taken from Slurm, Open MPI, a
    JobSet or a TPU slice. A process that is alone is left as it is; a second call does nothing. Without `devices` jax
    is not imported: the processes share out work of their hosts, and a lone process on a TPU slice is alone.

    From then on an end of one process is an end of all: within seconds each says why on stderr and exits with 1.
    Raises UsageError for numbers that cannot be or if jax has its devices already, and GLMError if not all have met
    within `wait` seconds."""
    global _job
    if _job is not None:
        return
    place = find(coordinator, processes, process, wait, devices)
    if place is None:
        return
    if not devices:
        _job = _Job(place, *_meet(place, wait))
        atexit.register(_at_exit)
        return
    import jax

    if jax.distributed.is_initialized():  # by the caller, whose business its end is then
        return
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():  # said before the others are met, who would wait
        raise UsageError("processes.start: jax has its devices already: call it before anything that asks for one")
    lines, hosts = _meet(place, wait)
    _without_proxy(place)
    jax.config.update("jax_check_proxy_envs", False)  # a warning of what has just been seen to
    # jax's own answer to SIGTERM is to note it and go on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _job = _Job(place, lines, hosts)
    _job.devices = True
    jax.distributed.initialize(
        _relay(lines[0].getpeername()) if place.process else place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(wait),
    )
    atexit.register(_at_exit)


def count() -> int:
    """How many processes there are; asks jax for nothing."""
    return 1 if _job is None else _job.place.processes


def index() -> int:
    """Which of them this is."""
    return 0 if _job is None else _job.place.process


def exchange(value: Any) -> list[Any]:
    """What each process gave, in their order. Called by all, in the same order; values are JSON's."""
    if _job is None:
        return [value]
    if _job.place.process:
        _job.send({"say": value})
        return _job.heard[0].get()
    values = [value] + [_job.heard[i].get() for i in range(1, _job.place.processes)]
    _job.send({"say": values})
    return values


@contextlib.contextmanager
def agreed():
    """What goes wrong inside, in any process, is raised in all, with the process's name if it went wrong in some only.
    Inside there must be nothing that waits for the other processes."""
    if _job is None:
        yield
        return
    error = None
    try:
        yield
    except Exception as e:
        error = e
    said = exchange(None if error is None else [type(error).__name__, str(error)])
    wrong = [i for i, words in enumerate(said) if words]
    if not wrong:
        return
    if error is not None and all(words == said[0] for words in said):
        raise error
    kind, words = said[wrong[0]]
    kind = getattr(errors, kind, GLMError)
    where = _job.name(wrong[0]) + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
    raise kind(f"{where}: {words}") from error


def finish() -> None:
    """Waits until every process is done, and disconnects. Called at the exit of Python too."""
    global _job
    if _job is None:
        return
    job = _job
    if job.place.process:
        job.send({"say": "done"})
    end = time.monotonic() + LEAVE
    for i in job.lines:
        while (said := _next(job.heard[i], end)) != "done":
            if said is None:
                words = f"has not come to an end {LEAVE:.0f} s after {job.name(job.place.process)} had"
                fail(f"{job.name(i)} {words}")
                return
    if job.place.process == 0:  # only now: who is told that all are done listens no more to who dies
        job.send({"say": "done"})
    job.done = True
    if job.devices:
        import jax

        jax.distributed.shutdown()  # waits for all
    elif job.place.process:
        job.send({"say": "done"})
    else:  # until nobody would take a closing line for a death
        for i in job.lines:
            _next(job.heard[i], end)
    for line in job.lines.values():
        line.close()
    _job = None


def fail(words: str, interrupted: bool = False) -> str | None:
    """Tells the others that this process ends, and why, and waits a moment for what they say. Returns the line that
    this process is to show: its own words, those of what another died of, or None if process 0 shows the same."""
    global _job
    if _job is None:
        return words
    job = _job
    job.ending.set()
    own = "was interrupted" if interrupted else f"has failed: {words}"
    foreign = not interrupted and "Error:" in words  # a library's: perhaps for want of another process
    if foreign:
        job.knows.wait(GRACE)
    if job.knows.is_set() and job.reason is not None and job.reason[1] != own:
        if foreign or job.reason[1] == "has gone":
            return f"{job.name(job.reason[0])} {job.reason[1]}"
    job.send({"end": [job.place.process, own]})
    if job.place.process == 0:
        return words
    same = job.knows.wait(GRACE) and job.reason == (0, own)
    return None if same else words


def leave(code: int) -> None:
    """Ends this process at once, if it is one of several: after a failure jax would wait for the others."""
    if _job is not None:
        _leave(None, code)


def catch_signals() -> None:
    """A signal that the main thread does not come to see, since it waits for another process, still ends this one."""
    if _job is None:
        return
    job = _job
    ours, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    seen: list[float] = []
    before = signal.getsignal(signal.SIGINT)

    def handler(number, frame):
        seen.append(time.monotonic())
        if callable(before):
            return before(number, frame)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handler)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)

    def watch(ours: socket.socket, _wakeup: socket.socket):  # an unnamed one would be closed
        while number := ours.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            since = time.monotonic() - GRACE / 2
            time.sleep(2 * GRACE)
            if not job.ending.is_set() and not (seen and seen[-1] > since):
                fail("interrupted", interrupted=True)
                _leave("interrupted", 130)

    threading.Thread(target=watch, args=(ours, wakeup), daemon=True, name="signals").start()


def _leave(words: str | None, code: int) -> None:
    if words is not None:
        with contextlib.suppress(Exception):
            os.write(stderr, f"glm-jax: {words}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _at_exit() -> None:
    if _job is None:
        return
    error = getattr(sys, "last_value", None)  # what Python has just printed the trace of
    if error is None:
        finish()
        return
    fail(f"{type(error).__name__}: {error}".splitlines()[0], isinstance(error, KeyboardInterrupt))
    _leave(None, 130 if isinstance(error, KeyboardInterrupt) else 1)


# ---- arrays over devices of several processes


def placed(tree: Any, sharding):
    """Host arrays, the same in every process, or arrays of the devices, with that sharding."""
    import jax
    from jax.core import Tracer

    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    traced = isinstance(jax.numpy.zeros(()), Tracer)

    def place(a):  # jax.device_put would first gather a host array from all processes, to see that it is the same
        if traced or isinstance(a, Tracer) or not getattr(a, "is_fully_addressable", True):
            return jax.device_put(a, sharding)
        if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            words = place(jax.random.key_data(a))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(a))
        host = numpy.asarray(a)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(place, tree)


def everywhere(tree: Any):
    """Arrays that each process can read whole: as they are if it can, else copied to its devices. Called by all."""
    import jax

    def copy(a):
        if a.is_fully_addressable or a.is_fully_replicated:
            return a
        return _copied(a, jax.NamedSharding(a.sharding.mesh, jax.P()))

    return jax.tree.map(copy, tree)


@functools.cache
def _copier(sharding):
    import jax

    return jax.jit(lambda a: a, out_shardings=sharding)


def _copied(a, sharding):
    return _copier(sharding)(a)


# ---- the lines


def _send(line: socket.socket, message: dict) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _messages(line: socket.socket):
    """Every message until the line closes."""
    with contextlib.suppress(OSError, ValueError), line.makefile("rb") as lines:
        while text := lines.readline(_LONGEST):
            message = json.loads(text)
            if not isinstance(message, dict):
                return
            yield message


def _next(heard: queue.SimpleQueue, end: float):
    with contextlib.suppress(queue.Empty):
        return heard.get(timeout=max(0.0, end - time.monotonic()))


def _kept_alive(line: socket.socket) -> None:
    """A host that vanishes closes no line: the kernel asks after it, and gives up after some ten seconds."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 10_000)):
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _meet(place: Place, wait: float) -> tuple[dict[int, socket.socket], list[str]]:
    """The lines, and the name of every process's host."""
    host, _, port = place.coordinator.rpartition(":")
    end = time.monotonic() + wait
    if place.process:
        return _call(place, host.strip("[]"), int(port), end, wait)
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", int(port)), family=family, dualstack_ipv6=dual, backlog=place.processes)
    except OSError as error:
        taken = "taken" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
        raise UsageError(f"--coordinator {place.coordinator}: port {port} is {taken}: give another") from None
    lines: dict[int, socket.socket] = {}
    hosts = [socket.gethostname()] * place.processes
    try:
        with server:
            while len(lines) < place.processes - 1:
                missing = [str(i) for i in range(1, place.processes) if i not in lines]
                server.settimeout(max(0.001, min(0.2, end - time.monotonic())))  # short, so that Ctrl-C is seen
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    if time.monotonic() < end:
                        continue
                    raise GLMError(
                        f"process 0 of {place.processes} waited {wait:.0f} s at {place.coordinator} for process "
                        f"{', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}: start "
                        f"{'it' if len(missing) == 1 else 'them'}, or open the port"
                    ) from None
                line.settimeout(2.0)
                try:
                    hello = _hello(line)
                    i, n, name = int(hello["process"]), int(hello["processes"]), str(hello["host"])
                except (OSError, ValueError, KeyError, TypeError):  # a stranger
                    line.close()
                    continue
                if n != place.processes or not 0 < i < n or i in lines:
                    why = (
                        f"process {i} of {n} ({name}) came to {place.coordinator}, where process 0 of "
                        f"{place.processes} {'has met one of that number already' if i in lines else 'waits'}: check "
                        "--processes and --process"
                    )
                    _send(line, {"no": why})
                    raise UsageError(why)
                _kept_alive(line)
                lines[i], hosts[i] = line, name
        for line in lines.values():
            _send(line, {"hosts": hosts})
    except BaseException as error:
        for line in lines.values():
            with contextlib.suppress(OSError):
                _send(line, {"no": str(error) or "process 0 was interrupted"})
            line.close()
        raise
    return lines, hosts


def _call(place: Place, host: str, port: int, end: float, wait: float):
    """The line from this process to process 0."""
    me = f"process {place.process} of {place.processes}"
    line, why = None, "no answer"
    while line is None and time.monotonic() < end:
        try:
            line = socket.create_connection((host, port), timeout=max(0.1, min(2.0, end - time.monotonic())))
        except OSError as error:  # its name may not be known yet either
            why = error.strerror or str(error)
            time.sleep(0.1)
    if line is None:
        raise GLMError(
            f"{me} waited {wait:.0f} s for the coordinator at {place.coordinator} ({why}): start process 0, or open "
            "the port"
        )
    _send(line, {"process": place.process, "processes": place.processes, "host": socket.gethostname()})
    answer: dict = {}
    while not answer and time.monotonic() < end + 2:
        line.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            if not line.recv(1, socket.MSG_PEEK):
                break
            line.settimeout(2.0)
            answer = _hello(line)
    if "no" in answer:
        raise UsageError(str(answer["no"]))
    if "hosts" not in answer:
        raise GLMError(f"{me} reached {place.coordinator}, but not all processes came within {wait:.0f} s")
    _kept_alive(line)
    return {0: line}, answer["hosts"]


def _without_proxy(place: Place) -> None:
    """gRPC, which jax's client is, would go to the coordinator through the proxy of a cluster, even on this machine."""
    before = next((v for k in ("no_grpc_proxy", "no_proxy", "NO_PROXY") if (v := os.environ.get(k))), "")
    host = place.coordinator.rpartition(":")[0].strip("[]")
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (before, host, "127.0.0.1")))


def _relay(to: tuple) -> str:
    """An address in this process from where bytes go to the coordinator, and those that come back."""
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, ends: bool):
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                sink.sendall(part)
            if ends:
                sink.shutdown(socket.SHUT_WR)

    def accept():
        while True:
            inner, _ = server.accept()
            end = time.monotonic() + WAIT  # the coordinator may not have begun to listen
            while True:
                try:
                    outer = socket.create_connection(to[:2], timeout=WAIT)
                    break
                except OSError:
                    if time.monotonic() > end:
                        return
                    time.sleep(0.02)
            for line in (inner, outer):
                line.settimeout(None)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for arguments in ((inner, outer, True), (outer, inner, False)):
                threading.Thread(target=pump, args=arguments, daemon=True, name="relay").start()

    threading.Thread(target=accept, daemon=True, name="relay").start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def _hello(line: socket.socket) -> dict:
    """One message, byte by byte: what follows is another's to read."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 1 << 20:
        if not (byte := line.recv(1)):
            break
        text += byte
    return json.loads(text)


# ---- who am I


def find(
    coordinator: str | None, processes: int | None, process: int | None, wait: float = WAIT, slices: bool = True
) -> Place | None:
    """This process's place among several, by what is given, the environment, and the cluster, and unless told
    otherwise the TPU slice; None if it is alone."""
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    found, devices = "flags", []
    if processes == 1 and not process:
        return None
    if None in (coordinator, processes, process):
        cluster = _cluster(coordinator, processes, wait, slices)
        if cluster is not None:
            coordinator, processes = coordinator or cluster.coordinator, processes or cluster.processes
            process = cluster.process if process is None else process
            found, devices = cluster.found, cluster.devices
    if coordinator is None and processes is None and process is None:
        return None
    flags = {
        "--coordinator HOST:PORT (JAX_COORDINATOR_ADDRESS)": coordinator,
        "--processes N (JAX_NUM_PROCESSES)": processes,
        "--process I (JAX_PROCESS_ID)": process,
    }
    if missing := [name for name, value in flags.items() if value is None]:
        given = ", ".join(name.split(" ")[0] for name, value in flags.items() if value is not None)
        raise UsageError(f"{given} without {' and '.join(missing)}: several processes need all three")
    assert coordinator is not None and processes is not None and process is not None
    if not 0 <= process < processes:
        raise UsageError(f"--process {process} of --processes {processes}: processes count from 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator {coordinator}: must be HOST:PORT of process 0, as node1:12345")
    return Place(coordinator, processes, process, devices, found)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: must be a number")
    return int(text)


def _cluster(coordinator: str | None, processes: int | None, wait: float, slices: bool) -> Place | None:
    """What the launcher says, where it has started more than one process. The addresses are jax's to know."""
    env = os.environ
    # A shell of sbatch or salloc has the variables of the job, but is a step of one task.
    if (tasks := _number("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in env:
        each = max(map(int, re.findall(r"(?:^|,)(\d+)", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))), default=1)
        devices = _own_devices(each, "SLURM_LOCALID")
        return _ask_jax("slurm", coordinator, tasks, int(env["SLURM_PROCID"]), devices, wait)
    if (ranks := _number("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        each = _number("OMPI_COMM_WORLD_LOCAL_SIZE") or 1
        devices = _own_devices(each, "OMPI_COMM_WORLD_LOCAL_RANK")
        method = "ompi" if "OMPI_MCA_orte_hnp_uri" in env else "mpi4py"  # Open MPI 5 says not where it was started
        if method == "mpi4py" and coordinator is None and importlib.util.find_spec("mpi4py") is None:
            raise UsageError("mpirun: give --coordinator HOST:PORT of rank 0, or install mpi4py, which asks for it")
        return _ask_jax(method, coordinator, ranks, int(env["OMPI_COMM_WORLD_RANK"]), devices, wait)
    if (pod := _number("JOB_COMPLETION_INDEX")) is not None and (processes or 1) > 1:
        assert processes is not None
        return Place(coordinator or _first_pod(), processes, pod, [], "JobSet")
    if slices and "tpu" in env.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu"):
        from jax._src import clusters

        for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
            if cluster.is_env_present():
                if (hosts := cluster.get_process_count()) == 1:
                    return None
                return _ask_jax(cluster.name, coordinator, hosts, cluster.get_process_id(), [], wait)
    return None


def _ask_jax(method: str, coordinator, processes: int, process: int, devices: list[int], wait: float) -> Place:
    from jax._src import clusters

    if coordinator is None:
        ask = clusters.ClusterEnv.auto_detect_unset_distributed_params
        coordinator = ask(None, processes, process, devices, method, int(wait))[0]
    return Place(coordinator, processes, process, devices, method)  # type: ignore[arg-type]


def _own_devices(each: int, local: str) -> list[int]:
    """Of several processes on a host each has the GPU of its number, unless it sees one only; of one, all."""
    if each == 1 or len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1:
        return []
    return [int(os.environ[local])]


def _first_pod() -> str:
    """A JobSet's pods are HOST-0, HOST-1, ... of one subdomain, and know their own full name."""
    host, dot, rest = socket.getfqdn().partition(".")
    return f"{re.sub(r'-[0-9]+$', '-0', host)}{dot}{rest}:{os.environ.get('JAX_COORDINATOR_PORT', PORT)}"
