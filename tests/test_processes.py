"""Several processes that work as one: who is one of them, that they compute what one computes and read only what is
theirs, that one prints, and that all end together. Real processes, of four CPU devices each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from folders import write_model, write_text_model
from golden import check_sums

from glm_jax import generate_ids, load, processes
from glm_jax.cli import main
from glm_jax.config import tiny
from glm_jax.convert.safetensors import read_folder
from glm_jax.errors import GLMError, UsageError
from glm_jax.processes import Place, find

ROOT = Path(__file__).resolve().parents[1]
FEW = dict(num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=2, hidden_size=32, num_nextn_predict_layers=0)
LAUNCHERS = ("SLURM", "OMPI", "PMI", "JOB_COMPLETION", "JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "TPU_", "KUBERNETES")
# Process 1 compiles anew every time, since jax keeps no programs but those of process 0; quickly, then.
FAST = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"  # the last of two flags is heeded


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(**more) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return clean | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"} | more


@contextmanager
def started(*commands: list, envs=None, stdin=subprocess.DEVNULL, cwd=ROOT):
    """Starts each command; all are killed at the end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and inherited
    with ExitStack() as stack:
        children = []
        try:
            for i, command in enumerate(commands):
                pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                env = environment(**(envs[i] if envs else {}))
                here = stdin if i == 0 else subprocess.DEVNULL
                child = subprocess.Popen([str(c) for c in command], env=env, cwd=cwd, stdin=here, **pipes)
                stack.enter_context(child)
                stack.callback(child.kill)
                children.append(child)
        finally:
            signal.signal(signal.SIGINT, before)
        yield children


def ended(children, timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, stdout, stderr of each."""
    end, out = time.monotonic() + timeout, []
    for child in children:
        said = child.communicate(timeout=max(0.1, end - time.monotonic()))
        out.append((child.returncode, *said))
    return out


def flags(count: int = 2, port: int | None = None) -> list[list]:
    port = port or free_port()
    return [["--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", i] for i in range(count)]


def glm_jax(*argv, count: int = 2, **options) -> list[tuple[int, str, str]]:
    """A command in each of several processes."""
    with started(*([sys.executable, "-m", "glm_jax", *argv, *f] for f in flags(count)), **options) as children:
        return ended(children)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text"), **FEW)


# ---- together


@pytest.mark.slow
def test_two_processes_answer_as_one_and_one_prints(folder, capfd):
    argv = ("generate", "-m", folder, "-p", "a", "--max-tokens", "4", "--raw", "--json")  # of one token: one program
    first, second = glm_jax(*argv, "--mesh", "expert=4,tensor=2")
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert second[1:] == ("", "")
    chatter, numbers = r"(loading .*\n|no token yet.*\n)*", r"prompt: .*\ngeneration: .*\npeak memory: .*\n"
    assert re.fullmatch(f"{chatter}1 row padded to 4 .*\n{chatter}{numbers}", first[2])
    assert main([*map(str, argv), "--mesh", "data=1"]) == 0
    said, alone = json.loads(first[1]), json.loads(capfd.readouterr().out)
    assert said["tokens"] == alone["tokens"] and said["text"] == alone["text"]
    assert np.allclose(said["logprobs"], alone["logprobs"], atol=1e-5)


# What each process of a script does, and what it must come to.
NUMBERS = """
import json, sys
from glm_jax import processes
processes.start()
import jax, numpy as np
from flax import nnx
from glm_jax import generate_ids, load, loss, save
from glm_jax.convert.safetensors import Tensor
from glm_jax.model import weight_path

folder, out, mesh, rules = sys.argv[1:]
seen, read, progress = [], Tensor.read, []
def counted(tensor, rows=None, out=None):
    data = read(tensor, rows, out)
    seen.append((tensor.name, data.nbytes))
    return data
Tensor.read = counted
model, _ = load(folder, mesh=mesh, rules=rules, progress=lambda *at: progress.append(at))
Tensor.read = read
host = lambda a: np.asarray(processes.everywhere(a))
ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 16))
graph, state = nnx.split(model)
found = {"logits": host(model(ids)[0]), "loss": host(loss(model, ids)[0])}
found["jit"] = host(jax.jit(lambda state: nnx.merge(graph, state)(ids)[0])(state))
cache = model.cache(8, 64)
_, cache = model(ids[:, :9], cache)
found["cached"] = host(model(ids[:, 9:], cache)[0])
rows = [list(map(int, row[:n])) for row, n in zip(ids, (3, 9, 16))]
found["tokens"] = np.asarray(generate_ids(model, rows, max_tokens=5, stop_ids=()))
found["drawn"] = np.asarray(generate_ids(model, rows, max_tokens=5, stop_ids=(), temperature=1.0, seed=[3, 4, 5]))
gradient = jax.jit(jax.grad(lambda state: loss(nnx.merge(graph, state), ids)[0]))(state)
for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    found["gradient " + weight_path(path)] = host(leaf)
np.savez(f"{out}/{processes.index()}.npz", **found)
held = sum(len({str(s.index) for s in a.addressable_shards}) * a.addressable_shards[0].data.nbytes
           for a in jax.tree.leaves(model))
print(json.dumps([sum(n for _, n in seen), progress[-1], held, jax.device_count(), jax.local_device_count()]))
if processes.count() > 1:
    save(model, f"{out}/saved")
"""


def places(count: int = 2) -> list[dict]:
    at = f"127.0.0.1:{free_port()}"
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    return [dict(zip(names, (at, str(count), str(i)), strict=True)) for i in range(count)]


def script(code: str, *argv, count: int = 2, **options):
    return started(*([sys.executable, "-c", code, *argv],) * count, envs=places(count), **options)


def by_one_process(root):
    """A model, and what one process of one device makes of it."""
    write_model(root / "model", tiny(**FEW))
    with started([sys.executable, "-c", NUMBERS, root / "model", root, "data=1", "ep"]) as children:
        ((code, _, error),) = ended(children)
    assert code == 0, error
    return root / "model", dict(np.load(root / "0.npz"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return by_one_process(tmp_path_factory.mktemp("numbers"))


def by_two_processes(folder, out, mesh, rules):
    """What each of two processes of four devices makes of a model, and what it says of the bytes."""
    with script(NUMBERS, folder, out, mesh, rules) as children:
        answers = ended(children, 500)
    for code, _, error in answers:
        assert code == 0, error
    return [(dict(np.load(out / f"{i}.npz")), json.loads(answers[i][1].splitlines()[-1])) for i in (0, 1)]


@pytest.mark.slow
def test_numbers_are_those_of_one_process(numbers, tmp_path):
    """Experts over both; benchmarks/every_mesh.py has the other rules."""
    folder, alone = numbers
    answers = by_two_processes(folder, tmp_path, "expert=4,tensor=2", "ep")
    whole = {name for name, a in alone.items() if a.dtype.kind == "i"}
    for found, _ in answers:
        assert all(np.array_equal(found.pop(name), alone[name]) for name in whole)
        check_sums(found, {name: a for name, a in alone.items() if name not in whole})
    # The bytes: what is read is what progress counted and, cut over experts, what the process's devices hold.
    tensors = read_folder(folder).values()
    total, experts = (sum(t.nbytes for t in tensors if part in t.name) for part in ("", ".experts."))
    for _, (read, (done, promised), held, devices, local) in answers:
        assert (devices, local) == (8, 4)
        assert read == done == promised
        assert read == held == total - experts // 2
    saved = {n: t.read().tobytes() for n, t in read_folder(tmp_path / "saved").items()}
    assert saved == {n: t.read().tobytes() for n, t in read_folder(folder).items()}
    assert load(tmp_path / "saved", mesh="data=1")[0].config == load(folder, mesh="data=1")[0].config


@pytest.mark.slow
def test_each_process_reads_its_experts_and_no_others(numbers):
    """By name: of two processes over `expert` each reads half of the experts."""
    code = """
import collections, json, re, sys
from glm_jax import processes
processes.start()
from glm_jax import load
from glm_jax.convert.safetensors import Tensor
seen, read = [], Tensor.read
def counted(tensor, rows=None, out=None):
    data = read(tensor, rows, out)
    seen.append((tensor.name, data.nbytes))
    return data
Tensor.read = counted
load(sys.argv[1], mesh="expert=8")
print(json.dumps(seen))
"""
    with script(code, numbers[0]) as children:
        answers = ended(children)
    tensors = read_folder(numbers[0])
    for i, (code, out, error) in enumerate(answers):
        assert code == 0, error
        seen = json.loads(out.splitlines()[-1])
        experts = {int(m[1]) for name, _ in seen if (m := re.search(r"experts\.(\d+)\.", name))}
        assert experts == set(range(4 * i, 4 * i + 4))
        mine = [n for n in tensors if (m := re.search(r"experts\.(\d+)\.", n)) is None or int(m[1]) in experts]
        assert sorted(seen) == sorted([n, tensors[n].nbytes] for n in mine)


@pytest.mark.slow
def test_a_chat_is_read_by_process_0_and_answered_by_all(folder):
    argv = [sys.executable, "-m", "glm_jax", "chat", "-m", folder, "--max-tokens", "3"]
    with started(*(argv + f for f in flags()), stdin=subprocess.PIPE) as children:
        out, error = children[0].communicate("the tool\n/clear\nthe model\n", timeout=240)
        second = children[1].communicate(timeout=30)
    assert [c.returncode for c in children] == [0, 0], error + second[1]
    assert second == ("", "") and error.count("generation:  3 tokens") == 2
    assert out.count("\n") >= 2


# ---- the end


WORK = """
import sys, time
from glm_jax import processes
processes.start()
import jax, numpy as np
mesh = jax.make_mesh((jax.device_count(),), ("d",))
x = processes.placed(np.arange(1.0 * mesh.size), jax.NamedSharding(mesh, jax.P("d")))
f = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
f(x).block_until_ready()
print("ready", flush=True)
for _ in range(600):
    f(x).block_until_ready()
    time.sleep(0.05)
    if sys.argv[1] == "raise" and processes.index() == 1:
        raise ValueError("no good")
    if sys.argv[1] == "done":
        break
"""


def until(child, word: str):
    """Reads stdout up to a line with this word."""
    for line in child.stdout:
        if word in line:
            return
    raise AssertionError(child.communicate())


@pytest.mark.slow
@pytest.mark.parametrize("who, count", [(0, 2), (1, 3)])
def test_a_killed_process_ends_the_others_with_one_line(who, count):
    with script(WORK, "wait", count=count) as children:
        for child in children:
            until(child, "ready")
        begin = time.monotonic()
        children[who].kill()
        answers = ended(children, 20)
        assert time.monotonic() - begin < 3
    del answers[who]
    assert {(code, error) for code, _, error in answers} == {
        (1, f"glm-jax: process {who} ({socket.gethostname()}) has gone\n")
    }


@pytest.mark.slow
def test_an_exception_in_one_ends_the_other(tmp_path):
    with script(WORK, "raise") as children:
        answers = ended(children, 60)
    assert [code for code, _, _ in answers] == [1, 1]
    assert answers[0][2] == f"glm-jax: process 1 ({socket.gethostname()}) has failed: ValueError: no good\n"
    assert answers[1][2].endswith("\nValueError: no good\n") and "glm-jax:" not in answers[1][2]


@pytest.mark.slow
def test_a_normal_end_is_quick_and_silent():
    with script(WORK, "done") as children:
        for child in children:
            until(child, "ready")
        begin = time.monotonic()
        answers = ended(children, 20)
        assert time.monotonic() - begin < 5
    assert [(code, error) for code, _, error in answers] == [(0, ""), (0, "")]


@pytest.mark.slow
@pytest.mark.parametrize("who, number", [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_an_interrupted_command_ends_in_all(folder, who, number):
    argv = [sys.executable, "-m", "glm_jax", "generate", "-m", folder, "-p", "the", "--max-tokens", 4000, "--raw"]
    with started(*(argv + f for f in flags()), envs=[{"PYTHONUNBUFFERED": "1"}] * 2) as children:
        assert children[0].stdout.read(1)
        begin = time.monotonic()
        children[who].send_signal(number)
        answers = ended(children, 30)
        assert time.monotonic() - begin < 6
    assert [code for code, _, _ in answers] == [130 if i == who else 1 for i in (0, 1)]
    other = [line for line in answers[1 - who][2].splitlines() if line.startswith("glm-jax")]
    assert other == [f"glm-jax: process {who} ({socket.gethostname()}) was interrupted"]
    assert "Traceback" not in answers[0][2] + answers[1][2] and "***" not in answers[0][2] + answers[1][2]


@pytest.mark.slow
def test_an_interrupt_is_seen_while_waiting_for_a_process_that_stands_still(folder):
    argv = [sys.executable, "-m", "glm_jax", "generate", "-m", folder, "-p", "the", "--max-tokens", 4000, "--raw"]
    with started(*(argv + f for f in flags()), envs=[{"PYTHONUNBUFFERED": "1"}] * 2) as children:
        assert children[0].stdout.read(1)
        children[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        begin = time.monotonic()
        children[0].send_signal(signal.SIGINT)
        code, _, error = ended(children[:1], 30)[0]
        assert time.monotonic() - begin < 6
        children[1].send_signal(signal.SIGCONT)
        other = ended(children[1:], 30)[0]
    assert code == 130 and error.endswith("glm-jax: interrupted\n")
    assert other[0] == 1 and other[2] == f"glm-jax: process 0 ({socket.gethostname()}) was interrupted\n"


@pytest.mark.slow
def test_what_one_finds_wrong_ends_all_and_is_said_once(folder, tmp_path):
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
    write_text_model(tmp_path / "0" / "model", **FEW)
    write_text_model(tmp_path / "1" / "model", **FEW)
    (tmp_path / "1" / "model" / "model.safetensors").unlink()
    code = """
import os, sys
from glm_jax.cli import main
os.chdir(sys.argv[1] + "/" + os.environ["JAX_PROCESS_ID"])
sys.exit(main(["generate", "-m", "model", "-p", "the"]))
"""
    with script(code, tmp_path) as children:
        answers = ended(children, 60)
    name = f"process 1 ({socket.gethostname()})"
    assert [c for c, _, _ in answers] == [66, 66], answers
    assert answers[0][2].startswith(f"glm-jax: {name}: model: no model.safetensors") and answers[0][2].count("\n") == 1
    assert answers[1][1:] == ("", "")
    answers = glm_jax("generate", "-m", tmp_path / "none", "-p", "a")
    assert [c for c, _, _ in answers] == [66, 66] and answers[1][2] == "" and answers[0][2].count("\n") == 1


@pytest.mark.slow
def test_different_flags_are_refused(folder):
    pair = flags()
    argv = [sys.executable, "-m", "glm_jax", "generate", "-m", folder, "-p", "the", "--max-tokens"]
    with started(argv + ["5"] + pair[0], argv + ["6"] + pair[1]) as children:
        answers = ended(children, 60)
    assert [c for c, _, _ in answers] == [2, 2]
    assert answers[0][2] == (
        "glm-jax: process 1 was started with --max-tokens 6, process 0 with 5: give all the same\n"
    )
    assert answers[1][2] == ""


@pytest.mark.slow
def test_different_meshes_are_refused(folder):
    code = f"""
import os
from glm_jax import load, processes
processes.start()
load({str(folder)!r}, mesh=[None, "expert=4,tensor=2"][int(os.environ["JAX_PROCESS_ID"])])
"""
    with script(code) as children:
        answers = ended(children, 60)
    assert [c for c, _, _ in answers] == [1, 1]
    assert any("process 1 was given another model, --mesh, --rules, --dtype or" in said for _, _, said in answers)


@pytest.mark.slow
def test_a_mesh_without_a_device_of_each_process_is_refused(folder):
    answers = glm_jax("generate", "-m", folder, "-p", "the", "--mesh", "expert=4")
    assert [c for c, _, _ in answers] == [2, 2]
    assert answers[0][2] == (
        "glm-jax: --mesh expert=4 takes 4 of 8 devices, and none of process 1: take a mesh of all devices, or start "
        "fewer processes\n"
    )


# ---- the beginning


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)  # other tests have seen to that
    port = free_port()
    with pytest.raises(GLMError, match=rf"process 0 of 3 waited 0 s at 127.0.0.1:{port} for process 1, 2: start them"):
        processes.start(f"127.0.0.1:{port}", 3, 0, wait=0.3)
    with pytest.raises(GLMError, match=rf"process 1 of 2 waited 0 s for the coordinator at 127.0.0.1:{port} \("):
        processes.start(f"127.0.0.1:{port}", 2, 1, wait=0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {taken} is taken: give another"):
            processes.start(f"127.0.0.1:{taken}", 2, 0, wait=0.3)
    assert processes.count() == 1


@pytest.mark.slow
def test_wrong_numbers_are_refused_by_both():
    at = flags()
    argv = [sys.executable, "-m", "glm_jax", "generate", "-p", "a"]
    with started(argv + at[0], argv + at[0][:2] + ["--processes", 3, "--process", 2]) as children:
        answers = ended(children, 60)
    assert [c for c, _, _ in answers] == [2, 2]
    for _, _, error in answers:
        assert re.fullmatch(
            r"glm-jax: process 2 of 3 \(.*\) came to 127.0.0.1:\d+, where process 0 of 2 waits: check --processes and "
            r"--process\n",
            error,
        )


@pytest.mark.slow
def test_a_proxy_is_not_asked_for_the_coordinator():
    """Where gRPC would go through one, jax aborts after a minute."""
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    envs = [place | proxies for place in places()]
    with started(*([sys.executable, "-c", WORK, "done"],) * 2, envs=envs) as children:
        answers = ended(children, 50)
    assert [(code, error) for code, _, error in answers] == [(0, ""), (0, "")]


def test_who_has_devices_already_is_refused_before_it_meets_the_others():
    jax.devices()
    with pytest.raises(UsageError, match="jax has its devices already: call it before anything that asks for one"):
        processes.start(f"127.0.0.1:{free_port()}", 2, 0, wait=0.3)
    assert processes.count() == 1


OWN = """
import os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
at, count, i = (os.environ[name] for name in names)
jax.distributed.initialize(at, int(count), int(i), cluster_detection_method="deactivate")
from glm_jax import generate_ids, load, processes, save
from glm_jax.errors import UsageError
processes.start()
model, _ = load(sys.argv[1])
print("tokens", generate_ids(model, [[1, 2, 3]], max_tokens=2, stop_ids=()))
try:
    save(model, sys.argv[2])
except UsageError as error:
    print("save", error)
"""


@pytest.mark.slow
def test_a_script_may_initialize_jax_itself(numbers, tmp_path):
    with script(OWN, numbers[0], tmp_path / "saved") as children:
        answers = ended(children)
    said = [[line for line in out.splitlines() if line.startswith(("tokens", "save"))] for _, out, _ in answers]
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert said[0] == said[1] and len(said[0]) == 2
    model = load(numbers[0], mesh="data=1")[0]
    assert said[0][0] == f"tokens {generate_ids(model, [[1, 2, 3]], max_tokens=2, stop_ids=())}"
    assert said[0][1].endswith("in place of jax.distributed.initialize()")


@pytest.fixture
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    return lambda **env: [monkeypatch.setenv(k, str(v)) for k, v in env.items()]


def test_alone_by_default(clean):
    assert find(None, None, None) is None
    assert find(None, 1, None) is None and find("node1:1234", 1, 0) is None
    clean(SLURM_JOB_ID=7, SLURM_NTASKS=2, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NNODES=2)  # a shell of sbatch
    assert find(None, None, None) is None
    clean(SLURM_STEP_NUM_TASKS=1, SLURM_STEP_NODELIST="node1", SLURM_STEP_TASKS_PER_NODE="1")  # of salloc; srun -n 1
    assert find(None, None, None) is None
    clean(JOB_COMPLETION_INDEX=3, OMPI_COMM_WORLD_SIZE=1)
    assert find(None, None, None) is None


def test_by_flags_and_by_environment(clean):
    assert find("node1:1234", 2, 1) == Place("node1:1234", 2, 1, [], "flags")
    clean(JAX_COORDINATOR_ADDRESS="node1:1234", JAX_NUM_PROCESSES=4, JAX_PROCESS_ID=3)
    assert find(None, None, None) == Place("node1:1234", 4, 3, [], "flags")
    assert find(None, None, 0) == Place("node1:1234", 4, 0, [], "flags")


@pytest.mark.parametrize(
    "given, said",
    [
        (("node1:1", 2, 3), "--process 3 of --processes 2: processes count from 0 to 1"),
        (("node1:1", 2, 2), "--process 2 of --processes 2"),
        (("node1:1", 2, -1), "--process -1"),
        (("node1:1", 0, 0), "--process 0 of --processes 0"),
        ((None, 2, 1), "--processes,? .*without --coordinator HOST:PORT"),
        (("node1:1", None, None), "--coordinator without --processes N .* and --process I"),
        (("node1", 2, 1), "--coordinator node1: must be HOST:PORT"),
        (("node1:http", 2, 1), "must be HOST:PORT"),
        (("node1:70000", 2, 1), "must be HOST:PORT"),
    ],
)
def test_wrong_flags(clean, given, said):
    with pytest.raises(UsageError, match=said):
        find(*given)
    clean(JAX_NUM_PROCESSES="two")
    with pytest.raises(UsageError, match="JAX_NUM_PROCESSES=two: must be a number"):
        find(None, None, None)


def test_slurm(clean):
    step = dict(SLURM_JOB_ID=4711, SLURM_NTASKS=2, SLURM_STEP_NUM_TASKS=2, SLURM_STEP_NODELIST="node[07-08]")
    clean(**step, SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_PROCID=1, SLURM_LOCALID=0)
    place = find(None, None, None)
    assert place == Place(f"node07:{4711 % 4096 + 61440}", 2, 1, [], "slurm")  # all of the node's GPUs are its own
    clean(SLURM_STEP_NUM_TASKS=16, SLURM_STEP_TASKS_PER_NODE="8(x2)", SLURM_PROCID=11, SLURM_LOCALID=3)
    assert find("10.0.0.1:99", None, None) == Place("10.0.0.1:99", 16, 11, [3], "slurm")
    clean(CUDA_VISIBLE_DEVICES="3")  # --gpus-per-task=1
    assert find("10.0.0.1:99", None, None) == Place("10.0.0.1:99", 16, 11, [], "slurm")


def test_open_mpi(clean):
    clean(OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_LOCAL_RANK=0, OMPI_COMM_WORLD_LOCAL_SIZE=1)
    assert find("node1:99", None, None) == Place("node1:99", 2, 1, [], "mpi4py")
    clean(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    place = find(None, None, None)
    assert place is not None and place.coordinator.startswith("10.96.0.1:") and place.found == "ompi"


def test_a_jobset(clean, monkeypatch):
    clean(JOB_COMPLETION_INDEX=1, JAX_NUM_PROCESSES=2, KUBERNETES_SERVICE_HOST="10.0.0.1")
    monkeypatch.setattr(socket, "getfqdn", lambda: "glm-workers-0-1.glm.default.svc.cluster.local")
    want = "glm-workers-0-0.glm.default.svc.cluster.local:55527"
    assert find(None, None, None) == Place(want, 2, 1, [], "JobSet")
    clean(JAX_COORDINATOR_ADDRESS="glm-workers-0-0.glm:1234")
    assert find(None, None, None) == Place("glm-workers-0-0.glm:1234", 2, 1, [], "JobSet")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "jobset"])
def test_two_processes_of_a_launcher_find_each_other(launcher, tmp_path):
    code = WORK
    if launcher == "slurm":
        step = dict(SLURM_JOB_ID=str(free_port() - 61440 & 4095), SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2")
        step |= dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2")
        envs = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)]
    else:
        code = "import socket\nsocket.getfqdn = lambda: 'localhost'\n" + code
        envs = [
            {"JOB_COMPLETION_INDEX": str(i), "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_PORT": port}
            for port in [str(free_port())]
            for i in (0, 1)
        ]
    with started(*([sys.executable, "-c", code, "done"],) * 2, envs=envs) as children:
        answers = ended(children, 60)
    assert [(code, error) for code, _, error in answers] == [(0, ""), (0, "")]


# ---- the page


def page(name: str) -> str:
    """A block of docs/processes.md that is marked to be run."""
    text = (ROOT / "docs/processes.md").read_text()
    (block,) = re.findall(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", text, re.S)
    return block


@pytest.mark.slow
def test_the_pages_commands_do_what_it_says(tmp_path):
    command = tmp_path / "glm-jax"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m glm_jax "$@"\n')
    command.chmod(0o755)
    code = page("generate").replace("12345", str(free_port()))
    with started(["bash", "-c", code], envs=[{"PATH": f"{tmp_path}:{os.environ['PATH']}"}]) as children:
        ((code, out, error),) = ended(children)
    assert code == 0 and out.strip(), error
    assert error.count("generation:  8 tokens") == 1
    with script(page("start")) as children:
        answers = ended(children, 60)
    assert [(c, o) for c, o, _ in answers] == [(0, f"process {i} of 2: 4 of 8 devices\n") for i in (0, 1)]


def test_every_block_of_the_page_is_run_or_needs_a_cluster():
    text = (ROOT / "docs/processes.md").read_text()
    blocks = re.findall(r"(<!-- test: \w+ -->\n)?```(\w+)\n(.*?)```", text, re.S)
    assert all(mark or re.search("srun|ssh|JobSet", block) for mark, _, block in blocks) and len(blocks) == 6
