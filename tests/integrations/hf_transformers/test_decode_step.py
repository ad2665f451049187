"""What docs/decode-step.md draws of a step is what happens, in its order."""

import re
import sys
from pathlib import Path

import pytest
import torch

import quantpage
from quantpage.ops import dispatch
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[3]


def drawn() -> list[tuple[str, str]]:
    """(file, function) of the drawing of a step, from the top down."""
    page = (ROOT / "docs/decode-step.md").read_text()
    picture = page.partition("## Each step, each layer")[2].partition("```text\n")[2]
    picture = picture.partition("```")[0].replace("hf/", "integrations/hf_transformers/")
    found = re.findall(r"─ (?:[A-Z]\w+\.)?(\w+) {2,}([\w/]+\.py)", picture)
    return [(file, name) for name, file in found if name != "hook"]


@torch.no_grad()
def test_a_step_goes_as_it_is_drawn():
    wanted, called = drawn(), []
    assert len(wanted) == 14
    names = {name for _, name in wanted}

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name in names and "quantpage" in code.co_filename:
            called.append((code.co_filename.rpartition("quantpage/")[2], code.co_name))

    model = tiny("llama", torch.float32)
    with quantpage.attach(model, "int8", page_size=16, implementation="torch") as attached:
        cache = attached.new_cache()
        dispatch._found.cache_clear()
        sys.setprofile(note)
        try:
            model(tokens(1, 3), past_key_values=cache)
        finally:
            sys.setprofile(None)
    # Plain torch writes here, where the page has the GPU's kernel.
    places = [("ops/rope_write/reference.py", name) if name == "rope_write" else (file, name)
              for file, name in wanted]  # fmt: skip
    at = [called.index(each) for each in places]
    assert at == sorted(at), [called[i] for i in sorted(at)]
