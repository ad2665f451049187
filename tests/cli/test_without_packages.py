"""Each command where Transformers, or what an extra brings, is not installed: it runs, or says in
one line what it needs, before anything takes long.
"""

import json
import subprocess
import sys
import textwrap

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.cpu

PROGRAM = textwrap.dedent(
    """
    import contextlib, importlib.abc, io, json, sys

    absent, calls = set(sys.argv[1].split(",")), json.loads(sys.argv[2])

    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] in absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    from quantpage.cli.app import run

    found = []
    for call in calls:
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = run(call)
        found.append([code, out.getvalue(), said.getvalue()])
    print(json.dumps(found))
    """
)


def answers(absent, calls):
    """(exit code, stdout, stderr) of each call where these packages are absent."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(absent), json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_without_transformers(model, tmp_path):
    text = tmp_path / "text"
    text.write_text("It is a truth universally acknowledged. " * 200)
    needing = [
        ["generate", "--model", model, "--prompt", "a"],
        ["chat", "--model", model],
        ["serve", "--model", model],
        ["evaluate", "--model", model, "--text", str(text)],
        ["calibrate", "--model", model, "--text", str(text), "--out", str(tmp_path / "keys")],
        ["capacity", "--model", model, "--memory", "1GiB"],
        ["formats", "--model", model],
        ["explain", "--model", model],
    ]
    for call, (code, out, said) in zip(needing, answers(["transformers"], needing), strict=True):
        assert (code, out) == (3, ""), (call, said)
        wanted = "this needs the package transformers: pip install 'quantpage[transformers]'"
        assert said.splitlines()[-1] == f"quantpage: {wanted}", call
    assert not (tmp_path / "keys").exists()


def test_what_needs_no_model_runs_without_it():
    calls = [
        ["formats"],
        ["capacity", "--layers", "2", "--kv-heads", "2", "--head-dim", "64", "--memory", "1GiB"],
        ["explain"],
        ["--help"],
        ["--version"],
    ]
    for call, (code, out, said) in zip(calls, answers(["transformers"], calls), strict=True):
        assert code == 0 and out, (call, said)


def test_without_what_the_server_needs(model):
    for package in ("fastapi", "llguidance"):
        ((code, out, said),) = answers([package], [["serve", model]])
        assert (code, out) == (3, "") and "loading" not in said, said
        assert said.splitlines()[-1] == (
            f"quantpage: this needs the package {package}: pip install 'quantpage[serve]'"
        )
