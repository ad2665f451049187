"""`quantpage serve` as a process: it says where it listens, and finishes its answers on SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from tests.server.small import save_small  # noqa: E402

pytestmark = pytest.mark.cpu


def start(folder, *flags):
    command = [sys.executable, "-m", "quantpage", "serve", "--model", str(folder)]
    command += ["--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    said = ""
    for line in process.stderr:
        said += line
        found = re.search(r"on (http://\S+) ", line)
        if found:
            return process, found.group(1), said
    process.communicate()
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


def test_answers_that_outlast_the_drain_say_so(tmp_path):
    flags = ("--memory", "16MiB", "--page-size", "16", "--drain", "0")
    process, url, _ = start(save_small(tmp_path), *flags)
    # Drawn by eight samplers, so that no machine is done before it is told to stop.
    body = {"prompt": "Once", "max_tokens": 480, "n": 8, "ignore_eos": True, "logprobs": 5}
    try:
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            stream = body | {"stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=stream, timeout=60) as got:
                lines = got.iter_lines()
                next(lines)
                both = re.compile(r"^vllm:num_requests_running\{.*\} 16\.0$", re.M)
                while not both.search(httpx.get(f"{url}/metrics", timeout=60).text):
                    assert not whole.done(), whole.result().text
                process.send_signal(signal.SIGTERM)
                events = [line for line in lines if line]
            refused = whole.result()
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert "the answer was ended before it was done" in error["message"]
        assert refused.status_code == 503 and "server is stopping" in refused.text
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_known_prompts_outlive_a_server_that_was_killed(tmp_path):
    folder, file = save_small(tmp_path / "model"), tmp_path / "known.pages"
    flags = ("--memory", "2MiB", "--page-size", "16", "--prefix-cache-file", str(file))
    body = {"prompt": "The same long beginning. " * 8, "max_tokens": 20, "temperature": 0}

    def answer(url):
        got = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        cached = got["usage"]["prompt_tokens_details"]["cached_tokens"]
        return got["choices"][0]["text"], cached

    process, url, _ = start(folder, *flags)
    try:
        text, cached = answer(url)
        assert cached == 0 and not file.exists()
        saved = httpx.post(f"{url}/prefix_cache/save", timeout=60).json()
        assert saved["pages"] >= 12
    finally:
        process.kill()
        process.communicate()
    process, url, said = start(folder, *flags)
    try:
        assert f"{saved['pages']} pages of known prompts" in said
        again, cached = answer(url)
        assert again == text and cached >= 192
        body["prompt"] = "Another beginning, as long as the first. " * 4
        other, _ = answer(url)
        # A clean end saves by itself.
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
    process, url, _ = start(folder, *flags)
    try:
        again, cached = answer(url)
        assert again == other and cached >= 144
    finally:
        process.kill()
        process.communicate()
    damaged = file.read_bytes()[:-1]
    file.write_bytes(damaged)
    with pytest.raises(AssertionError, match=r"known\.pages: expected a whole safetensors file"):
        start(folder, *flags)
    assert file.read_bytes() == damaged


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memory", "100"], "memory: expected"),
        (["--memory", "900TB"], "memory: expected at most the"),
        (["--context", "100000"], "context: expected at most the model's 512"),
        (["--max-requests", "0"], "--max-requests"),
        (["--kv-format", "int9"], "int9"),
        (["--no-prefix-cache", "--prefix-cache-file", "x"], "prefix_cache_file: expected a prefix"),
        (["--prefix-cache-file", "/"], "prefix_cache_file: expected a file to write"),
        (["--engine", "vllm"], "vLLM is not installed"),
        (["--", "--seed", "1"], "flags after --: expected none for the embedded engine"),
    ],
)
def test_wrong_flags_end_in_one_sentence(tmp_path, flags, said):
    process = subprocess.run(
        [sys.executable, "-m", "quantpage", "serve", "--model", str(save_small(tmp_path)), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == (3 if "--engine" in flags else 2)
    assert said in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
