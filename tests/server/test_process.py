"""`quantpage serve` as a process: it says where it listens, and finishes its answers on SIGTERM."""

import os
import re
import signal
import subprocess
import sys

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from tests.server.small import save_small  # noqa: E402

pytestmark = pytest.mark.cpu


def start(folder, *flags):
    command = [sys.executable, "-m", "quantpage", "serve", str(folder), "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    said = ""
    for line in process.stderr:
        said += line
        found = re.search(r"on (http://\S+) ", line)
        if found:
            return process, found.group(1), said
    process.wait()
    raise AssertionError(said)


def test_answers_under_way_are_finished_on_sigterm(tmp_path):
    process, url, said = start(save_small(tmp_path), "--memory", "2MiB", "--page-size", "16")
    try:
        assert "int8" in said
        body = {"prompt": "Once", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body | usage, timeout=60) as got:
            lines = got.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert '"completion_tokens": 300' in events[-2]
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memory", "100"], "memory: expected"),
        (["--context", "100000"], "context: expected at most the model's 512"),
        (["--max-requests", "0"], "--max-requests"),
        (["--kv-format", "int9"], "int9"),
    ],
)
def test_wrong_flags_end_in_one_sentence(tmp_path, flags, said):
    process = subprocess.run(
        [sys.executable, "-m", "quantpage", "serve", str(save_small(tmp_path)), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert said in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
