"""Decode on an H100: one step as the planner lays it out, and what it is made of."""

from figuring.rows import MISSING, Rows, read, table

TREE = "3fa0a36"
"""The commit of what is shown."""
FORMATS = ("int8", "int4", "int4_near8", "k8v4")
SHAPES = ("1 x 4k", "1 x 32k", "8 x 8k", "16 x 8k", "64 x 4k", "128 x 1k", "16 x 32k")
UNLIKE = (
    "1 x 128k and 31 x 4k", "1 x 64k and 15 x 4k", "1 x 100k and 63 x 512", "64 of 512 to 128k",
)  # fmt: skip
PARTS = {
    "all of it": "planned",
    "without exact pages": "codes alone",
    "and without the join": "codes alone, not joined",
}


def _rows(variant: str) -> Rows:
    """One token a request."""
    rows = read("h100-decode.csv")
    return [row for row in rows if (row["tree"], row["variant"]) == (TREE, variant)]


def _drafts(variant: str) -> Rows:
    rows = read("h100-drafts.csv")
    return [row for row in rows if (row["commit"], row["implementation"]) == (TREE, variant)]


def _time(rows: Rows, case: str, name: str, new: str = "1") -> dict[str, str] | None:
    """The row of a step."""
    for row in rows:
        if (row["case"], row["format"], row["new"]) == (case, name, new):
            return row
    return None


def _cell(row: dict[str, str] | None, share: bool = True) -> str:
    """Microseconds, and the share of copy of all that is read."""
    if row is None:
        return MISSING
    said = f"{float(row['microseconds']):.1f}"
    return f"{said} ({float(row['of_copy']):.2f})" if share else said


def steps() -> str:
    """A column a shape."""
    rows = _rows("planned")
    lines = (
        [f"`{name}`", *(_cell(_time(rows, case, name), case != "1 x 4k") for case in SHAPES)]
        for name in FORMATS
    )
    return table(["us (share of copy)", *SHAPES], lines)


def unlike() -> str:
    """Requests of unlike lengths, all keys and a window of 4,096."""
    rows = _rows("planned")
    lines = []
    for title, said in (("", "all keys"), (", window 4k", "a window of 4,096 keys")):
        for name in FORMATS:
            cells = [_cell(_time(rows, case + title, name)) for case in UNLIKE]
            if set(cells) != {MISSING}:
                lines.append([f"{said}, `{name}`", *cells])
    return table(["us (share of copy)", *UNLIKE], lines)


def drafts() -> str:
    """Several tokens a request at 16 x 8k, and times one token."""
    rows = _rows("planned") + _drafts("planned")
    counts = ("1", "4", "8", "16")

    def cell(name: str, new: str) -> str:
        one, row = _time(rows, "16 x 8k", name), _time(rows, "16 x 8k", name, new)
        if row is None or one is None:
            return MISSING
        times = float(row["microseconds"]) / float(one["microseconds"])
        return _cell(row, share=False) + (f" ({times:.2f})" if new != "1" else "")

    head = ["16 x 8k, us (times one token)", *(f"{n} token{'s' * (n != '1')}" for n in counts)]
    names = [name for name in FORMATS if name != "int4_near8"]
    return table(head, ([f"`{name}`", *(cell(name, n) for n in counts)] for name in names))


def parts() -> str:
    """What a step of int4 is made of: a column a step."""
    steps = [(case, "1") for case in SHAPES[:1] + SHAPES[3:6] + UNLIKE[1:3]]
    steps += [("16 x 8k", "8"), ("16 x 8k", "16")]

    def cell(case: str, new: str, variant: str) -> str:
        rows = _rows(variant) if new == "1" else _drafts(variant)
        return _cell(_time(rows, case, "int4", new), share=False)

    def copied(case: str, new: str) -> str:
        row = _time(_rows("planned") + _drafts("planned"), case, "int4", new)
        if row is None:
            return MISSING
        return f"{float(row['microseconds']) * float(row['of_copy']):.1f}"

    head = ["`int4`, us", *(case + f", {new} tokens" * (new != "1") for case, new in steps)]
    lines = [[said, *(cell(*step, variant) for step in steps)] for said, variant in PARTS.items()]
    return table(head, [*lines, ["all bytes at copy's speed", *(copied(*s) for s in steps)]])
