"""What the kernels reach on this machine: cases as data, rows as CSV, pictures from the CSV.

A module a bench of `quantpage bench`, and what they share:

    GPU     kernels (decode, latent, write), prefill and its peers, masks with mask_kinds and
            mask_flex, gpu_model
    CPU     cpu, cpu_model, bookkeeping; memory and contexts anywhere
    shared  cases      random pages, steps over them, and the truth that a kernel is held to first
            timing     how time is taken: graphs on a GPU, clocks on a CPU
            rows       a row on stdout and in the CSV as soon as it is measured
            base       the same bench of another commit beside this one's
            plots      pictures of rows
"""
