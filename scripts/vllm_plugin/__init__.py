"""Our plugin inside vLLM, on a CPU or a GPU: whole answers (check), distributions (logits), speed.

Not called ``vllm``: where that is missing, scripts beside this folder would find it by the name.
"""
