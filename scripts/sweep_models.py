"""Every causal and image-text class of Transformers, tiny and random, attached and not.

    python scripts/sweep_models.py --out docs/models.csv            # all; about an hour on one core
    python scripts/sweep_models.py --only llama,gemma3 -v           # some, with what went wrong

A class is built from its configuration, shrunk by the names of its numbers. What it says unattached
with eager attention is compared with what it says attached: a prompt, chunks and single tokens
through a cache, a left-padded batch, beams and prompt lookup with format ``none``; and with int8,
where the control rounds keys and values as they go into Transformers' own cache. A class is a
forked process with a time limit. docs/models.md is written from the table by --table.
"""

import argparse
import csv
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402

import quantpage  # noqa: E402
from quantpage.errors import PartlyPaged, UnsupportedModel  # noqa: E402
from quantpage.formats import FORMATS, dequantize, quantize, rotate  # noqa: E402
from quantpage.integrations.hf_transformers.arguments import cache_as, caches_in  # noqa: E402

LISTS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
VERDICTS = ("kernels", "partly", "dense", "refused", "wrong", "silent", "late error", "not tried")
PROMPT, NEW, PAD = 40, 6, 7
SMALL = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "d_embed": 64,
    "embedding_size": 64, "word_embed_proj_dim": 64, "hidden_dim": 64, "vision_hidden_size": 64,
    "projection_dim": 64, "mm_hidden_size": 64, "vision_embed_dim": 64, "out_hidden_size": 64,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "n_head_kv": 2,
    "num_kv_heads": 2, "head_dim": 16, "attention_head_dim": 16, "rotary_dim": 8, "d_kv": 16,
    "global_head_dim": 16, "swa_head_dim": 16, "v_head_dim": 16,
    "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "n_inner": 96, "ffn_hidden_size": 96,
    "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96, "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "vocab_size": 128, "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512,
    "max_sequence_length": 512, "max_seq_len": 512, "seq_length": 512,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1,
    "topk_group": 1, "num_shared_experts": 1, "n_shared_experts": 1, "zero_expert_num": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "sliding_window": 24, "attention_chunk_size": 24, "attention_window_size": 24,
    "first_k_dense_replace": 1, "num_kv_shared_layers": 0,
    "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_state": 16, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16,
    "mamba_dt_rank": 8, "mamba_expand": 2, "num_heads_linear": 4, "lru_width": 64,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "vision_feature_layer": -1, "image_size": 32, "patch_size": 8,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "laurel_rank": 8,
    "depth": 2, "num_mem_blocks": 1, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
    "rope_head_dim": 8, "d_inner": 128, "window_size": 24, "block_size": 8, "dropout": 0.0,
}  # fmt: skip
"""What a number of a configuration becomes, by its name."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
OTHER_LAYERS = {"encoder_layers": 2, "depth": 2, "num_mem_blocks": 1}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen of one class."""

    kind: str
    model_type: str
    name: str
    verdict: str
    coverage: str = ""
    error: float = 0.0
    """Largest relative error of logits with format none, over all ways to run it."""
    int8_error: float = 0.0
    """The same with int8, whose control rounds as well: codes that flip."""
    skipped: str = ""
    """Ways that the class does not run unattached either."""
    why: str = ""


def small_arguments(config_class, given=None):
    """Arguments of a configuration class that make a tiny model."""
    found = config_class() if given is None else given
    numbers = {}
    held = {k: v for k, v in vars(found).items() if not k.startswith("_")}
    names = set(found.to_dict()) | set(held)
    for name in names & SMALL.keys():
        old = getattr(found, name, None)
        if isinstance(old, (int, float)) and not isinstance(old, bool):
            numbers[name] = SMALL[name]
    heads = next((n for n in ("num_attention_heads", "n_head", "num_heads") if n in names), None)
    for kv in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        if kv in numbers and heads and getattr(found, kv) == getattr(found, heads, None):
            numbers[kv] = 4
    layers = next((n for n in LAYERS if n in names), None)
    old = getattr(found, layers, None) if layers else None
    kinds = getattr(found, "layer_types", None)
    kinds = kinds or getattr(found, "layers_block_type", None)
    if isinstance(old, int):
        keep = list(range(min(4, old)))
        if isinstance(kinds, list) and len(kinds) == old:
            firsts = sorted({kind: at for at, kind in reversed(list(enumerate(kinds)))}.values())
            keep = sorted((firsts + [i for i in range(old) if i not in firsts])[: max(4, len(firsts))])
        numbers[layers] = len(keep)
        for name in names:
            value = getattr(found, name, None)
            if isinstance(value, (list, tuple)) and len(value) == old:
                numbers[name] = type(value)(value[i] for i in keep)
    for name, value in OTHER_LAYERS.items():
        if isinstance(getattr(found, name, None), int):
            numbers[name] = value
    numbers |= {name: at for at, name in enumerate(TOKENS) if name in names}
    for name in ("initializer_range", "init_std"):
        if name in names:
            numbers[name] = 0.2
    for name in names:
        value = getattr(found, name, None)
        if name.endswith(("image_token_id", "image_token_index", "video_token_id", "audio_token_id")):
            numbers[name] = 127
        elif "token_id" in name and isinstance(value, int) and name not in numbers and value > 127:
            numbers[name] = 126
        elif "dropout" in name and isinstance(value, float):
            numbers[name] = 0.0
    for name, sub in (getattr(config_class, "sub_configs", None) or {}).items():
        inner = getattr(found, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            shrunk = small_arguments(type(inner), inner)
            numbers[name] = {**_plain(inner), **shrunk}
            if hasattr(inner, "model_type"):
                numbers[name]["model_type"] = inner.model_type
    return numbers


def _plain(config):
    skipped = ("transformers_version", "architectures", "_name_or_path", "id2label", "label2id")
    return {k: v for k, v in config.to_dict().items() if k not in skipped}


def build(kind, model_type):
    """The class, its weights drawn wide enough that attention matters."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(**small_arguments(config_class))
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    name = LISTS[kind][model_type]
    name = name[0] if isinstance(name, (list, tuple)) else name
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    try:
        model = model_class._from_config(config, attn_implementation="eager")
    except ValueError:
        model = model_class(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, each in model.named_parameters():
            if each.ndim >= 2 and each.is_floating_point():
                each.copy_(torch.randn(each.shape, generator=generator) * 0.15)
            elif not parameter_name.endswith("norm.weight") and each.std() == 0 == each.mean():
                each.copy_(torch.randn(each.shape, generator=generator) * 0.1)
    return model.float().eval()


def tokens(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 120, (rows, length), generator=generator)


@torch.no_grad()
def stepwise(model, new_cache=None):
    """Logits of a prompt, a chunk and single tokens through one cache."""
    ids, found = tokens(2, PROMPT + 9, 3), []
    cache = None if new_cache is None else new_cache()
    ends = [PROMPT, PROMPT + 5, *range(PROMPT + 6, PROMPT + 10)]
    for start, end in zip([0, *ends], ends, strict=False):
        given = {} if cache is None else cache_as(model, cache)
        mask = torch.ones(2, end, dtype=torch.long)
        out = model(input_ids=ids[:, start:end], attention_mask=mask, use_cache=True, **given)
        cache = (caches_in(out) or [cache])[0]
        found.append(out.logits)
    return torch.cat(found, 1), cache


@torch.no_grad()
def generated(model, ids, mask, **arguments):
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, output_logits=True, return_dict_in_generate=True, **arguments,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def ways():
    """name -> run of a model; each returns (tokens, logits)."""
    ids, repeated = tokens(2, PROMPT, 5), tokens(1, 10, 6).repeat(1, 4)
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[0, :PAD] = 0
    pads = ids.masked_fill(padded == 0, 0)
    return {
        "batch": lambda model: generated(model, ids, ones),
        "left padding": lambda model: generated(model, pads, padded),
        "beams": lambda model: generated(model, ids, ones, num_beams=2),
        "prompt lookup": lambda model: generated(
            model, repeated, torch.ones_like(repeated), prompt_lookup_num_tokens=3
        ),
    }


def apart(got, wanted):
    """Relative error of logits, as far as both chose the same tokens."""
    (tokens_got, logits_got), (tokens_wanted, logits_wanted) = got, wanted
    if tokens_got is None:
        return float((logits_got - logits_wanted).norm() / logits_wanted.norm())
    same, prompt = 0, tokens_wanted.shape[1] - len(logits_wanted)
    steps = min(len(logits_got), len(logits_wanted))
    while same < steps:
        same += 1
        at = prompt + same - 1
        if at >= tokens_got.shape[1] or (tokens_got[:, at] != tokens_wanted[:, at]).any():
            break
    got, wanted = logits_got[:same], logits_wanted[:same]
    if got.shape != wanted.shape:
        return float("inf")
    fine = torch.isfinite(wanted)
    return float((got - wanted)[fine].norm() / wanted[fine].norm())


def rounding_cache():
    """Make Transformers' own cache round what it is given, in this process."""
    from transformers import cache_utils

    spec = FORMATS["int8"]

    def seen(x, each):
        turned = rotate(x.float()) if each.rotation == "hadamard" else x.float()
        found = dequantize(*quantize(turned, each), each, torch.float32)
        return (rotate(found) if each.rotation == "hadamard" else found).to(x.dtype)

    for name in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        kind = getattr(cache_utils, name)

        def update(self, key, value, *args, _own=kind.update, **kwargs):
            return _own(self, seen(key, spec.key), seen(value, spec.value), *args, **kwargs)

        kind.update = update


def attached(model, kv_format):
    return quantpage.attach(model, kv_format=kv_format, page_size=16, calibration=None)


def judge(kind, model_type):
    """A Row for one class."""
    base = {"kind": kind, "model_type": model_type, "name": str(LISTS[kind][model_type])}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(kind, model_type)
            base["name"] = type(model).__name__
            wanted = {"steps": (None, stepwise(model)[0])}
            if not torch.isfinite(wanted["steps"][1]).all():
                raise ValueError("its logits are not finite")
    except Exception as error:  # noqa: BLE001
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attached(model, "int8").detach()
        except UnsupportedModel as refusal:
            return Row(**base, verdict="refused", why=str(refusal))
        except Exception:  # noqa: BLE001
            pass
        return Row(**base, verdict="not tried", why=_said(error))
    skipped = []
    for name, run in ways().items():
        try:
            wanted[name] = run(model)
        except Exception:  # noqa: BLE001
            skipped.append(name)
    base["skipped"] = ", ".join(skipped)
    said = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                # Refusals come here, before anything runs.
                at = attached(model, "none")
            except UnsupportedModel as refusal:
                return Row(**base, verdict="refused", why=str(refusal))
            errors = {}
            with at:
                got = {"steps": (None, stepwise(model)[0])}
                errors["steps"] = apart(got["steps"], wanted["steps"])
                for name, run in ways().items():
                    if name in wanted:
                        step = name
                        errors[name] = apart(run(model), wanted[name])
            step = "int8"
            with attached(model, "int8") as at:
                quantized, cache = stepwise(model)
                coverage = at.coverage
        said = [each for each in caught if issubclass(each.category, PartlyPaged)]
    except Exception as error:  # noqa: BLE001
        place = locals().get("step", "steps")
        return Row(**base, verdict="late error", why=f"{place}: {_said(error)}")
    rounding_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        control = stepwise(model)[0]
    worst = max(errors, key=errors.get)
    base |= {"coverage": str(coverage), "error": errors[worst]}
    base["int8_error"] = apart((None, quantized), (None, control))
    if not errors[worst] < 2e-3:
        off = ", ".join(f"{name} {value:.0e}" for name, value in errors.items() if not value < 2e-3)
        return Row(**base, verdict="wrong", why=off)
    if not base["int8_error"] < 0.1:
        return Row(**base, verdict="wrong", why=f"int8 {base['int8_error']:.0e}")
    if not hasattr(cache, "used_bytes") or not cache.used_bytes():
        return Row(**base, verdict="silent", why="nothing in pages")
    if coverage.whole:
        return Row(**base, verdict="kernels")
    if not said:
        return Row(**base, verdict="silent", why=str(coverage))
    verdict = "partly" if coverage.paged else "dense"
    return Row(**base, verdict=verdict, why="; ".join(each for each, _ in coverage.dense))


def _said(error):
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = str(error).strip().splitlines()
    return f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno}): {said[0][:160] if said else ''}"


def in_a_process(kind, model_type, limit):
    """``judge`` in a fork, so that nothing that a class does stays."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        row = judge(kind, model_type)
        with os.fdopen(write, "w") as pipe:
            json.dump(asdict(row), pipe)
        os._exit(0)
    os.close(write)
    text, end = b"", time.monotonic() + limit
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(read, 1 << 16)
        if not piece:
            break
        text += piece
    os.close(read)
    os.waitpid(child, 0)
    name = str(LISTS[kind][model_type])
    if not text:
        return Row(kind, model_type, name, "not tried", why=f"no answer within {limit} s")
    return Row(**json.loads(text))


def read(path):
    """The rows of a table."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["error"], row["int8_error"] = float(row["error"]), float(row["int8_error"])
    return [Row(**row) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--out", type=Path, help="CSV to write; rows that it has are kept")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a class")
    parser.add_argument("-v", action="store_true", help="print every row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = arguments.only.split(",") if arguments.only else None
    done = []
    for kind, entries in LISTS.items():
        for model_type in entries:
            if wanted is not None and model_type not in wanted:
                continue
            if model_type not in transformers.CONFIG_MAPPING:
                continue
            row = in_a_process(kind, model_type, arguments.limit)
            done.append(row)
            if arguments.v or row.verdict in ("wrong", "silent", "late error"):
                print(f"{row.kind} {row.model_type}: {row.verdict} {row.error:.0e} "
                      f"{row.int8_error:.0e} [{row.coverage}] {row.why} | skipped: {row.skipped}",
                      flush=True)  # fmt: skip
            if arguments.out:
                with arguments.out.open("w", newline="") as file:
                    table = csv.DictWriter(file, [each.name for each in fields(Row)])
                    table.writeheader()
                    table.writerows(asdict(each) for each in done)
    for verdict in VERDICTS:
        counts = [sum(r.kind == k and r.verdict == verdict for r in done) for k in LISTS]
        print(verdict, *counts)
    return any(row.verdict in ("wrong", "silent", "late error") for row in done)


if __name__ == "__main__":
    sys.exit(main())
