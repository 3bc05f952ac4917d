"""Headers are found in folders, in the Hugging Face cache, and on a hub without downloading weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import synthetic

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIND = """
import json, sys
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.headers import find_headers
try:
    found = find_headers(sys.argv[1], None)
    print(json.dumps({name: [header.dtype, list(header.shape)] for name, header in found.items()}))
except InputError as error:
    print(json.dumps(str(error)))
"""


def _find(model: str, cache: Path, **env: str) -> dict[str, list] | str:
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"} | env
    done = subprocess.run(
        [sys.executable, "-c", FIND, model], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_checkpoint(
        tmp_path_factory.mktemp("headers") / "sharded", synthetic.small_config(), shards=2
    )


@pytest.fixture(scope="module")
def expected() -> dict[str, list]:
    return {name: ["BF16", list(shape)] for name, shape in synthetic.shapes(synthetic.small_config()).items()}


def test_a_folder(checkpoint: Path, expected: dict[str, list], tmp_path: Path) -> None:
    assert _find(str(checkpoint), tmp_path) == expected


def _cache(checkpoint: Path, cache: Path, *missing: str) -> Path:
    """Somebody's Gemma as `huggingface_hub` keeps it, without some files; returns the repository's folder."""
    repository = cache / "models--somebody--gemma"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(*missing))
    return repository


def test_the_cache(checkpoint: Path, expected: dict[str, list], tmp_path: Path) -> None:
    _cache(checkpoint, tmp_path)
    assert _find("somebody/gemma", tmp_path) == expected


def test_the_cache_without_files_that_no_engine_needs(
    checkpoint: Path, expected: dict[str, list], tmp_path: Path
) -> None:
    """vLLM downloads by patterns; huggingface_hub 2 knows what else the repository has, and calls that incomplete."""
    tree_cache = pytest.importorskip("huggingface_hub._tree_cache")
    repository = _cache(checkpoint, tmp_path)
    files = [*(path.name for path in checkpoint.iterdir()), "README.md"]
    tree_cache.write_tree_cache(repository, COMMIT, dict.fromkeys(files, tree_cache.TreeCacheEntry(1, "1")))
    assert _find("somebody/gemma", tmp_path) == expected


@pytest.mark.parametrize("missing", ["model-00002-*", "model-00002-* model.safetensors.index.json"])
def test_a_cache_without_all_weights_is_not_taken(
    missing: str, checkpoint: Path, hub: str, expected: dict[str, list], tmp_path: Path
) -> None:
    """Another process may be downloading them; the hub has all headers."""
    _cache(checkpoint, tmp_path, *missing.split())
    assert _find("somebody/gemma", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0") == expected


def test_weights_in_object_storage(checkpoint: Path, tmp_path: Path) -> None:
    """With `--load-format runai_streamer` vLLM fetches all but the weights into a folder, and names that."""
    folder = tmp_path / "fetched"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    message = _find(str(folder), tmp_path)
    assert isinstance(message, str) and message.startswith(f"{folder}: got a configuration without weights")
    assert "object storage" in message and "VLLM_PLUGINS" in message


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    message = _find("somebody/gemma", tmp_path, HF_ENDPOINT=closed, HF_HUB_OFFLINE="0")
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith("somebody/gemma: cannot read the headers of its weights: ")


def test_neither_cached_nor_online(tmp_path: Path) -> None:
    message = _find("somebody/gemma", tmp_path)
    assert isinstance(message, str)
    assert message.startswith("somebody/gemma: cannot read the headers of its weights: ")


class _Hub(BaseHTTPRequestHandler):
    """Serves one repository's files, whole or by range, as huggingface.co does."""

    folder: Path
    sent = 0

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.folder / Path(self.path).name
        if not self.path.startswith("/somebody/gemma/resolve/main/") or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            last = min(last, len(content) - 1)
        body = content[first : last + 1]
        self.send_response(206 if asked else 200)
        headers = {"Content-Length": len(body), "ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            type(self).sent += len(body)
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[str]:
    _Hub.folder, _Hub.sent = checkpoint, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_sends_headers_alone(hub: str, checkpoint: Path, expected: dict[str, list], tmp_path: Path) -> None:
    assert _find("somebody/gemma", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0") == expected
    assert 0 < _Hub.sent < sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 2
    assert not list(tmp_path.rglob("*.safetensors"))
