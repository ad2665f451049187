"""Rounding or a defect? How far vLLM's log-probabilities are from a float32 reference's.

    logits.py attach FOLDER FORMAT PAGE [--by torch] [--noise 1e-3]   by quantpage.attach
    logits.py run FOLDER KV_DTYPE --name NAME [--set name=value ..]   by vLLM, cold and warm
    logits.py text MODEL KV_DTYPE TEXT --out FILE [--beside FILE]     of a text's own tokens
    logits.py compare FOLDER REFERENCE PEER NAME...                   of what they have written

Free answers of a model that turns a rounding into another text say little. Here every request is
answered with tokens that are chosen before (``FORCED``), in steps of a decode as always, and what
is compared is the whole distribution at each of them. ``--by torch`` computes attention in plain
torch in the model's own dtype: the reference. Kernels round products with codes to 16 bits, so that
``attach`` with them is some way off, and vLLM over the same kernels may be as far off, not further;
a wrong page, scale or row is off by whole logits.

The folder is one of check.py's. Exit status of ``compare`` 1 where a NAME is further from the
reference than PEER allows.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from check import add_settings, calibration, start_vllm

FORCED = 40
"""Tokens of each answer: two pages of 32 begin in some of them."""
MORE = 2.0
"""Times the peer's distance from the reference, in its middle and at its end, is another cause than
the same rounding in another order."""
FLOOR = 1e-3
"""Of a log-probability: nearer than this nobody asks."""


def forced(prompt: int) -> list[int]:
    """Tokens that the answer to a prompt consists of; not those that the model would choose."""
    return [(11 * i * i + 37 * prompt + 5 * i) % 480 + 10 for i in range(FORCED)]


def attach(folder: Path, given: argparse.Namespace) -> int:
    """What Transformers over our pages says."""
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor

    import quantpage

    class Forced(LogitsProcessor):
        def __init__(self, prompt: int, length: int) -> None:
            self.tokens, self.length = forced(prompt), length

        def __call__(self, input_ids, scores):
            only = torch.full_like(scores, -torch.inf)
            only[:, self.tokens[input_ids.shape[1] - self.length]] = 0
            return only

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, given.dtype))
    model.to(device)
    rows = []
    with ExitStack() as stack:
        if given.noise:
            _add_noise(model, given.noise, stack)
        if given.format != "none":
            stack.enter_context(
                quantpage.attach(
                    model,
                    given.format,
                    page_size=given.page,
                    implementation=given.by,
                    calibration=calibration(folder),
                )
            )
        for index, prompt in enumerate(json.loads((folder / "prompts.json").read_text())):
            ids = torch.tensor([prompt], device=device)
            out = model.generate(
                ids, max_new_tokens=FORCED, do_sample=False, eos_token_id=None, pad_token_id=0,
                attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
                output_logits=True, logits_processor=[Forced(index, len(prompt))],
            )  # fmt: skip
            rows.append(torch.stack([each[0].float().log_softmax(0) for each in out.logits]).cpu())
    name = given.name or f"{given.by or 'attach'}-{given.format}-{given.page}"
    np.save(folder / f"logits-{name}.npy", torch.stack(rows).numpy()[None])
    return 0


def _add_noise(model, size: float, stack: ExitStack) -> None:
    """What one relative error of attention's results costs: how much this model makes of it."""
    import torch

    noise = torch.Generator(model.device).manual_seed(0)

    def disturb(module, args):
        (x,) = args
        drawn = torch.randn(x.shape, generator=noise, device=x.device)
        return (x * (1 + size * drawn),)

    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            stack.callback(module.register_forward_pre_hook(disturb).remove)


class Vllm:
    """vLLM over a model, whose answers are chosen before."""

    def __init__(self, folder: Path, given: argparse.Namespace, logprobs: int) -> None:
        self._on_cpu, self._logprobs = _force_on_cpu(), logprobs
        how = {"enable_trace_replay": True}
        if self._on_cpu:
            how = {"logits_processors": [self._on_cpu]}
        self._llm = start_vllm(folder, given, max_logprobs=logprobs, **how)

    def said(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[dict]]:
        """Of each token of each answer: token -> what is said of it, the likeliest and itself."""
        from vllm import SamplingParams

        name = "extra_args" if self._on_cpu else "trace_decode_token_ids"
        params = [
            SamplingParams(
                temperature=0, max_tokens=len(answer), detokenize=False, ignore_eos=True,
                logprobs=self._logprobs, **{name: {"forced": answer} if self._on_cpu else answer},
            )
            for answer in answers
        ]  # fmt: skip
        asked = [{"prompt_token_ids": each} for each in prompts]
        outs = self._llm.generate(asked, params, use_tqdm=False)
        for out, answer in zip(outs, answers, strict=True):
            if list(out.outputs[0].token_ids) != answer:
                raise SystemExit(f"expected {answer}, got {out.outputs[0].token_ids}")
        return [out.outputs[0].logprobs for out in outs]


def run(folder: Path, given: argparse.Namespace) -> int:
    """What vLLM says, in two rounds: the second one hits the first one's prefixes."""
    prompts = json.loads((folder / "prompts.json").read_text())
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    llm = Vllm(folder, given, vocabulary)
    answers = [forced(index) for index in range(len(prompts))]
    rounds = np.full((2, len(prompts), FORCED, vocabulary), np.nan, dtype=np.float32)
    for each in rounds:
        for index, row in enumerate(llm.said(prompts, answers)):
            for place, said in enumerate(row):
                tokens = list(said)
                each[index, place, tokens] = [said[token].logprob for token in tokens]
    np.save(folder / f"logits-{given.name}.npy", rounds)
    return 0


def text(folder: Path, given: argparse.Namespace) -> int:
    """How likely vLLM finds pieces of a text, token by token behind a prompt of its own."""
    from transformers import AutoTokenizer

    words = given.text.read_text("utf-8")[: 64 * given.requests * (given.prompt + given.tokens)]
    tokens = AutoTokenizer.from_pretrained(folder)(words)["input_ids"]
    each, apart = given.prompt + given.tokens, len(tokens) // given.requests
    if apart < each:
        raise SystemExit(f"text: expected {given.requests * each} tokens, got {len(tokens)}")
    rows = [tokens[first * apart :][:each] for first in range(given.requests)]
    answers = [row[given.prompt :] for row in rows]
    said = Vllm(folder, given, 1).said([row[: given.prompt] for row in rows], answers)
    places = [
        (place, token)
        for row, answer in zip(said, answers, strict=True)
        for place, token in zip(row, answer, strict=True)
    ]
    nats = np.array([-place[token].logprob for place, token in places])
    first = np.array([max(place, key=lambda t: place[t].logprob) for place, _ in places])
    np.savez(given.out, nats=nats, first=first)
    beside = np.load(given.beside or given.out)
    print(
        f"{given.kv_dtype}: {nats.mean():.4f} nats a token of {len(nats)}, "
        f"{(nats - beside['nats']).mean():+.4f} beside {given.beside or given.out}, "
        f"{(first == beside['first']).mean():.4f} with the same likeliest token"
    )
    return 0


def _force_on_cpu() -> type | None:
    """vLLM's runner for CPUs has no replay: a processor of logits does it; None: for a GPU."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    import torch
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forced(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params):
            tokens = (params.extra_args or {}).get("forced")

            def only(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
                chosen = torch.full_like(logits, -torch.inf)
                chosen[tokens[len(output_ids)]] = 0
                return chosen

            return None if tokens is None else only

    return Forced


def compare(folder: Path, given: argparse.Namespace) -> int:
    """Distances from the reference, of each token's distribution in root mean square."""
    known = {
        name: np.load(folder / f"logits-{name}.npy")
        for name in (given.reference, given.peer, *given.names)
    }
    reference, peer = (known[name][0] for name in (given.reference, given.peer))
    failed, allowed = 0, _spread(_distance(peer, reference))
    best = reference.argmax(-1)
    print(f"distance from {given.reference}, median, 90 % and most of {best.size} tokens:")
    for name, rounds in known.items():
        if name == given.reference:
            continue
        for index, each in enumerate(rounds):
            far = _distance(each, reference)
            spread = _spread(far)
            beside = _spread(_distance(each, peer))
            wrong = bool((spread[:2] > np.maximum(MORE * allowed[:2], FLOOR)).any())
            wrong |= not np.isfinite(far).all()
            failed |= wrong and name in given.names
            when = (" cold", " warm")[index] if len(rounds) > 1 else ""
            print(
                f"  {name}{when}: {_words(spread)}; "
                f"{int((each.argmax(-1) != best).sum())} other tokens first; from {given.peer} "
                f"{_words(beside)}{'; FURTHER' if wrong else ''}"
            )
            if given.where:
                for prompt, row in enumerate(far):
                    print(f"    {prompt}: {' '.join(f'{value:.2g}' for value in row)}")
    sys.stdout.flush()
    return failed


def _distance(said: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[prompts, tokens]"""
    return np.sqrt(((said - wanted) ** 2).mean(-1))


def _spread(far: np.ndarray) -> np.ndarray:
    return np.quantile(far, [0.5, 0.9, 1.0])


def _words(spread: np.ndarray) -> str:
    return ", ".join(f"{each:.2g}" for each in spread)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    named = ("attach", "run", "text", "compare")
    by_attach, by_vllm, by_text, comparing = (kinds.add_parser(each) for each in named)
    for each in (by_attach, by_vllm, by_text, comparing):
        each.add_argument("folder", type=Path)
    for each in (by_attach, by_vllm, by_text):
        each.add_argument("--dtype", default="float32")
    by_attach.add_argument("format")
    by_attach.add_argument("page", type=int)
    by_attach.add_argument("--by", help="of attach's implementations (default: what serves)")
    by_attach.add_argument("--noise", type=float, default=0.0, help="relative, of attention")
    by_attach.add_argument("--name", help="of what is written (default: what was asked for)")
    add_settings(by_vllm)
    add_settings(by_text)
    by_vllm.add_argument("--name", required=True, help="of what is written")
    by_text.add_argument("text", type=Path)
    by_text.add_argument("--out", type=Path, required=True, help="an .npz file")
    by_text.add_argument("--beside", type=Path, help="what another run has written")
    for name, number in (("requests", 6), ("prompt", 512), ("tokens", 64)):
        by_text.add_argument(f"--{name}", type=int, default=number)
    comparing.add_argument("reference")
    comparing.add_argument("peer")
    comparing.add_argument("names", nargs="+")
    comparing.add_argument("--where", action="store_true", help="print every token's distance")
    given = parser.parse_args()
    do = {"attach": attach, "run": run, "text": text, "compare": compare}[given.kind]
    return int(do(given.folder, given))


if __name__ == "__main__":
    sys.exit(main())
