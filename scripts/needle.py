"""Whether a sentence far back is found through each cache format: depth by length.

python scripts/needle.py --model models/smollm2 --csv benchmarks/results/needle.csv

The needles of `quantpage report` (evaluate/needle), through more formats and at greater lengths
than a report asks for. Everything, the prompt too, is read through the cache. Rows are written as
they come, and what the file has already is not asked again: a run that was ended goes on.
"""

import argparse
from pathlib import Path

import transformers

import quantpage
from quantpage.bench.rows import Rows, environment
from quantpage.cli.generation import check_positions
from quantpage.errors import QuantPageError
from quantpage.evaluate.needle import judge, make_needles
from quantpage.evaluate.run import DTYPES
from quantpage.evaluate.score import log_probabilities
from quantpage.evaluate.text import default_path, obtain, read
from quantpage.files import check_writable
from quantpage.formats.per_layer import split_choices
from quantpage.integrations.hf_transformers.loading.model import check_format, load_model


def lengths(text: str) -> list[int]:
    """'4096,8064' -> [4096, 8064]."""
    return [int(each) for each in text.split(",")]


def depths(text: str) -> list[float]:
    """'0.1,0.9' -> [0.1, 0.9]; ValueError for one outside of 0 to 1."""
    found = [float(each) for each in text.split(",")]
    if not all(0 <= each <= 1 for each in found):
        raise ValueError
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--formats", default="none,int8,int4")
    parser.add_argument("--calibration", default="auto", help="auto, none or a file")
    parser.add_argument(
        "--lengths", type=lengths, default="2048,4096,8064", help="tokens, the answer included"
    )
    parser.add_argument(
        "--depths", type=depths, default="0.1,0.3,0.5,0.7,0.9", help="of the needle in it, 0 to 1"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, required=True)
    given = parser.parse_args()
    try:
        ask(given)
    except (QuantPageError, ValueError, OSError) as error:
        parser.error(str(error))


def ask(given: argparse.Namespace) -> None:
    """Every cell that the file does not have yet."""
    check_writable(given.csv, "csv", {"text": given.text})
    names = split_choices(given.formats)
    for name in names:
        check_format(given.model, name)
    text = read(obtain(default_path()) if given.text is None else given.text)
    model, tokenizer = load_model(given.model, given.dtype, given.device)
    check_positions(model.config, max(given.lengths), 0)
    needles = list(make_needles(tokenizer, text, given.lengths, given.depths))
    calibration = None if given.calibration == "none" else given.calibration
    about = {"model": Path(given.model).name, "dtype": given.dtype}
    about |= {"transformers": transformers.__version__} | environment(given.device)
    rows = Rows(
        given.csv, about, ("model", "dtype", "kv_format", "length", "depth", "calibration"),
        kv_format=16, length=-6, depth=-5, found=-5, probability=-11,
    )  # fmt: skip
    for name in names:
        with quantpage.attach(model, name, calibration=calibration) as attached:
            for each in needles:
                cell = {"kv_format": name, "length": each.length, "depth": each.depth}
                source = {"calibration": attached.calibration}
                if rows.there(cell | source):
                    continue
                said = log_probabilities(model, each.window, attached.new_cache, chunk=1)
                answered = judge(each.window, said)
                found = {
                    "found": int(answered.right),
                    "probability": f"{answered.probability:.3g}",
                }
                rows.add(cell | found | source)


if __name__ == "__main__":
    main()
