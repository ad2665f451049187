"""The commands as a user runs them: on a small model made here, and with wrong flags."""

import signal
import subprocess
import sys

import pytest
import torch
import transformers as tf

from quantpage.cli.app import run
from tests.integrations.architectures import FOUR, LATENT
from tests.integrations.tiny_models import tiny

pytestmark = pytest.mark.cpu


def test_explain_takes_the_heads_of_a_model(quantpage, folder, tmp_path):
    said = quantpage("explain", "--device", "cpu", "--kv-format", "int8", "--model", folder).out
    assert "attend decode" in said
    odd = tiny("llama")
    odd.config.head_dim = 40
    odd.config.save_pretrained(tmp_path)
    said = quantpage("explain", "--device", "cpu", "--kv-format", "int8", "--model", tmp_path).out
    assert "head_dim that is a multiple of 16 up to 512, got 40" in said


def test_explain_shows_what_latent_attention_caches(quantpage, tmp_path):
    tf.DeepseekV2Config(**{**FOUR, **LATENT}).save_pretrained(tmp_path)
    said = quantpage("explain", "--device", "cpu", "--kv-format", "int8", "--model", tmp_path).out
    assert "4 query heads, latent rows of 32 and 16 rotary channels, page_size 64" in said
    assert "needs values of their own, got latent rows (MLA)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "no", "--prompt", "x"], "got no, which does not exist"),
        (
            ["generate", "--model", "x", "--prompt", "x", "--seed", str(1 << 64)],
            "seed: expected a number of 64 bits",
        ),
        (["compare", "a.json", "b.json"], "report: expected the .json that `quantpage report`"),
        (["capacity", "--memory", "1GB", "--context", str(1 << 31)], "'--context': Input should"),
        (["formats", "--layers", "1000000000"], "'--layers': Input should be less than"),
        (["generate", "--model", "nowhere"], "expected --prompt or --file"),
        (["generate", "--model", "x", "--prompt", " "], "expected some text"),
        (["generate", "--model", "x", "--prompt", "x", "--page-size", "0"], "page_size: expected"),
        (["generate", "--model", "x", "--prompt", "x", "--kv-format", "int9"], "expected one of"),
        (["generate", "--model", "x", "--file", "nowhere"], "file: expected a text file"),
        (["capacity", "--model", ".", "--memory", "1GiB"], "expected config.json or one .gguf"),
        (["formats", "--head-dim", "-4"], "Invalid value for '--head-dim'"),
        (["explain", "--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N"),
        (["explain", "--mask", "some"], "mask: expected causal, full, interval or asked"),
        (["formats", "--wrong-flag"], "No such option"),
        (["formats", "--hed-dim", "4"], "--head-dim"),
        (["formts"], "Did you mean 'formats'?"),
        (["bench", "swim"], "No such command 'swim'"),
        (["bench", "decode", "--plot", "x.png"], "out: expected the CSV to draw from"),
        (["bench", "cpu-model"], "Missing option '--model'"),
        (["bench", "cpu", "--cases", "42 x 1k"], "cases: expected names of 8 x 4k"),
        (["bench", "cpu-model", "--model", "x", "--out", "."], "out: expected a file to write"),
    ],
)
def test_wrong_arguments_are_one_sentence(quantpage, arguments, message):
    assert message in quantpage(*arguments, code=2).err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("op", ["decode", "write", "prefill", "masks", "gpu-model"])
def test_benches_of_a_gpu_say_that_there_is_none(quantpage, op):
    assert "expected one of 0 CUDA devices" in quantpage("bench", op, code=3).err


def test_help_version_and_no_command(quantpage):
    assert quantpage("--version").out.startswith("quantpage 0.")
    for arguments in ([], ["-h"], ["--help"]):
        said = quantpage(*arguments)
        assert "generate" in said.out and said.err == ""
    assert "--head-dim" in quantpage("formats", "-h").out


def test_verbose_says_where_an_error_came_from(capsys):
    assert run(["capacity", "--model", "nowhere", "--memory", "1GiB", "--verbose"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.strip().splitlines()[-1].startswith("quantpage: model:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_said(quantpage, folder):
    for command in (["explain"], ["generate", "--model", folder, "--prompt", "w5"]):
        said = quantpage(*command, "--device", "cuda", code=3).err
        assert "device: expected one of 0 CUDA devices, got cuda" in said


SLOW_TO_LOAD = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("importing", flush=True)
            try:
                time.sleep(60)
            except BaseException as error:
                raise ImportError("swallowed") from error
sys.meta_path.insert(0, Slow())
from quantpage.cli import main
main(["formats"])
"""


def test_help_and_wrong_flags_do_not_wait_for_torch():
    for call in (["--help"], ["bench", "cpu", "--help"], ["explain", "--nope"], ["--version"]):
        code = (
            "import sys\nfrom quantpage.cli import main\n"
            f"try: main({call})\n"
            "finally: print('torch' in sys.modules, 'numpy' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False False", call
        assert done.returncode == (2 if "--nope" in call else 0)


def test_an_interrupt_while_torch_is_imported_is_one_line():
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_LOAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout.readline() == b"importing\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert (child.returncode, said) == (130, b"quantpage: interrupted\n")


IGNORED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
class Looks:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(2, signal.getsignal(signal.SIGINT).name.encode())
            os._exit(1)
sys.meta_path.insert(0, Looks())
from quantpage.cli import main
main(["formats"])
"""


def test_an_interrupt_that_a_shell_ignores_stays_ignored_while_torch_is_imported():
    child = subprocess.run([sys.executable, "-c", IGNORED], capture_output=True, text=True)
    assert child.stderr == "SIG_IGN"


def test_an_interrupt_of_a_command_is_one_line(quantpage, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    def interrupted_in_a_class(name):
        type(
            "Made",
            (),
            {"field": type("Field", (), {"__set_name__": lambda *_: interrupted(name)})()},
        )

    for each in (interrupted, interrupted_in_a_class):
        monkeypatch.setattr("quantpage.cli.explain_tables.find_device", each)
        assert quantpage("explain", code=130).err == "quantpage: interrupted\n"


def test_a_reader_that_leaves_ends_the_command_quietly():
    call = f"{sys.executable} -m quantpage formats | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith(("141", "0")) and done.stderr == ""


def test_benches_are_listed_as_commands_are(quantpage):
    assert "cpu-model" in quantpage("bench").out


def test_a_broken_calibration_is_told_before_anything_is_loaded(quantpage, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    said = quantpage("evaluate", "--model", folder, "--calibration", empty, code=2).err
    assert f"{empty}: expected a whole safetensors file" in said
    assert "loading" not in said
    for elsewhere in ("nowhere", tmp_path):
        said = quantpage("evaluate", "--model", folder, "--calibration", elsewhere, code=2).err
        assert "calibration: expected 'auto', 'none' or a file" in said and "loading" not in said


@pytest.mark.parametrize(
    "command",
    [("generate", "--prompt", "a"), ("chat",), ("serve", "--port", "0")],
    ids=lambda command: command[0],
)
def test_a_calibration_that_is_none_is_told_before_a_model_is_read(quantpage, folder, command):
    command = (*command, "--model", folder)
    for elsewhere in ("nowhere", folder):
        said = quantpage(*command, "--calibration", elsewhere, code=2).err
        assert "calibration: expected 'auto', 'none' or a file" in said and "loading" not in said
    for given in (("--calibration", "none"), ("--calibration", folder), ()):
        said = quantpage(*command, *given, "--kv-format", "int8_static", code=2).err
        assert "calibration: expected a file with static scales" in said and "loading" not in said


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_the_model_may_be_the_first_word(quantpage, command):
    for given in (["nowhere"], ["--model", "nowhere"], ["--page-size", "16", "nowhere"]):
        assert "got nowhere, which does not exist" in quantpage(command, *given, code=2).err
    said = quantpage(command, "here", "--model", "there", code=2).err
    assert "model: expected one, got there and here" in said
    assert "model: expected --model, got none" in quantpage(command, code=2).err


@pytest.mark.parametrize("given", [["--model", "nowhere"], ["nowhere"]], ids=["flag", "word"])
def test_flags_behind_dashes_are_no_model(quantpage, given):
    said = quantpage("serve", *given, "--", "--seed", "3", code=2).err
    assert "flags after --: expected none" in said and said.strip().endswith("got --seed 3")


def test_a_commands_files_are_apart(quantpage, folder, words, tmp_path):
    asked = ["evaluate", "--model", folder, "--text", words, "--formats", "int8"]
    csv, content = tmp_path / "rows", words.read_text()
    for flags, other in (
        (["--csv", words], "text"),
        (["--markdown", words], "text"),
        (["--csv", csv, "--markdown", csv], "csv"),
    ):
        assert f"expected another file than {other}" in quantpage(*asked, *flags, code=2).err
    data = tmp_path / "a.json"
    data.write_text("{}")
    err = quantpage("compare", data, data, "--out", data, code=2).err
    assert "out: expected another file than a" in err
    err = quantpage("report", "--model", folder, "--out", data, code=2).err
    assert "out: expected a page, such as report.html, got " in err
    assert (words.read_text(), data.read_text()) == (content, "{}")


def test_a_report_says_that_it_takes_no_static_format(quantpage, folder, words, tmp_path):
    out = tmp_path / "made"
    asked = ["--model", folder, "--text", words]
    tokens = ["--tokens", 256, "--window", 128]
    quantpage("calibrate", *asked, *tokens, "--out", out, "--kv-format", "int4_static")
    asked += ["--out", tmp_path / "page.html", "--calibration", out, "--formats"]
    err = quantpage("report", *asked, "none,int4_static", code=2).err
    assert "formats: expected dynamic formats" in err and "loading" not in err
