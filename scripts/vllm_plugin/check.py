"""Does vLLM with QuantPage's pages say what it should? One random model, one setting a call.

    check.py model FOLDER               a Llama in which attention decides, and prompts
    check.py expect FOLDER FORMAT PAGE  what quantpage.attach answers (none: Transformers)
    check.py run FOLDER KV_DTYPE ...    what vLLM answers, cold and over its prefix cache

``run`` takes LLM()'s settings as --set name=value .. (JSON, or a text). --expect FORMAT-PAGE:
tokens must be those of ``expect``. --agree FILE: they must be those of whichever run wrote FILE
first, which is what a chaotic format can promise (a rounding that differs once changes all that
follows).
Exit status 1 where they are not. scripts/vllm_plugin/check.sh runs all of it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

NEW = 24
_GEMMA = {"sliding_window": 64, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3Text",
        {**_GEMMA, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            "sliding_window": 64, "tie_word_embeddings": True, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16,
            "laurel_rank": 16, "intermediate_size": [512] * 4, "activation_sparsity_pattern": None,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gptoss": (
        "GptOss", {"sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
}  # fmt: skip
"""Transformers' classes, and what a model has beside the shape of all: windows, a softcap, sink
logits, layers of two kinds, layers that share pages."""
EAGLE = "eagle"
"""In a Llama's folder: a draft model's."""
KEYS = "keys.calibration"
"""In a model's folder: its key maps. (vLLM reads all .safetensors there as weights.)"""
TIE = 0.02
"""Logits. Where the best token led by less, another order of the same sums may choose the second,
and all that follows is another text: such a difference from ``expect`` is none."""


def make_model(folder: Path, given: argparse.Namespace) -> None:
    """A model of four layers; weights large enough for attention to matter."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {
        "hidden_size": 4 * given.head_dim, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": given.head_dim,
        "vocab_size": 512, "max_position_embeddings": 2048, "initializer_range": 0.12,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    name, own = FAMILIES[given.family]
    config = getattr(transformers, f"{name}Config")(**shape | own)
    config.architectures = [f"{name.removesuffix('Text')}ForCausalLM"]
    model = getattr(transformers, config.architectures[0])(config)
    if config.tie_word_embeddings:
        # Else the likeliest next token is the last one again, whatever attention says.
        model.get_input_embeddings().weight.data.mul_(0.05)
    model.to(getattr(torch, given.dtype)).eval()
    biased = [weight for name, weight in model.named_parameters() if name.endswith("k_proj.bias")]
    if biased:
        _bias_keys(model, biased, folder / KEYS)
    model.save_pretrained(folder)
    if given.family == "llama":
        _save_eagle(model, folder / EAGLE)
    long = [(7 * i * i + 3 * i + 11) % 500 + 3 for i in range(900)]
    prompts = [
        long[:300],
        list(range(5, 25)),
        long[:280],
        long[:700],
        [*long[:290], *range(40, 80)],
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def _save_eagle(model, folder: Path) -> None:
    """A draft model as EAGLE's: one layer over the next token's embedding and the model's state. It
    has the model's first layer, and is wrong as often as it may be."""
    import torch
    from safetensors.torch import save_file

    width, layer = model.config.hidden_size, "model.layers.0."
    weights = model.state_dict()
    drafts = {"embed_tokens.weight": weights["model.embed_tokens.weight"]}
    drafts["fc.weight"] = torch.cat([torch.eye(width), 0.05 * torch.randn(width, width)], 1)
    # Without its first norm, which EAGLE's layer has not.
    drafts |= {
        name.removeprefix("model."): each
        for name, each in weights.items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    folder.mkdir(exist_ok=True)
    save_file(
        {name: each.contiguous().clone() for name, each in drafts.items()},
        folder / "model.safetensors",
    )
    own = {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | own))


def _bias_keys(model, biases, file: Path) -> None:
    """Keys as Qwen2.5's, most of whose numbers are what all keys have in common; and their maps,
    which ``expect`` and ``start_vllm`` use then.
    """
    import torch

    from quantpage.formats import FORMATS
    from quantpage.integrations.hf_transformers.keys.calibration import calibrate

    for bias in biases:
        bias.data.normal_(std=2.0)
    noise = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 500, (1, 300), generator=noise) for _ in range(2)]
    calibrate(model, texts, [FORMATS["int4"]] * len(biases), {"text": "random"}).save(file)


def expect(folder: Path, given: argparse.Namespace) -> None:
    """Greedy answers of Transformers over our cache, or over its own."""
    from contextlib import nullcontext

    import torch
    from transformers import AutoModelForCausalLM

    import quantpage

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    attached = quantpage.attach(
        model, kv_format=given.format, page_size=given.page, calibration=calibration(folder)
    )
    prompts = json.loads((folder / "prompts.json").read_text())

    def answer(prompt: list[int]) -> dict[str, list]:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        said = [logits[0].float().log_softmax(0).topk(2) for logits in out.logits]
        return {
            "tokens": out.sequences[0, len(prompt) :].tolist(),
            "leads": [(best.values[0] - best.values[1]).item() for best in said],
            "logprobs": [best.values[0].item() for best in said],
        }

    with nullcontext() if given.format == "none" else attached:
        if device == "cuda" and given.format != "none":
            from quantpage.ops.triton.ahead import compile_ahead

            # A minute of compiling one after the other, else. What is answered then is noise.
            with compile_ahead() as count:
                if count is not None:
                    [answer(prompt) for prompt in prompts]
        rows = [answer(prompt) for prompt in prompts]
    # Whole when it is there: ``run`` may be waiting for it.
    file = _expected(folder, f"{given.format}-{given.page}")
    part = file.with_suffix(".part")
    part.write_text(json.dumps(rows))
    part.replace(file)


def _expected(folder: Path, name: str) -> Path:
    return folder / f"expect-{name}.json"


def _wait_for(file: Path, seconds: float) -> Path:
    """``file``, when whoever was started beside has written it."""
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{file}: expected from `expect` beside, not there yet")
        time.sleep(0.2)
    return file


def start_vllm(folder: Path, given: argparse.Namespace, **more: object):
    """LLM() over the model in ``folder``, with what ``add_settings`` asks for and ``more``."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    from vllm import LLM

    settings = {
        "enforce_eager": True, "max_model_len": 1024, "dtype": given.dtype,
        "skip_tokenizer_init": True, "disable_log_stats": False, "kv_cache_dtype": given.kv_dtype,
        **({"enable_sleep_mode": True} if given.sleep else {}), **dict(map(_setting, given.set)),
    }  # fmt: skip
    keys = given.calibration or calibration(folder)
    if keys in ("auto", "none"):
        keys = None
    told = {"quantpage": given.quantpage, "quantpage_calibration": keys}
    settings["additional_config"] = {name: each for name, each in told.items() if each}
    # Few of the kernels that a server may need are needed here.
    settings["additional_config"]["quantpage_warm_up"] = given.warm_up
    return LLM(str(folder), **settings, **more)


def run(folder: Path, given: argparse.Namespace) -> int:
    """Two rounds of all prompts; 0 where every answer is the wanted one."""
    llm = start_vllm(folder, given)
    from vllm import SamplingParams

    prompts = json.loads((folder / "prompts.json").read_text())
    params = SamplingParams(
        temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True, logprobs=0
    )
    asked = [{"prompt_token_ids": each} for each in prompts]
    rounds = [llm.generate(asked, params, use_tqdm=False)]
    if given.sleep:
        # Its memory goes, weights to the host's, and comes back elsewhere or empty.
        llm.sleep(level=1)
        llm.wake_up()
    rounds.append(llm.generate(asked, params, use_tqdm=False))
    answers = [[list(out.outputs[0].token_ids) for out in outs] for outs in rounds]
    cached = [[out.num_cached_tokens for out in outs] for outs in rounds]
    config = llm.llm_engine.vllm_config.cache_config
    preempted = sum(
        int(each.value) for each in llm.get_metrics() if each.name == "vllm:num_preemptions"
    )
    print(
        f"{given.kv_dtype} {given.quantpage or ''} {' '.join(given.set)}: "
        f"{config.num_gpu_blocks} blocks of {config.block_size}, {preempted} preemptions, "
        f"cached {cached[0]} then {cached[1]}"
    )
    wanted, leads, rows = None, [[given.tie] * NEW] * len(prompts), []
    if given.expect:
        rows = json.loads(_wait_for(_expected(folder, given.expect), given.wait).read_text())
        wanted, leads = [each["tokens"] for each in rows], [each["leads"] for each in rows]
    elif given.agree and given.agree.exists():
        wanted = json.loads(given.agree.read_text())
    elif given.agree:
        given.agree.write_text(json.dumps(answers[0]))
    wanted = wanted or answers[0]
    first = [[_shared(got, want) for got, want in zip(row, wanted, strict=True)] for row in answers]
    bad = sum(
        at < NEW and lead[at] >= given.tie
        for row in first
        for at, lead in zip(row, leads, strict=True)
    )
    far = [
        max(
            (abs(got - row["logprobs"][i]) for i, got in enumerate(_logprobs(out)[:same])),
            default=0,
        )
        for outs, sames in zip(rounds, first, strict=True)
        for out, row, same in zip(outs, rows, sames, strict=bool(rows))
    ]
    apart = f"; logprobs of the same tokens at most {max(far):.2g} apart" if far else ""
    print(f"  tokens as wanted {first[0]} and {first[1]} of {NEW}; {bad} wrong answers{apart}")
    parted = [
        f"{lead[at]:.2g}"
        for row in first
        for at, lead in zip(row, leads, strict=True)
        if rows and at < NEW
    ]
    if parted:
        print(f"  where they part the best token led by {', '.join(parted)} logits")
    sys.stdout.flush()
    return int(bad > 0 and not given.report)


def _logprobs(out) -> list[float]:
    """Of the tokens that a request was answered with."""
    completion = out.outputs[0]
    each = zip(completion.logprobs, completion.token_ids, strict=True)
    return [said[token].logprob for said, token in each]


def calibration(folder: Path) -> str:
    """The model's key maps, where it has some, else what ``attach`` makes of itself: none."""
    return str(folder / KEYS) if (folder / KEYS).exists() else "auto"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What ``start_vllm`` reads, but for --dtype."""
    parser.add_argument("kv_dtype")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="name=value")
    parser.add_argument("--quantpage", help="a format that this vLLM has no name for")
    parser.add_argument(
        "--calibration", help=f"key maps, or none (default: {KEYS} in FOLDER, if any)"
    )
    parser.add_argument("--sleep", action="store_true", help="between two rounds (GPU)")
    parser.add_argument("--warm-up", action="store_true", help="compile all kernels at the start")


def _setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _shared(got: list[int], wanted: list[int]) -> int:
    """Tokens before the first difference."""
    same = (i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    return next(same, len(wanted))


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("model", "expect", "run"):
        each = kinds.add_parser(kind)
        each.add_argument("folder", type=Path)
        each.add_argument("--dtype", default="float32")
        if kind == "model":
            each.add_argument("--head-dim", type=int, default=64)
            each.add_argument("--family", choices=FAMILIES, default="llama")
        if kind == "expect":
            each.add_argument("format")
            each.add_argument("page", type=int)
        if kind == "run":
            add_settings(each)
            each.add_argument("--expect", metavar="FORMAT-PAGE")
            each.add_argument("--agree", type=Path, metavar="FILE")
            each.add_argument(
                "--wait", type=float, default=0, help="seconds for --expect's file to be written"
            )
            each.add_argument(
                "--tie", type=float, default=TIE, help="logits (default: %(default)s)"
            )
            each.add_argument("--report", action="store_true", help="differences are no failure")
    given = parser.parse_args()
    made = {"model": make_model, "expect": expect, "run": run}[given.kind](given.folder, given)
    return made or 0


if __name__ == "__main__":
    sys.exit(main())
