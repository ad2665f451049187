"""Models by their hub id, from a hub that this test is: what is asked for, and what is told."""

import json
import logging
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quantpage.errors import Unavailable
from quantpage.integrations.hf_transformers.loading.checkpoint import find_files
from quantpage.integrations.hf_transformers.loading.hub import is_hub_id
from tests.server.small import save_small

pytestmark = pytest.mark.cpu
COMMIT = "0" * 40
PROGRAM = """
import sys
from quantpage.cli.app import run
for call in (
    ["formats", "--model", "someone/small"],
    ["formats", "--model", "someone/other"],
    ["generate", "--model", "someone/small", "--prompt", "Once", "--max-new-tokens", "2"],
):
    print("code", run(call), flush=True)
"""

LOAD = """
from quantpage.integrations.hf_transformers.loading.model import load_model
model, tokenizer = load_model("someone/small")
"""


@pytest.fixture
def hub(tmp_path):
    """(address, paths asked for) of a hub with one model, and a file that is no part of it."""
    folder, asked = save_small(tmp_path / "small"), []
    (folder / "training.bin").write_bytes(b"not wanted")
    files = {each.name: each.read_bytes() for each in folder.iterdir()}
    listed = [
        {"type": "file", "oid": sha256(data).hexdigest()[:40], "size": len(data), "path": name}
        for name, data in files.items()
    ]

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append((self.command, path))
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/someone/small/tree/"):
                self.answer(json.dumps(listed).encode())
            elif path.startswith("/api/models/someone/small"):
                about = {"id": "someone/small", "sha": COMMIT}
                about["siblings"] = [{"rfilename": each} for each in files]
                self.answer(json.dumps(about).encode())
            elif path.startswith("/someone/small/resolve/") and name in files:
                self.answer(files[name])
            else:
                missing = "EntryNotFound" if "/small/" in path else "RepoNotFound"
                self.answer(b"", 404, **{"X-Error-Code": missing})

        do_HEAD = do_GET

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            headers |= {"Content-Length": len(body), "X-Repo-Commit": COMMIT}
            headers["ETag"] = sha256(body).hexdigest()[:40]
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_and_no_more_than_it(hub, tmp_path):
    url, asked = hub
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    environment.pop("HF_HUB_CACHE", None)

    def run(program):
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment,
            cwd=tmp_path, timeout=300,
        )  # fmt: skip

    done = run(PROGRAM)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0", "code 2", "code 0"], done.stderr
    assert "no folder someone/other here, and the hub shows no model of this id" in done.stderr
    assert "Traceback" not in done.stderr
    fetched = [path.rpartition("/")[2] for kind, path in asked if kind == "GET"]
    # The configuration alone, until weights are wanted.
    assert fetched.index("config.json") < fetched.index("model.safetensors")
    assert fetched.count("model.safetensors") == fetched.count("config.json") == 1
    assert not any(path.endswith("training.bin") for _, path in asked)
    models = [path for _, path in asked if path.startswith("/api/models/someone/small")]
    assert models.count("/api/models/someone/small") == 1
    # Everything is of the commit that was the newest then.
    assert not any("/main" in path for _, path in asked if path.startswith("/someone/small"))
    asked.clear()
    done = run(LOAD)
    assert done.returncode == 0, done.stderr
    about = [each for each in asked if "someone" in each[1]]
    assert about == [("GET", "/api/models/someone/small")]


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_it_is_one_sentence(monkeypatch, offline, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    # Nobody listens there.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    with pytest.raises(Unavailable, match="no folder some-one/small here, and the hub cannot be a"):
        find_files("some-one/small")
    # A download would have tried again for half a minute.
    assert "Retrying" not in caplog.text


def test_what_is_here_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/absent", "absent", "a/b/c", "../a", "/a/b", "./a", tmp_path / "x"):
        assert not is_hub_id(path)
    assert is_hub_id("meta-llama/Llama-3.1-8B") and is_hub_id("Qwen/Qwen2.5-0.5B")
    with pytest.raises(FileNotFoundError, match="got models/absent, which does not exist"):
        find_files("models/absent")
