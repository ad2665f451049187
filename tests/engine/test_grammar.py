"""Which tokens may come next."""

import sys

import pytest
import torch
import transformers as tf

pytest.importorskip("llguidance")

from quantpage.engine.grammar import AnswerGrammar, GrammarTokenizer
from tests.server.small import save_small

pytestmark = pytest.mark.cpu


def test_what_cannot_follow_is_ruled_out_without_compiling_anything(tmp_path, monkeypatch):
    """torch.compile would take seconds in the engine's thread, and needs a C++ compiler."""

    def refused(*_, **__):
        raise RuntimeError("a C++ compiler is wanted")

    monkeypatch.setattr(torch, "compile", refused)
    monkeypatch.delitem(sys.modules, "llguidance.torch", raising=False)
    tokenizer = tf.AutoTokenizer.from_pretrained(save_small(tmp_path))
    # Wider than the tokens that have names, as models' logits are.
    table = GrammarTokenizer(tokenizer, 264)
    follower = AnswerGrammar("choice", ["yes", "no", "never"], table).follow()
    logits = torch.zeros(1, 264)
    for letter, wanted in (("n", "yn"), ("e", "oe"), ("v", "v")):
        left = follower.restrict(logits)[0].isfinite().nonzero().flatten().tolist()
        assert set(tokenizer.convert_ids_to_tokens(left)) == set(wanted)
        follower.take(tokenizer.convert_tokens_to_ids(letter))
    assert not logits.any() and not follower.done()
    for letter in "er":
        follower.take(tokenizer.convert_tokens_to_ids(letter))
    assert follower.done()
