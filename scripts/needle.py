"""Whether a sentence far back is found through each cache format: depth by length.

python scripts/needle.py --model models/smollm2 --csv benchmarks/results/needle.csv

A sentence with a number of seven digits stands somewhere in Austen's novels (or --text); after the
last page the sentence begins once more, and the model has to say the number. Found: each digit's
token is the most likely one, with those before it given, which is what greedy decoding would write.
Everything, the prompt too, is read through the cache. Rows are written after every format.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantpage
from quantpage.bench.measure import RowPrinter, current_commit, write_table
from quantpage.evaluate.text import default_path, obtain, read
from quantpage.formats.per_layer import split_choices
from quantpage.hardware import device_info
from quantpage.integrations.hf_transformers.model import check_format, load_model

NAMES = ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Dakar", "Riga", "Lima")


def make_prompt(
    tokenizer: Any, text: str, length: int, depth: float, number: int
) -> tuple[list[int], list[int]]:
    """(prompt of ``length`` tokens, the tokens of its answer)."""
    noise = torch.Generator().manual_seed(number)
    place = NAMES[number % len(NAMES)]
    digits = str(int(torch.randint(10**6, 10**7, (), generator=noise)))
    begin = f"The secret number of {place} is"
    needle = tokenizer(f"\n\n{begin} {digits}.\n\n", add_special_tokens=False).input_ids
    answer = tokenizer(f"{begin} {digits}", add_special_tokens=False).input_ids
    question = tokenizer(f"\n\n{begin}", add_special_tokens=False).input_ids
    asked = tokenizer(begin, add_special_tokens=False).input_ids
    answer = answer[len(asked) :]
    room = length - len(needle) - len(question)
    # A piece of the text of its own for each prompt; eight characters a token are more than enough.
    start = text.find("\n\n", number * 8 * length % max(1, len(text) - 8 * length))
    hay = tokenizer(text[start : start + 8 * room], add_special_tokens=False).input_ids[:room]
    if len(hay) < room:
        raise SystemExit(f"--text: expected {room} tokens for a prompt, got {len(hay)}")
    at = int(depth * room)
    return hay[:at] + needle + hay[at:] + question, answer


@torch.inference_mode()
def is_found(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[bool, float]:
    """(every token the most likely one, log-probability of the answer)."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    wanted = torch.tensor(answer, device=model.device)
    said = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return bool((logits.argmax(-1) == wanted).all()), float(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--formats", default="none,int8,int4")
    parser.add_argument("--calibration", default="auto", help="as attach takes it")
    parser.add_argument("--lengths", default="2048,4096,8064", help="tokens of a prompt")
    parser.add_argument("--depths", default="0.1,0.3,0.5,0.7,0.9", help="of the needle in it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, required=True)
    given = parser.parse_args()
    names = split_choices(given.formats)
    for name in names:
        check_format(given.model, name)
    text = read(obtain(default_path()) if given.text is None else given.text)
    model, tokenizer = load_model(given.model, getattr(torch, given.dtype), given.device)
    lengths = [int(each) for each in given.lengths.split(",")]
    depths = [float(each) for each in given.depths.split(",")]
    show = RowPrinter(kv_format=16, length=-6, depth=-5, found=-5, log_probability=-15)
    rows: list[dict[str, object]] = []
    for name in names:
        with quantpage.attach(model, name, calibration=given.calibration) as attached:
            for at, length in enumerate(lengths):
                for number, depth in enumerate(depths):
                    prompt, answer = make_prompt(
                        tokenizer, text, length, depth, at * len(depths) + number
                    )
                    found, said = is_found(model, prompt, answer)
                    rows.append(
                        {
                            "kv_format": name,
                            "length": length,
                            "depth": depth,
                            "found": int(found),
                            "log_probability": f"{said:.4f}",
                            "calibration": attached.calibration,
                            "model": Path(given.model).name,
                            "dtype": given.dtype,
                            "device": device_info(given.device).name,
                            "torch": torch.__version__,
                            "transformers": transformers.__version__,
                            "commit": current_commit(),
                        }
                    )
                    show(rows[-1])
        write_table(rows, given.csv)


if __name__ == "__main__":
    main()
