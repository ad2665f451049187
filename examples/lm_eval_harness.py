"""Tasks of EleutherAI's lm-evaluation-harness through a quantized cache: pip install lm-eval.

    python examples/lm_eval_harness.py models/smollm2 --tasks lambada_openai --limit 100

The harness runs the model that it is given, so that attaching it is all there is to do: prompts
are scored, and answers generated, over the cache that ``attach`` supplies.
"""

import argparse
import sys

import quantpage


def scores(model, tokenizer, tasks, kv_format: str, **options) -> dict[str, dict]:
    """The harness's results of each task, the cache in ``kv_format``.

    options: of lm_eval.simple_evaluate, such as limit or task_manager.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with quantpage.attach(model, kv_format):
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        return lm_eval.simple_evaluate(judged, tasks=tasks, bootstrap_iters=0, **options)["results"]


def main() -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--tasks", default="lambada_openai", help="names, separated by commas")
    flags.add_argument("--formats", default="none,int8,int4")
    flags.add_argument("--limit", type=int, help="documents a task")
    flags.add_argument("--include-path", help="a folder with tasks of your own")
    given = flags.parse_args()
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        print("lm_eval_harness: needs lm-eval: pip install lm-eval", file=sys.stderr)
        return 3
    manager = TaskManager(include_path=given.include_path)
    model, tokenizer = quantpage.load_model(given.model)
    for kv_format in given.formats.split(","):
        found = scores(
            model,
            tokenizer,
            given.tasks.split(","),
            kv_format,
            limit=given.limit,
            task_manager=manager,
        )
        for task, numbers in found.items():
            told = {name: value for name, value in numbers.items() if isinstance(value, float)}
            print(kv_format, task, *(f"{name} {value:.4f}" for name, value in told.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
