"""Drawn cases against an oracle of its own: numpy in float64, written from docs/formats.md,
docs/layouts.md and docs/masks.md, importing none of the package's arithmetic.

    numbers    codes, scales, zeros: is what stands in a page a right rounding of what was written
    keys       what happens to a row between the projection and the page
    attention  softmax over what stands in the pages, and how far an implementation may be off
    shown      who may see whom, as plain predicates
    case       what is drawn of one case before it runs
    world      requests, their tokens and pages; what is done to them
    run        a case from its two integers, and its line
"""
