"""A Ray cluster of two nodes on this machine, real processes of Ray's: same bytes, a node killed half-way, refusals."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import scale_tasks
from calibrate_runs import SMALL
from gemma4q_kernels.ggml import GGMLQuantizationType as T
from gemma4q_kernels.ggml.quantize import Quantizers, find_library
from safetensors.torch import save_file
from scale_runs import CONVERSIONS, content, run, write_sources

from gguf_mixed.atomic_file import WriteError
from gguf_mixed.errors import InputError
from gguf_mixed.measure import measure
from gguf_mixed.sensitivity import role_prior
from gguf_mixed.tasks.on_ray import OnRay
from gguf_mixed.tasks.options import with_address
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert

sys.path.append(str(Path(__file__).parents[1] / "gguf"))
from gguf_files import small_moe, write_gguf

GEMMA4Q = Path(sys.executable).with_name("gemma4q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A head with one core, on which the caller is, and another node with one."""
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def workers(cluster):
    with OnRay(cluster.address, 1) as workers:
        yield workers


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_same_bytes(folder, workers, tmp_path, name):
    done = []
    conversion = run(name, folder, tmp_path / "by ray", workers, done.append)
    run(name, folder, tmp_path / "alone", None)
    assert content(tmp_path / "by ray") == content(tmp_path / "alone")
    assert sum(done) == conversion.source_bytes


@pytest.mark.slow
def test_both_nodes_work(workers):
    results = workers.run(scale_tasks.node_after_a_while, range(8), lambda _: None)
    assert len({node for _, node in results}) == 2


@pytest.mark.slow
def test_same_error_table(workers, tmp_path):
    listed = [entry for entry in small_moe() if "attn_output" not in entry[0]]
    inventory = read_inventory(write_gguf(tmp_path / "m.gguf", listed, random_weights=True))
    quantizers = Quantizers(find_library([]))
    asked = inventory, quantizers, role_prior(inventory), None, [T.Q4_0, T.Q8_0, T.IQ4_NL]
    alone, cache = measure(*asked), tmp_path / "cache"
    assert measure(*asked, cache=cache, workers=workers) == alone
    assert measure(*asked, cache=cache) == alone


@pytest.mark.slow
def test_an_error_on_a_node_is_the_task_s(workers):
    with pytest.raises(InputError) as raised:
        list(workers.run(scale_tasks.square_but_three, range(9), lambda _: None))
    assert str(raised.value) == "task 3: got three, expected another"


@pytest.mark.slow
def test_the_command(folder, cluster, workers, tmp_path):
    """One JSON document, nothing on stderr, and but for the command that it names the same files."""
    arguments = ["quantize", "moe", "--scheme", "quark-int8", "--max-shard-size", "60kB", "--json"]
    for target, more in (("alone", []), ("by-ray", ["--ray", cluster.address])):
        result = subprocess.run(
            [GEMMA4Q, *arguments, tmp_path / target, *more], cwd=folder, capture_output=True, text=True, check=True
        )
        assert result.stderr == ""
        assert json.loads(result.stdout)["written"]
    alone, by_ray = content(tmp_path / "alone"), content(tmp_path / "by-ray")
    one, other = (json.loads(files.pop("gemma4q-manifest.json")) for files in (alone, by_ray))
    assert alone == by_ray
    assert other.pop("command")[-1] == cluster.address and one.pop("command")
    assert one == other


@pytest.mark.slow
def test_a_target_that_a_node_does_not_see(folder, workers, tmp_path, monkeypatch):
    """A path that is another place for each process."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriteError, match="expected the target, on a file system that all machines share") as raised:
        run("quark-int8", folder, Path("/proc/self/cwd/target"), workers)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_calibrate(cluster, workers, tmp_path):
    """The command, with paths of its own folder: the file that one process writes, and nothing else."""
    (tmp_path / "text.txt").write_text(
        "\n".join(f"The {number} sheep of the valley went home." for number in range(200))
    )
    shutil.copytree(SMALL / "moe", tmp_path / "model")
    arguments = ["model", "--text", "text.txt", "--samples", "3", "--max-length", "40", "--hessians", "--json"]
    for target, more in (("alone", []), ("by-ray", ["--ray", cluster.address])):
        result = subprocess.run(
            [GEMMA4Q, "calibrate", *arguments, target, *more], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert result.stderr == ""
        assert json.loads(result.stdout)["written"]
    assert (tmp_path / "by-ray").read_bytes() == (tmp_path / "alone").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "by-ray", "model", "text.txt"]


@pytest.mark.slow
def test_a_node_is_killed_half_way(cluster, workers, tmp_path):
    """Last, for it leaves one node: its tasks are done again by the other, and what it began does not stay."""
    source = tmp_path / "source"
    source.mkdir()
    save_file(scale_tasks.matrices(), source / "model.safetensors")
    (source / "config.json").write_text("{}")
    convert(scale_tasks.plan(open_checkpoint(source)), tmp_path / "alone", ["test"], lambda _: None)
    began, target, killed = tmp_path / "began", tmp_path / "target", []
    began.mkdir()

    def is_in_a_task(node):
        began_at = [path.stat().st_mtime for path in began.glob(f"{node}.*")]
        return bool(began_at) and time.time() - max(began_at) < 0.3 * scale_tasks.PAUSE  # a node takes time to die

    def kill_in_a_task():
        while not ended.wait(0.02):
            if len(list(target.glob("*.safetensors"))) >= 2 and is_in_a_task(cluster.other.node_id):
                killed.append(cluster.other.node_id)
                cluster.remove_node(cluster.other, allow_graceful=False)
                return

    conversion = scale_tasks.plan(open_checkpoint(source), began)
    ended, killer = threading.Event(), threading.Thread(target=kill_in_a_task)
    killer.start()
    try:
        assert convert(conversion, target, ["test"], lambda _: None, workers=workers)
    finally:
        ended.set()
        killer.join()
    assert content(target) == content(tmp_path / "alone")
    nodes = [path.name.partition(".")[0] for path in began.iterdir()]
    assert killed and set(nodes) > set(killed), "both worked"
    assert len(nodes) > len(conversion.shards), "a task of the node that died was done again"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no cluster answers there: [Errno 111] Connection refused"),
        ("somewhere", "--ray somewhere: expected auto, local or HOST:PORT of the cluster's head"),
        ("ray://somewhere:1", "--ray ray://somewhere:1: expected auto, local or HOST:PORT of the cluster's head"),
    ],
)
def test_no_such_cluster(address, message):
    with pytest.raises(InputError) as raised, OnRay(address, 1):
        pass
    assert str(raised.value) == message


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError) as raised, OnRay("auto", 1):
        pass
    assert str(raised.value) == "--ray: Ray is not installed: pip install 'vllm-gemma4q[ray]'"


def test_an_address_may_be_left_out():
    assert with_address(["a", "--ray", "b"]) == ["a", "--ray", "auto", "b"]
    assert with_address(["--ray", "--json"]) == ["--ray", "auto", "--json"]
    assert with_address(["--ray"]) == ["--ray", "auto"]
    for address in ("auto", "local", "10.0.0.1:6379", "[::1]:6379", "ray://head:10001"):
        assert with_address(["--ray", address, "b"]) == ["--ray", address, "b"]
