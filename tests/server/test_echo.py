"""Log-probabilities of prompts, as lm-evaluation-harness and vLLM's clients ask for them."""

import pytest
import torch
import transformers as tf

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from quantpage.engine import TokenChoice  # noqa: E402
from quantpage.server.logprobs import TextLogprobs  # noqa: E402
from tests.server.small import TEMPLATE, answering  # noqa: E402

pytestmark = pytest.mark.cpu

TEXT = "Once upon a time, é"


@pytest.fixture(scope="module")
def client(folder):
    with (
        answering(folder, None, kv_format="none", max_requests=8, step_tokens=8) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=60) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def own(folder):
    """What the model gives each next token of a text, by Transformers alone."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)

    def told(prompt):
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        with torch.no_grad():
            return ids, model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return told


def complete(client, prompt=TEXT, **options):
    options = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1} | options
    return client.completions.create(model="small", prompt=prompt, **options)


def test_a_harness_reads_what_the_model_gives(client, own):
    """Prompts of tokens in one call, scored as lm-evaluation-harness scores them."""
    prompts = [own(each)[0] for each in (TEXT, TEXT + "again", "Twice " * 12)]
    got = complete(client, prompts, seed=1234)
    assert got.usage.prompt_tokens == sum(map(len, prompts)) and got.usage.completion_tokens == 3
    # The second time all of them are known, which changes nothing.
    assert complete(client, prompts, seed=1234).choices == got.choices
    for choice, ids in zip(got.choices, prompts, strict=True):
        _, told = own(ids)
        given, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert given[0] is None and tops[0] is None
        assert len(given) == len(tops) == len(choice.logprobs.tokens) == len(ids) + 1
        wanted = [float(row[token]) for row, token in zip(told, ids[1:], strict=False)]
        assert given[1:-1] == pytest.approx(wanted, abs=1e-4)
        assert given[-1] == pytest.approx(float(told[-1].max()), abs=1e-4)
        greedy = [max(top.values()) == own for own, top in zip(given[1:], tops[1:], strict=True)]
        likely = [int(row.argmax()) == token for row, token in zip(told, ids[1:], strict=False)]
        assert greedy == [*likely, True] and not all(likely)


def test_an_echo_begins_with_the_prompt(client, own):
    ids, _ = own(TEXT)
    alone = complete(client, max_tokens=6, echo=False, logprobs=2)
    for prompt in (TEXT, ids):
        got = complete(client, prompt, max_tokens=6, n=2, logprobs=2)
        for each in got.choices:
            assert each.text == TEXT + alone.choices[0].text
            names = each.logprobs.tokens
            assert names[: len(TEXT) - 1] == list(TEXT[:-1])
            assert names[len(TEXT) - 1 : len(ids)] == ["bytes:\\xc3", "bytes:\\xa9"]
            assert names[len(ids) :] == alone.choices[0].logprobs.tokens
            # The two bytes of a letter begin where it does.
            assert each.logprobs.text_offset[: len(ids)] == [*range(len(TEXT)), len(TEXT) - 1]
            assert each.logprobs.text_offset[len(ids)] == len(TEXT)
    # The prompt and nothing else, with log-probabilities or without.
    got = complete(client, max_tokens=0)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (TEXT, "length")
    assert len(got.choices[0].logprobs.tokens) == len(ids) and got.usage.completion_tokens == 0
    bare = complete(client, max_tokens=0, logprobs=None).choices[0]
    assert (bare.text, bare.logprobs) == (TEXT, None)
    assert complete(client, [ids[0]], max_tokens=0).choices[0].logprobs.token_logprobs == [None]


def test_a_streams_echo_comes_first(client):
    for options in ({"max_tokens": 6}, {"max_tokens": 0}, {"max_tokens": 6, "logprobs": None}):
        (whole,) = complete(client, **options).choices
        pieces = [each.choices[0] for each in complete(client, stream=True, **options)]
        assert "".join(each.text for each in pieces) == whole.text
        assert pieces[0].text.startswith(TEXT) and pieces[-1].finish_reason == "length"
        if whole.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [part for each in pieces for part in getattr(each.logprobs, name)]
                assert joined == getattr(whole.logprobs, name), name


def test_prompts_in_vllms_shape(client, own):
    ids, told = own(TEXT)
    asked = {"echo": False, "logprobs": None, "extra_body": {"prompt_logprobs": 2}}
    for choice in complete(client, n=2, **asked).choices:
        check(choice.prompt_logprobs, ids, told)
    messages = [{"role": "user", "content": "Hi"}]
    got = client.chat.completions.create(
        model="small", messages=messages, max_tokens=2, extra_body={"prompt_logprobs": 2}
    )
    check(got.prompt_logprobs, *own("user: Hi\nassistant: "))
    # One asked for more of the prompt than the other.
    mixed = complete(client, extra_body={"prompt_logprobs": 2}).choices[0]
    check(mixed.prompt_logprobs, ids, told)
    assert {len(each) for each in mixed.logprobs.top_logprobs[1:]} == {1, 2}


def check(got, ids, told):
    assert got[0] is None and len(got) == len(ids)
    for known, token, row in zip(got[1:], ids[1:], told, strict=False):
        assert next(iter(known)) == str(token)
        best = row.topk(2).indices.tolist()
        assert known.keys() == {str(each) for each in (token, *best)}
        for name, facts in known.items():
            number = row[int(name)]
            assert facts["logprob"] == pytest.approx(float(number), abs=1e-4)
            assert facts["rank"] == 1 + int((row > number).sum())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"echo": False, "max_tokens": 0}, "max_tokens: expected at least 1 without echo or"),
        ({"max_tokens": 0, "extra_body": {"min_tokens": 1}}, "min_tokens: expected 0 to 0, got 1"),
        ({"max_tokens": -1}, "max_tokens: expected at least 0, got -1"),
        ({"logprobs": 21}, "logprobs: expected at most 20, got 21"),
        ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs: expected at most 20, got 21"),
        ({"extra_body": {"prompt_logprobs": True}}, "prompt_logprobs: expected a whole number"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs: expected none"),
        ({"extra_body": {"echo": 1}}, "echo: expected true or false, got 1"),
        ({"prompt": [[5], []]}, "prompt: expected at least one token, got none"),
        ({"prompt": [5] * 512, "max_tokens": 1}, "max_tokens: expected at most 512 tokens"),
    ],
)
def test_what_cannot_be_is_refused(client, options, said):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert said in caught.value.message


def test_a_harness_is_told_how_to_write_prompts(client):
    got = client.get("/../tokenizer_info", cast_to=object)
    assert (got["eos_token"], got["bos_token"]) == ("<eos>", None)
    assert got["chat_template"] == TEMPLATE


def test_a_whole_context_is_scored(client):
    got = complete(client, [5] * 512, max_tokens=0)
    assert len(got.choices[0].logprobs.token_logprobs) == 512


class _Words:
    """A model's tokens, written as SentencePiece does; 0 ends an answer."""

    names = ("<eos>", " Once", " up", "on")

    def text_of(self, token):
        return self.names[token]

    named = text_of

    def bytes_of(self, token, text):
        return text.encode()

    def is_special(self, token):
        return token == 0


def test_places_of_what_is_written_otherwise_or_not_at_all():
    def places(keep_special, *pieces):
        made = TextLogprobs(_Words(), 0, keep_special)
        return [
            at
            for text, tokens in pieces
            for at in made.piece(text, [TokenChoice(each, -1.0) for each in tokens])["text_offset"]
        ]

    whole = (0, 1, 2, 3, 0)
    assert places(False, ("Once upon", whole)) == [0, 0, 4, 7, 9]
    assert places(True, ("<eos> Once upon<eos>", whole)) == [0, 5, 10, 13, 15]
    # A stop text that may begin there holds characters back.
    assert places(False, ("Once", (1, 2)), (" upon", (3, 0))) == [0, 4, 7, 9]
    made = TextLogprobs(_Words(), 0, False).piece("", [TokenChoice(3, -torch.inf)], 1)
    assert made["token_logprobs"] == [None, -9999.0]
    assert made["top_logprobs"] == [None, {"on": -9999.0}]
