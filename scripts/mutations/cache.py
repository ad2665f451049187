"""Pages and who holds them: layouts, what is copied, kept, given back, swapped."""

from .mutation import SRC, TORCH, Mutation

MUTATIONS = (
    Mutation(
        "exact bytes one page short",
        SRC + "cache/layout.py",
        "kept.kept_pages * self.exact_bytes_per_page()",
        "(kept.kept_pages - 1) * self.exact_bytes_per_page()",
        ("tests/cache/test_layout.py",),
    ),
    Mutation(
        "the page before a rollback's end given back",
        SRC + "cache/reach.py",
        "near = range(max(query // page_size - 1, seen.start), seen.stop)",
        "near = range(max(query // page_size, seen.start), seen.stop)",
        ("tests/cache/test_sequence.py",),
        TORCH,
    ),
    Mutation(
        "a window's last page given back",
        SRC + "cache/reach.py",
        "max(0, query - self.window + 1) if self.window else 0",
        "max(0, query - self.window + 17) if self.window else 0",
        ("tests/cache/test_sequence.py",),
        TORCH,
    ),
    Mutation(
        "a page of two written by one of them",
        SRC + "cache/sequence.py",
        "pool.references(pages[-1]) > 1",
        "pool.references(pages[-1]) > 2",
        ("tests/cache/test_sequence.py",),
        TORCH,
    ),
    Mutation(
        "a rejected draft counted",
        SRC + "cache/sequence.py",
        "self._cut(self.length + accepted)",
        "self._cut(self.length + self.reserved)",
        ("tests/cache/test_sequence.py",),
        TORCH,
    ),
    Mutation(
        "pages swapped in in order of their ids",
        SRC + "cache/paged.py",
        "plane[ids] = host.planes[name]",
        "plane[sorted(ids)] = host.planes[name]",
        ("tests/cache/test_saved.py",),
        TORCH,
    ),
    Mutation(
        "growing forgets the last page",
        SRC + "cache/paged.py",
        "new[:both] = old[:both]",
        "new[: both - 1] = old[: both - 1]",
        ("tests/cache/test_paged.py",),
    ),
    Mutation(
        "zeros not counted",
        SRC + "cache/layout.py",
        "planes = 2 if spec.zero_point else 1",
        "planes = 1",
        ("tests/cache/test_paged.py", "tests/cache/test_layout.py"),
    ),
    Mutation(
        "sums of latent rows in the basis of the rotary channels",
        SRC + "cache/views.py",
        "summed = self.key if self.latent else self.value",
        "summed = self.value",
        ("tests/ops/test_latent_rows.py",),
        TORCH,
    ),
    Mutation(
        "a pool on a CPU takes its memory at the start",
        SRC + "cache/memory.py",
        "np.zeros(size, np.uint8)",
        "np.full(size, 0, np.uint8)",
        ("tests/cache/test_memory.py",),
    ),
)
