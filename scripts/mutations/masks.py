"""Who may see whom: windows, intervals, rows that nobody described."""

from .mutation import SRC, TORCH, Mutation

MUTATIONS = (
    Mutation(
        "a window's range one key short",
        SRC + "masks/base.py",
        "first_query - self.window + 1)",
        "first_query - self.window + 2)",
        ("tests/masks/test_base.py",),
        TORCH,
    ),
    Mutation(
        "a window one key long",
        SRC + "masks/base.py",
        "(k > q - self.window)",
        "(k >= q - self.window)",
        ("tests/masks/test_base.py",),
        TORCH,
    ),
    Mutation(
        "rows past the described ones see what came later",
        SRC + "masks/rows.py",
        "clipped = found[:, :ranges].clamp(max=end)",
        "clipped = found[:, :ranges]",
        ("tests/masks/test_intervals.py",),
    ),
    Mutation(
        "two intervals that hide a key are gone through in one order",
        SRC + "masks/columns.py",
        "for start, end in ((0, 1), (2, 3), (0, 1)):",
        "for start, end in ((0, 1), (2, 3)):",
        ("tests/masks/test_intervals.py",),
    ),
    Mutation(
        "a key that a mask does not describe is not seen by itself",
        SRC + "masks/columns.py",
        'ute = torch.where(past, causal, named.get("UTE", causal))',
        'ute = torch.where(past, causal + 1, named.get("UTE", causal))',
        ("tests/masks/test_intervals.py", "tests/masks/test_kinds.py"),
        TORCH,
    ),
)
