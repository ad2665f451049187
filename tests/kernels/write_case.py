"""The write kernel as ahead-of-time compile cases."""

import json

from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.rope_write.triton_products import layout_holds
from tests.kernels.aot import compile_kernel, resources
from tests.kernels.decode_case import write_arguments

FORMATS = {"none": (0, 1, False), "int8": (1, 128, False), "fp8": (2, 1, False)}
FORMATS["int4"] = (3, 128, True)
FORMATS["int4 mapped"] = (3, 128, True, 2)
FORMATS["int4 near int8"] = (3, 128, True, 0, 128, 1)
FORMATS |= {name: (CODE_KINDS[name], 128, True) for name in ("int6", "int3")}


def main() -> None:
    found = {}
    for name, given in FORMATS.items():
        kernel, arguments = write_arguments(*given)
        if name == "none":
            arguments |= {"K_SCALES": 0, "V_SCALES": 0}
        compiled = compile_kernel(kernel, arguments, 90, num_warps=1)
        takes = resources(compiled)
        found[name] = {
            "registers": takes.registers,
            "spills": takes.find("LDL|STL"),
            "products": takes.find("HMMA"),
            "shuffles": takes.find("SHFL"),
            "instructions": sum(takes.counts.values()),
            "layout": layout_holds(compiled.asm["ttgir"]),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
