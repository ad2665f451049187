"""The examples on the demo's model: what each claims. Those about masks are in test_mask_examples,
on a random model.
"""

import json
import re
import sys

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from quantpage import attach
from quantpage.integrations.hf_transformers.loading.model import load_model
from tests.examples.loading import ROOT, example

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def loaded():
    if not (ROOT / "models/smollm2/config.json").is_file():
        pytest.skip("models/smollm2 is missing: scripts/demo.sh fetches it")
    return load_model(ROOT / "models/smollm2", torch.float32)


@pytest.fixture(scope="module")
def ids(loaded):
    text = (ROOT / "docs/memory.md").read_text()
    return loaded[1](text, return_tensors="pt").input_ids[:, :260]


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_a_kept_cache_answers_as_a_new_one(loaded, kv_format):
    model, tokenizer = loaded
    chat = example("chat_with_a_kept_cache")
    with attach(model, kv_format) as attached:
        talk = chat.Conversation(attached, tokenizer)
        _, kept, _ = talk.ask("My name is Ada. What is a cache?", 6)
        assert kept == 0
        before = list(talk.messages)
        answer, kept, new = talk.ask("What is my name?", 6)
        assert kept > 30 and 0 < new < 30
        again = chat.Conversation(attached, tokenizer, before)
        assert again.ask("What is my name?", 6)[:2] == (answer, 0)


def test_what_two_conversations_share():
    shared = example("chat_with_a_kept_cache").shared_length
    assert shared([1, 2, 3], [1, 2, 4]) == 2
    assert shared([1, 2], [1, 2, 4]) == shared([1, 2, 4], [1, 2]) == 2
    assert shared([], [1]) == 0


def test_a_learnt_prompt_changes_no_answer(loaded):
    model, tokenizer = loaded
    reuse = example("prefix_reuse")
    system = tokenizer(reuse.SYSTEM, return_tensors="pt").input_ids[:, :150]
    questions = [tokenizer(each, return_tensors="pt").input_ids for each in reuse.QUESTIONS[:2]]
    with attach(model, "int8") as attached:
        plain, known = (
            list(reuse.answers(attached, system, questions, 3, learnt)) for learnt in (False, True)
        )
    assert [held for _, held in plain] == [0, 0]
    assert [held for _, held in known] == [128, 128]
    for (mine, _), (theirs, _) in zip(known, plain, strict=True):
        assert mine.tolist() == theirs.tolist()


def test_the_costliest_layers_keep_their_bits(loaded):
    model, tokenizer = loaded
    # So long that int4's exact pages are a part of it.
    text = (ROOT / "docs/memory.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :700]
    by_layer = example("format_by_layer")
    exact = by_layer.predictions(model, ids, "none")
    loss = [
        by_layer.divergence(exact, by_layer.predictions(model, ids, each))
        for each in ("int8", "int4,layers=0-19:int8", "int4")
    ]
    assert 1e-6 < loss[0] < loss[1] < loss[2]


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_a_line_names_the_costliest_layers():
    by_layer = example("format_by_layer")
    assert by_layer.choose([3.0, 1.0, 4.0, 2.0], "int4", "int8", 2) == "int4,layers=0,2:int8"
    assert by_layer.choose([3.0, 1.0], "int4", "int8", 0) == "int4"
    model = small_model()
    with torch.no_grad():
        # What this layer says is not heard, so that its bits cost nothing.
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = by_layer.costs(model, torch.randint(64, (1, 300)), "int4", "none")
    assert abs(found[1]) < 1e-6 < min(found[0], found[2])


def test_a_custom_format_runs_and_costs_something(loaded, ids):
    model, _ = loaded
    custom = example("custom_format")
    assert custom.loss(model, ids, "int8") < custom.loss(model, ids, custom.made()) < 0.05


def test_calibrated_keys_cost_less(loaded, ids, tmp_path):
    model, tokenizer = loaded
    calibrated = example("calibrated_keys")
    text = tokenizer((ROOT / "docs/masks.md").read_text(), return_tensors="pt").input_ids
    keys = calibrated.measure(model, text[:, :512].split(256, 1), "int4", tmp_path / "keys")
    plain, mapped = (calibrated.loss(model, ids, "int4", each) for each in (None, keys))
    assert 0 < mapped < 0.6 * plain


def test_the_harness_scores_what_is_cached(loaded, tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install lm-eval")
    from lm_eval.tasks import TaskManager

    documents = [
        {"text": "The capital of France is", "target": "Paris"},
        {"text": "Two plus two is", "target": "four"},
    ]
    lines = "\n".join(map(json.dumps, documents))
    (tmp_path / "documents.json").write_text(lines)
    (tmp_path / "mini.yaml").write_text(
        f"""
task: mini
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/documents.json}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{target}}}}"
metric_list: [{{metric: perplexity}}]
"""
    )
    manager = TaskManager(include_path=str(tmp_path))
    harness = example("lm_eval_harness")
    found = [
        harness.scores(*loaded, ["mini"], each, task_manager=manager)["mini"]["perplexity,none"]
        for each in ("none", "int8", "int8")
    ]
    assert found[0] != found[1] == found[2]
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_the_harness_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sys.argv", ["lm_eval_harness.py", "models/smollm2"])
    assert example("lm_eval_harness").main() == 3
    assert capsys.readouterr().err == "lm_eval_harness: needs lm-eval: pip install lm-eval\n"


@pytest.mark.skipif(
    not transformers.__version__.startswith("5.17."), reason="the example is of Transformers 5.17"
)
@pytest.mark.parametrize("kv_format", ["none", "int8", "int6"])
def test_transformers_batching_answers_as_attach(kv_format):
    model = small_model()
    known = torch.randint(1, 64, (150,)).tolist()
    # One that runs in chunks, one that stands alone, two whose first two pages are one.
    prompts = [torch.randint(1, 64, (length,)).tolist() for length in (300, 5)]
    prompts += [[*known, 7], [*known, 9, 11]]
    made = example("transformers_batching").answers(model, prompts, kv_format, 8)
    with attach(model, kv_format):
        for ids, tokens in zip(prompts, made, strict=True):
            given = torch.tensor([ids])
            out = model.generate(given, max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert out[0, len(ids) :].tolist() == tokens


def test_transformers_batching_refuses_what_it_was_not_made_for():
    batching = example("transformers_batching")
    batching.TESTED = transformers.__version__
    with pytest.raises(ValueError, match="format without exact pages, got 'int4'"):
        batching.answers(small_model(), [[1, 2]], "int4", 2)
    batching.TESTED = "4.0."
    with pytest.raises(RuntimeError, match=r"expected transformers 4\.0\.x, .*, got 5"):
        batching.answers(small_model(), [[1, 2]], "int8", 2)


def test_every_example_is_listed_and_says_how_it_is_run():
    names = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    listed = re.findall(
        r"^\| \[([\w.]+)\]\(\1\) \|", (ROOT / "examples/README.md").read_text(), re.M
    )
    assert sorted(listed) == names
    for name in names:
        assert f"python examples/{name} " in (ROOT / "examples" / name).read_text()
        assert callable(example(name.removesuffix(".py")).main)
