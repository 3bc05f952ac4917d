"""Headers are found in folders, in the Hugging Face cache, and on a hub without downloading weights."""

import json
import os
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


def test_the_cache(checkpoint: Path, expected: dict[str, list], tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--gemma"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(checkpoint)
    assert _find("somebody/gemma", tmp_path) == expected


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
