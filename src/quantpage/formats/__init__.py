"""What a cached number means: codes, scales, zeros, rotation. Knows no cache and no kernel."""

from quantpage.formats.key_map import KeyMap
from quantpage.formats.quantize import Quantized, decode, dequantize, quantize, quantize_static
from quantpage.formats.rotate import hadamard_matrix, rotate, rotation_block
from quantpage.formats.scales import LayerScales, StaticScales
from quantpage.formats.spec import CODES, Code, ExactPages, Granularity, KVFormat, QuantSpec
from quantpage.formats.table import ALIASES, FORMATS, find_format, join

__all__ = [
    "ALIASES",
    "CODES",
    "FORMATS",
    "Code",
    "ExactPages",
    "Granularity",
    "KVFormat",
    "KeyMap",
    "LayerScales",
    "QuantSpec",
    "Quantized",
    "StaticScales",
    "decode",
    "dequantize",
    "find_format",
    "hadamard_matrix",
    "join",
    "quantize",
    "quantize_static",
    "rotate",
    "rotation_block",
]
